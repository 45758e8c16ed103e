"""What tests run in other processes: toy models trained by several workers, and the command line with a toy preset."""

import dataclasses
import functools
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from reproduce.experiments import table2
from reproduce.models.gpt2 import GPT2
from reproduce.models.rows import TABLE2, Row
from reproduce.train import language
from reproduce.train.distributed import Workers, started
from reproduce.train.language import LanguagePreset, batch_of
from reproduce.train.loop import train
from reproduce.train.recipes import Recipe
from reproduce.train.settings import TrainConfig

TEXT = (np.arange(5000) ** 2 // 7 % 61 % np.tile([3, 5, 7, 11, 13], 1000)).astype(np.uint16)  # enough order to learn something
CONFIG = TrainConfig(steps=18, batch_size=8, learning_rate=2e-3, warmup_steps=4, log_every=2, checkpoint_every=6)
ROWS = {torch.float32: TABLE2[0].narrowed(16), torch.float64: Row("Tucker", ranks=(8, 8, 8), shared_kv=True)}  # by precision
CONTEXT = 16
MUON_ROW = Row("Tucker", ranks=(8, 20, 24))  # a core whose slices Muon orthogonalises
TOY = LanguagePreset(
    narrower=16,
    n_layers=1,
    context=CONTEXT,
    vocab_size=300,
    validation_tokens=4096,
    train=TrainConfig(steps=150, batch_size=8, learning_rate=2e-3, warmup_steps=10, log_every=10, checkpoint_every=10),
)


class Stopped(Exception):
    pass


class Apart(Workers):
    """Workers that take their own rows and keep their gradients to themselves."""

    def shared(self, model, loss_of):
        return functools.partial(loss_of, model)


def run(
    workers: Workers,
    dtype: torch.dtype,
    checkpoint: Path,
    rows: slice | None = None,
    stop: int = -1,
    compiled: bool = False,
    muon: bool = False,
    again: bool = False,
) -> list[float]:
    """Train a toy GPT-2.

    rows: in place of this worker's own; stop: a step that raises Stopped; muon: in place of AdamW; again: queries made again.

    Returns: the loss of every step; on the first worker also that of the trained model, made whole, on the first batch.
    """
    fresh = lambda: GPT2(64, CONTEXT, 48, 12, 2, (MUON_ROW if muon else ROWS[dtype]).build).to(dtype)  # noqa: E731
    torch.manual_seed(0)
    model = fresh()
    for block in model.blocks:
        block.attention.recompute = again
    workers = workers.settled(CONFIG.batch_size, parameters=1)
    seen = []

    def batch_at(step):
        if step == stop:
            raise Stopped
        return (batch_of(TEXT, step, 0, CONFIG.batch_size, CONTEXT, rows or workers.rows(CONFIG.batch_size)),)

    def loss_of(model, windows):  # like LanguageModel.loss, in the model's own precision
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        seen.append(loss.detach().double())
        return loss

    model.compile_parts = functools.partial(model.compile_parts, backend="aot_eager")  # needs no C++ compiler
    settings = dataclasses.replace(CONFIG, compiled=compiled, optimizer="muon" if muon else "adamw")
    train(model, batch_at, loss_of, settings, checkpoint, "toy", optimizer_of=Recipe().optimizer, workers=workers)
    steps = torch.stack(seen).unflatten(0, (-1, CONFIG.batch_size // workers.count // workers.micro_batch)).mean(1)
    curve = workers.mean(steps).tolist()
    whole = workers.unsharded(model, fresh)
    if workers.is_first:
        with torch.compiler.set_stance("force_eager"):  # or the whole batch, of another size, would be compiled for
            curve.append(loss_of(whole, batch_of(TEXT, 0, 0, CONFIG.batch_size, CONTEXT)).item())
    return curve


def together(folder: Path) -> None:
    """All that two workers train, in one start of them; their curves go to curves.json."""
    curves = {}
    with started("cpu") as (workers, _):
        for dtype in ROWS:
            for sharding in ("ddp", "fsdp"):
                for micro_batch in (None, 2):
                    chosen = dataclasses.replace(workers, sharding=sharding, micro_batch=micro_batch)
                    name = f"{dtype} {sharding} {micro_batch}"
                    curves[name] = run(chosen, dtype, folder / f"{name}.pt")
        this = functools.partial(run, dtype=torch.float64)
        sharded = dataclasses.replace(workers, sharding="fsdp")
        for sharding in ("ddp", "fsdp"):
            chosen = dataclasses.replace(workers, sharding=sharding, micro_batch=2)
            curves[f"compiled {sharding}"] = this(chosen, checkpoint=folder / f"compiled {sharding}.pt", compiled=True)
            curves[f"again {sharding}"] = this(chosen, checkpoint=folder / f"again {sharding}.pt", again=True)
            curves[f"muon {sharding}"] = this(chosen, checkpoint=folder / f"muon {sharding}.pt", muon=True)
        curves["wrong rows"] = this(workers, checkpoint=folder / "rows.pt", rows=slice(0, CONFIG.batch_size // 2))
        apart = Apart(workers.rank, workers.count)
        curves["not averaged"] = this(apart, checkpoint=folder / f"apart{workers.rank}.pt")
        try:
            this(workers, checkpoint=folder / ("alone.pt" if workers.is_first else "elsewhere.pt"))
        except ValueError as error:
            curves["apart"] = str(error)
        # On checkpoints: one process stopped and left `alone.pt`; two stop here and leave `fsdp.pt`, which one takes up.
        curves["alone, then fsdp"] = this(sharded, checkpoint=folder / "alone.pt")
        try:
            this(sharded, checkpoint=folder / "fsdp.pt", stop=14)
        except Stopped:
            workers.wait()
        if workers.is_first:
            (folder / "curves.json").write_text(json.dumps(curves), encoding="utf-8")


def wordy(last: str, folder: Path) -> None:
    """Many errors from every worker; when both have written them, they fail, or wait until they are ended."""
    for n in range(1000):
        sys.stderr.write(f"\n{os.environ['RANK']} says {n}\n")
    sys.stderr.flush()
    (folder / os.environ["RANK"]).touch()
    while last == "waits" or len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    sys.exit(1)


def command_line() -> None:
    """`python -m reproduce` with the toy preset.

    It leaves its process number in the folder $PIDS, and kills itself in the step $KILLED_IN_STEP.
    """
    if folder := os.environ.get("PIDS"):
        Path(folder, os.environ.get("RANK", "0")).write_text(str(os.getpid()), encoding="utf-8")
    if last := os.environ.get("KILLED_IN_STEP"):
        language.batch_of = functools.partial(batch_or_death, int(last))
    table2.PRESETS["smoke"] = TOY
    runpy.run_module("reproduce", run_name="__main__", alter_sys=True)


def batch_or_death(last: int, tokens: np.ndarray, step: int, *more) -> torch.Tensor:
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch_of(tokens, step, *more)


if __name__ == "__main__":
    if sys.argv[1] == "together":
        together(Path(sys.argv[2]))
    elif sys.argv[1] == "wordy":
        wordy(sys.argv[2], Path(sys.argv[3]))
    else:
        command_line()
