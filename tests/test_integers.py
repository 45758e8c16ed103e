"""Whatever Python takes for an integer is one here: NumPy's of any width, and those in tensors. Kept are ints; True and 2.0 are none."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import tokens, with_large_weights
from torch import nn

from tucker_ref import (
    Cache,
    GroupedQueryAttention,
    LatentNorm,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    choose_ranks,
    compress,
    fold,
    gqa_cost,
    hooi,
    hosvd,
    mha_cost,
    mla_cost,
    mode_product,
    mode_product_einsum,
    spectra,
    sthosvd,
    tail_energies,
    to_gqa,
    to_mla,
    tucker_cost,
    unfold,
)
from tucker_ref.compression.model_ranks import choose_model_ranks
from tucker_ref.held import Held
from tucker_ref.norms import QKNorm
from tucker_ref.static_cache import StaticCache

KINDS = {
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "np.int8": np.int8,
    "an array of order 0": np.array,
    "a tensor": torch.tensor,
    "a tensor of uint8": lambda value: torch.tensor(value, dtype=torch.uint8),
}
NO_INTEGERS = (
    *(True, 2.0, "2", np.True_, np.float64(2), np.array(2.0), np.array([2, 2])),
    *(torch.tensor(True), torch.tensor(2.0), torch.tensor([2, 2]), torch.tensor(2, device="meta")),
)
TENSOR = np.random.default_rng(0).normal(size=(3, 4, 5))
ROWS = np.ones((2, 4))
LAYER = with_large_weights(MultiHeadAttention(24, 6))
SPECTRUM = spectra(LAYER)[0]


def stored(n: int = 3) -> Cache:
    cache = Cache({"key": (1, 2)}, 1, 4, dtype=torch.float64, device="cpu")
    cache.append(key=tokens(1, n, 2).unsqueeze(1))
    return cache


def cut(length, static: bool) -> list:
    cache = stored()
    chosen = StaticCache(cache, torch.tensor([3])) if static else cache
    chosen.truncate(length)
    return [chosen.length, getattr(chosen, "place", None)]


PARAMETERS = {  # of the public functions, each that is an integer: one that it may be, and the call
    "MHA d_model": (24, lambda v: MultiHeadAttention(v, 6, bias=True)),
    "MHA n_heads": (6, lambda v: MultiHeadAttention(24, v)),
    "MHA head_dim": (4, lambda v: MultiHeadAttention(24, 6, head_dim=v, qk_norm="all")),
    "GQA d_model": (24, lambda v: GroupedQueryAttention(v, 6, 2)),
    "GQA n_heads": (6, lambda v: GroupedQueryAttention(24, v, 2)),
    "GQA n_kv_heads": (2, lambda v: GroupedQueryAttention(24, 6, v, qk_norm="all")),
    "MLA d_model": (24, lambda v: MultiHeadLatentAttention(v, 6, 10, 8)),
    "MLA n_heads": (6, lambda v: MultiHeadLatentAttention(24, v, 10, 8)),
    "MLA q_rank": (10, lambda v: MultiHeadLatentAttention(24, 6, v, 8, latent_norm=True)),
    "MLA kv_rank": (8, lambda v: MultiHeadLatentAttention(24, 6, 10, v)),
    "MLA head_dim": (4, lambda v: MultiHeadLatentAttention(24, 6, 10, 8, head_dim=v)),
    "MLA v_head_dim": (3, lambda v: MultiHeadLatentAttention(24, 6, 10, 8, v_head_dim=v)),
    "MLA rope_dim": (4, lambda v: MultiHeadLatentAttention(24, 6, 10, 8, rope_dim=v, rotary=Rotary.heads(4))),
    "MLA no rope_dim": (0, lambda v: MultiHeadLatentAttention(24, 6, 10, 8, rope_dim=v)),
    "Tucker d_model": (24, lambda v: TuckerAttention(v, 6, (4, 9, 8), bias=True)),
    "Tucker n_heads": (6, lambda v: TuckerAttention(24, v, (4, 9, 8), qk_norm="all")),
    "Tucker rank": (8, lambda v: TuckerAttention(24, 6, (4, 9, v), latent_norm=True)),
    "Tucker post rank": (5, lambda v: TuckerAttention(24, 6, (4, 9, 8), (3, 7, v))),
    "LatentNorm width": (8, lambda v: LatentNorm(v)),
    "LatentNorm normalised": (6, lambda v: LatentNorm(8, v)),
    "QKNorm width": (8, lambda v: QKNorm(v)),
    "QKNorm heads": (2, lambda v: QKNorm(8, v)),
    "QKNorm blocks": (2, lambda v: QKNorm(8, blocks=v)),
    "QKNorm count": (3, lambda v: QKNorm(8, count=v)),
    "Rotary blocks": (2, lambda v: Rotary([1.0, 2.0, 3.0], blocks=(4, v))),
    "Rotary head_dim": (8, lambda v: Rotary.heads(v)),
    "Rotary n_kv_heads": (2, lambda v: Rotary.groups(8, v)),
    "Rotary width": (8, lambda v: Rotary.latent(v)),
    "Rotary kv_rank": (6, lambda v: Rotary.decoupled(v, 4)),
    "Rotary rope_dim": (4, lambda v: Rotary.decoupled(6, v)),
    "Rotary times": (3, lambda v: Rotary.heads(8).repeated(v)),
    "new_cache batch": (2, lambda v: LAYER.new_cache(v, 5)),
    "new_cache max_tokens": (5, lambda v: LAYER.new_cache(2, v)),
    "Cache heads": (3, lambda v: Cache({"key": (v, 2)}, 1, 4, dtype=torch.float32, device="cpu")),
    "Cache width": (3, lambda v: Cache({"key": (2, v)}, 1, 4, dtype=torch.float32, device="cpu")),
    "Cache length": (2, lambda v: cut(v, static=False)),
    "StaticCache length": (2, lambda v: cut(v, static=True)),
    "Held max_positions": (7, lambda v: Held(MultiHeadAttention(24, 6, rotary=Rotary.heads(4)), v, torch.float32).values[0][2]),
    "unfold mode": (1, lambda v: unfold(TENSOR, v)),
    "fold mode": (1, lambda v: fold(unfold(TENSOR, 1), v, (3, 4, 5))),
    "fold shape": (5, lambda v: fold(unfold(TENSOR, 1), 1, (3, 4, v))),
    "mode_product mode": (1, lambda v: mode_product(TENSOR, ROWS, v)),
    "mode_product_einsum mode": (1, lambda v: mode_product_einsum(TENSOR, ROWS, v)),
    "hosvd rank": (2, lambda v: hosvd(TENSOR, (2, v, 3))),
    "sthosvd rank": (2, lambda v: sthosvd(TENSOR, (2, v, 3))),
    "hooi rank": (2, lambda v: hooi(TENSOR, (2, v, 3))),
    "hooi max_sweeps": (2, lambda v: hooi(TENSOR, (2, 2, 2), v)),
    "tail_energies rank": (2, lambda v: tail_energies(TENSOR, (2, v, 3))),
    "Spectra.tails rank": (2, lambda v: SPECTRUM.tails((2, v, 3))),
    "compress rank": (8, lambda v: compress(LAYER, (4, v, 8))),
    "compress post rank": (8, lambda v: compress(LAYER, (4, 8, 8), (3, v, 8))),
    "compress shared rank": (8, lambda v: compress(LAYER, (4, 9, v), (4, 9, v), shared_kv=True)),
    "to_gqa n_kv_heads": (2, lambda v: to_gqa(LAYER, v)),
    "to_gqa mean n_kv_heads": (2, lambda v: to_gqa(LAYER, v, method="mean")),
    "to_mla q_rank": (9, lambda v: to_mla(LAYER, v, 8)),
    "to_mla kv_rank": (8, lambda v: to_mla(LAYER, 9, v)),
    "choose_model_ranks max_cache": (9, lambda v: choose_model_ranks([LAYER], max_cache=v)),
    "choose_model_ranks max_parameters": (127, lambda v: choose_model_ranks([LAYER], max_parameters=v)),
    "mha_cost d_model": (24, lambda v: mha_cost(v, 6)),
    "mha_cost n_heads": (6, lambda v: mha_cost(24, v)),
    "mha_cost head_dim": (4, lambda v: mha_cost(24, 6, v)),
    "gqa_cost n_kv_heads": (2, lambda v: gqa_cost(24, 6, v)),
    "mla_cost q_rank": (10, lambda v: mla_cost(24, 6, v, 8)),
    "mla_cost kv_rank": (8, lambda v: mla_cost(24, 6, 10, v)),
    "mla_cost v_head_dim": (3, lambda v: mla_cost(24, 6, 10, 8, v_head_dim=v)),
    "mla_cost rope_dim": (4, lambda v: mla_cost(24, 6, 10, 8, rope_dim=v)),
    "tucker_cost rank": (8, lambda v: tucker_cost(24, 6, (4, v, 8))),
    "tucker_cost post rank": (8, lambda v: tucker_cost(24, 6, (4, 8, 8), (v, 8, 8))),
    "flops n_tokens": (100, lambda v: mha_cost(24, 6).flops(v)),
    "cache_bytes n_tokens": (100, lambda v: mha_cost(24, 6).cache_bytes(v)),
    "cache_bytes n_layers": (100, lambda v: mha_cost(24, 6).cache_bytes(1, v)),
    "parameter_bytes n_layers": (100, lambda v: mha_cost(24, 6).parameter_bytes(v)),
    "parameter_bytes bytes_per_number": (4, lambda v: mha_cost(24, 6).parameter_bytes(1, v)),
}  # fmt: skip
BUDGETS = {  # which may be fractions
    "choose_ranks max_cache": (9, lambda v: choose_ranks(LAYER, max_cache=v)),
    "choose_ranks max_parameters": (127, lambda v: choose_ranks(LAYER, max_parameters=v)),
}


def told(found):
    """All that an object holds, with the types of its numbers."""
    if isinstance(found, torch.Tensor):
        return "tensor", found.dtype, found.tolist()
    if isinstance(found, np.ndarray):
        return "array", found.dtype, found.tolist()
    if isinstance(found, nn.Module):
        kept = {name: value for name, value in vars(found).items() if not name.startswith("_")}
        shapes = {name: tuple(p.shape) for name, p in found.named_parameters()}
        return type(found).__name__, told(kept), shapes, [told(child) for child in found.children()]
    if dataclasses.is_dataclass(found):
        return type(found).__name__, told(vars(found))
    if isinstance(found, Cache):
        return found.length, told([found.batch, found.max_tokens]), {name: tuple(t.shape) for name, t in found.streams.items()}
    if isinstance(found, dict):
        return {name: told(value) for name, value in found.items()}
    if isinstance(found, (tuple, list, torch.Size)):
        return [told(value) for value in found]
    return type(found).__name__, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PARAMETERS | BUDGETS)
def test_an_integer_of_another_kind_is_that_integer(name, kind):
    value, call = (PARAMETERS | BUDGETS)[name]
    assert told(call(KINDS[kind](value))) == told(call(value))


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_no_integer_is_refused(name):
    for bad in NO_INTEGERS:
        with pytest.raises(ValueError, match="integer|modes 0 to 2"):
            PARAMETERS[name][1](bad)


@pytest.mark.parametrize("name", BUDGETS)
def test_what_is_no_number_is_no_budget(name):
    for bad in (True, "2", np.True_, torch.tensor(True), -1, np.int64(-1), float("nan")):
        with pytest.raises(ValueError, match="it must be a number of at least 0"):
            BUDGETS[name][1](bad)
    assert BUDGETS[name][1](130.5) == BUDGETS[name][1](130)


def test_control_what_is_told_shows_the_kind_of_an_integer():
    layer = MultiHeadAttention(24, 6)
    before = told(layer)
    layer.head_dim = np.int64(layer.head_dim)
    assert told(layer) != before and layer.head_dim == 4


def test_narrow_integers_do_not_overflow():
    """200 + 1, 200^2 and 255 * 4 are beyond eight bits."""
    eight = np.uint8
    assert TuckerAttention(eight(255), eight(5), (eight(4), eight(9), eight(8)), bias=True).pre.query.shape == (256, 9)
    assert mha_cost(eight(200), eight(10)).parameters == 4 * 200**2
    assert mha_cost(200, 10).flops(eight(200)) == mha_cost(200, 10).flops(200) > 2**16
    assert mha_cost(200, 10).cache_bytes(eight(200), eight(200), eight(4)) == 400 * 200 * 200 * 4
    assert LAYER.new_cache(eight(1), eight(200)).nbytes == 2 * 24 * 200 * 8
    assert Rotary.groups(eight(254), eight(3)).width == 762


def test_sizes_of_no_kind_of_room():
    with pytest.raises(ValueError, match="the number of heads of key is 0; it must be an integer of at least 1"):
        Cache({"key": (0, 2)}, 1, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="blocks is 4; it must be even widths that add up to 4"):
        Rotary([1.0, 2.0], blocks=4)
