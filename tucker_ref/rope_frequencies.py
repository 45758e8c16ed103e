"""Beside rung 5. Rotary frequencies: the usual schedule, its stretch to longer contexts, and the angles they give (PyTorch)."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .checks import SMALLEST, check_angles, check_even, check_number


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the context: slow frequencies are divided by `factor`, fast ones kept, those between blended.

    Args:
        factor: what slow frequencies are divided by.
        low_frequency_factor: slow is what turns fewer times than this within `original_context` tokens.
        high_frequency_factor: fast is what turns more often than this.
        original_context: tokens of the context before the stretch.

    Raises:
        ValueError: if one is not positive or the two limits are in the wrong order.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        for name, value in vars(self).items():
            check_number(name, value, SMALLEST, allowed=f"positive and finite in {self}")
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(f"{self}: low_frequency_factor must be positive and below high_frequency_factor")

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """frequencies: (pairs,) in radians per token.  Returns: the stretched ones, the same shape."""
        turns = float(self.original_context) * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, 1: fast
        return frequencies * (kept + (1 - kept) / float(self.factor))


def schedule(width: int, base: float, scaling: Llama3Scaling | None) -> torch.Tensor:
    """theta_j = base^(-2j / width), j = 0 .. width/2 - 1, in float64.  Raises ValueError for an odd width or another base."""
    width = check_even("rotary width", width)
    if not (scaling is None or isinstance(scaling, Llama3Scaling)):
        raise ValueError(f"scaling is {scaling!r}; it must be a Llama3Scaling or None")
    frequencies = check_number("base", base, SMALLEST) ** (
        -torch.arange(0, width, 2, dtype=torch.float64, device=_device()) / width
    )
    return frequencies if scaling is None else scaling.apply(frequencies)


def constants(frequencies) -> torch.Tensor:
    """A list or tensor of frequencies as a float64 tensor of its own.  Raises ValueError unless they are finite numbers, one per pair."""
    if not isinstance(frequencies, torch.Tensor):
        try:
            frequencies = torch.tensor(frequencies, dtype=torch.float64, device=_device())
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"frequencies is {frequencies!r}; it must be a list of finite numbers, one per pair") from None
    if frequencies.is_meta or frequencies.requires_grad:
        held = "holds no values (it is on the meta device)" if frequencies.is_meta else "requires a gradient"
        raise ValueError(f"frequencies {held}; they are constants")
    frequencies = frequencies.detach().to(torch.float64, copy=True)
    if frequencies.ndim != 1 or len(frequencies) == 0 or not frequencies.isfinite().all():
        beyond = "" if frequencies.isfinite().all() else ", NaN or infinity among them"
        raise ValueError(
            f"frequencies has shape {tuple(frequencies.shape)}{beyond}; it must be a list of finite numbers, one per pair"
        )
    return frequencies


@torch.library.custom_op("tucker_ref::cos_sin", mutates_args=())
def cos_sin(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles in float64, rounded once. An operator of its own, or torch.compile would compute them anew for every head."""
    angles = check_angles(positions.unsqueeze(-1).to(torch.float64) * frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@cos_sin.register_fake
def _(positions, frequencies, dtype):
    return tuple(frequencies.new_empty(*positions.shape, len(frequencies), dtype=dtype) for _ in range(2))


class Angles(nn.Module):
    """What turns by position times frequency."""

    frequencies: torch.Tensor  # (pairs,), float64
    table: tuple[torch.Tensor, torch.Tensor] | None = None  # cosines and sines from position 0 on, where `held` keeps them

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every pair's angle, ([b,] n, pairs) each."""
        if self.table is not None:
            return self.table[0][positions], self.table[1][positions]
        # Both on the device "meta", where a layer has shapes alone and frequencies keep their values elsewhere.
        return cos_sin(positions, self.frequencies.to(positions.device), dtype)


def joined(blocks) -> torch.Tensor:
    """Side by side in the last axis; one alone as it is, which torch.cat would copy."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def _device() -> torch.device:
    """Where new tensors go; not "meta", since frequencies are values that no state dict brings back."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device
