"""Ctrl-C is answered in one line with exit status 130, from the first import to the last line; streams speak UTF-8."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import run_here
from PIL import Image

from reproduce import console
from reproduce.store import records
from reproduce.train.loop import train
from reproduce.train.settings import TrainConfig

ROOT = Path(__file__).parent.parent


def started(*command, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore Ctrl-C
    )


def after_ctrl_c(process: subprocess.Popen) -> tuple[int, str, str]:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("program", ["reproduce", "paper_figures"])
def test_while_a_program_imports_its_libraries(program, tmp_path):
    """PyTorch takes seconds; here it takes a minute."""
    (tmp_path / "torch.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    process = started("-m", program, "--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert process.stdout.readline() == "begun\n"
    assert after_ctrl_c(process) == (130, "", "stopped\n")


def test_while_figures_are_drawn(tmp_path):
    for record in records.load(records.COMMITTED, "table2", "sizes") + records.load(records.COMMITTED, "table3", "sizes"):
        records.append(tmp_path / "records", record)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cache_against_context.png").write_bytes(b"old")
    process = started("-m", "paper_figures", "--records", tmp_path / "records", "--out", tmp_path / "images")
    while not (tmp_path / "images" / "tucker_attention.png").exists() and process.poll() is None:
        time.sleep(0.002)
    assert after_ctrl_c(process) == (130, "", "stopped\n")
    images = {p.name: p for p in (tmp_path / "images").iterdir()}
    old = images.pop("cache_against_context.png")
    assert images and all(p.suffix == ".png" and Image.open(p).load() for p in images.values())
    assert old.read_bytes() == b"old" or Image.open(old).load()


ENDS = {  # a program's text, and what it ends with
    "before its main": ("raise KeyboardInterrupt", 130, "stopped\n"),
    "in its main": ("main(KeyboardInterrupt)", 130, "stopped\n"),
    "in its main, which told": ("main(console.Told)", 130, ""),
    "in what its main imports": ("main(made_of(KeyboardInterrupt()))", 130, "stopped\n"),
    "in what forgets it": ("main(ForgetsIt())", 130, "stopped\n"),
    "an error in its main": ("main(made_of(KeyError()))", 1, f"ImportError: initialization failed\n{console.BUG}\n"),
    "after its main": ("main(None); os.kill(os.getpid(), 2); time.sleep(9)", 130, "stopped\n"),
    "what was given, in its main": ("main(ValueError('of theirs'))", 1, "error: of theirs\n"),
    "an error": ("raise ValueError('of ours')", 1, "ValueError: of ours\n"),
    "nothing": ("main(None)", 0, ""),
}


@pytest.mark.parametrize("when", ENDS)
def test_ctrl_c_before_in_and_after_main(when):
    what, status, told = ENDS[when]
    program = f"""
import os, sys, time
from reproduce import console
console.leave_at_once()
class ForgetsIt(ValueError):  # as compiled parts raise where Ctrl-C met them
    pass
def work(error):
    print("output")
    if isinstance(error, ForgetsIt):
        try:
            os.kill(os.getpid(), 2)
            time.sleep(9)
        except KeyboardInterrupt:
            pass
    if error:
        raise error
    return 0
def made_of(error):
    made = ImportError("initialization failed")
    made.__cause__ = error
    return made
def main(error):
    status = console.at_the_terminal(lambda: work(error))()
    if status:
        sys.exit(status)
{what}
"""
    process = started("-c", program)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and err.endswith(told) and ("Traceback" in err) == (status == 1 and "error:" not in err)
    assert out == ("output\n" if "main(" in what else "")


def test_while_main_runs_ctrl_c_is_an_exception_again(monkeypatch):
    seen, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.leave_at_once()
        assert console.at_the_terminal(lambda: seen.append(signal.getsignal(signal.SIGINT)) or 7)() == 7
        seen.append(signal.getsignal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        console.leave_at_once()
        seen.append(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [console._stop, console._leave, signal.SIG_IGN]  # who started it to ignore Ctrl-C is obeyed


@pytest.mark.parametrize("writes", [False, True])
def test_while_main_loads_a_library_the_program_ends_at_once(tmp_path, writes):
    """No exception passes through compiled parts; but where a file is written, its part is removed first."""
    (tmp_path / "late.py").write_text(
        "import os, time\ntry:\n    os.kill(os.getpid(), 2)\n    time.sleep(9)\nfinally:\n    print('through', flush=True)\n",
        encoding="utf-8",
    )
    program = f"""
import importlib, sys
from pathlib import Path
from reproduce import console
from reproduce.store.files import write_atomically
console.leave_at_once()
@console.at_the_terminal
def main():
    if {writes}:
        write_atomically(Path(sys.argv[1]), lambda file: importlib.import_module("late"))
    importlib.import_module("late")
sys.exit(main())
"""
    process = started("-c", program, tmp_path / "file", PYTHONPATH=f"{tmp_path}:{ROOT}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "through\n" if writes else "", "stopped\n")
    assert not list(tmp_path.glob("file*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, console.Told])
def test_what_was_half_made_when_it_was_stopped_is_cleared_away_unheard(error, monkeypatch, capsys):
    class HalfMade:
        def __del__(self):
            raise AttributeError("half made")

    def stopped() -> int:
        half = HalfMade()
        raise error(half)

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    assert console.at_the_terminal(stopped)() == 130
    assert "half made" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "unraisablehook", theirs := lambda _: None)  # control: another program's is left to it
    assert console.at_the_terminal(stopped)() == 130 and sys.unraisablehook is theirs


def test_without_a_program_around_it_main_answers_all_the_same(monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("reproduce.__main__.show_records", stopped)
    assert run_here("report") == 130 and capsys.readouterr().err == "stopped\n"


def test_before_its_first_checkpoint_a_run_says_that_it_will_start_again(tmp_path, capsys):
    def batch_at(step):
        if step == 3:
            raise KeyboardInterrupt
        return (torch.ones(2, 4),)

    settings = TrainConfig(steps=20, batch_size=2, learning_rate=1e-2, log_every=10, checkpoint_every=10)
    with pytest.raises(console.Told):
        train(torch.nn.Linear(4, 4), batch_at, lambda m, x: m(x).square().mean(), settings, tmp_path / "c.pt", "run")
    said = capsys.readouterr().out
    assert said == "run: stopped in step 3; the same command starts again: there is no checkpoint yet\n"
