"""How to train, and the learning rate of every step."""

import math
from dataclasses import dataclass

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon, with AdamW beside it"}


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: in all.
        batch_size: of the global batch, in sequences or images.
        learning_rate: the peak.
        warmup_steps: of rising learning rate, before the peak.
        final_share: of the peak learning rate, where the cosine ends.
        weight_decay, beta1, beta2: of the optimiser.
        gradient_clip: the largest norm of all gradients together.
        precision: "float32", or "bfloat16" for autocast, with float32 weights and optimiser.
        compiled: whether torch.compile is used.
        log_every: steps between two entries of the curve.
        checkpoint_every: steps between two checkpoints, a multiple of log_every.
        optimizer: "adamw", or "muon" for the matrices of the blocks (muon.py).
        qk_clip: what no head's largest logit may exceed (qk_clip.py), None for no limit.

    Raises:
        ValueError: for another optimizer or checkpoint_every.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    final_share: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    precision: str = "float32"
    compiled: bool = False
    log_every: int = 10
    checkpoint_every: int = 50
    optimizer: str = "adamw"
    qk_clip: float | None = None

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every is {self.checkpoint_every}; it must be a multiple of log_every = {self.log_every}"
            )

    def config(self) -> dict:
        """All fields, for records and checkpoints; those that came later only where they are set, so that older runs keep their ids."""
        later = {"optimizer": "adamw", "qk_clip": None}
        return {name: value for name, value in vars(self).items() if name not in later or value != later[name]}


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up from zero, then a cosine from the peak down to final_share of it at the last step.

    Args:
        step: from 0.
        config: peak, warm-up and length.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    share = config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share
