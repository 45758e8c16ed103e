"""Table 3, LLaMA3-1B: sizes at the paper's shape under both readings of the unit, and losses at a scale the preset can train.

Multi-head and grouped-query rows turn keys head by head; MLA and Tucker turn their latent (Def. 3.1, Cor. 3.2.1). Which rotary
embedding the paper trained with is not known to us, nor its base.
"""

import dataclasses

from .language import LanguagePreset, train_rows
from .options import Options
from .recipe import Recipe
from .rows import TABLE3
from .runs import selected
from .sizes import record_sizes
from .table2 import ON_GPU
from .training import TrainConfig

PAPER_SHAPE = {"d_model": 2048, "n_heads": 32}
ROPE_BASE = 500_000.0  # Llama 3's own

PRESETS = {
    "smoke": LanguagePreset(
        narrower=8,
        n_layers=2,
        context=128,
        vocab_size=1024,
        validation_tokens=65_536,
        train=TrainConfig(steps=100, batch_size=8, learning_rate=2e-3, warmup_steps=12),
    ),
    # Half the paper's width with as many heads, a quarter of LLaMA3-1B's layers, 49M tokens; rates as Table 2's sweep found them.
    "gpu": LanguagePreset(
        narrower=2,
        n_layers=4,
        context=1024,
        vocab_size=50_257,
        validation_tokens=300_000,
        train=dataclasses.replace(ON_GPU, steps=1500),
        seeds=(0, 1, 2),
        keep_models=False,
        learning_rates={"Tucker [32,128,64]": 2.4e-3, "Tucker [32,64,64]": 2.4e-3},
        observe_every=100,
    ),
}


def run(options: Options) -> None:
    """One record with the sizes of all rows, then one per trained row and seed."""
    record_sizes("table3", TABLE3, PAPER_SHAPE, options)
    rows = selected(TABLE3, options.rows)
    model = {"model": "llama", "rope_base": ROPE_BASE, **PAPER_SHAPE}
    train_rows("table3", [(row, Recipe()) for row in rows], model, PRESETS[options.preset], options)
