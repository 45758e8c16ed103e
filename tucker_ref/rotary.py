"""Rung 5. Rotary position embedding (Su et al. 2021) with one frequency per channel pair (PyTorch).

Token n turns each pair of channels by the angle n * frequency. Two turned vectors then meet in a dot product that depends on
their distance alone, R(m) R(n)^T = R(m - n) (Eq. 10). Which frequency each pair has is free, and that freedom is what makes
ordinary rotary embeddings exact for Tucker Attention:

    Rotary.heads(d_H)                the usual schedule, base^(-2j/d_H), for the heads of MHA, GQA and MQA
    Rotary.groups(d_H, n_KV)         the same schedule once per key/value head: the key latent of a GQA written as Tucker
    Rotary.latent(r3)                the paper's latent RoPE (Def. 3.1): the schedule stretched over the whole latent
    Rotary.decoupled(d_c, d_R)       frequency zero on the latent, the usual schedule on d_R more channels (DeepSeek-V2)
"""

import torch

from .checks import check_blocks, check_even, check_pairing, check_positive, check_turned
from .rope_frequencies import Angles, constants, joined, schedule


class Rotary(Angles):
    """Turns channel pairs by position times frequency.

    Args:
        frequencies: (width / 2,), radians per token, one per pair. They stay float64 whatever dtype the module is cast to: a
            position of 100,000 needs the digits.
        pairing: "half" pairs channel j of a block with channel j + block/2 (Llama, GPT-NeoX), "interleaved" 2j with 2j + 1.
        blocks: widths of the blocks that are paired within themselves, by default the whole width. Pairs count block by block.

    Raises:
        ValueError: for an unknown pairing, an odd block, non-finite frequencies or widths that do not add up.
    """

    def __init__(self, frequencies, pairing: str = "half", blocks: tuple[int, ...] | None = None):
        super().__init__()
        check_pairing(pairing)
        self.width, self.pairing = 2 * len(frequencies := constants(frequencies)), pairing
        self.blocks = check_blocks(blocks, self.width)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _apply(self, fn, recurse=True):
        if not self.frequencies.is_meta:  # where values are lost, and no state dict brings them back
            self._values = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = self._values.to(self.frequencies.device)  # follow the device, but keep dtype and values
        return self

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """R(positions) applied to the last axis: each pair, as a complex number, times exp(i position frequency) (Eq. 10).

        Args:
            x: (n, width), (b, n, width) or (b, h, n, width).
            positions: (n,), or (b, n) where sequences differ.

        Returns: Like x; the heads of one token lie side by side in memory, as the products before and after attention have them.

        Raises:
            ValueError: for another width, or positions of another shape or device.
        """
        check_turned(x, positions, self.width)
        cos, sin = self.cos_sin(positions, x.dtype)  # ([b,] n, width / 2)
        if x.ndim < 4:
            return self._turned(x, cos, sin)
        return self._turned(x.transpose(1, 2), cos.unsqueeze(-2), sin.unsqueeze(-2)).transpose(1, 2)

    def _turned(self, x, cos, sin):
        first, second = self.pairs(x)
        return self.unpaired(first * cos - second * sin, second * cos + first * sin)

    def pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second channel of every pair.  x: (..., width).  Returns: (..., width / 2) each."""
        # By slices and not by a list of channels, whose gradient would be a slow scatter.
        apart = (lambda y: y.chunk(2, -1)) if self.pairing == "half" else (lambda y: y.unflatten(-1, (-1, 2)).unbind(-1))
        first, second = zip(*(apart(block) for block in x.split(self.blocks, dim=-1)))
        return joined(first), joined(second)

    def unpaired(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The inverse of `pairs`: every channel back in its place."""
        together = torch.cat if self.pairing == "half" else (lambda pair, dim: torch.stack(pair, dim).flatten(-2))
        halves = [block // 2 for block in self.blocks]
        return joined([together(pair, -1) for pair in zip(first.split(halves, -1), second.split(halves, -1))])

    @classmethod
    def heads(cls, head_dim: int, base: float = 10000.0, pairing: str = "half", scaling=None) -> "Rotary":
        """The usual schedule base^(-2j / head_dim), for heads of MHA, GQA, MQA and for MLA's decoupled rotary key."""
        return cls(schedule(head_dim, base, scaling), pairing)

    @classmethod
    def groups(cls, head_dim: int, n_kv_heads: int, base: float = 10000.0, pairing: str = "half", scaling=None) -> "Rotary":
        """The head schedule once per key/value head, width n_kv_heads * head_dim: GQA's keys side by side in one latent."""
        return cls.heads(head_dim, base, pairing, scaling).repeated(check_positive("n_kv_heads", n_kv_heads))

    @classmethod
    def latent(cls, width: int, base: float = 10000.0, pairing: str = "half", scaling=None) -> "Rotary":
        """Latent RoPE, Def. 3.1 (Eq. 12): the schedule base^(-2j / width) over the whole key latent."""
        return cls(schedule(width, base, scaling), pairing)

    @classmethod
    def decoupled(cls, kv_rank: int, rope_dim: int, base: float = 10000.0, pairing: str = "half", scaling=None) -> "Rotary":
        """DeepSeek-V2's layout in one latent of width kv_rank + rope_dim: an unturned part, then the usual schedule."""
        return cls.heads(rope_dim, base, pairing, scaling).after_unrotated(kv_rank)

    def repeated(self, times: int) -> "Rotary":
        """This embedding side by side, once per key/value head.  Raises ValueError for less than once."""
        times = check_positive("times", times)
        return Rotary(self.frequencies.repeat(times), self.pairing, self.blocks * times)

    def after_unrotated(self, width: int) -> "Rotary":
        """This embedding behind `width` channels that do not turn.  Raises ValueError for an odd width."""
        width = check_even("kv_rank", width)
        frequencies = torch.cat([self.frequencies.new_zeros(width // 2), self.frequencies])
        return Rotary(frequencies, self.pairing, (width, *self.blocks))
