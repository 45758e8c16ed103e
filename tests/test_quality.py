"""Mutation, fuzzing and versions: what is counted, what is listed as equivalent, and what the committed records say."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from reproduce.store import records
from reproduce.train.options import Options
from reproduce.trust import fuzz, mutation, versions

CHANGED = {"m1": "cache.f: a + b -> a - b", "m2": "cache.f: a -> b", "m3": "cache.f: a -> b"}


def test_mutants_are_counted_by_their_ends():
    outcomes = dict(m0="killed", m1="survived", m2="survived", m3="untested", m4="mypy", m5="timeout")
    metrics = mutation.count(outcomes, CHANGED, {"cache.f: a -> b": "b is a"})
    assert [metrics[n] for n in ("mutants", "killed", "mypy", "timeouts", "equivalent", "survived")] == [6, 1, 1, 1, 2, 1]
    assert metrics["survivors"] == ["cache.f: a + b -> a - b"] and metrics["equivalents"] == {"cache.f: a -> b": "b is a"}
    assert mutation.killed_share(metrics) == 0.75
    assert mutation.killed_share(mutation.count(outcomes, CHANGED, {})) == 0.5  # control: nothing is equivalent unless listed


def test_every_equivalent_mutant_has_a_reason_and_is_listed_once():
    entries = tomllib.loads(mutation.EQUIVALENT.read_text())["equivalent"]
    listed = [mutant for entry in entries for mutant in entry["mutants"]]
    assert len(listed) == len(set(listed)) == len(mutation.equivalent())
    modules = tuple(f"{module.replace('/', '.')}." for module in mutation.TESTS)
    assert all(entry["reason"] and mutant.startswith(modules) for entry in entries for mutant in entry["mutants"])


def test_a_module_gets_a_fresh_copy_with_its_own_tests(tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "old").touch()
    folder = mutation.prepare(tmp_path / "gqa", "gqa")
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["mutmut"]
    assert settings["only_mutate"] == ["tucker_ref/gqa.py"] and not (folder / "old").exists()
    assert all((folder / name.split("::")[0]).exists() for name in settings["pytest_add_cli_args_test_selection"])
    folder = mutation.prepare(tmp_path / "compression/spectra", "compression/spectra")
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["mutmut"]
    assert settings["only_mutate"] == ["tucker_ref/compression/spectra.py"] and (folder / settings["only_mutate"][0]).exists()


@pytest.mark.parametrize("module", mutation.TESTS)
def test_the_tests_of_a_module_exist(module):
    assert (mutation.ROOT / "tucker_ref" / f"{module}.py").exists()
    for name in mutation.TESTS[module]:
        file, _, function = name.partition("::")
        assert f"def {function}" in (mutation.ROOT / "tests" / file).read_text()


def test_unknown_modules_are_named(tmp_path):
    with pytest.raises(ValueError, match="no module is called kernels; there are: checks; tensor_algebra"):
        mutation.run(Options("smoke", tmp_path, tmp_path, rows=("kernels",)))


def finished(returncode: int = 0, stdout: str = "") -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], returncode, stdout, "")


def test_mutants_are_counted_and_survivors_named(tmp_path, monkeypatch, capsys):
    """mutmut itself takes minutes: here it leaves three mutants, of which one lives."""

    def mutmut(folder, *arguments):
        if "-c" in arguments:
            diff = "--- a\n+++ b\n-    end = start + n\n+    end = start - n\n"
            return json.dumps({name: diff for name in arguments[2:]})
        meta = folder / "mutants" / "tucker_ref" / "cache.py.meta"
        meta.parent.mkdir(parents=True)
        codes = {f"tucker_ref.cache.xǁCacheǁappend__mutmut_{n}": code for n, code in enumerate((1, 37, 0))}
        meta.write_text(json.dumps({"exit_code_by_key": codes}))
        return ""

    monkeypatch.setattr(mutation, "python", mutmut)
    options = Options("smoke", tmp_path, tmp_path / "records", rows=("cache",))
    for _ in range(2):  # a second run replaces the first
        mutation.run(options)
    (record,) = records.load(options.records)
    assert record.metrics["survivors"] == ["cache.Cache.append: end = start + n -> end = start - n"]
    assert [record.metrics[name] for name in ("mutants", "killed", "mypy", "survived")] == [3, 1, 1, 1]
    assert "survived: cache.Cache.append" in capsys.readouterr().out


def test_a_tool_that_fails_is_reported(tmp_path):
    assert mutation.python(tmp_path, "-c", "print(1)") == "1\n"
    with pytest.raises(ValueError, match=f"mutmut failed in {tmp_path}: (.|\n)*wrong"):
        mutation.python(tmp_path, "-c", "raise SystemExit('wrong')")


def test_a_broken_contract_is_on_record_before_it_is_an_error(tmp_path, monkeypatch):
    def contracts(returncode, stdout, tried):
        def run(command, env, **_):
            if tried:
                Path(env["CONTRACTS_TRIED"]).write_text(json.dumps({"tried": tried, "contracts": {"unfold": list(tried)}}))
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
            pins.append(Path(command[command.index("-c") + 1]).read_text())
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
