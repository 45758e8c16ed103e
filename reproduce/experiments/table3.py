"""Table 3, LLaMA3-1B: sizes at the paper's shape under both readings of the unit, and losses at a scale the preset can train.

Multi-head and grouped-query rows turn keys head by head; MLA and Tucker turn their latent (Def. 3.1, Cor. 3.2.1). Which rotary
embedding the paper trained with is not known to us, nor its base.
"""

import dataclasses

from ..models.rows import TABLE3, TABLE3_BEST, TABLE3_NORMED
from ..train.arguments import LANGUAGE
from ..train.dry_run import Plan
from ..train.language import LanguagePreset, plan_of, train_rows
from ..train.options import Options
from ..train.recipes import Recipe
from ..train.runs import selected
from ..train.settings import TrainConfig
from .sizes import record_sizes
from .table2 import FRESH, ON_GPU

PAPER_SHAPE = {"d_model": 2048, "n_heads": 32}
ROPE_BASE = 500_000.0  # Llama 3's own
ROWS = {"gpu-fresh": TABLE3_BEST}  # by preset; the paper's elsewhere

TAKES = (*LANGUAGE, "workers")
PRESETS = {
    "smoke": LanguagePreset(
        narrower=8,
        n_layers=2,
        context=128,
        vocab_size=1024,
        validation_tokens=65_536,
        train=TrainConfig(steps=100, batch_size=8, learning_rate=2e-3, warmup_steps=12),
    ),
    # Half the paper's width with as many heads, a quarter of LLaMA3-1B's layers, 49M tokens; settings from Table 2's sweep,
    # but for MQA and MLA, which do better here at Tucker's rate.
    "gpu": LanguagePreset(
        narrower=2,
        n_layers=4,
        context=1024,
        vocab_size=50_257,
        validation_tokens=300_000,
        train=dataclasses.replace(ON_GPU, steps=1500, warmup_steps=600),
        seeds=(0, 1, 2),
        keep_models=False,
        learning_rates={row.label: 2.4e-3 for row in TABLE3 if row.label not in ("MHA", "GQA n_KV=8")},
        observe_every=100,
    ),
    # The model of "gpu" trained as Table 2's "gpu-fresh": Muon, every token read once. The other rows run where --rows names them.
    # Seed 0 tries two rates; those that validation text prefers belong here before another seed runs.
    "gpu-fresh": dataclasses.replace(FRESH, narrower=2, n_layers=4, learning_rates={}),
    # The paper's own scale; LLaMA3-1B's public depth, since the paper's number of layers is not known to us.
    "paper": LanguagePreset(
        narrower=1,
        n_layers=16,
        context=2048,
        vocab_size=50_257,
        validation_tokens=4_000_000,
        train=dataclasses.replace(
            ON_GPU,
            steps=100_000,
            batch_size=256,
            learning_rate=3e-4,
            warmup_steps=2000,
            log_every=50,
            checkpoint_every=500,
        ),
        micro_batch=8,
        text="openwebtext2",
    ),
}
KNOWN = ("LLaMA3-1B with d 2048 and 32 heads", "OpenWebText2", "100,000 steps", "the rows' ranks")
OURS = (
    "16 layers, the public 1B model's",
    "2,048 tokens",
    "the global batch",
    "AdamW at a peak rate of 3e-4 for every row",
    "GPT-2's byte pairs in place of Llama 3's",
    "a cleaned copy of OpenWebText2",
    "which rotary embedding, its base 500,000 and its pairing (DEVIATIONS.md)",
    "initialisation (DEVIATIONS.md)",
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
        ValueError: for a label that no row has.
    """
    known = ROWS.get(options.preset, TABLE3)
    beside = [row for row in (*TABLE3, *TABLE3_NORMED) if row not in TABLE3_BEST] if known is TABLE3_BEST else []
    rows = [(row, Recipe()) for row in selected(known, options.rows, beside)]
    model, preset = {"model": "llama", "rope_base": ROPE_BASE, **PAPER_SHAPE}, PRESETS[options.preset]
    if options.dry_run:
        return [plan_of("table3", rows, model, preset, options, KNOWN, OURS)]
    record_sizes("table3", TABLE3, PAPER_SHAPE, options)
    train_rows("table3", rows, model, preset, options)
    return []
