"""Beside rung 6. What the four mechanisms of rungs 7 to 10 share as layers with a cache (PyTorch)."""

import functools
import itertools

import torch
from torch import nn

from .cache import Cache
from .checks import check_held_scale, check_mask, check_numbers, check_positions, check_rules, check_tokens
from .one_thread import alone
from .own_code import CompiledApart
from .static_cache import StaticCache


def keeps_cache(forward):
    """Decorates a layer's `forward`: an error leaves the cache as it was, where a kernel refuses after its tokens were appended.

    Meanwhile no other thread may use the cache, which is a RuntimeError: a token's position is read before it is stored.
    """

    @functools.wraps(forward)
    def kept(self, *args, cache=None, **options):
        if not isinstance(cache, Cache):  # none, or what `forward` refuses
            return forward(self, *args, cache=cache, **options)
        with alone(cache):
            length = cache.length
            try:
                return forward(self, *args, cache=cache, **options)
            except BaseException:
                if not isinstance(cache, StaticCache):  # that one's place has not moved
                    cache.truncate(min(length, cache.length))
                raise

    return kept


class CachedAttention(CompiledApart):
    """What all four mechanisms share: they say which streams they keep, make a cache for them, and check what they are called with."""

    d_model: int
    n_heads: int
    scale: float
    rotates_on_reading = False  # True where one unturned latent serves keys and values

    def cache_streams(self) -> dict[str, tuple[int, int]]:
        """Per stream its number of heads and its width."""
        raise NotImplementedError

    def new_cache(self, batch: int, max_tokens: int, *, dtype: torch.dtype | None = None, device=None) -> Cache:
        """An empty cache.

        Args:
            batch: how many sequences.
            max_tokens: how many tokens of each there is room for.
            dtype, device: the layer's by default.

        Raises:
            ValueError: as `Cache` does.
        """
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

    def check_call(self, x: torch.Tensor, causal, mask, positions, cache, backend) -> None:
        """Raise ValueError for an argument of `forward` that does not fit, before anything is computed or cached."""
        check_numbers("x", x, self._example(x))
        check_tokens(x, self.d_model)
        check_held_scale(self.scale, x.dtype)
        check_rules(causal, backend)
        if not (cache is None or isinstance(cache, Cache)):
            raise ValueError(f"cache is {type(cache).__name__}; it must come from this layer's new_cache")
        if mask is None and isinstance(cache, StaticCache):
            raise ValueError(
                "a static cache is read as a whole; it needs a mask over its max_tokens places, such as its seen()"
            )
        batch, n = x.shape[:2]
        check_mask(mask, (batch, self.n_heads, n, n if cache is None else cache.length + n), x.device, backend)
        if positions is not None:
            check_positions(positions, batch, n, x.device)


def token_positions(x: torch.Tensor, positions: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
    """The given positions, or those that follow what is cached: (n,) or (b, n) integers."""
    if positions is not None:
        return positions
    if isinstance(cache, StaticCache):
        return cache.place
    start = 0 if cache is None else cache.length
    return torch.arange(start, start + x.shape[1], device=x.device)


def plain_weight(layer: nn.Module, name: str) -> torch.Tensor:
    """The weight of a layer's projection, for what multiplies by it without calling the projection.

    Args:
        layer: a mechanism of this package.
        name: of the projection.

    Returns:
        (out, in).

    Raises:
        ValueError: where a call would compute more than this weight and the layer's biases: an adapter beside it, or another matrix,
            of which the weight holds the quantised numbers.
    """
    projection = getattr(layer, name)
    if type(projection).forward is not nn.Linear.forward:  # parametrised ones keep it
        raise ValueError(
            f"{name} is {type(projection).__name__}; here its weight alone is read, so it must be a torch.nn.Linear: merge an adapter into "
            "the weight first, or make quantised numbers floating-point ones"
        )
    if projection.bias is not None and not vars(layer).get("bias"):
        raise ValueError(f"{name} has a bias; this layer was made without, and knows none")
    return projection.weight
