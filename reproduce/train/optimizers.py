"""Which optimiser trains which parameter: AdamW all of them, or Muon the matrices of the blocks and AdamW the rest.

The learning rate of every step is in settings.py.
"""

from collections.abc import Callable

import torch
from torch import nn

from .muon import Muon
from .settings import TrainConfig

NARROWEST = 16  # sides up to this, as of the factors (n_H, r1) of the heads, are no matrices to Muon
OTHERS_SHARE = 0.5  # of the learning rate, for what AdamW trains beside Muon


def make_optimizer(model: nn.Module, config: TrainConfig) -> "torch.optim.AdamW | Together":
    """The one that the settings name."""
    return make_muon(model, config) if config.optimizer == "muon" else make_adamw(model, config)


def make_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and cores, and leaves vectors (norms, biases, the class token) alone.

    Args:
        model: whose parameters.
        config: learning rate, weight decay and betas.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def make_muon(model: nn.Module, config: TrainConfig) -> "Together":
    """Muon for every matrix and core within the blocks that is wider than NARROWEST, AdamW for the rest at half the rate.

    Args:
        model: whose parameters; it has `blocks`.
        config: learning rate and weight decay.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2 and min(p.shape[-2:]) > NARROWEST]
    chosen = {id(p) for p in matrices}
    plain = make_adamw(model, config)
    rest = [group | {"share": OTHERS_SHARE} for group in narrowed(plain, lambda p: id(p) not in chosen)]
    return Together(torch.optim.AdamW(rest), Muon(matrices, config.learning_rate, config.weight_decay))


def narrowed(optimizer: torch.optim.Optimizer, keep: Callable[[nn.Parameter], bool]) -> list[dict]:
    """Its groups with these parameters alone."""
    return [group | {"params": list(filter(keep, group["params"]))} for group in optimizer.param_groups]


class Together:
    """Several optimisers that step as one, their groups and their states in one row, as a checkpoint wants them.

    Args:
        optimizers: of different parameters.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        """Those of all optimisers, in order; changes to a group reach its optimiser."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        """As torch's: states by the number of a parameter, which goes on from one optimiser to the next."""
        state, groups, first = {}, [], 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            state |= {number + first: moments for number, moments in own["state"].items()}
            groups += [group | {"params": [n + first for n in group["params"]]} for group in own["param_groups"]]
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, whole: dict) -> None:
        """Take up what `state_dict` gave.

        Args:
            whole: the state of all together.

        Raises:
            ValueError: for the state of other parameters, as torch's optimisers do.
        """
        groups, first = list(whole["param_groups"]), 0
        for optimizer in self.optimizers:
            own, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
            numbers = {n: n - first for group in own for n in group["params"]}
            optimizer.load_state_dict(
                {
                    "state": {numbers[n]: moments for n, moments in whole["state"].items() if n in numbers},
                    "param_groups": [group | {"params": [numbers[n] for n in group["params"]]} for group in own],
                }
            )
            first += len(numbers)
