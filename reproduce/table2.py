"""Table 2, GPT-2: attention and cache sizes at the paper's shape, and validation losses at a scale that this preset can train."""

import dataclasses
import functools
from dataclasses import dataclass

import torch

from .data.text import TextData, load_text
from .language import batch_of, next_token_loss, validate
from .models.gpt2 import GPT2
from .options import Options
from .records import append, new_record
from .rows import TABLE2, Row
from .runs import Run, override, selected
from .sizes import measure
from .training import TrainConfig, train

PAPER_SHAPE = {"d_model": 768, "n_heads": 12, "n_layers": 12, "context": 1024}


@dataclass(frozen=True)
class Preset:
    """narrower: by what factor d and all latent widths shrink (heads and head ranks stay); the rest as it says."""

    narrower: int
    n_layers: int
    context: int
    vocab_size: int
    validation_tokens: int
    train: TrainConfig
    seeds: tuple[int, ...] = (0,)


PRESETS = {
    "smoke": Preset(
        narrower=4,
        n_layers=2,
        context=128,
        vocab_size=1024,
        validation_tokens=65_536,
        train=TrainConfig(steps=300, batch_size=16, learning_rate=2e-3, warmup_steps=30),
    ),
}

# Learning rates are compared at a third of the token budget: 1,000 steps of 32,768 tokens.
PRESETS["gpu-sweep"] = Preset(
    narrower=1,
    n_layers=12,
    context=1024,
    vocab_size=50_257,
    validation_tokens=300_000,
    train=TrainConfig(
        steps=1000,
        batch_size=32,
        learning_rate=6e-4,
        warmup_steps=100,
        precision="bfloat16",
        compiled=True,
        log_every=20,
        checkpoint_every=500,
    ),
)


def run(options: Options) -> None:
    """One record with the sizes of all rows, then one per trained row and seed."""
    sizes = [measure(row, PAPER_SHAPE["d_model"], PAPER_SHAPE["n_heads"]) for row in TABLE2]
    append(options.records, new_record("table2", "sizes", "all rows", PAPER_SHAPE, {"rows": sizes}))
    preset, rows = PRESETS[options.preset], selected(TABLE2, options.rows)
    data = load_text(options.text, preset.vocab_size, options.out / "cache", options.validation, options.bpe)
    for row in rows:
        for seed in options.seeds or preset.seeds:
            train_row(row, seed, preset, data, options)


def train_row(row: Row, seed: int, preset: Preset, data: TextData, options: Options) -> None:
    """Train GPT-2 with this row's attention, narrowed to the preset's width, and record its validation loss."""
    settings = override(preset.train, options)
    narrow = row.narrowed(preset.narrower)
    d_model, n_heads = PAPER_SHAPE["d_model"] // preset.narrower, PAPER_SHAPE["n_heads"]
    config = {
        "row": row.config(),
        "attention": narrow.config(),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_layers": preset.n_layers,
        "context": preset.context,
        "vocab_size": data.vocab_size,
        "train": dataclasses.asdict(settings),
    }
    this = Run("table2", options, row.label, config, seed, data.describe())
    if this.is_done():
        return
    torch.manual_seed(seed)
    model = GPT2(data.vocab_size, preset.context, d_model, n_heads, preset.n_layers, narrow.build).to(options.device)

    def loss_of(model, step):
        windows = batch_of(data.train, step, seed, settings.batch_size, preset.context)
        return next_token_loss(model, windows.to(options.device, non_blocking=True))

    result = train(model, loss_of, settings, this.checkpoint, this.title)
    judge = functools.partial(validate, batch_size=settings.batch_size, precision=settings.precision, title=this.title)
    metrics = judge(model, data, preset.context, max_tokens=preset.validation_tokens)
    tokens_seen = settings.steps * settings.batch_size * preset.context
    this.finish(
        {
            **metrics,
            "tokens_seen": tokens_seen,
            "tokens_per_second": round(tokens_seen / result.seconds),
            "attention_parameters": sum(p.numel() for block in model.blocks for p in block.attention.parameters()),
            "cache_per_token": narrow.cost(d_model, n_heads).cache_per_token * preset.n_layers,
            "curve": result.curve,
        },
        result.seconds,
    )
