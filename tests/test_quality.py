"""Mutation, fuzzing and versions: what is counted, what is listed as equivalent, and what the committed records say."""

import tomllib

import pytest

from reproduce import fuzz, mutation, records, versions
from reproduce.options import Options

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
    assert all(entry["reason"] and mutant.split(".")[0] in mutation.TESTS for entry in entries for mutant in entry["mutants"])


def test_a_module_gets_a_fresh_copy_with_its_own_tests(tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "old").touch()
    folder = mutation.prepare(tmp_path / "gqa", "gqa")
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["mutmut"]
    assert settings["only_mutate"] == ["tucker_ref/gqa.py"] and not (folder / "old").exists()
    assert all((folder / name.split("::")[0]).exists() for name in settings["pytest_add_cli_args_test_selection"])


@pytest.mark.parametrize("module", mutation.TESTS)
def test_the_tests_of_a_module_exist(module):
    assert (mutation.ROOT / "tucker_ref" / f"{module}.py").exists()
    for name in mutation.TESTS[module]:
        file, _, function = name.partition("::")
        assert f"def {function}" in (mutation.ROOT / "tests" / file).read_text()


def test_unknown_modules_are_named(tmp_path):
    with pytest.raises(ValueError, match="no module 'kernels' is mutated; those are checks, tensor_algebra"):
        mutation.run(Options("smoke", tmp_path, tmp_path, rows=("kernels",)))


def test_tables_have_a_row_per_record():
    metrics = mutation.count(dict(m0="killed", m1="survived"), {"m1": "x"}, {})
    table = mutation.table([records.new_record("mutation", "mutmut", name, {}, metrics) for name in ("cache", "mha")])
    assert table.count("50.0 %") == 3 and "| all" in table and "| cache" in table
    tried = {"tried": {"a": 3, "b": 4}, "inputs": 7, "public_names": {"f": 1}, "failed": ["b[x]"]}
    table = fuzz.table([records.new_record("fuzz", "long", "hypothesis", {}, tried)])
    assert "| a" in table and "held" in table and "failed" in table and "7" in table
    metrics = {"passed": 5, "failed": 0, "skipped": 1, "library": "wheel"}
    table = versions.table([records.new_record("versions", "tests", "Python 3", {}, metrics)])
    assert "wheel" in table and table.count("\n") == 2
