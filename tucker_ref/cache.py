"""Rung 6. What a layer keeps of the past while it generates: the numbers that Table 1 counts, and nothing more (PyTorch).

MHA, GQA        rotated keys and values, per key/value head              2 n_KV d_H numbers a token
MLA             the latent(s), and the decoupled rotary key behind       d_c + d_R, or 2 d_c + d_R separated
Tucker          the rotated key latent and the value latent              r3 + r~3
Tucker shared   one latent, unrotated, because values read it too        r3
"""

import functools
import itertools

import torch
from torch import nn

from .checks import check_mask, check_numbers, check_positive, check_rules, check_tokens


class Cache:
    """Preallocated room for `max_tokens` tokens of every stream, (batch, heads, max_tokens, width) each.

    length: how many tokens it holds, to be set lower to take the last ones back; nbytes: bytes of all streams, full or not.
    For inference: what is stored is detached.
    keep_positions: remember positions that a caller gives, because keys will be rotated when they are read, not when stored.
    Raises ValueError unless batch and max_tokens are at least 1 and dtype is one of floating-point numbers.
    """

    def __init__(
        self,
        streams: dict[str, tuple[int, int]],
        batch: int,
        max_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        keep_positions: bool = False,
    ):
        check_positive("batch", batch)
        check_positive("max_tokens", max_tokens)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype!r}; it must be a floating-point dtype such as torch.bfloat16")
        self.batch, self.max_tokens, self.length = batch, max_tokens, 0
        with torch.inference_mode(False):  # made there, it could not be written anywhere else
            self.streams = {
                name: torch.zeros(batch, heads, max_tokens, width, dtype=dtype, device=device)
                for name, (heads, width) in streams.items()
            }
        self.keep_positions = keep_positions
        self._positions: torch.Tensor | None = None  # none while tokens stand where they are stored: 0, 1, 2, ...

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.streams.values())

    def append(self, positions: torch.Tensor | None = None, **new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store n more tokens of every stream and return all that is stored, (batch, heads, length, width) each.

        new: one tensor (batch, heads, n, width) per stream; positions: (n,) or (batch, n) if the caller gave any.
        Raises ValueError on overflow or other streams, batch, shape, dtype or device, and then leaves the cache as it was.
        """
        if set(new) != set(self.streams):
            raise ValueError(
                f"this cache holds {', '.join(self.streams)}; the layer keeps {', '.join(new)}: it was made for another"
            )
        n = next(iter(new.values())).shape[2]
        end = self.length + n
        for name, tensor in new.items():
            stream = self.streams[name]
            expected = (self.batch, stream.shape[1], n, stream.shape[3])
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this cache was made for {expected}, batch first")
            if tensor.dtype != stream.dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype}; this cache holds {stream.dtype}: make it with dtype={tensor.dtype}"
                )
            if tensor.device != stream.device:
                raise ValueError(f"{name} is on {tensor.device}; this cache is on {stream.device}: make it with device=")
        if end > self.max_tokens:
            raise ValueError(f"{n} more tokens after {self.length} overflow a cache of max_tokens = {self.max_tokens}")
        for name, tensor in new.items():
            self.streams[name][:, :, self.length : end] = tensor.detach()
        if self.keep_positions and positions is not None and self._positions is None:
            with torch.inference_mode(False):
                self._positions = torch.arange(self.max_tokens, device=positions.device).repeat(self.batch, 1)
        if self._positions is not None:
            default = torch.arange(self.length, end, device=self._positions.device)
            self._positions[:, self.length : end] = default if positions is None else positions
        self.length = end
        return tuple(self.streams[name][:, :, :end] for name in new)

    def reorder(self, rows: torch.Tensor) -> None:
        """Sequence i goes on from what sequence rows[i] holds, as beam search needs it.  rows: (batch,) integers.

        Raises ValueError for other rows, and then leaves the cache as it was.
        """
        whole = isinstance(rows, torch.Tensor) and rows.dtype in (torch.int32, torch.int64)
        if not whole or rows.shape != (self.batch,) or not ((rows >= 0) & (rows < self.batch)).all():
            raise ValueError(f"rows is {rows!r}; it must be {self.batch} integers from 0 to {self.batch - 1}, one per sequence")
        for stream in self.streams.values():
            stream[:, :, : self.length] = stream[rows, :, : self.length]
        if self._positions is not None:
            self._positions[:] = self._positions[rows]

    def positions(self, device: torch.device) -> torch.Tensor:
        """Positions of all stored tokens, (length,) or (batch, length)."""
        if self._positions is None:
            return torch.arange(self.length, device=device)
        return self._positions[:, : self.length]


def keeps_cache(forward):
    """A layer's `forward`, such that an error leaves the cache as it was: a kernel may refuse after its tokens were appended."""

    @functools.wraps(forward)
    def kept(self, *args, cache=None, **options):
        if cache is None:
            return forward(self, *args, **options)
        length = getattr(cache, "length", 0)
        try:
            return forward(self, *args, cache=cache, **options)
        except BaseException:
            if isinstance(cache, Cache):
                cache.length = length
            raise

    return kept


class CachedAttention(nn.Module):
    """What all four mechanisms share: they say which streams they keep, make a cache for them, and leave it whole on errors."""

    d_model: int
    n_heads: int
    scale: float

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward = keeps_cache(cls.forward)

    def cache_streams(self) -> dict[str, tuple[int, int]]:
        """Per stream its number of heads and its width."""
        raise NotImplementedError

    def new_cache(self, batch: int, max_tokens: int, *, dtype: torch.dtype | None = None, device=None) -> Cache:
        """An empty cache for `batch` sequences of up to `max_tokens` tokens; dtype and device are the layer's by default."""
        example = self._example()
        return Cache(
            self.cache_streams(),
            batch,
            max_tokens,
            dtype=dtype or example.dtype,
            device=device or example.device,
            keep_positions=self.rotates_on_reading,
        )

    def _example(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """A parameter of x's dtype and device, else the first; quantised weights, and adapters beside them, have others."""
        floating = (p for p in self.parameters() if p.is_floating_point())
        first = next(floating, None)  # as a rule it fits, and no other is looked at: this is asked in every call
        if first is None:
            return torch.empty(0)
        if not isinstance(x, torch.Tensor):
            return first
        return next((p for p in itertools.chain([first], floating) if (p.dtype, p.device) == (x.dtype, x.device)), first)

    rotates_on_reading = False  # True where one unrotated latent serves keys and values

    def check_call(self, x: torch.Tensor, causal, mask, positions, cache, backend) -> None:
        """Raise ValueError for an argument of `forward` that does not fit, before anything is computed or cached."""
        check_numbers("x", x, self._example(x))
        check_tokens(x, self.d_model)
        check_rules(causal, mask, backend)
        if not (cache is None or isinstance(cache, Cache)):
            raise ValueError(f"cache is {type(cache).__name__}; it must come from this layer's new_cache")
        batch, n = x.shape[:2]
        check_mask(mask, (batch, self.n_heads, n, n if cache is None else cache.length + n), x.device)
        if positions is not None:
            check_positions(positions, batch, n, x.device)


def check_positions(positions: torch.Tensor, batch: int, n: int, device: torch.device) -> None:
    """Raise ValueError unless these are whole numbers, negative ones included, of shape (n,) or (batch, n), on this device."""
    if not isinstance(positions, torch.Tensor):
        raise ValueError(f"positions is {type(positions).__name__}; it must be a tensor of integers")
    whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
    if not (whole and positions.shape in ((n,), (batch, n))):
        raise ValueError(
            f"positions is {positions.dtype} {tuple(positions.shape)}; it must be integers of shape ({n},) or ({batch}, {n})"
        )
    if positions.device != device:
        raise ValueError(f"positions is on {positions.device}; the tokens are on {device}")


def token_positions(x: torch.Tensor, positions: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
    """The given positions, or those that follow what is cached: (n,) or (b, n) integers."""
    if positions is not None:
        return positions
    start = 0 if cache is None else cache.length
    return torch.arange(start, start + x.shape[1], device=x.device)
