"""The command line as a user meets it: resumable, with errors that say what to do."""

import functools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import run_here, unmeasured
from setuptools import find_packages

from reproduce import __main__
from reproduce.__main__ import EXPERIMENTS, NOT_IN_ALL
from reproduce.train.arguments import labels
from reproduce.train.distributed import Workers
from reproduce.train.options import Options

ROOT = Path(__file__).parent.parent
ROW = "Tucker [8,64,64]"
TOYS = str(ROOT / "tests" / "workers.py")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "reproduce", *arguments]


def run(*arguments: str, **options):
    return subprocess.run(command(*arguments), capture_output=True, encoding="utf-8", cwd=ROOT, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(20):
        (folder / f"{n:02}.txt").write_text("".join(f"{n} times {k} makes {n * k}.\n" for k in range(400)), encoding="utf-8")
    return folder


def training(text, folder, *more: str) -> list[str]:
    places = ["--text", str(text), "--out", str(folder), "--records", str(folder / "records")]
    return ["table2", "--rows", ROW, *places, *more]


def records_in(folder) -> list[dict]:
    return json.loads((folder / "records" / "table2.smoke.json").read_text(encoding="utf-8"))


def test_killed_and_resumed_equals_uninterrupted_to_the_last_digit(text, tmp_path, warm):
    train_toys = functools.partial(warm.run, TOYS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_toys(*training(text, whole, "--seeds", "0,1")).returncode == 0
    assert train_toys(*training(text, killed), KILLED_IN_STEP="14").returncode == -signal.SIGKILL
    assert list(killed.glob("checkpoints/*.pt")) and not (killed / "records" / "table2.smoke.json").exists()
    resumed = train_toys(*training(text, killed))
    assert resumed.returncode == 0
    assert b" 10/150" in resumed.stderr and b" 0/150" not in resumed.stderr  # it did not start again
    (expected, other), (actual,) = ([r["metrics"] for r in records_in(folder)] for folder in (whole, killed))
    for metric in ("validation_loss", "bits_per_byte", "curve"):
        assert actual[metric] == expected[metric] != other[metric]  # control: another seed has other losses
    assert not list(killed.glob("checkpoints/*.pt"))  # dropped once the record is written
    again = train_toys(*training(text, killed))
    assert again.returncode == 0 and b"on record already, skipped" in again.stdout


def test_ctrl_c_says_how_to_go_on(text, tmp_path, warm):
    process = subprocess.Popen(
        [warm.python, TOYS, *training(text, tmp_path, "--steps", "100000")],
        cwd=ROOT,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    while not list(tmp_path.glob("checkpoints/*.pt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from the last checkpoint" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["table2", "--rows", "MHA,Tukker"], 1, "no row is called Tukker; there are: MHA; GQA n_KV=4"),
        (["table2", "--text", "/nowhere"], 1, "--text /nowhere: no such file or folder"),
        (["figure3", "--images", "/nowhere.npz"], 1, "--images /nowhere.npz: no such file"),
        (["report", "--records", "/nowhere"], 1, "/nowhere holds no records"),
        (["figure3", "--preset", "gpu-sweep"], 2, "--preset: invalid choice: 'gpu-sweep'"),
        (["table2", "--seeds", "one"], 2, "'one' is not a list of integers such as 0,1,2"),
        (["table2", "--seeds", "-1"], 2, "'-1' is not a list of integers"),
        (["table2", "--steps", "0"], 2, "'0' is not a number of 1 or more"),
        (["table2", "--device", "toaster"], 1, "--device toaster cannot be used here"),
        (["compress", "--ranks", "8,64"], 2, "'8,64' is not a list of head,query,key ranks such as 8,64,64;8,32,32"),
        (["compress", "--model", "/nowhere/at/all"], 1, "--model /nowhere/at/all: no such file or folder"),
        (["spectra", "--model", "/nowhere.safetensors"], 1, "/nowhere.safetensors is not a readable safetensors file"),
        (["table9"], 2, "invalid choice: 'table9'"),
        (["compress", "--ranks", "4,4,4", "--save", "x"], 1, "--save keeps one compressed model; say of which with --model"),
        (["decode", "--text", "novel.txt"], 2, "unrecognized arguments: --text novel.txt"),
        (["exactness", "--dry-run"], 2, "unrecognized arguments: --dry-run"),
        (
            ["speed", "--rows", "layers,naps"],
            1,
            "no section is called naps; there are: limits; layers; contexts; memory; decode; models",
        ),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_allowed(arguments, code, message, tmp_path, capsys):
    if arguments[0] in ("table2", "figure3"):
        arguments = [*arguments, "--out", str(tmp_path), "--records", str(tmp_path / "records")]
    assert run_here(*arguments) == code and message in capsys.readouterr().err


def test_an_error_is_one_line_and_an_exit_status():
    result = run("report", "--records", "/nowhere")
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == "error: /nowhere holds no records; run an experiment first, or name another folder\n"


def test_where_the_wheel_is_installed_what_tests_the_code_says_that_it_needs_the_repository(tmp_path):
    packages = find_packages(
        ROOT, **tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]["find"]
    )
    assert {"reproduce.store", "tucker_ref.kernels"} <= set(packages) and "reproduce.trust" not in packages
    for package in (ROOT / name.replace(".", "/") for name in packages):
        (tmp_path / package.relative_to(ROOT)).mkdir(parents=True, exist_ok=True)
        for file in package.glob("*.py"):
            shutil.copy(file, tmp_path / file.relative_to(ROOT))
    here = {"cwd": tmp_path, "env": unmeasured() | {"PYTHONPATH": str(tmp_path)}, "capture_output": True, "encoding": "utf-8"}
    result = subprocess.run(command("fuzz", "--preset", "smoke"), **here)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == "error: fuzz tests the code and is not in the wheel; run it in the repository\n"
    result = subprocess.run(command("table1"), **here)
    assert result.returncode == 0 and "Table 1" in result.stdout  # control: the rest runs


@pytest.mark.parametrize("name", __main__.TRUST)
def test_a_command_that_is_not_installed_is_no_unknown_command(name, monkeypatch, capsys):
    monkeypatch.delitem(EXPERIMENTS, name)
    assert run_here(name) == 1 and f"error: {name} tests the code" in capsys.readouterr().err


def test_labels_may_hold_commas():
    assert labels("MHA, Tucker [8,64,64],MLA shared d_c=128") == ("MHA", "Tucker [8,64,64]", "MLA shared d_c=128")
    assert labels("") == ()


def test_help_teaches(capsys, warm):
    result = warm.run("-m", "reproduce", "--help")
    assert result.returncode == 0
    for word in ("table2", "figure3", "compress", "report", "claims", "examples:", "goes on from its last checkpoint"):
        assert word in result.stdout.decode()
    assert run_here("table3", "--help") == 0
    own = capsys.readouterr().out
    assert "Table 3, LLaMA3-1B: sizes" in own and "{smoke,gpu,gpu-fresh,paper}" in own and "gpu-sweep" not in own
    assert "--dry-run" in own and "--images" not in own


def test_without_docstrings_as_with_oo_commands_run_all_the_same(capsys, monkeypatch):
    for module in EXPERIMENTS.values():
        monkeypatch.setattr(module, "__doc__", None)
    assert run_here("table3", "--help") == 0
    assert "--dry-run" in capsys.readouterr().out


GIVEN = {  # one argument of each group of options, and where it arrives
    "device": ("--device", "cpu:0", {"device": "cpu:0"}),
    "rows": ("--rows", "MHA", {"rows": ("MHA",)}),
    "seeds": ("--seeds", "3,4", {"seeds": (3, 4)}),
    "training": ("--steps", "9", {"steps": 9}),
    "text": ("--text", "novel.txt", {"text": "novel.txt"}),
    "validation": ("--validation", "other.txt", {"validation": "other.txt"}),
    "bpe": ("--bpe", "gpt2", {"bpe": "gpt2"}),
    "images": ("--images", "x.npz", {"images": "x.npz"}),
    "passes": ("--passes", "0.5", {"passes": 0.5}),
    "test": ("--test", "a.txt,b.xz", {"test": ("a.txt", "b.xz")}),
    "workers": ("--micro-batch", "2", {"workers": Workers(micro_batch=2)}),
    "model": ("--model", "gpt2", {"model": "gpt2"}),
    "pretrained": ("--model", "vit", {"model": "vit"}),
    "compression": ("--ranks", "4,4,4", {"ranks": ((4, 4, 4),)}),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_receives_what_it_takes_and_defaults_for_the_rest(name, monkeypatch):
    received = []
    monkeypatch.setattr(EXPERIMENTS[name], "run", received.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    takes = EXPERIMENTS[name].TAKES
    for group, (option, value, where) in GIVEN.items():
        taken = group in takes or (option == "--model" and {"model", "pretrained"} & {*takes})
        assert run_here(name, option, value) == (0 if taken else 2)
        if taken:
            assert received.pop() == Options("smoke", Path("out"), Path("out/records"), **where)
    assert run_here(name) == 0
    assert received == [Options("smoke", Path("out"), Path("out/records"))]


def test_the_command_that_is_proposed_can_be_repeated(tmp_path, capsys):
    """Folders are called as people call them."""
    for name in ("plain", "my results", "l'été; 日本"):
        assert run_here("table1", "--out", tmp_path, "--records", tmp_path / name) == 0
        (proposed,) = re.findall(r"`(python -m reproduce report .*)` draws", capsys.readouterr().out)
        _, _, program, *arguments = shlex.split(proposed)
        assert program == "reproduce" and arguments == ["report", "--records", str(tmp_path / name)]
        assert run_here(*arguments) == 0 and "Table 1" in capsys.readouterr().out
    assert proposed.split()[5:] != [str(tmp_path / name)]  # control: as it is, a shell would read it otherwise


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_experiment_takes_a_held_out_text_that_it_does_not_read(name):
    """Taken and not read, it would leave whoever names it with figures of another text."""
    module = EXPERIMENTS[name]
    reads = "options.validation" in Path(module.__file__).read_text(encoding="utf-8")
    trains = "optimizer" in module.TAKES  # by `train_rows`, which reads it
    assert ("validation" in module.TAKES) == (reads or trains)


def test_an_experiment_that_several_workers_cannot_train_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "started", lambda *_: nullcontext((Workers(count=2), "cpu")))
    assert run_here("decode", "--device", "cpu") == 1
    assert "decode does not run under torchrun; table2, table3, figure3 do" in capsys.readouterr().err


def test_make_reproduce_runs_every_experiment_of_all():
    """In its own order, two at a time: the Makefile names them once more."""
    targets = re.search(r"addprefix smoke-,(.*?)\)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()
    alone = re.findall(r"-m reproduce (\w+) --out out --records", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert sorted([*targets, *alone]) == sorted(set(EXPERIMENTS) - set(NOT_IN_ALL))
