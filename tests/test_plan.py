"""The dry run: numbers that a real model, optimiser and checkpoint confirm, and the copy of it in docs/scale.md."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import a_record, run_here

from reproduce.__main__ import EXPERIMENTS
from reproduce.experiments import table2, table3
from reproduce.models.block import Block
from reproduce.models.rows import TABLE2_ALLOCATIONS, TABLE3_BEST, Row
from reproduce.report import plans
from reproduce.store import records
from reproduce.train import dry_run
from reproduce.train.arguments import labels, rate
from reproduce.train.distributed import Workers
from reproduce.train.language import passes_of, settings_of
from reproduce.train.loop import train
from reproduce.train.options import Options
from reproduce.train.recipes import Recipe
from reproduce.train.settings import TrainConfig

PAGE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")


def plan(tmp_path, capsys, module=table2, workers=Workers(count=8), **changes) -> str:  # noqa: B008 (frozen)
    options = Options("paper", tmp_path / "out", tmp_path / "records", workers=workers, dry_run=True)
    options = dataclasses.replace(options, **changes)
    plans.show(module.run(options), options)
    assert not list(tmp_path.iterdir())  # nothing is written
    return capsys.readouterr().out


QUOTED = re.findall(r"^python -m reproduce (\w+) --preset paper --dry-run --gpus (\d+) --rows \"(.*)\"$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name, gpus, rows", QUOTED, ids=[name for name, *_ in QUOTED])
def test_the_page_quotes_the_dry_run(tmp_path, capsys, name, gpus, rows):
    """Where it fails: what that command prints, up to the formulas, belongs there."""
    printed = plan(tmp_path, capsys, EXPERIMENTS[name], Workers(count=int(gpus)), rows=labels(rows))
    assert f"```text\n{printed.split(plans.FORMULAS)[0].strip()}\n```" in PAGE


def test_the_page_quotes_every_experiment():
    assert [name for name, *_ in QUOTED] == ["table2", "table3", "figure3"]


def test_llama_on_fresh_text_trains_five_rows_and_others_by_name(tmp_path, capsys):
    def shown(*rows):
        printed = plan(tmp_path, capsys, table3, Workers(), preset="gpu-fresh", rows=rows)
        assert "Muon, with AdamW beside it at a peak rate of 0.0048" in printed and "runs per row: 1" in printed
        return re.findall(r"^\| (\S.*?) +\| +[\d,.]+M", printed, re.MULTILINE)

    assert shown() == [row.label for row in TABLE3_BEST] and len(shown()) == 5
    assert all(label.endswith(("QK-norm", "latent norms")) for label in shown())  # as each does best in Table 2
    assert shown("Tucker [32,128,64] QK-norm", "MHA") == ["MHA", "Tucker [32,128,64] QK-norm"]
    with pytest.raises(ValueError, match="no row is called MHA QK-norm"):  # control: at the other presets
        plan(tmp_path, capsys, table3, Workers(), preset="gpu", rows=("MHA QK-norm",))


TRAINING = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
STILL_TO_RUN = re.search(r"^## What is still to run\n.*?```sh\n(.*?)```", TRAINING, re.MULTILINE | re.DOTALL)[1]
PLANNED = re.findall(r"^python -m reproduce (.*)\n#   (\d+) runs?, (\d+) minutes$", STILL_TO_RUN, re.MULTILINE)
MINUTES = {
    "table2 gpu-fresh": 2.45,
    "table2 gpu-fresh-narrow": 0.8,
    "table2 gpu-fresh-allocations": 2.45,
    "table3 gpu-fresh": 2.3,
}


@pytest.mark.parametrize("command, count, minutes", PLANNED)
def test_the_page_of_training_plans_runs_that_can_be_made(command, count, minutes, tmp_path, monkeypatch):
    """As many as it says, each at settings that are not refused; one way to spend parameters of each size stands for the chosen one."""
    given = dict(re.findall(r'^(\w+)="(.*)"$', STILL_TO_RUN, re.MULTILINE))
    given |= {"TEXT": "--text wiki", "CHOSEN": ",".join(rows[0].normed().label for rows in TABLE2_ALLOCATIONS.values())}
    words = shlex.split(re.sub(r"\$(\w+)", lambda found: given[found[1]], command))
    made = []

    def noted(experiment, rows, model, preset, options):
        for row, recipe in rows:
            for at_rate in options.at_each_rate():
                settings = settings_of(row, recipe, preset, at_rate)
                made.extend((row.label, settings, seed, passes_of(preset, at_rate)) for seed in options.seeds or preset.seeds)

    for module in (table2, table3):
        monkeypatch.setattr(module, "train_rows", noted)
    monkeypatch.setattr("reproduce.__main__.check_places", lambda places: None)
    assert run_here(*words, "--out", tmp_path / "out", "--records", tmp_path / "records", "--device", "cpu") == 0
    assert len(made) == len(set(map(str, made))) == int(count)
    full = table2.FRESH.train.steps
    took = sum(MINUTES[f"{words[0]} {words[2]}"] * settings.steps / full for _, settings, _, _ in made)
    assert abs(took - int(minutes)) < 1
    judges = "--test" in words
    assert {seed for _, _, seed, _ in made} <= (set(range(1, 7)) if judges else {0})  # the seed that chooses reads no test text


def test_every_planned_command_is_read():
    assert len(PLANNED) == STILL_TO_RUN.count("python -m reproduce") == 15


def test_a_plan_says_what_the_passes_change(tmp_path, capsys):
    printed = plan(
        tmp_path, capsys, preset="gpu-fresh-narrow", rows=("Tucker [8,64,64] QK-norm",), workers=Workers(), passes=0.5
    )
    assert "Steps: 990, which see 31,680 sequences" in printed and "200 warm-up steps" in printed
    assert "Changed on the command line: passes 0.5." in printed
    assert "each window of the text read once" in " ".join(printed.split())
    twice = plan(tmp_path, capsys, preset="gpu-fresh-narrow", rows=("Tucker [8,64,64] QK-norm",), workers=Workers(), passes=2.0)
    assert "Steps: 3,960" in twice and "each window of the text read 2 times" in " ".join(twice.split())


def test_hours_below_one_are_not_rounded_to_none(tmp_path, capsys):
    printed = plan(tmp_path, capsys, preset="gpu-fresh", rows=("MHA",), workers=Workers())
    assert re.search(r"MHA 0\.0[1-9] \(\d", " ".join(printed.split()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["table2", "--preset", "paper"],
            "is trained on openwebtext: name a folder with --text that `python -m reproduce prepare",
        ),
        (["table2", "--gpus", "8"], "--gpus is for --dry-run; how many train is said to torchrun: torchrun --nproc-per-node 8"),
        (["figure3", "--dry-run"], "figure3 knows --dry-run in its presets paper and gpu-tiny-imagenet alone"),
        (["prepare", "wikipedia"], "known are openwebtext, openwebtext2; any other text needs --files"),
    ],
)
def test_errors_say_what_to_do(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(*arguments, "--out", tmp_path / "out") == 1 and message in capsys.readouterr().err


def test_gpus_reach_the_plan_and_a_rate_is_read(tmp_path, monkeypatch, capsys):
    expected = plan(tmp_path, capsys, rows=("MHA",), learning_rate=1e-3)
    arguments = ["table2", "--preset", "paper", "--dry-run", "--rows", "MHA", "--learning-rate", "1e-3"]
    assert rate("1e-3") == 1e-3
    monkeypatch.chdir(tmp_path)
    for gpus, same in (("8", True), ("4", False)):  # the second is the control
        assert run_here(*arguments, "--gpus", gpus) == 0 and (capsys.readouterr().out == expected) == same


def test_what_the_command_line_changes_is_said(tmp_path, capsys):
    plain, changed = (plan(tmp_path, capsys, rows=("MHA",), **given) for given in ({}, {"steps": 1000, "learning_rate": 2e-3}))
    assert "Changed" not in plain and "Changed on the command line: steps 1,000, learning rate 0.002.\n" in changed
    assert "Known from the paper" in plain and "Known from the paper" in changed


def test_a_scale_of_ours_knows_nothing_from_the_paper(tmp_path, capsys):
    printed = plan(tmp_path, capsys, preset="gpu", rows=("MHA", "Tucker [8,64,64]"), workers=Workers())
    assert "paper" not in printed and "Our choice: AdamW at a peak rate of 0.0012 or 0.0024, by row; betas" in printed
    assert "bfloat16 autocast" in printed
    smoke = plan(tmp_path, capsys, preset="smoke", rows=("MHA",), workers=Workers())
    assert "at a peak rate of 0.002; betas" in smoke and "; float32; no dropout." in " ".join(smoke.split())


def test_a_vision_transformer_of_unknown_shape_has_no_plan(tmp_path, capsys):
    with pytest.raises(
        ValueError, match="--dry-run knows the shapes of google/vit-large-patch32-224-in21k and google/vit-base"
    ):
        plan(tmp_path, capsys, EXPERIMENTS["figure3"], model="vit_tiny_patch16_224")


def test_batches_steps_and_tokens_are_those_of_the_settings(tmp_path, capsys):
    printed = plan(tmp_path, capsys, workers=Workers(count=16, micro_batch=10), rows=("MHA",))
    assert "Global batch 480 sequences = 16 workers x 10 at a time x 3, 491,520 tokens a step." in printed
    assert "Steps: 600,000, which see 288,000,000 sequences, 294.9 billion tokens" in printed
    with pytest.raises(ValueError, match="480 cannot be shared evenly among 7 workers"):
        plan(tmp_path, capsys, workers=Workers(count=7))


def test_a_model_that_does_not_fit_is_named(tmp_path, capsys):
    printed = plan(tmp_path, capsys, rows=("MHA", "Tucker [8,64,64]"), gpu_memory=15.0)
    assert "TOO LARGE for 15 GB: MHA. Take a smaller --micro-batch" in printed  # the other is none
    assert "TOO LARGE" not in plan(tmp_path, capsys, rows=("MHA",), gpu_memory=16.0)


def test_hours_come_from_records_alone(tmp_path, capsys, monkeypatch):
    shape = {"model": "gpt2", "d_model": 768, "n_layers": 12, "context": 1024, "vocab_size": 50_257}
    made = a_record(method="MHA", device="NVIDIA A100", config=shape, metrics={"tokens_per_second": 100_000})
    others = [
        {"device": "2 threads on a CPU", "metrics": {"tokens_per_second": 10**9}},
        {"config": shape | {"n_layers": 2}, "metrics": {"tokens_per_second": 10**9}},
        {"metrics": {"tokens_per_second": 10**9, "workers": {"workers": 8}}},
        {"metrics": {"tokens_per_second": 90_000}},
        {"metrics": {"diverged_at": 20}},
    ]
    others = [dataclasses.replace(made, **changes) for changes in others]
    monkeypatch.setattr(dry_run, "load", lambda folder, experiment: [made, *others] if folder == records.COMMITTED else [])
    printed = plan(tmp_path, capsys, rows=("MHA", "GQA n_KV=4"))
    hours = 600_000 * 480 * 1024 / 100_000 / 8 / 3600
    said = f"MHA {hours:,.0f} (100,000 tokens/s on one NVIDIA A100). No record says whether its run had the card to itself:"
    assert said in " ".join(printed.split())
    monkeypatch.setattr(dry_run, "load", lambda folder, experiment: [])
    assert "Hours: no run at this shape is on record." in plan(tmp_path, capsys, rows=("MHA",))


def test_what_a_block_keeps_is_what_its_layers_read():
    """Counted by hand for multi-head attention: norms, four projections, softmax and MLP, in the precision of each."""
    d = 48
    block = Block(d, 4, 2, Row("MHA").build, causal=True)
    float32, bfloat16 = 4, 2
    norms = 2 * (float32 * d + 2 * float32)  # input, mean, deviation
    attention = bfloat16 * (3 * d + 3 * d + d) + 4 * float32  # its input per projection; q, k, v; z; four heads' softmax sums
    mlp = bfloat16 * (d + 4 * d + 4 * d)
    assert dry_run.kept_per_token(block) == norms + attention + mlp


def test_memory_of_weights_and_checkpoint_is_what_they_take(tmp_path):
    torch.manual_seed(0)
    config = table2.PRESETS["smoke"]
    options = Options("smoke", tmp_path, tmp_path)
    made = table2.plan_of(
        "table2", [(table2.TABLE2[0], Recipe())], {"model": "gpt2", **table2.PAPER_SHAPE}, config, options, (), ()
    )
    model = made.build("MHA")
    settings = TrainConfig(steps=1, batch_size=1, learning_rate=1e-3, log_every=1, checkpoint_every=1)
    train(model, lambda step: (torch.arange(9)[None],), type(model).loss, settings, tmp_path / "c.pt", "one step")
    alone, *halves = (Workers(count=count, sharding="fsdp").settled(16, 1) for count in (1, 2, 4))
    weights, gradients, moments, copies, *_ = dry_run.memory_parts(model, alone, made, 100.0)
    assert weights == sum(p.nbytes for p in model.parameters()) == gradients == moments / 2 == copies * 2
    assert (tmp_path / "c.pt").stat().st_size == pytest.approx(weights + moments, rel=0.01)
    for workers in halves:
        assert dry_run.memory_parts(model, workers, made, 100.0)[1:3] == (gradients / workers.count, moments / workers.count)
