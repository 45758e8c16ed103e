"""Records: appended whole, never overwritten, complete in provenance, and silent about the machine's folders."""

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import a_record, committed_records

from reproduce.__main__ import EXPERIMENTS
from reproduce.store import records
from reproduce.store.files import code_hash, write_atomically

ROOT = Path(__file__).parents[1]


def record(method="MHA", seed=0, **metrics):
    data = {"name": "text", "sha256": "00" * 32}
    return records.new_record("table2", "smoke", method, {"d_model": 4}, metrics, seed=seed, data=data)


def test_a_record_says_where_its_numbers_come_from():
    made = record(loss=1.0)
    assert set(vars(made)) == {*records.FIELDS, "more"} and not made.more
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", made.commit)
    assert set(made.versions) == {"python", "torch", "numpy"} and "threads on" in made.device
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made.finished)


def test_records_append_in_order_and_are_never_overwritten(tmp_path):
    records.append(tmp_path, record("MHA", loss=1.0))
    records.append(tmp_path, record("GQA", loss=2.0))
    records.append(tmp_path, record("MHA", loss=3.0))  # the same run again: the first stands
    assert [(r.method, r.metrics["loss"]) for r in records.load(tmp_path)] == [("MHA", 1.0), ("GQA", 2.0)]
    assert records.load(tmp_path, "table2", "smoke") and not records.load(tmp_path, "table3")


def test_what_is_measured_anew_replaces_the_old_measurement(tmp_path):
    records.append(tmp_path, record("MHA", loss=1.0))
    records.append(tmp_path, record("GQA", loss=2.0))
    records.append(tmp_path, record("MHA", loss=3.0), replace=True)
    assert [(r.method, r.metrics["loss"]) for r in records.load(tmp_path)] == [("MHA", 3.0), ("GQA", 2.0)]


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
    context = multiprocessing.get_context("forkserver")  # processes of their own, for one import of PyTorch
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
        ("[3]", "record 0 is 3; it must be a dict"),
        (b"[\xff]", "not a record file"),  # not UTF-8
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, content, message):
    path, written = tmp_path / "table2.smoke.json", content if isinstance(content, bytes) else content.encode()
    path.write_bytes(written)
    with pytest.raises(ValueError, match=f"table2.smoke.json.*{message}"):
        records.append(tmp_path, record())
    assert path.read_bytes() == written


@pytest.mark.parametrize("copy", ["table2.smoke copy.json", "table2.smoke.bak.json", "table2.smoke (1).json", "old.smoke.json"])
def test_a_copy_beside_a_file_of_records_is_not_read(tmp_path, copy):
    records.append(tmp_path, record())
    (tmp_path / copy).write_bytes((tmp_path / "table2.smoke.json").read_bytes())
    assert len(records.load(tmp_path)) == len(records.load(tmp_path, "table2", "smoke")) == 1


def test_a_record_that_is_there_twice_is_an_error_that_names_both_files(tmp_path):
    first, second = (tmp_path / f"table2.{preset}.json" for preset in ("old", "smoke"))
    records.append(tmp_path, record())
    first.write_bytes(second.read_bytes())
    identity = record().id
    with pytest.raises(ValueError, match=f"record {identity} is there twice, in {first} and in {second}: remove one"):
        records.load(tmp_path)
    assert len(records.load(tmp_path, "table2", "smoke")) == 1  # control: one of them alone
    first.unlink()
    (line,) = second.read_text(encoding="utf-8").splitlines()[1:-1]
    second.write_text(f"[\n{line},\n{line}\n]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"there twice, in {second} and in {second}"):
        records.load(tmp_path)


def test_what_may_be_recorded_is_what_the_command_line_runs(tmp_path):
    assert set(records.EXPERIMENTS) == set(EXPERIMENTS)
    made = dataclasses.replace(record(), experiment="table9")
    with pytest.raises(ValueError, match="no experiment is called table9; there are: exactness, theorems, table1"):
        records.append(tmp_path, made)
    assert not list(tmp_path.iterdir())


@pytest.mark.no_cover
def test_reading_and_adding_leaves_what_stands_in_a_file_as_it_was(tmp_path):
    for path in records.COMMITTED.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(text, encoding="utf-8")
        experiment, preset, _ = path.name.split(".")
        some = records.load(tmp_path, experiment, preset)[0]
        records.append(tmp_path, dataclasses.replace(some, id="another"))
        assert (tmp_path / path.name).read_text(encoding="utf-8").startswith(text.removesuffix("\n]\n") + ",\n")
        records.append(tmp_path, some, replace=True)
        assert (tmp_path / path.name).read_text(encoding="utf-8").startswith(text.removesuffix("\n]\n") + ",\n")


def test_a_record_answers_what_many_ask():
    train = {"learning_rate": 0.1, "warmup_steps": 2, "steps": 9}
    trained = a_record(config={"train": train}, metrics={"attention_parameters": 5, "workers": {"workers": 8}})
    assert (trained.rate, trained.warmup, trained.steps, trained.is_trained) == (0.1, 2, 9, True)
    assert (trained.attention_parameters, trained.workers, trained.diverged_at) == (5, 8, None)
    other = a_record(metrics={"diverged_at": 7})
    assert (other.is_trained, other.workers, other.diverged_at) == (False, 1, 7)
    with pytest.raises(KeyError, match="train"):
        _ = other.rate


def test_the_command_names_files_but_not_folders(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "table2", "--text", "/home/somebody/books/novel.txt", "--seeds", "0,1"])
    assert records.command_line() == "python -m reproduce table2 --text novel.txt --seeds 0,1"
    arguments = ["x", "table2", "--text=/home/x/a.txt", "--out", "out/here", "--rows", "MHA,Tucker [8,64,64]"]
    monkeypatch.setattr("sys.argv", arguments)
    assert records.command_line() == "python -m reproduce table2 --text=a.txt --out out/here --rows 'MHA,Tucker [8,64,64]'"
    monkeypatch.setattr("sys.argv", ["x", "table2", "--test", "/home/x/a.txt,../b.xz,c.txt"])
    assert records.command_line() == "python -m reproduce table2 --test a.txt,b.xz,c.txt"
    monkeypatch.setattr("sys.argv", ["x", "spectra", "--model", ".."])
    assert records.command_line() == f"python -m reproduce spectra --model {Path.cwd().parent.name}"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]

    def broken(file):
        raise RuntimeError("PyTorch lost its file")

    with pytest.raises(OSError, match="cannot be written: PyTorch lost its file"):
        write_atomically(path, broken)
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


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
        text = json.dumps(vars(r))
        assert not re.search(r"/(home|root|tmp|work|usr)/", text)
        assert "+changes" not in r.commit and r.commit != "unknown", r.id
        what = [r.experiment, r.preset, r.method, r.config]
        assert r.id == records.run_id(*what, r.seed, r.data) != records.run_id(*what, -1, r.data)  # the last one is the control
    assert len({r.id for r in committed}) == len(committed)


@pytest.fixture
def fresh_commit():
    """Nothing is known of a commit, before and after."""
    records._commit_of.cache_clear()
    yield
    records._commit_of.cache_clear()


def test_committed_records_name_commits_that_are_in_the_history():
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, encoding="utf-8")
    if git(["git", "rev-parse", "--is-shallow-repository"]).stdout.strip() != "false":
        pytest.skip("no history: not a clone, or a shallow one")
    history = git(["git", "log", "--format=%H"]).stdout.split()
    known = lambda commit: any(one.startswith(commit) for one in history)  # noqa: E731
    named = {record.commit.split("+")[0] for record in committed_records()}
    slip = "57aed8d92"  # the page on provenance says which commit is meant
    assert {commit for commit in named if not known(commit)} == {slip}  # the slip is the control
    assert slip in (ROOT / "docs" / "provenance.md").read_text(encoding="utf-8")


def test_the_device_and_the_commit_are_said_even_where_nothing_is_known(monkeypatch, fresh_commit):
    def no_file(*_arguments, **_options):
        raise OSError

    monkeypatch.setenv("GIT_COMMIT", "0123456789")
    assert records.git_commit() == "0123456789"
    monkeypatch.delenv("GIT_COMMIT")
    monkeypatch.setattr(records.subprocess, "run", no_file)
    monkeypatch.setattr(records.Path, "read_text", no_file)
    assert records.git_commit() == "unknown"
    assert " threads on " in records.device_in_words("cpu")


@pytest.mark.parametrize("way", ["a copy within it", "GIT_DIR"])
def test_the_commit_of_another_repository_is_none_of_ours(way, monkeypatch, tmp_path, fresh_commit):
    git = functools.partial(in_repository, tmp_path)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    copy = a_copy(tmp_path)  # as pip puts it into a folder of an environment
    (tmp_path / "theirs").write_text("", encoding="utf-8")
    git("init")
    git("add", "theirs")
    git("commit", "-m", "theirs")
    if way == "GIT_DIR":  # as in a hook of theirs
        monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    else:
        monkeypatch.setattr(records, "__file__", str(copy))
    assert records.git_commit() == "unknown"
    records._commit_of.cache_clear()
    git("add", "reproduce")  # control: where it belongs to it
    git("commit", "-m", "ours")
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", records.git_commit())


def in_repository(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, check=True)


def a_copy(folder: Path) -> Path:
    """The file that asks for the commit, in another repository."""
    copy = folder / "reproduce" / "store" / "records.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("", encoding="utf-8")
    return copy


def test_a_command_records_the_commit_that_it_started_from(monkeypatch, tmp_path, fresh_commit):
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    copy = a_copy(tmp_path)
    monkeypatch.setattr(records, "__file__", str(copy))
    for arguments in (["init"], ["add", "reproduce"], ["commit", "-m", "first"]):
        in_repository(tmp_path, *arguments)
    started = records.git_commit()
    assert re.fullmatch(r"[0-9a-f]{40}", started)
    copy.write_text("# edited while the command runs\n", encoding="utf-8")
    assert records.git_commit() == started
    records._commit_of.cache_clear()
    assert records.git_commit() == f"{started}+changes"  # control: the next command


def test_the_hash_of_code_does_not_hang_on_what_is_said_about_it(tmp_path):
    code = (
        '''"""A module."""\n\n\ndef f(x):\n    """Doubles.\n\n    And more.\n    """\n    # why\n    return 2 * x  # (n,)\n'''
    )

    def hashed(source):
        (tmp_path / "module.py").write_text(source, encoding="utf-8")
        return code_hash(tmp_path / "module.py")

    same = (code.replace("Doubles", "Twice x"), code.replace("    # why\n", ""), code.replace("A module", "Ein Modul, größer"))
    other = (code.replace("2 * x", "3 * x"), code.replace("f(x)", "f(x=1)"), code + "y = 1\n")
    assert {hashed(source) for source in same} == {hashed(code)} and len(hashed(code)) == 16
    assert all(hashed(source) != hashed(code) for source in other)  # control


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "table1.sizes.json")
    with pytest.raises(ValueError, match="table1.sizes.json is not a record file: it is no regular file"):
        records.load(tmp_path)


def test_a_path_that_is_no_text_leaves_a_record_that_is_read_again(tmp_path):
    for name in ("plain", "caf\udce9"):
        command = f"python -m reproduce table1 --records {name}"
        records.append(
            tmp_path, dataclasses.replace(a_record(experiment="table1", preset="sizes"), id=name[:4], command=command)
        )
    assert [r.command.split()[-1] for r in records.load(tmp_path)] == ["plain", "caf\ufffd"]
