"""Table 2, GPT-2: sizes at the paper's shape, and validation losses at a scale that the preset can train.

The rows themselves stand in models/rows.py.
"""

import dataclasses
import itertools

from ..models.rows import TABLE2, TABLE2_ALLOCATIONS, TABLE2_BESIDE, TABLE2_BEST, TABLE2_EQUAL, TABLE2_JUDGED, TABLE2_NORMED
from ..train.arguments import LANGUAGE
from ..train.dry_run import Plan
from ..train.language import LanguagePreset, plan_of, train_rows
from ..train.options import Options
from ..train.recipes import Recipe
from ..train.runs import selected
from ..train.settings import TrainConfig
from .sizes import record_sizes

PAPER_SHAPE = {"d_model": 768, "n_heads": 12, "n_layers": 12, "context": 1024}
ON_GPU_ROWS = (*TABLE2, *TABLE2_BESIDE, *TABLE2_EQUAL)  # where a GPU trains them, more than the paper's seven
FRESH_ROWS = (*TABLE2_BEST, *TABLE2_NORMED)
ROWS = {  # by preset; the paper's elsewhere
    "gpu": ON_GPU_ROWS,
    "gpu-fresh": FRESH_ROWS,
    "gpu-fresh-narrow": TABLE2_JUDGED,
    "gpu-fresh-allocations": tuple(row.normed() for row in itertools.chain(*TABLE2_ALLOCATIONS.values())),
    "gpu-fresh-optimizers": (TABLE2[0], TABLE2[0].normed()),
}

FULL_SHAPE = dict(narrower=1, n_layers=12, context=1024, vocab_size=50_257, validation_tokens=300_000)
ON_GPU = TrainConfig(
    steps=3052,
    batch_size=32,
    learning_rate=1.2e-3,
    warmup_steps=200,
    precision="bfloat16",
    compiled=True,
    log_every=20,
    checkpoint_every=500,
)

# The sweep's best rates that differ from `ON_GPU`'s; the Tucker rows with all heads and the one with a shared latent break down there.
SWEPT_RATES = {
    row.label: 2.4e-3
    for row in ON_GPU_ROWS
    if row.mechanism == "Tucker" and row.ranks[0] < PAPER_SHAPE["n_heads"] and not row.shared_kv
}

# Where validation text preferred another rate than that of `FRESH`, for rows whose grid is whole: locked before any new seed of theirs ran.
# MLA with separate latents and norms on them stays at `FRESH`'s.
LOCKED_RATES = dict.fromkeys(
    ("MHA QK-norm", "GQA n_KV=4 QK-norm", *(f"Tucker {ranks} QK-norm" for ranks in ("[8,128,128]", "[8,128,64]", "[8,64,64]"))),
    9.6e-3,
)
FRESH = LanguagePreset(
    **FULL_SHAPE,
    train=dataclasses.replace(
        ON_GPU, steps=1980, warmup_steps=400, learning_rate=4.8e-3, checkpoint_every=1000, optimizer="muon"
    ),
    keep_models=False,
    observe_every=100,
    one_pass=True,
    learning_rates=LOCKED_RATES,
)

TAKES = (*LANGUAGE, "workers")
PRESETS = {
    "smoke": LanguagePreset(
        narrower=4,
        n_layers=2,
        context=128,
        vocab_size=1024,
        validation_tokens=65_536,
        train=TrainConfig(steps=250, batch_size=16, learning_rate=2e-3, warmup_steps=25),
    ),
    # The paper's shape at a third of the budget of "gpu", to compare learning rates.
    "gpu-sweep": LanguagePreset(
        **FULL_SHAPE,
        train=dataclasses.replace(ON_GPU, steps=1000, warmup_steps=100, learning_rate=6e-4),
        keep_models=False,
        observe_every=100,
    ),
    # The paper's shape and 100M tokens, with the sweep's long warm-up; every row at the best of the rates that were tried here, which
    # is the sweep's for all but the one that is named.
    "gpu": LanguagePreset(
        **FULL_SHAPE,
        train=dataclasses.replace(ON_GPU, warmup_steps=800),
        seeds=(0, 1, 2),
        observe_every=100,
        learning_rates=SWEPT_RATES | {"Tucker [8,128,128]": 1.2e-3},
    ),
    # Each mechanism at its best: Muon, every token of two shards of text read once, rates from one grid for all rows.
    "gpu-fresh": FRESH,
    # The judged rows with 5.3M parameters beside the embedding of multi-head attention, 12 tokens for each. Seed 0 tried four rates.
    # Validation text preferred the same one for all six rows; it stands here for all passes, since before another seed ran.
    "gpu-fresh-narrow": dataclasses.replace(
        FRESH, narrower=4, learning_rates={}, train=dataclasses.replace(FRESH.train, learning_rate=1.92e-2)
    ),
    # Where a given number of parameters should go, at the setting that is best for the three rows whose parameters they are; these
    # stand in "gpu-fresh", with the same batches. Seed 0 chooses one of each size, which seeds 1 to 5 judge.
    "gpu-fresh-allocations": dataclasses.replace(FRESH, train=dataclasses.replace(FRESH.train, learning_rate=9.6e-3)),
    # Multi-head attention alone, whose models are kept: `spectra` asks of them whether ranks depend on the optimiser. Muon's rates are
    # those that validation text preferred in "gpu-fresh"; those of AdamW are named with --optimizer adamw --learning-rate.
    "gpu-fresh-optimizers": dataclasses.replace(FRESH, keep_models=True, learning_rates={"MHA": 2.4e-3, "MHA QK-norm": 9.6e-3}),
    # The paper's own scale; where it tells no setting, those of nanoGPT's GPT-2, which takes as many steps on the same text.
    "paper": LanguagePreset(
        **(FULL_SHAPE | {"validation_tokens": 4_000_000, "keep_models": True}),
        train=dataclasses.replace(
            ON_GPU,
            steps=600_000,
            batch_size=480,
            learning_rate=6e-4,
            warmup_steps=2000,
            log_every=100,
            checkpoint_every=1000,
        ),
        micro_batch=20,
        text="openwebtext",
    ),
}
KNOWN = ("GPT-2 with d 768, 12 heads, 12 layers, 1,024 tokens", "OpenWebText", "600,000 steps", "the rows' ranks")
OURS = (
    "the global batch",
    "AdamW at a peak rate of 6e-4 for every row",
    "GPT-2's own byte pairs",
    "initialisation (DEVIATIONS.md); no biases",
    "one document in 2,000 held out",
    "one run per row",
)


def run(options: Options) -> list[Plan]:
    """One record with the sizes of all rows, then one per trained row and seed.

    Args:
        options: `rows` by label, `seeds`, `text`, workers, and what changes the training.

    Returns:
        The plan of a dry run; otherwise nothing.

    Raises:
        ValueError: for a label that no row of the preset has.
    """
    rows = [(row, Recipe()) for row in selected(ROWS.get(options.preset, TABLE2), options.rows)]
    model, preset = {"model": "gpt2", **PAPER_SHAPE}, PRESETS[options.preset]
    if options.dry_run:
        return [plan_of("table2", rows, model, preset, options, KNOWN, OURS)]
    record_sizes("table2", TABLE2, PAPER_SHAPE, options)
    train_rows("table2", rows, model, preset, options)
    return []
