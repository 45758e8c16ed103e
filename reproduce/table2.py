"""Table 2, GPT-2: sizes at the paper's shape, and validation losses at a scale that the preset can train."""

from .language import LanguagePreset, train_rows
from .options import Options
from .rows import TABLE2
from .runs import selected
from .sizes import record_sizes
from .training import TrainConfig

PAPER_SHAPE = {"d_model": 768, "n_heads": 12, "n_layers": 12, "context": 1024}

PRESETS = {
    "smoke": LanguagePreset(
        narrower=4,
        n_layers=2,
        context=128,
        vocab_size=1024,
        validation_tokens=65_536,
        train=TrainConfig(steps=250, batch_size=16, learning_rate=2e-3, warmup_steps=25),
    ),
    # The paper's shape at a third of the budget of the coming "gpu" preset, to compare learning rates.
    "gpu-sweep": LanguagePreset(
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
        keep_models=False,
    ),
}


def run(options: Options) -> None:
    """One record with the sizes of all rows, then one per trained row and seed."""
    record_sizes("table2", TABLE2, PAPER_SHAPE, options)
    rows = selected(TABLE2, options.rows)
    train_rows("table2", rows, {"model": "gpt2", **PAPER_SHAPE}, PRESETS[options.preset], options)
