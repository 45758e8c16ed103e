"""Beside rungs 5 and 10. While a model writes, its weights stand still: what they alone decide is computed once (PyTorch)."""

from typing import Any

import torch
from torch import nn

from .checks import check_positive
from .rotary import Rotary
from .tucker import TuckerAttention
from .tucker_weights import latent_factors


class Held:
    """Inside `with held:`, layers of Tucker Attention have their head cores mixed, and rotary embeddings look their cosines up.

    The numbers are those that every call would compute from the weights as they were when this was made; they have no gradient.
    A CUDA graph that is captured inside keeps them. One thread at a time may be inside with one model.

    Args:
        model: a layer, or whatever holds layers.
        max_positions: positions inside go from 0 to one less.
        dtype: of what is turned.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, max_positions: int, dtype: torch.dtype):
        max_positions = check_positive("max_positions", max_positions)
        self.values: list[tuple[nn.Module, str, Any]] = []
        tables: dict[tuple[float, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # one for all that turn alike
        for module in model.modules():
            if isinstance(module, TuckerAttention):
                factors = torch.cat(latent_factors(module.pre, module.post), dim=1)
                self.values.append((module.pre, "held_factors", factors))
                self.values += [(w, "held_cores", w.head_cores().contiguous()) for w in (module.pre, module.post)]
            if isinstance(module, Rotary):
                known = tuple(module.frequencies.tolist())
                if known not in tables:
                    positions = torch.arange(max_positions, device=module.frequencies.device)
                    tables[known] = module.cos_sin(positions, dtype)
                self.values.append((module, "table", tables[known]))

    def __enter__(self) -> None:
        for module, name, value in self.values:
            setattr(module, name, value)

    def __exit__(self, *_) -> None:
        for module, name, _value in self.values:
            setattr(module, name, None)
