"""A layer of `tucker_ref` where a model of transformers or timm calls its own attention, and a cache for transformers' `generate`."""

import torch
from torch import nn

from tucker_ref import Cache

READ_ELSEWHERE = ("position_embeddings", "cache_position")  # cosines and sines: the layer has their frequencies


class Adapter(nn.Module):
    """A layer of `tucker_ref` in the place of an attention module.

    Args:
        attention: the layer.
        causal: whether a token sees only those before it, where no mask says so.
        returns_weights: transformers expects (output, weights), timm the output alone.
        norm: what follows inside the module that is replaced: BERT's LayerNorm of output plus input.
        index: of the layer's own cache among those of the model.
        limit: positions from here on turn with other frequencies in the original (longrope).
    """

    def __init__(
        self,
        attention: nn.Module,
        causal: bool,
        returns_weights: bool,
        norm: nn.Module | None = None,
        index: int = 0,
        limit: int | None = None,
    ):
        super().__init__()
        self.attention, self.causal, self.returns_weights = attention, causal, returns_weights
        self.norm, self.index, self.limit = norm, index, limit

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        *,
        attn_mask=None,
        position_ids=None,
        past_key_values=None,
        layer_past=None,
        is_causal=None,
        **others,
    ):
        """The layer on these hidden states.

        Args:
            hidden_states: (b, n, d).
            attention_mask: as SDPA takes it, boolean or added to the logits, the causal rule included; None for that rule alone.
            attn_mask: timm's name for it.
            position_ids: (n,), (1, n) or (b, n).
            past_key_values: None, or what `layer_caches` made.
            layer_past: GPT-NeoX's name for it.
            is_causal: in place of the layer's own rule, where the model says so.
            others: what transformers hands on; a tensor among them must be known here.

        Returns:
            (b, n, d), in a pair with None where the model expects one.

        Raises:
            ValueError: for what no layer here knows: another cache, numbers added to logits, other frequencies.
        """
        for name, value in others.items():
            if isinstance(value, torch.Tensor) and name not in READ_ELSEWHERE:
                raise ValueError(f"this attention is given {name}, which no layer here knows")
        mask = _may_look(attn_mask if attention_mask is None else attention_mask)
        causal = (self.causal if is_causal is None else is_causal) and mask is None
        y = self.attention(
            hidden_states,
            causal=causal,
            mask=mask,
            positions=self._positions(position_ids),
            cache=self._cache(past_key_values if layer_past is None else layer_past),
        )
        if self.norm is not None:
            y = self.norm(y + hidden_states)
        return (y, None) if self.returns_weights else y

    def _positions(self, positions):
        if positions is None:
            return None
        if self.limit is not None and positions.numel() and positions.max() >= self.limit:
            raise ValueError(f"position {int(positions.max())}: from {self.limit} on this model turns with other frequencies")
        return positions[0] if positions.ndim == 2 and len(positions) == 1 else positions

    def _cache(self, caches) -> Cache | None:
        """This layer's own."""
        if caches is None:
            return None
        own = getattr(caches.layers[self.index], "cache", None) if len(caches.layers) > self.index else None
        if own is None:
            raise ValueError(
                "a replaced attention layer keeps no transformers cache; call the model with use_cache=False, or give it "
                "past_key_values=opened.new_cache(batch, max_tokens)"
            )
        return own


def _may_look(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as layers here take it, True where a query may look.  Raises ValueError for one that adds something to logits."""
    if mask is None or not mask.is_floating_point():
        return mask
    seen = mask == 0
    if not (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ValueError("this attention is given numbers that are added to its logits, which no layer here knows")
    return seen


def layer_caches(layers: list[nn.Module], batch: int, max_tokens: int):
    """One cache of `tucker_ref` per layer, in a form that transformers takes as `past_key_values`.

    Args:
        layers: in the order of the model.
        batch: how many sequences.
        max_tokens: how many tokens of each there is room for.
    """
    from transformers import cache_utils

    class OwnCache(cache_utils.CacheLayerMixin):
        """Masks and positions hang on its length; keys and values are the layer's affair."""

        is_sliding = False

        def __init__(self, cache: Cache):
            super().__init__()
            self.cache, self.is_initialized = cache, True

        def lazy_initialization(self, key_states, value_states):
            raise NotImplementedError

        def update(self, key_states, value_states, *args, **kwargs):
            raise NotImplementedError

        def get_mask_sizes(self, query_length):
            return self.cache.length + query_length, 0

        def get_seq_length(self):
            return self.cache.length

        def get_max_length(self):
            return self.cache.max_tokens

        def reset(self):
            self.cache.truncate(0)

        def reorder_cache(self, beam_idx):
            self.cache.reorder(beam_idx)

    return cache_utils.Cache(layers=[OwnCache(layer.new_cache(batch, max_tokens)) for layer in layers])
