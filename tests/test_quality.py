"""Mutation, fuzzing and versions: what is counted, what is listed as equivalent, and what the committed records say."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from reproduce.report import checks
from reproduce.store import records
from reproduce.train.options import Options
from reproduce.trust import fuzz, mutation, versions

CHANGED = {"m1": "cache.f: a + b -> a - b", "m2": "cache.f: a -> b", "m3": "cache.f: a -> b"}
OUTCOMES = dict(m0="killed", m1="survived", m2="survived", m3="untested", m4="mypy", m5="timeout", m6="mypy")


def test_mutants_are_counted_by_their_ends():
    metrics = mutation.count(OUTCOMES, {}, CHANGED, {"cache.f: a -> b": "b is a"})
    assert [metrics[n] for n in ("mutants", "killed", "mypy", "timeouts", "equivalent", "survived")] == [7, 1, 2, 1, 2, 1]
    assert metrics["survivors"] == ["cache.f: a + b -> a - b"] and metrics["equivalents"] == {"cache.f: a -> b": "b is a"}
    assert mutation.count(OUTCOMES, {}, CHANGED, {})["survived"] == 3  # control: nothing is equivalent unless listed


def test_what_types_reject_and_what_tests_notice_are_told_apart():
    said = CHANGED | {"m4": "cache.f: b -> None"}
    metrics = mutation.count(OUTCOMES, {"m4": "survived", "m6": "killed"}, said, {})
    assert metrics["lot"] == {"seed": 0, "drawn": 2, "noticed": 1, "unnoticed": ["cache.f: b -> None"]}
    assert metrics["survived"] == 3  # types did notice
    assert "Tests met 5: 1 killed" in mutation.summary(metrics)
    assert "Types alone rejected 2; of 2 of these, drawn by lot, tests noticed 1" in mutation.summary(metrics)


def test_one_in_ten_of_what_types_reject_is_drawn_by_lot():
    from reproduce.trust.collected_once import lot

    rejected = [f"a.m{n}" for n in range(41)]
    drawn = lot([*rejected, "b.m"], mutation.LOT, mutation.SEED)
    assert len(set(drawn)) == 6 and drawn[-1] == "b.m" and set(drawn[:5]) <= set(rejected)  # of each module at least one
    assert lot(["b.m", *reversed(rejected)], mutation.LOT, mutation.SEED) == drawn and drawn[:5] != sorted(rejected)[:5]
    assert lot([], mutation.LOT, mutation.SEED) == []


def test_tests_that_killed_come_first_then_the_quickest():
    from collections import Counter

    from reproduce.trust.collected_once import in_order

    seconds = {"slow": 2.0, "quick": 0.1, "killer": 3.0}
    assert in_order(seconds, Counter(killer=2, slow=1), seconds) == ["killer", "slow", "quick"]
    assert in_order(seconds, Counter(), seconds) == ["quick", "slow", "killer"]


def test_every_equivalent_mutant_has_a_reason_and_is_listed_once():
    entries = tomllib.loads(mutation.EQUIVALENT.read_text(encoding="utf-8"))["equivalent"]
    listed = [mutant for entry in entries for mutant in entry["mutants"]]
    assert len(listed) == len(set(listed)) == len(mutation.equivalent())
    modules = tuple(f"{module.replace('/', '.')}." for module in mutation.TESTS)
    assert all(entry["reason"] and mutant.startswith(modules) for entry in entries for mutant in entry["mutants"])


def test_modules_get_a_fresh_copy_with_their_own_tests(tmp_path):
    modules = ("gqa", "compression/spectra", "reproduce/train/muon")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "old").touch()
    folder = mutation.prepare(tmp_path / "copy", modules)
    settings = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    assert settings["only_mutate"] == ["tucker_ref/gqa.py", "tucker_ref/compression/spectra.py", "reproduce/train/muon.py"]
    assert not (folder / "old").exists() and all((folder / path).exists() for path in settings["only_mutate"])
    selected = settings["pytest_add_cli_args_test_selection"]
    assert all((folder / name.split("::")[0]).exists() for name in selected) and len(selected) == len(set(selected))
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    belonging = asked["tests_of"]
    assert belonging["reproduce.train.muon"] == ["tests/test_muon.py"] and set(belonging["tucker_ref.gqa"]) < set(selected)
    assert "mypy" in settings["type_check_command"] and (asked["share"], asked["seed"]) == (mutation.LOT, mutation.SEED)


@pytest.mark.parametrize("module", mutation.TESTS)
def test_the_tests_of_a_module_exist(module):
    assert (mutation.ROOT / mutation.path_of(module)).exists()
    for name in mutation.TESTS[module]:
        file, _, function = name.partition("::")
        assert f"def {function}" in (mutation.ROOT / "tests" / file).read_text(encoding="utf-8")


def decorated(source):
    """The functions that mutmut would leave out."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [
        f.name for f in functions if [ast.unparse(d) for d in f.decorator_list] not in ([], ["staticmethod"], ["classmethod"])
    ]


def test_no_function_is_left_out_for_its_decorators():
    sources = [(mutation.ROOT / mutation.path_of(module)).read_text(encoding="utf-8") for module in mutation.TESTS]
    assert not any(decorated(mutation.undecorated(source)) for source in sources)
    assert "forward" in [name for source in sources for name in decorated(source)]  # control


DECORATED = """
import functools

def twice(function):
    @functools.wraps(function)
    def called(*arguments):
        return 2 * function(*arguments)
    return called

class A:
    @property
    def one(self):
        return 1

    @twice
    @functools.cache
    def times(
        self, n,
    ):
        return self.one * n

    @classmethod
    def made(cls):
        return cls()

    @twice
    def two(self):
        return 1
"""


def test_a_function_whose_decorators_are_applied_below_it_does_the_same():
    plain, before, after = mutation.undecorated(DECORATED), {}, {}
    exec(DECORATED, before)
    exec(plain, after)
    for module in (before, after):
        assert module["A"].made().one == 1 and module["A"]().times(3) == 6 and module["A"]().two() == 2
        assert isinstance(module["A"].one, property) and module["A"]().times.__wrapped__.cache_info is not None
        module["twice"] = lambda function: lambda *arguments: 3 * function(*arguments)
    assert (before["A"]().two(), after["A"]().two()) == (2, 3)  # a decorator of ours can be mutated after the import
    assert "times = twice(functools.cache(times__plain))" in plain and "    @classmethod\n    def made(cls)" in plain


def test_every_committed_record_of_mutation_is_of_a_module_that_exists():
    """A stale one is no error: the page says which they are."""
    committed = records.load(records.COMMITTED, "mutation")
    assert {record.method for record in committed} <= set(mutation.TESTS)
    print("stale:", ", ".join(checks.stale(committed)))


def test_unknown_modules_are_named(tmp_path):
    with pytest.raises(ValueError, match="no module is called kernels; there are: checks; tensor_algebra"):
        mutation.run(Options("smoke", tmp_path, tmp_path, rows=("kernels",)))


def finished(returncode: int = 0, stdout: str = "") -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], returncode, stdout, "")


@pytest.mark.parametrize(
    "modules, rejected", ((("cache",), 1), (tuple(mutation.TESTS)[: mutation.TOGETHER + 1], 1), (("mha",), 0))
)
def test_mutants_are_counted_and_survivors_named(tmp_path, monkeypatch, capsys, modules, rejected):
    """mutmut itself takes minutes: here five mutants of a module, of which two live; types may reject two, of which one is drawn."""
    runs = []

    def mutmut(folder, *arguments):
        if "-c" in arguments:
            diff = "--- a\n+++ b\n-    end = start + n\n+    end = start - n\n"
            return json.dumps({name: diff for name in arguments[2:]})
        settings = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
        runs.append(settings["only_mutate"])
        drawn = []
        for path in settings["only_mutate"]:
            meta = folder / "mutants" / f"{path}.meta"
            meta.parent.mkdir(parents=True, exist_ok=True)
            name = path.removesuffix(".py").replace("/", ".")
            codes = {
                f"{name}.xǁCacheǁappend__plain__mutmut_{n}": code for n, code in enumerate((1, 37 if rejected else 1, 0, 1, 33))
            }
            drawn += list(codes)[3:] if rejected else []  # of the two the last is called by no test
            meta.write_text(json.dumps({"exit_code_by_key": codes}), encoding="utf-8")
        (folder / "drawn.json").write_text(json.dumps(drawn), encoding="utf-8")
        return ""

    monkeypatch.setattr(mutation, "python", mutmut)
    monkeypatch.setenv("GIT_COMMIT", "0" * 40)
    options = Options("smoke", tmp_path, tmp_path / "records", rows=modules)
    for _ in range(2):  # a second run replaces the first
        mutation.run(options)
    found = records.load(options.records)
    assert [record.method for record in found] == list(modules) and not checks.stale(found)
    for record in found:
        module = record.method.replace("/", ".")
        assert record.metrics["survivors"] == 2 * [f"{module}.Cache.append: end = start + n -> end = start - n"]
        assert [record.metrics[name] for name in ("mutants", "killed", "mypy", "survived")] == [
            5,
            3 - 2 * rejected,
            2 * rejected,
            2,
        ]
        assert record.metrics["lot"] == {"seed": 0, "drawn": rejected, "noticed": rejected, "unnoticed": []}
    assert f"survived: {found[0].method}.Cache.append" in capsys.readouterr().out
    paths, size = [mutation.path_of(module) for module in modules], mutation.TOGETHER
    assert runs == 2 * [paths[first : first + size] for first in range(0, len(paths), size)]


TOY = {
    "tucker_ref/toy.py": "def larger(a, b):\n    return a if a > b else b\n",
    "tests/test_toy.py": """
from tucker_ref.toy import larger


def test_larger():
    assert larger(1, 2) == 2 and larger(2, 1) == 2


def test_other():
    assert larger(0, 0) == 0
""",
    "asked.json": '{"tests_of": {"tucker_ref.toy": ["tests/test_toy.py::test_larger"]}, "equivalent": [], "share": 0.1, "seed": 0}',
    "pyproject.toml": """
[tool.mutmut]
source_paths = ["tucker_ref"]
pytest_add_cli_args_test_selection = ["tests"]
process_isolation = "forkserver"
[tool.pytest.ini_options]
addopts = "-p no:cacheprovider -p no:nbval"
""",
}


@pytest.fixture
def toy(tmp_path):
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def try_toy(toy) -> dict[str, str]:
    """What became of each mutant, by what it changes."""
    mutation.python(toy, "-P", str(mutation.COLLECTED_ONCE), "run", "--max-children", "1")
    outcomes = mutation.exits(toy, "toy")
    texts = mutation.changes(toy, list(outcomes))
    return {texts[name].partition(": ")[2]: outcome for name, outcome in outcomes.items()}


def test_mutants_are_killed_by_tests_that_were_collected_once(toy):
    """The tool itself, on one function: `a > b` -> `a >= b` changes nothing, every other mutant does."""
    outcomes = try_toy(toy)
    assert [text for text, outcome in outcomes.items() if outcome != "killed"] == [
        "return a if a > b else b -> return a if a >= b else b"
    ]
    killers = (toy / "killers.txt").read_text(encoding="utf-8").splitlines()
    assert killers == (len(outcomes) - 1) * ["tucker_ref.toy.x_larger\ttests/test_toy.py::test_larger"] and len(killers) > 1


def test_what_types_reject_meets_no_test_unless_it_is_drawn(toy):
    """Here types reject all three mutants, of which the lot draws one."""
    rejects = """
import json, pathlib
lines = pathlib.Path("tucker_ref/toy.py").read_text(encoding="utf-8").splitlines()
for n, line in enumerate(lines, 1):
    if "return a if" in line and "a > b else b" not in line or "return a if (" in line:
        print(json.dumps(dict(severity="error", file="tucker_ref/toy.py", line=n, message="no")))
"""
    settings = f"[tool.mutmut]\ntype_check_command = {json.dumps([sys.executable, '-c', rejects, 'mypy'])}"
    (toy / "pyproject.toml").write_text(TOY["pyproject.toml"].replace("[tool.mutmut]", settings), encoding="utf-8")
    outcomes = try_toy(toy)
    drawn = json.loads((toy / "drawn.json").read_text(encoding="utf-8"))
    assert list(outcomes.values()) == ["mypy", "killed", "mypy"] and drawn == ["tucker_ref.toy.x_larger__mutmut_2"]
    (every, lot) = mutation.outcomes_of(toy, ["toy"])["toy"]
    assert set(every.values()) == {"mypy"} and lot == {drawn[0]: "killed"}


def test_a_test_that_breaks_down_has_noticed(toy):
    """As a wrong operator may end the whole process. Other exit codes nobody knows are no kill."""
    codes = {"m0": -11, "m1": -6, "m2": 1, "m3": -15, "m4": 0}
    meta = toy / "mutants" / "tucker_ref" / "toy.py.meta"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"exit_code_by_key": codes}), encoding="utf-8")
    assert mutation.living(mutation.exits(toy, "toy")) == ["m3", "m4"]


LARGER = """
def test_larger():
    assert True


def test_larger_fails():
    assert False


def test_other():
    assert False
"""


def test_only_tests_that_belong_to_the_module_are_run(toy, monkeypatch):
    from mutmut import configuration
    from mutmut.state import state

    from reproduce.trust import collected_once
    from reproduce.trust.collected_once import CollectedOnce

    (toy / "mutants" / "tests").mkdir(parents=True)
    (toy / "mutants" / "tests" / "test_in_here.py").write_text(LARGER, encoding="utf-8")
    copies = [TOY["tucker_ref/toy.py"].replace("larger", f"x_larger__mutmut_{n}") for n in ("orig", 1, 2)]
    copies[1:] = (copy.replace("a > b", changed) for copy, changed in zip(copies[1:], ("a < b", "a >= b")))
    (toy / "mutants" / "tucker_ref").mkdir()
    (toy / "mutants" / "tucker_ref" / "toy.py").write_text("\n".join(copies), encoding="utf-8")
    same = "toy.larger: return a if a > b else b -> return a if a >= b else b"
    asked = {"tests_of": {"tucker_ref.toy": ["tests/test_in_here.py::test_larger"]}, "equivalent": [same]}
    (toy / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    passes, fails, other = (f"tests/test_in_here.py::test_{name}" for name in ("larger", "larger_fails", "other"))
    mutant = "tucker_ref.toy.x_larger__mutmut_1"
    monkeypatch.chdir(toy)
    monkeypatch.setattr(state(), "duration_by_test", {passes: 0.1})
    configuration.reset_config()
    runner = CollectedOnce()
    try:
        runner.warm_up()
        assert runner.run_tests(mutant_name=None, tests=[fails]) == 0  # not run: it has passed when it was timed
        assert runner.run_tests(mutant_name=mutant, tests=[other]) == 33  # none that belongs
        assert runner.run_tests(mutant_name=mutant, tests=[passes, other]) == 0
        monkeypatch.setattr(collected_once, "QUICKEST", 1)
        state().duration_by_test[fails] = 0.2
        assert runner.run_tests(mutant_name=f"{mutant[:-1]}2", tests=[fails, passes]) == 0  # listed: the quickest alone
        assert runner.run_tests(mutant_name=mutant, tests=[fails, passes]) == 1  # control
        assert runner.run_forced_fail() == 1
        runner.session.config._ensure_unconfigure()
        monkeypatch.setattr(collected_once, "QUICKEST", 2)
        with pytest.raises(RuntimeError, match="fail in a fork"):
            runner.warm_up()
        runner.session.config._ensure_unconfigure()
        monkeypatch.setattr(state(), "duration_by_test", {passes: 0.1})
        monkeypatch.setattr(state(), "tests_by_mangled_function_name", {"tucker_ref.toy.x_larger": {passes}})
        with pytest.raises(RuntimeError, match="tests pass where every function that is mutated fails"):
            runner.warm_up()  # this one calls none
    finally:
        runner.session.config._ensure_unconfigure()
        configuration.reset_config()


def test_a_tool_that_fails_is_reported(tmp_path):
    assert mutation.python(tmp_path, "-c", "print(1)") == "1\n"
    with pytest.raises(ValueError, match=f"mutmut failed in {tmp_path}: (.|\n)*wrong"):
        mutation.python(tmp_path, "-c", "raise SystemExit('wrong')")


def test_a_broken_contract_is_on_record_before_it_is_an_error(tmp_path, monkeypatch):
    def contracts(returncode, stdout, tried):
        def run(command, env, **_):
            if tried:
                Path(env["CONTRACTS_TRIED"]).write_text(
                    json.dumps({"tried": tried, "contracts": {"unfold": list(tried)}}), encoding="utf-8"
                )
            return finished(returncode, stdout)

        monkeypatch.setenv("GIT_COMMIT", "0" * 40)  # git is not asked for it, which would be another process
        monkeypatch.setattr(fuzz.subprocess, "run", run)
        fuzz.run(Options("long", tmp_path, tmp_path))

    contracts(0, "", {"test_a": 500})
    with pytest.raises(ValueError, match="test_c failed"):
        contracts(1, "ERROR tests/test_contracts.py::test_c - fixture", {"test_a": 500, "test_b": 3})
    with pytest.raises(ValueError, match=r"test_b\[1\] failed"):
        contracts(1, "FAILED tests/test_contracts.py::test_b[1] - assert", {"test_a": 500, "test_b": 3})
    with pytest.raises(ValueError, match="the contracts did not run: no such file"):
        contracts(2, "no such file", {})
    (record,) = records.load(tmp_path)
    assert record.metrics["inputs"] == 503 and record.metrics["failed"] == ["test_b[1]"]


def test_the_tests_at_hand_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "call", lambda *_: None)
    monkeypatch.setenv("GIT_COMMIT", "0" * 40)
    for returncode, summary in ((0, "5 passed, 1 skipped in 3.1s"), (1, "4 passed, 1 failed, 1 error in 3.1s")):
        monkeypatch.setattr(versions.subprocess, "run", lambda *_, c=returncode, s=summary, **__: finished(c, f"...\n{s}\n"))
        if returncode:
            with pytest.raises(ValueError, match="the tests do not pass with Python"):
                versions.run(Options("smoke", tmp_path, tmp_path))
        else:
            versions.run(Options("smoke", tmp_path, tmp_path))
            (record,) = records.load(tmp_path)
            assert [record.metrics[name] for name in ("passed", "failed", "skipped", "library")] == [5, 0, 1, "source"]
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: finished(1, ""))  # no pytest, or no tests
    with pytest.raises(ValueError, match="no test ran"):
        versions.run(Options("smoke", tmp_path, tmp_path))
    (record,) = records.load(tmp_path)  # the same versions: the later run that ran tests counts
    assert [record.metrics[name] for name in ("passed", "failed", "skipped")] == [4, 2, 0]


def test_each_combination_gets_an_empty_environment_with_the_wheel(tmp_path, monkeypatch, capsys):
    commands, pins = [], []

    def call(*command, folder=None):
        commands.append([str(part) for part in command])
        if "wheel" in command:
            (Path(command[-2]) / "tucker_ref.whl").touch()
        if "-c" in command and "install" in command:
            pins.append(Path(command[command.index("-c") + 1]).read_text(encoding="utf-8"))
        if folder:
            assert (folder / "tests" / "conftest.py").exists() and (folder / "README.md").exists()
            assert (folder / "versions.py").exists()

    here = (sys.executable, ("numpy==2.0.0", "torch"))
    monkeypatch.setattr(versions, "call", call)
    monkeypatch.setitem(versions.PRESETS, "wheel", (here, ("python0.9", ("numpy",))))
    versions.run(Options("wheel", tmp_path, tmp_path))
    build, environment, install, tests = commands
    assert "wheel" in build and environment[:3] == [sys.executable, "-m", "venv"]
    assert {"numpy==2.0.0", "torch", "pytest"} <= set(install) and any("tucker_ref.whl[" in part for part in install)
    assert "tqdm==" in pins[0] and "numpy==" not in pins[0] and "torch==" not in pins[0]  # free to be what was asked for
    assert tests[1:4] == ["versions.py", "versions", "--records"]
    assert "python0.9 is not on this machine: left out" in capsys.readouterr().out


def test_what_a_command_said_is_repeated_if_it_fails():
    versions.call(sys.executable, "-c", "import os; assert os.environ['GIT_COMMIT'] and 'PYTHONPATH' not in os.environ")
    with pytest.raises(ValueError, match="failed: (.|\n)*no luck"):
        versions.call(sys.executable, "-c", "raise SystemExit('no luck')")
