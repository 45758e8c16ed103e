"""What `hostile` and `coverage` count in the reports of pytest and coverage.py, and that they record nothing when a test fails."""

import json
import subprocess

import pytest

from reproduce.store import records
from reproduce.train.options import Options
from reproduce.trust import coverage, hostile

JUNIT = """<testsuites><testsuite>
<testcase name="test_a[shape: x of one sequence-MHA]"/><testcase name="test_a[shape: x too narrow-GQA]"/>
<testcase name="test_b[flex-not finite: -infinity-Tucker shared]"/><testcase name="test_c[MLA coupled-mask: a list]"/>
<testcase name="test_d"/><testcase name="test_c[MHA-mask: a list]"><skipped/></testcase>
</testsuite></testsuites>"""
SUMMARY = dict(num_statements=10, covered_lines=9, num_branches=4, covered_branches=2, excluded_lines=1)
FILES = {name: {"summary": SUMMARY} for name in ("tucker_ref/a.py", "tucker_ref/kernels/b.py", "reproduce/a.py")}


def reported(monkeypatch, option: str, content: str, code: int = 0):
    """In place of pytest: its report, and how it ends."""

    def run(command, **_options):
        (path,) = [part.removeprefix(option) for part in command if part.startswith(option)]
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
        return subprocess.CompletedProcess(command, code, "1 failed", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(records, "git_commit", lambda: "0123456789")


def test_hostile_inputs_are_counted_by_kind(monkeypatch, tmp_path, capsys):
    reported(monkeypatch, "--junitxml=", JUNIT)
    hostile.run(Options("smoke", tmp_path, tmp_path))
    (record,) = records.load(tmp_path, "hostile")
    assert record.metrics == {"kinds": {"shape": 2, "not finite": 1, "mask": 1, "others": 1}, "skipped": 1}
    assert "| together | 5 |" in capsys.readouterr().out


def test_changed_records_are_summed_over_files(tmp_path):
    (tmp_path / "tally").write_text("120 1\n30 2\n", encoding="utf-8")
    assert hostile.changed_records(tmp_path / "tally") == {"records": {"tried": 150, "drawn": 3}}
    (tmp_path / "tally").write_text("", encoding="utf-8")
    assert hostile.changed_records(tmp_path / "tally") == {}


def test_lines_and_branches_are_summed_by_package(monkeypatch, tmp_path, capsys):
    reported(monkeypatch, "--cov-report=json:", json.dumps({"files": FILES}))
    coverage.run(Options("smoke", tmp_path, tmp_path))
    (record,) = records.load(tmp_path, "coverage")
    one = dict(lines=10, covered_lines=9, branches=4, covered_branches=2, left_out=1)
    assert record.metrics == {"tucker_ref": {name: 2 * n for name, n in one.items()}, "reproduce": one}
    assert "18 of 20" in capsys.readouterr().out


@pytest.mark.parametrize("module, option", [(hostile, "--junitxml="), (coverage, "--cov-report=json:")])
def test_a_failed_test_is_not_counted(monkeypatch, tmp_path, module, option):
    reported(monkeypatch, option, "", code=1)
    with pytest.raises(ValueError, match="1 failed"):
        module.run(Options("smoke", tmp_path, tmp_path))
    assert not records.load(tmp_path)


def test_what_failed_is_the_first_failure_whole_and_the_end_of_the_summary():
    """As pytest writes them: an error of a fixture comes before what a test fails by; a rule of its own divides a traceback."""
    long = "\n".join(f"E   worker 0 says {n}" for n in range(1000))
    rule = "_ " * 40
    error = f"{'=' * 34} ERRORS {'=' * 34}\n{'_' * 27} ERROR at setup of test_a {'_' * 27}\n{long}\n{rule}\n\ntest_x.py:3: ValueError\n"
    failure = f"{'=' * 33} FAILURES {'=' * 33}\n{'_' * 36} test_b {'_' * 36}\nE   KeyError: second\n"
    summary = (
        f"{'=' * 27} short test summary info {'=' * 27}\nFAILED test_x.py::test_b\nERROR test_x.py::test_a\n1 failed, 1 error\n"
    )
    said = coverage.what_failed(f"FE [100%]\n{error}{failure}{'=' * 30} coverage {'=' * 30}\n{'.' * 3000}\n{summary}")
    assert said.startswith(error) and "second" not in said and said.endswith("ERROR test_x.py::test_a\n1 failed, 1 error\n")
    assert len(said) < len(error) + 2100
    assert coverage.what_failed(f"FE [100%]\n{failure}{summary}").startswith(failure)
    assert coverage.what_failed("no such option") == "\nno such option"
