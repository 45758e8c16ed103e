"""Beside rungs 7 to 10. RMSNorms of latents, and of queries and keys (PyTorch).

QK-norm takes the mean square of each query and key to one, before it is turned, so that no weight can make logits large. Its
logits are a product of three linear maps of the weights divided by two norms: no longer trilinear, hence outside Def. 2.1, and
without a tensor to decompose. Thms B.2 and B.3 survive it: multi-head and grouped-query attention with QK-norm are Tucker
Attentions with QK-norm, exactly, if the norm goes in blocks. The keys of all groups side by side are one latent, normalised
block by block. A head's latent query P T_h is zero outside its group's block, so each head keeps its own mean square; one mean
square over all heads (OLMo 2) divides by the channels that are in use, and has a gain per head and channel.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_eps, check_integer, check_positive


class LatentNorm(nn.Module):
    """RMSNorm over the first channels of a latent; the rest passes (DeepSeek-V2's rotary key).

    Args:
        width: of the latent.
        normalised: how many channels are normalised, all by default.
        eps: added to the mean square, as in torch.nn.RMSNorm.

    Raises:
        ValueError: for sizes that do not fit, or an eps that is negative or beyond float32.
    """

    def __init__(self, width: int, normalised: int | None = None, *, eps: float | None = 1e-6):
        super().__init__()
        width = check_positive("width", width)
        self.eps = None if eps is None else check_eps(eps)
        self.normalised = width if normalised is None else check_integer("normalised", normalised, 1, width)
        self.weight = nn.Parameter(torch.ones(self.normalised))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """latent: (..., width).  Returns: the same shape."""
        first, rest = latent[..., : self.normalised], latent[..., self.normalised :]
        return torch.cat([F.rms_norm(first, (self.normalised,), self.weight, eps=self.eps), rest], dim=-1)


class QKNorm(nn.Module):
    """RMSNorm of queries or keys before they are turned: of each head by itself (Qwen3, Gemma 3) or of all together (OLMo 2).

    Args:
        width: channels of a head.
        heads: None: each head has a mean square of its own, and all have the same gains `weight`, (width,). A number: so many heads
            have one mean square together, and gains each, (heads * width,).
        blocks: of a head that are normalised apart; only where heads have mean squares of their own.
        count: how many channels share a mean square, where some are zero whatever the input; by default all that it runs over.
        eps: added to the mean square.

    Raises:
        ValueError: for a size below one, or an eps that is negative or beyond float32.
    """

    def __init__(self, width: int, heads: int | None = None, *, blocks: int = 1, count: int | None = None, eps: float = 1e-6):
        super().__init__()
        self.width, self.blocks = check_positive("width", width), check_positive("blocks", blocks)
        self.heads = None if heads is None else check_positive("heads", heads)
        self.eps = check_eps(eps)
        channels = (self.heads or 1) * self.width
        self.count = channels // self.blocks if count is None else check_positive("count", count)
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, h, n, width).  Returns: the same shape; half precision is normalised in single."""
        parts = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.blocks, -1))  # (b, h, n, block, c)
        squares = parts.square().sum(-1 if self.heads is None else (1, 3, 4), keepdim=True)
        normed = (parts * (squares / self.count + self.eps).rsqrt()).flatten(-2)  # (b, h, n, width)
        return (normed * self.weight.unflatten(0, (-1, 1, self.width))).to(x.dtype)

    @classmethod
    def of(cls, qk_norm: str | None, width: int, heads: int) -> nn.Module:
        """The norm that `qk_norm`, None, "head" or "all", names, for so many heads of this width."""
        return nn.Identity() if qk_norm is None else cls(width, heads if qk_norm == "all" else None)


def kind_of(qk_norms: tuple[QKNorm, QKNorm] | None) -> str | None:
    """What a layer with these norms of queries and keys is called."""
    if qk_norms is None:
        return None
    return "head" if qk_norms[0].heads is None else "all"


def side_by_side(layer) -> tuple[QKNorm, QKNorm] | None:
    """The query and key norms of a multi-head or grouped-query attention, for the keys of all its groups as one latent."""
    if layer.qk_norm is None:
        return None
    (q, k), g = (layer.q_norm, layer.k_norm), layer.k_proj.out_features // layer.head_dim
    width = g * layer.head_dim
    if layer.qk_norm == "head":
        norms = QKNorm(width, blocks=g, eps=q.eps), QKNorm(width, blocks=g, eps=k.eps)
        weights = q.weight.repeat(g), k.weight.repeat(g)
    else:
        norms = QKNorm(width, layer.n_heads, count=q.count, eps=q.eps), QKNorm(width, eps=k.eps)
        weights = q.weight.unflatten(0, (-1, layer.head_dim)).repeat(1, g).flatten(), k.weight
    for norm, weight in zip(norms, weights):
        norm.weight = nn.Parameter(weight.detach().clone())
    return norms
