"""One worker and two take the same steps, killed and resumed or not: the experiment at toy size, on a CPU."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import a_record

from reproduce.experiments import two_gpus
from reproduce.report import pages, results
from reproduce.report.two_gpus import two_gpus_table
from reproduce.store import records
from reproduce.store.schema import check_record
from reproduce.train.options import Options


@pytest.fixture(scope="module")
def found(tmp_path_factory, warm):
    """The whole experiment, once; its processes, and those that torchrun starts, are forked."""
    folder = tmp_path_factory.mktemp("two")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {k} makes {n * k}.\n" for n in range(40) for k in range(100)), encoding="utf-8")
    options = Options("smoke", folder, folder / "records", text=str(text))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "executable", warm.python)
        patched.setenv("PYTHON_EXEC", warm.python)
        two_gpus.run(options)
    return options


def test_two_workers_killed_or_not_reach_the_losses_of_one(found):
    (record,) = records.load(found.records, "two_gpus")
    metrics, every = record.metrics, two_gpus.TOY.train.checkpoint_every
    assert metrics["within_noise"] and max(metrics["two_apart"], metrics["resumed_apart"]) <= 3e-4
    assert metrics["next_batch"] > 1e-2  # control: what another batch does
    first, second = metrics["resumed_after"]
    assert 0 < first < second < two_gpus.TOY.train.steps and first % every == second % every == 0
    losses = metrics["losses"]
    assert len(losses) == two_gpus.TOY.train.steps and losses[-1] < 0.9 * losses[0]
    machines = json.loads((found.out / "two_gpus-smoke-table2" / "killed" / "result.json").read_text(encoding="utf-8"))[
        "machines"
    ]
    assert [machine.rpartition(", ")[2] for machine in machines] == ["2 workers", "1 worker"]
    assert not list(found.out.glob("two_gpus*/*/checkpoint.pt"))
    folders = [path.name for path in (found.out / "two_gpus-smoke-table2").iterdir()]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in folders) and "one-other-sums" in folders


def test_its_record_can_be_shown_though_a_table_and_no_row_names_it(found):
    (record,) = records.load(found.records, "two_gpus", to_show=True)
    assert (record.method, record.config["row"], record.data["name"]) == ("table2", "MHA", "text.txt")
    assert "the same training steps" in results.render([record])
    as_file = json.loads((found.records / "two_gpus.smoke.json").read_text(encoding="utf-8"))[0]
    with pytest.raises(ValueError, match="it has config.row 7; it must be"):  # control
        check_record(as_file | {"config": as_file["config"] | {"row": 7}}, "it", ("two_gpus", "smoke"))


def test_what_has_ended_is_not_run_again(found, monkeypatch):
    before = records.load(found.records, "two_gpus")[0].metrics

    def refused(*_):
        raise AssertionError("it starts again")

    monkeypatch.setattr(two_gpus.Command, "start", refused)
    two_gpus.run(found)
    assert records.load(found.records, "two_gpus")[0].metrics == before
    with pytest.raises(ValueError, match="no table is called table9"):
        two_gpus.run(Options("smoke", found.out, found.records, rows=("table9",)))


def test_what_runs_found_on_another_text_or_machine_is_not_taken_for_theirs(found, tmp_path, monkeypatch):
    def started(self, title, *_, **__):
        raise AssertionError(f"{title} starts")

    monkeypatch.setattr(two_gpus.Command, "start", started)
    other, place = tmp_path / "other.txt", tmp_path / "out"
    other.write_text(Path(found.text).read_text(encoding="utf-8") + "and one line more\n", encoding="utf-8")

    def run(left_out="nothing", **changed):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(found.out, place, ignore=shutil.ignore_patterns(left_out))
        two_gpus.run(dataclasses.replace(found, out=place, records=tmp_path / "records", **changed))

    run()  # control
    assert len(records.load(tmp_path / "records")) == 1
    with pytest.raises(AssertionError, match="one starts"):
        run(text=str(other))
    assert not list(place.glob("two_gpus*/*/*"))
    with pytest.raises(AssertionError, match="one starts"):
        run(left_out="runs.json")  # as an older program left them
    monkeypatch.setattr(two_gpus, "device_in_words", lambda _: "another machine")
    with pytest.raises(AssertionError, match="one starts"):
        run()


def test_tables_are_chosen_by_name(tmp_path, monkeypatch):
    cases = dict.fromkeys(("table2", "table3"), two_gpus.PRESETS["smoke"]["table2"])
    monkeypatch.setitem(two_gpus.PRESETS, "smoke", cases)
    measured = {"noise": 0.0, "two_apart": 0.0, "resumed_apart": 0.0, "next_batch": 1.0, "within_noise": True}
    measured |= {"tokens_per_second": [1.0, 2.0], "resumed_after": [5, 10]}
    monkeypatch.setattr(two_gpus, "measured", lambda *_: measured)
    two_gpus.run(Options("smoke", tmp_path, tmp_path / "records", rows=("table3",)))
    assert [r.method for r in records.load(tmp_path / "records", "two_gpus")] == ["table3"]


@pytest.mark.parametrize("name, case", two_gpus.PRESETS["gpu"].items())
def test_every_run_can_be_shared_and_killed_twice(name, case):
    settings = case.preset.train
    for micro_batch in (case.preset.micro_batch, case.other_micro_batch):
        assert settings.batch_size % (2 * micro_batch) == 0
    assert case.other_micro_batch < case.preset.micro_batch and 2 * settings.checkpoint_every < settings.steps


def test_one_gpu_is_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="two_gpus needs two GPUs"):
        two_gpus.run(Options("smoke", tmp_path, tmp_path / "records", device="cuda"))


def test_a_worker_that_fails_or_ends_too_early_is_told(tmp_path):
    command = two_gpus.Command("table2", Options("smoke", tmp_path, tmp_path), tmp_path, 5)
    failing, ending = (subprocess.Popen([sys.executable, "-c", code]) for code in ("raise SystemExit(1)", ""))
    (tmp_path / "one").mkdir()
    said = "".join(f"line {n}\n" for n in range(100))
    (tmp_path / "one" / "log.txt").write_text(said, encoding="utf-8")
    with pytest.raises(ValueError, match=r"table2, one: a worker failed; see .*log.txt\nline 60\n(.|\n)*line 99$"):
        command.end("one", failing, expected=0)
    with pytest.raises(ValueError, match="ended before it was killed"):
        command.await_checkpoint("one", ending, beyond=0)


class Ended(subprocess.Popen):
    """A run that has ended already, and left what a run leaves."""

    def __init__(self, arguments, **_):
        *_, folder, chosen = arguments
        self.chosen = json.loads(chosen)
        (Path(folder) / "result.json").write_text(json.dumps(self.chosen), encoding="utf-8")

    def wait(self, timeout=None):
        return 0


def test_runs_on_one_gpu_run_side_by_side_each_on_its_own_and_leave_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Ended)
    options = Options("gpu", tmp_path, tmp_path, device="cuda")
    one, other = two_gpus.Command("table2", options, tmp_path, 5).side_by_side({"one": 0, "other": 10})
    assert [(found["device"], found["micro_batch"]) for found in (one, other)] == [("cuda:0", 0), ("cuda:1", 10)]
    assert not one["lasting"] and not other["lasting"]
    (tmp_path / "one" / "result.json").unlink()  # what is there is not run again, and the other one takes the first GPU
    assert two_gpus.Command("table2", options, tmp_path, 5).side_by_side({"one": 0, "other": 10})[0]["device"] == "cuda:0"
    assert two_gpus.Command("table2", options, tmp_path, 5).whole("killed", 2, lasting=True)["lasting"]  # control
    on_cpu = two_gpus.Command("table2", Options("smoke", tmp_path, tmp_path), tmp_path / "cpu", 5)
    assert on_cpu.whole("one", 1)["device"] == "cpu"


def test_losses_that_are_further_apart_than_noise_are_told(monkeypatch, found):
    curves = {"one": 0.0, "one-other-sums": 0.001, "two": 0.0015}

    def whole(_, title, *__):
        return {"curve": [[1, 2.0 + curves[title], 1.0], [2, 1.5, 1.0]], "step_seconds": 1.0}

    monkeypatch.setattr(two_gpus.Command, "whole", whole)
    monkeypatch.setattr(two_gpus.Command, "killed", lambda self, _: {**whole(self, "two"), "resumed_after": [1, 2]})
    case = two_gpus.PRESETS["smoke"]["table2"]
    assert two_gpus.measured("table2", case, found, "its hash")["within_noise"]
    curves["two"] = 0.003  # control
    assert not two_gpus.measured("table2", case, found, "its hash")["within_noise"]


def test_the_page_on_scale_has_a_place_for_records_of_two_gpus():
    metrics = {"noise": 0.001, "two_apart": 0.0015, "resumed_apart": 0.0019, "next_batch": 0.2, "within_noise": True}
    config = {"row": "MHA", "sharding": "ddp", "steps": 200, "paper_tokens": 36e9}
    given = dict(experiment="two_gpus", preset="gpu", method="table2", device="2 x H200", config=config)
    record = a_record(**given, metrics=metrics | {"tokens_per_second": [1e6, 2e6]})
    page = (Path(pages.__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")

    def shown(found) -> str:
        return pages.filled(page, pages.texts_of(["Two GPUs"], found))

    assert "| table2 MHA | ddp | 200 | 0.0010 | 0.0015 | 0.0019 | 1,000,000 | 2,000,000 | 2.00 | 5 |" in shown([record])
    assert "One 2 x H200 and two" in shown([record]) and "no record of it yet" not in shown([record])
    toy = dataclasses.replace(record, preset="smoke")
    assert shown([]) == shown([toy]) and "There is no record of it yet." in shown([toy])  # control


def test_the_table_gives_the_hours_of_the_papers_run(found):
    (record,) = records.load(found.records, "two_gpus")
    record.metrics["tokens_per_second"] = [1e6, 1.9e6]
    (table,) = two_gpus_table([record])
    hours = two_gpus.tokens_of(two_gpus.GPT2) / 1.9e6 / 3600
    assert f"| 1,000,000 | 1,900,000 | 1.90 | {hours:,.0f} |" in table.body and "1 of 1" in table.note
