"""Beside rung 6. A cache for steps that all look alike, as compiled code and CUDA graphs repeat them (PyTorch).

An ordinary cache grows: with each token all that a layer reads is longer. A graph repeats the same work on the same memory. So here
the place of the new token is a number in a tensor, a layer gets the whole memory back, and a mask hides what is not filled yet.
"""

import torch

from .cache import Cache
from .checks import check_length, check_new_tokens
from .no_gradient import without_gradient
from .one_thread import by_one_thread


class StaticCache(Cache):
    """The memory of another cache, written at `place` from now on and read as a whole.

    A layer that is called with it needs a mask over all `max_tokens` places, such as `seen()`; between two calls whoever calls moves
    the place on, `place += 1`. A place beyond the last one is an IndexError, and on a GPU an error of the device.

    Args:
        cache: what it holds stays; only one of the two is to be written from now on.
        place: (n,) integers on its device: where the next n tokens go.
    """

    def __init__(self, cache: Cache, place: torch.Tensor):
        self.batch, self.max_tokens, self.streams = cache.batch, cache.max_tokens, cache.streams
        self.one_thread = cache.one_thread  # whose memory this is
        self.place, self.keep_positions, self._positions = place, cache.keep_positions, cache._positions
        self._length = cache.max_tokens - len(place)  # a query meets all places, its own last in the count
        if self.keep_positions and self._positions is None:
            with torch.inference_mode(False):  # made there, it could not be written anywhere else
                self._positions = torch.arange(self.max_tokens, device=place.device).repeat(self.batch, 1)

    @by_one_thread
    def append(self, positions: torch.Tensor | None = None, **new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store n tokens of every stream at `place` and return all places.

        Args, Returns, Raises:
            As `Cache.append`; without positions the tokens stand where they are stored.
        """
        check_new_tokens(self, new)
        place = self.place.long()  # PyTorch takes no other kind; of 64 bits it is the same memory
        for name, tensor in new.items():
            self.streams[name].index_copy_(2, place, tensor.detach())
        if self._positions is not None:
            given = place if positions is None else positions.long()
            self._positions.index_copy_(1, place, given.expand(self.batch, -1))
        return tuple(without_gradient(self.streams[name], tensor) for name, tensor in new.items())

    def seen(self) -> torch.Tensor:
        """What the new tokens may look at, (n, max_tokens): the places up to their own."""
        return torch.arange(self.max_tokens, device=self.place.device) <= self.place[:, None]

    def positions(self, device: torch.device) -> torch.Tensor:
        """Positions of all places, (max_tokens,) or (batch, max_tokens)."""
        return torch.arange(self.max_tokens, device=device) if self._positions is None else self._positions

    @by_one_thread
    def truncate(self, length: int) -> None:
        """Go on after the first `length` tokens.  Raises ValueError unless there is room for the next ones."""
        length = check_length(length, self._length)
        self.place.copy_(torch.arange(length, length + len(self.place), device=self.place.device))

    @by_one_thread
    def reorder(self, rows: torch.Tensor) -> None:
        """As `Cache.reorder`, of all places."""
        before, self._length = self._length, self.max_tokens
        try:
            super().reorder(rows)
        finally:  # of refused rows too, after which the cache is as it was
            self._length = before
