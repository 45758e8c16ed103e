"""Rung 13: Table 1's formulas against the real modules: parameters counted, arithmetic measured."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    gqa_cost,
    mha_cost,
    mla_cost,
    tucker_cost,
)

CASES = {  # made anew for each test
    "mha": (lambda: MultiHeadAttention(24, 3), lambda: mha_cost(24, 3)),
    "mha-wide": (lambda: MultiHeadAttention(10, 3, head_dim=7), lambda: mha_cost(10, 3, 7)),
    "gqa": (lambda: GroupedQueryAttention(24, 12, 4), lambda: gqa_cost(24, 12, 4)),
    "mqa": (lambda: GroupedQueryAttention(24, 12, 1), lambda: gqa_cost(24, 12, 1)),
    "mla-shared": (lambda: MultiHeadLatentAttention(24, 3, 7, 5), lambda: mla_cost(24, 3, 7, 5)),
    "mla-separated": (
        lambda: MultiHeadLatentAttention(24, 3, 7, 5, shared_kv=False),
        lambda: mla_cost(24, 3, 7, 5, shared_kv=False),
    ),
    "mla-widths": (
        lambda: MultiHeadLatentAttention(24, 3, 7, 5, head_dim=6, v_head_dim=4),
        lambda: mla_cost(24, 3, 7, 5, 6, 4),
    ),
    "tucker": (lambda: TuckerAttention(24, 12, (8, 7, 5)), lambda: tucker_cost(24, 12, (8, 7, 5))),
    "tucker-unequal": (
        lambda: TuckerAttention(24, 12, (8, 7, 5), (3, 6, 4)),
        lambda: tucker_cost(24, 12, (8, 7, 5), (3, 6, 4)),
    ),
    "tucker-shared": (
        lambda: TuckerAttention(24, 12, (8, 7, 5), (3, 6, 5), shared_kv=True),
        lambda: tucker_cost(24, 12, (8, 7, 5), (3, 6, 5), shared_kv=True),
    ),
    "mla-decoupled": (
        lambda: MultiHeadLatentAttention(24, 3, 7, 5, head_dim=6, v_head_dim=4, rope_dim=2, rotary=Rotary.heads(2)),
        lambda: mla_cost(24, 3, 7, 5, 6, 4, rope_dim=2),
    ),
    "mla-decoupled-separated": (
        lambda: MultiHeadLatentAttention(24, 3, 7, 5, rope_dim=2, rotary=Rotary.heads(2), shared_kv=False),
        lambda: mla_cost(24, 3, 7, 5, rope_dim=2, shared_kv=False),
    ),
}
SIZES = pytest.mark.parametrize("d, h", [(24, 3), (768, 12), (2048, 32)])


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_module(name):
    make, cost = CASES[name]
    assert sum(p.numel() for p in make().parameters()) == cost().parameters


@pytest.mark.parametrize("name", CASES)
def test_cached_numbers_are_those_of_the_module(name):
    make, cost = CASES[name]
    assert make().new_cache(1, 1).nbytes == 4 * cost().cache_per_token


@pytest.mark.parametrize("name", CASES)
def test_arithmetic_is_what_torch_counts(name):
    make, cost = CASES[name]
    with FlopCounterMode(display=False) as counter:
        make()(torch.randn(1, 9, make().d_model), causal=False, backend="reference")
    assert counter.get_total_flops() == cost().flops(9)


@SIZES
def test_table_1_closed_forms(d, h):
    """The formulas as the paper prints them, for n_H d_H = d and all latents of one width."""
    d_h, g, c, n = d // h, 3 if h == 12 else 1, d // 4, 100
    r1, r2, r3 = min(h, 8), d // 6, d // 8
    assert mha_cost(d, h).parameters == 4 * d**2 and mha_cost(d, h).cache_bytes(n, bytes_per_number=1) == 2 * n * d
    mqa = gqa_cost(d, h, 1)
    assert mqa.parameters == 2 * d**2 + 2 * d_h * d and mqa.cache_bytes(n, bytes_per_number=1) == 2 * n * d_h
    gqa = gqa_cost(d, h, g)
    assert gqa.parameters == 2 * d**2 + 2 * g * d_h * d and gqa.cache_bytes(n, bytes_per_number=1) == 2 * n * g * d_h
    shared, separated = mla_cost(d, h, c, c), mla_cost(d, h, c, c, shared_kv=False)
    assert shared.parameters == d**2 + 5 * d * c and shared.cache_bytes(n, bytes_per_number=1) == n * c
    assert separated.parameters == d**2 + 6 * d * c and separated.cache_bytes(n, bytes_per_number=1) == 2 * n * c
    tucker, tied = tucker_cost(d, h, (r1, r2, r3)), tucker_cost(d, h, (r1, r2, r3), shared_kv=True)
    assert tucker.parameters == 2 * (h * r1 + d * r2 + d * r3 + r1 * r2 * r3)
    assert tied.parameters == 2 * (h * r1 + d * r2 + r1 * r2 * r3) + d * r3
    assert tucker.cache_bytes(n, bytes_per_number=1) == 2 * n * r3 and tied.cache_bytes(n, bytes_per_number=1) == n * r3


def test_bytes_count_layers_and_precision():
    cost = mha_cost(768, 12)
    assert cost.parameter_bytes() == cost.parameters * 2 and cost.cache_bytes(3) == cost.cache_per_token * 3 * 2
    assert cost.parameter_bytes(12) == 4 * 768**2 * 12 * 2 == 2 * cost.parameter_bytes(12, bytes_per_number=1)
    assert cost.cache_bytes(1024, 12) == 2 * 768 * 1024 * 12 * 2


def test_heads_that_do_not_divide_the_model_need_a_width():
    with pytest.raises(ValueError, match="n_heads is 3; it must divide d_model = 10"):
        mha_cost(10, 3)


def test_what_happens_once_is_apart_from_what_happens_per_token():
    cost = tucker_cost(10, 3, (2, 4, 5), (3, 6, 2))  # heads need not divide the model
    assert cost.once == 3 * (2 * 4 * 5 + 3 * 6 * 2)  # C x_1 U1 and C~ x_1 U~1
    assert cost.projections == 10 * (4 + 5 + 6 + 2) + 3 * (4 * 5 + 6 * 2)
    assert cost.attention == 3 * (5 + 2)
    assert mha_cost(24, 3).once == gqa_cost(24, 3, 1).once == mla_cost(24, 3, 7, 5).once == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mla_cost(24, 3, 7, 5, v_head_dim=0), "^v_head_dim is 0"),
        *(
            (
                lambda size=size: mla_cost(24, 3, 7, 5, rope_dim=size),
                f"^rope_dim is {size!r}; it must be an integer of at least 1",
            )
            for size in (-2, 2.0, True, None)
        ),
        (lambda: tucker_cost(24, 3, (2, 4, 5), (2, 4)), r"^post_ranks is \(2, 4\); it must be 3 integers"),
        (lambda: tucker_cost(24, 3, 5), "^ranks is 5; it must be 3 integers"),
        (lambda: tucker_cost(24, 3, (2, 4, 5), (2, 0, 5)), r"^post_ranks\[1\] is 0"),
    ],
)
def test_what_no_layer_can_have_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_tokens_cost_nothing_and_any_number_may_be_asked_about():
    cost = mha_cost(24, 3)
    assert cost.flops(0) == cost.cache_bytes(0) == cost.parameter_bytes(0) == 0
    assert cost.cache_bytes(10**30) == 10**30 * cost.cache_bytes(1) > 0  # not the size of a tensor
    with pytest.raises(ValueError, match="^n_tokens is -1; it must be an integer of at least 0"):
        cost.flops(-1)
