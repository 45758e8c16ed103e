"""Rung 6. What a layer keeps of the past while it generates: the numbers that Table 1 counts, and nothing more (PyTorch).

MHA, GQA        rotated keys and values, per key/value head              2 n_KV d_H numbers a token
MLA             the latent(s), and the decoupled rotary key behind       d_c + d_R, or 2 d_c + d_R separated
Tucker          the rotated key latent and the value latent              r3 + r~3
Tucker shared   one latent, unrotated, because values read it too        r3

Which streams a layer keeps, its `cache_streams` says; its `forward` puts them in.
"""

import torch

from .checks import check_dtype, check_length, check_new_tokens, check_room, check_rows
from .no_gradient import without_gradient
from .one_thread import OneThread, by_one_thread


class Cache:
    """Preallocated room for `max_tokens` tokens of every stream, (batch, heads, max_tokens, width) each.

    For inference: what is stored is detached, and a backward pass through it raises RuntimeError. So does a second thread's write.

    Args:
        streams: per name the number of heads and the width.
        batch: how many sequences.
        max_tokens: how many tokens of each there is room for.
        dtype, device: of the numbers that are kept.
        keep_positions: remember positions that a caller gives, because keys will be turned when they are read, not when stored.

    Raises:
        ValueError: unless all sizes are at least 1 and dtype is one of floating-point numbers.
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
        self.batch, self.max_tokens, streams = check_room(batch, max_tokens, streams)
        check_dtype(dtype)
        self.one_thread, self._length = OneThread(), 0
        with torch.inference_mode(False):  # made there, it could not be written anywhere else
            self.streams = {
                name: torch.zeros(self.batch, heads, self.max_tokens, width, dtype=dtype, device=device)
                for name, (heads, width) in streams.items()
            }
        self.keep_positions = keep_positions
        self._positions: torch.Tensor | None = None  # none while tokens stand where they are stored: 0, 1, 2, ...

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of all streams, full or not."""
        return sum(tensor.nbytes for tensor in self.streams.values())

    @by_one_thread
    def append(self, positions: torch.Tensor | None = None, **new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store n more tokens of every stream and return all that is stored.

        Args:
            positions: (n,) or (batch, n) if the caller gave any.
            new: one tensor (batch, heads, n, width) per stream.

        Returns:
            One tensor (batch, heads, length, width) per stream, in the order of `new`.

        Raises:
            ValueError: on overflow or other streams, batch, shape, dtype or device; the cache is then as it was.
        """
        end = self.length + check_new_tokens(self, new)
        for name, tensor in new.items():
            self.streams[name][:, :, self.length : end] = tensor.detach()
        if self.keep_positions and positions is not None and self._positions is None:
            with torch.inference_mode(False):
                self._positions = torch.arange(self.max_tokens, device=positions.device).repeat(self.batch, 1)
        if self._positions is not None:
            default = torch.arange(self.length, end, device=self._positions.device)
            self._positions[:, self.length : end] = default if positions is None else positions
        self._length = end
        return tuple(without_gradient(self.streams[name][:, :, :end], tensor) for name, tensor in new.items())

    @by_one_thread
    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens and take back the others.

        Raises:
            ValueError: unless length is from 0 to what is stored.
        """
        self._length = check_length(length, self.length)

    @by_one_thread
    def reorder(self, rows: torch.Tensor) -> None:
        """Sequence i goes on from what sequence rows[i] holds, as beam search needs it.  rows: (batch,) integers, or ValueError."""
        check_rows(rows, self.batch)
        for stream in self.streams.values():
            stream[:, :, : self.length] = stream[rows, :, : self.length]
        if self._positions is not None:
            self._positions[:] = self._positions[rows]

    def positions(self, device: torch.device) -> torch.Tensor:
        """Positions of all stored tokens, (length,) or (batch, length)."""
        return torch.arange(self.length, device=device) if self._positions is None else self._positions[:, : self.length]
