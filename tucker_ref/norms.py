"""Beside rungs 7 to 10. Norms of what goes into the logits (PyTorch)."""

import torch
import torch.nn.functional as F
from torch import nn


class LatentNorm(nn.Module):
    """RMSNorm over the first channels of a latent; the rest passes (DeepSeek-V2's rotary key).

    Args:
        width: of the latent.
        normalised: how many channels are normalised, all by default.
        eps: added to the mean square, as in torch.nn.RMSNorm.
    """

    def __init__(self, width: int, normalised: int | None = None, *, eps: float | None = 1e-6):
        super().__init__()
        self.eps = eps
        self.normalised = width if normalised is None else normalised
        self.weight = nn.Parameter(torch.ones(self.normalised))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """latent: (..., width).  Returns: the same shape."""
        first, rest = latent[..., : self.normalised], latent[..., self.normalised :]
        return torch.cat([F.rms_norm(first, (self.normalised,), self.weight, eps=self.eps), rest], dim=-1)
