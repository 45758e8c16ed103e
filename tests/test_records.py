"""Records: appended whole, never overwritten, complete in provenance, and silent about the machine's folders."""

import json
import multiprocessing
import re

import pytest

from reproduce.store import records
from reproduce.store.files import write_atomically


def record(method="MHA", seed=0, **metrics):
    data = {"name": "text", "sha256": "00" * 32}
    return records.new_record("table2", "smoke", method, {"d_model": 4}, metrics, seed=seed, data=data)


def test_a_record_says_where_its_numbers_come_from():
    made = record(loss=1.0)
    assert set(made) == set(records.FIELDS)
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", made["commit"])
    assert set(made["versions"]) == {"python", "torch", "numpy"} and "threads on" in made["device"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["finished"])


def test_records_append_in_order_and_are_never_overwritten(tmp_path):
    records.append(tmp_path, record("MHA", loss=1.0))
    records.append(tmp_path, record("GQA", loss=2.0))
    records.append(tmp_path, record("MHA", loss=3.0))  # the same run again: the first stands
    assert [(r["method"], r["metrics"]["loss"]) for r in records.load(tmp_path)] == [("MHA", 1.0), ("GQA", 2.0)]
    assert records.load(tmp_path, "table2", "smoke") and not records.load(tmp_path, "table3")


def test_what_is_measured_anew_replaces_the_old_measurement(tmp_path):
    records.append(tmp_path, record("MHA", loss=1.0))
    records.append(tmp_path, record("GQA", loss=2.0))
    records.append(tmp_path, record("MHA", loss=3.0), replace=True)
    assert [(r["method"], r["metrics"]["loss"]) for r in records.load(tmp_path)] == [("MHA", 3.0), ("GQA", 2.0)]


def test_what_defines_a_run_tells_it_apart():
    def identity(**changes):
        parts = dict(experiment="e", preset="p", method="m", config={"a": 1}, seed=0, data={"sha256": "x"}) | changes
        return records.run_id(**parts)

    changes = [
        dict(experiment="f"),
        dict(preset="q"),
        dict(method="n"),
        dict(config={"a": 2}),
        dict(seed=1),
        dict(data={"sha256": "y"}),
    ]
    assert len({identity(), *(identity(**c) for c in changes)}) == 7
    assert identity(config={"a": 1, "b": 2}) == identity(config={"b": 2, "a": 1})


def append_some(folder, worker):
    for seed in range(10):
        records.append(folder, record(f"w{worker}", seed))


def test_two_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append_some, args=(tmp_path, w)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(records.load(tmp_path)) == 30


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "not a record file"),
        ("{}", "must hold a list"),
        ('[{"id": 1}]', "record 0 lacks experiment"),
        ("[3]", "record 0 lacks id"),
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, content, message):
    path = tmp_path / "table2.smoke.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"table2.smoke.json.*{message}"):
        records.append(tmp_path, record())
    assert path.read_text() == content


def test_the_command_names_files_but_not_folders(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "table2", "--text", "/home/somebody/books/novel.txt", "--seeds", "0,1"])
    assert records.command_line() == "python -m reproduce table2 --text novel.txt --seeds 0,1"
    arguments = ["x", "table2", "--text=/home/x/a.txt", "--out", "out/here", "--rows", "MHA,Tucker [8,64,64]"]
    monkeypatch.setattr("sys.argv", arguments)
    assert records.command_line() == "python -m reproduce table2 --text=a.txt --out out/here --rows 'MHA,Tucker [8,64,64]'"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def broken(file):
        raise RuntimeError("PyTorch lost its file")

    with pytest.raises(OSError, match="cannot be written: PyTorch lost its file"):
        write_atomically(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_litter_and_stays_an_interruption(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)
    assert not list(tmp_path.iterdir())


def test_committed_records_are_complete_and_hold_no_machine_paths():
    committed = records.load(records.COMMITTED)
    assert committed
    for r in committed:
        text = json.dumps(r)
        assert not re.search(r"/(home|root|tmp|work|usr)/", text)
        assert "+changes" not in r["commit"] and r["commit"] != "unknown", r["id"]
    assert len({r["id"] for r in committed}) == len(committed)


def test_the_device_and_the_commit_are_said_even_where_nothing_is_known(monkeypatch):
    def no_file(*_arguments, **_options):
        raise OSError

    monkeypatch.setenv("GIT_COMMIT", "0123456789")
    assert records.git_commit() == "0123456789"
    monkeypatch.delenv("GIT_COMMIT")
    monkeypatch.setattr(records.subprocess, "run", no_file)
    monkeypatch.setattr(records.Path, "read_text", no_file)
    assert records.git_commit() == "unknown"
    assert " threads on " in records.device_in_words("cpu")
