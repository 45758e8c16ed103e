"""Rung 11: Theorems B.2, B.3 and B.4. Outputs and gradients equal to 1e-12, ranks as stated, and controls that miss."""

import numpy as np
import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights, worst_error
from torch import nn

from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    TuckerTensor,
    as_tucker,
    multilinear_rank,
    post_softmax_tensor,
    pre_softmax_tensor,
)


def mha(d, h, **options):
    return with_large_weights(MultiHeadAttention(d, h, **options))


def gqa(d, h, g, **options):
    return with_large_weights(GroupedQueryAttention(d, h, g, **options))


def mla(d, h, q_rank, kv_rank, **options):
    return with_large_weights(MultiHeadLatentAttention(d, h, q_rank, kv_rank, **options))


CASES = {  # theorem and sizes: (layer, pre ranks of the theorem, post ranks of the theorem)
    "B.2 MHA d24 h3": (lambda: mha(24, 3), (3, 24, 24), (3, 24, 24)),
    "B.2 MHA d24 h12": (lambda: mha(24, 12), (12, 24, 24), (12, 24, 24)),
    "B.2 MHA d10 h1": (lambda: mha(10, 1), (1, 10, 10), (1, 10, 10)),
    "B.2 MHA d9 h3 wide heads": (lambda: mha(9, 3, head_dim=4), (3, 9, 9), (3, 9, 9)),
    "B.3 GQA d24 h12 g4": (lambda: gqa(24, 12, 4), (12, 24, 8), (12, 24, 8)),
    "B.3 GQA d30 h6 g2": (lambda: gqa(30, 6, 2), (6, 30, 10), (6, 30, 10)),
    "B.3 MQA d24 h12": (lambda: gqa(24, 12, 1), (12, 24, 2), (12, 24, 2)),
    "B.3 MQA d15 h3": (lambda: gqa(15, 3, 1), (3, 15, 5), (3, 15, 5)),
    "B.4 MLA shared d24 h3": (lambda: mla(24, 3, 10, 9), (3, 10, 9), (3, 24, 9)),
    "B.4 MLA shared d24 h12": (lambda: mla(24, 12, 7, 5), (12, 7, 5), (12, 24, 5)),
    "B.4 MLA separated d24 h3": (lambda: mla(24, 3, 10, 9, shared_kv=False), (3, 10, 9), (3, 24, 9)),
    "B.4 MLA separated d24 h12": (lambda: mla(24, 12, 7, 5, shared_kv=False), (12, 7, 5), (12, 24, 5)),
    "B.4 MLA value width d24 h12": (lambda: mla(24, 12, 7, 5, v_head_dim=3), (12, 7, 5), (12, 24, 5)),
}

DEGENERATE = {  # where the theorem's ranks are only maxima: (layer, theorem pre, theorem post, actual pre, actual post)
    # heads so narrow that together they do not span the model: min(d, n_H d_H)
    "B.2 MHA d24 h3 k4": (lambda: mha(24, 3, head_dim=4), (3, 24, 24), (3, 24, 24), (3, 12, 12), (3, 12, 12)),
    "B.3 GQA d24 h6 g2 k2": (lambda: gqa(24, 6, 2, head_dim=2), (6, 24, 4), (6, 24, 4), (6, 12, 4), (6, 12, 4)),
    "B.3 MQA d24 h6 k2": (lambda: gqa(24, 6, 1, head_dim=2), (6, 24, 2), (6, 24, 2), (6, 12, 2), (6, 12, 2)),
    # a latent so narrow that the output mode cannot reach d: min(d, n_H min(d_H, d_c^K))
    "B.4 MLA shared d24 h3 t5": (lambda: mla(24, 3, 7, 5), (3, 7, 5), (3, 24, 5), (3, 7, 5), (3, 15, 5)),
    "B.4 MLA separated d24 h3 t5": (
        lambda: mla(24, 3, 7, 5, shared_kv=False), (3, 7, 5), (3, 24, 5), (3, 7, 5), (3, 15, 5),
    ),
    # a query latent wider than all heads together can use: n_H d_c^K
    "B.4 MLA separated d24 h2 s15 t5": (
        lambda: mla(24, 2, 15, 5, shared_kv=False, head_dim=12), (2, 15, 5), (2, 24, 5), (2, 10, 5), (2, 10, 5),
    ),
}  # fmt: skip

ALL = {name: case[0] for name, case in (CASES | DEGENERATE).items()}


def dense_tensors(layer) -> tuple[np.ndarray, np.ndarray]:
    """W and W~ of rung 3 straight from the projections, without as_tucker."""
    h = layer.n_heads
    weight = lambda linear: linear.weight.detach().numpy().T  # noqa: E731  (d, out), tokens multiply from the left
    w_o = weight(layer.o_proj).reshape(h, -1, layer.d_model)  # (h, v, d)

    def per_head(w, n_groups):  # (d, groups * k) -> (h, d, k)
        return np.repeat(w.reshape(len(w), n_groups, -1).transpose(1, 0, 2), h // n_groups, axis=0)

    if isinstance(layer, MultiHeadLatentAttention):
        q = per_head(weight(layer.q_a_proj) @ weight(layer.q_b_proj), h)
        up = layer.kv_b_proj.weight.detach().numpy().reshape(h, layer.head_dim + layer.v_head_dim, -1)  # (h, k + v, t)
        down_k = weight(layer.kv_a_proj_with_mqa)
        down_v = down_k if layer.shared_kv else weight(layer.v_a_proj)
        k = np.stack([down_k @ u[: layer.head_dim].T for u in up])
        v = np.stack([down_v @ u[layer.head_dim :].T for u in up])
    else:
        g = layer.k_proj.out_features // layer.head_dim
        q, k, v = per_head(weight(layer.q_proj), h), per_head(weight(layer.k_proj), g), per_head(weight(layer.v_proj), g)
    return pre_softmax_tensor(q, k), post_softmax_tensor(v, w_o)


@pytest.mark.no_cover
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("batch, n_tokens", [(1, 1), (2, 7), (1, 63)])
@pytest.mark.parametrize("name", ALL)
def test_as_tucker_is_exact_in_output_and_gradient(name, batch, n_tokens, causal):
    layer = ALL[name]()
    tucker, x = as_tucker(layer), tokens(batch, n_tokens, layer.d_model)
    assert isinstance(tucker, TuckerAttention)
    for backend in ("reference", "sdpa"):
        assert worst_error(tucker, layer, x, causal=causal, backend=backend) < EXACT


@pytest.mark.parametrize("name", ALL)
def test_controls_miss_by_far(name):
    """Each way to get a theorem slightly wrong is seen by the test above."""
    layer = ALL[name]()
    x = tokens(2, 7, layer.d_model)
    expected = layer(x).detach()

    def missed(change):
        tucker = as_tucker(layer)
        with torch.no_grad():
            change(tucker)
        return relative_error(tucker(x), expected) > DIFFERENT

    assert missed(lambda t: setattr(t, "scale", t.scale / 1.2))
    assert missed(lambda t: t.pre.query.copy_(t.pre.query.roll(1, dims=0)))
    if layer.n_heads > 1:
        assert missed(lambda t: t.pre.head.copy_(t.pre.head.flip(0)))  # heads in the wrong order before the softmax only
        assert missed(lambda t: t.post.head.copy_(t.post.head.flip(0)))  # and after it only
    if layer.n_heads > 1 and as_tucker(layer).post_ranks[1] == as_tucker(layer).post_ranks[2]:
        assert missed(transpose_slices)


def transpose_slices(tucker):
    """W~ stacked without the transpose: exchange its output and value modes, core and factors alike."""
    post = tucker.post
    output, value = post.output.clone(), post.value.clone()
    post.core.copy_(post.core.transpose(1, 2).clone())
    post.output.copy_(value)
    post.value.copy_(output)


@pytest.mark.parametrize("name", CASES)
def test_dense_tensors_and_ranks_are_those_of_the_theorem(name):
    make, pre_ranks, post_ranks = CASES[name]
    check_tensors_and_ranks(make(), pre_ranks, post_ranks)


@pytest.mark.parametrize("name", DEGENERATE)
def test_ranks_below_the_theorems_maxima_are_found(name):
    make, theorem_pre, theorem_post, pre_ranks, post_ranks = DEGENERATE[name]
    check_tensors_and_ranks(make(), pre_ranks, post_ranks)
    assert all(a <= b for a, b in zip(pre_ranks + post_ranks, theorem_pre + theorem_post))
    assert pre_ranks + post_ranks != theorem_pre + theorem_post


@pytest.mark.parametrize("rotary", [None, Rotary.heads(2)], ids=["plain", "RoPE"])
def test_more_heads_than_two_narrow_latents_can_tell_apart_share_a_basis(rotary):
    layer = with_large_weights(GroupedQueryAttention(2, 6, 1, head_dim=2, rotary=rotary))
    tucker, x = as_tucker(layer), tokens(2, 5, 2)
    assert tucker.ranks == (4, 2, 2) and relative_error(tucker(x), layer(x)) < EXACT


def check_tensors_and_ranks(layer, pre_ranks, post_ranks):
    tucker = as_tucker(layer)
    w_pre, w_post = dense_tensors(layer)
    assert relative_error(tucker.pre.to_tensor(), w_pre) < EXACT
    assert relative_error(tucker.post.to_tensor(), w_post) < EXACT
    assert multilinear_rank(w_pre) == pre_ranks == tucker.ranks
    assert multilinear_rank(w_post) == post_ranks == tucker.post_ranks
    assert isinstance(tucker.pre.numpy(), TuckerTensor) and tucker.pre.numpy().ranks == pre_ranks


@pytest.mark.parametrize("name", ALL)
def test_no_mechanism_compresses_the_head_mode(name):
    tucker = as_tucker(ALL[name]())
    identity = torch.eye(tucker.n_heads, dtype=torch.float64)
    assert torch.equal(tucker.pre.head, identity) and torch.equal(tucker.post.head, identity)


@pytest.mark.parametrize("head_rank", [1, 2, 3, 4])
def test_tucker_compresses_the_head_mode(head_rank):
    """What U1 adds: the head rank of the tensors falls below n_H."""
    layer = with_large_weights(TuckerAttention(24, 6, (head_rank, 7, 7), (head_rank, 8, 8)))
    for tensor in (layer.pre, layer.post):
        assert multilinear_rank(tensor.numpy().to_tensor())[0] == head_rank


def test_as_tucker_copies_weights_and_leaves_the_random_state_alone():
    for make in ALL.values():
        layer = make()
        x, state = tokens(1, 5, layer.d_model), torch.get_rng_state()
        tucker = as_tucker(layer)
        assert torch.equal(torch.get_rng_state(), state)
        before = layer(x).detach()
        everything = [*layer.parameters(), *tucker.parameters()]
        assert len({p.untyped_storage().data_ptr() for p in everything}) == len(everything)
        with torch.no_grad():
            for parameter in tucker.parameters():
                parameter.zero_()
        assert torch.equal(layer(x), before)
        assert all(p.requires_grad for p in tucker.parameters())


@pytest.mark.parametrize("shared_kv", [True, False])
def test_shared_kv_stays_one_parameter(shared_kv):
    tucker = as_tucker(mla(24, 3, 10, 9, shared_kv=shared_kv))
    assert tucker.shared_kv == shared_kv == (tucker.post.value is tucker.pre.key)


def test_a_shared_latent_wider_than_the_queries_can_use_is_kept():
    layer = mla(24, 1, 4, 8)  # one head and a query latent of 4 use 4 of the 8 key channels; the values use all 8
    assert as_tucker(layer).ranks == (1, 4, 8)
    assert worst_error(as_tucker(layer), layer, tokens(2, 7, 24)) < EXACT


@pytest.mark.parametrize("latent_norm", [False, True])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_an_odd_latent_beside_rotary_channels_gets_a_channel_of_zeros(shared_kv, latent_norm):
    options = dict(rope_dim=4, rotary=Rotary.heads(4), shared_kv=shared_kv, latent_norm=latent_norm)
    layer = mla(24, 3, 10, 9, **options)
    assert as_tucker(layer).ranks == (3, 10, 14)
    assert worst_error(as_tucker(layer), layer, tokens(2, 7, 24)) < EXACT


def test_as_tucker_of_a_tucker_layer_is_a_copy():
    layer = with_large_weights(TuckerAttention(24, 6, (4, 8, 7), (3, 6, 7), shared_kv=True, scale=0.3))
    other = as_tucker(layer)
    assert other is not layer and other.pre.core is not layer.pre.core and other.post.value is other.pre.key
    assert worst_error(other, layer, tokens(2, 7, 24)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_tucker_keeps_the_dtype(dtype):
    for make in ALL.values():
        assert {p.dtype for p in as_tucker(make().to(dtype)).parameters()} == {dtype}


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="layer is Linear"):
        as_tucker(nn.Linear(3, 3))


HEADS_TO_SPARE = {  # modes that are smaller than the theorem's rank, or more than the other two ranks can tell apart
    "MHA, more heads than products of channels": lambda: mha(2, 6, head_dim=1),
    "MHA, wide heads": lambda: mha(4, 3, head_dim=4),
    "MHA, wide heads that turn": lambda: mha(4, 3, head_dim=4, rotary=Rotary.heads(4)),
    "MQA, more heads that turn than products of channels": lambda: gqa(2, 8, 1, head_dim=2, rotary=Rotary.heads(2)),
    "MHA, many heads that turn": lambda: mha(2, 12, head_dim=2, rotary=Rotary.heads(2)),
    "MLA, more heads than products of latents": lambda: mla(8, 8, 2, 2, head_dim=1),
    "MLA, latents that turn": lambda: mla(8, 2, 2, 6, head_dim=1, rotary=Rotary.latent(6)),
    "MLA, normalised latents wider than their heads": lambda: mla(8, 1, 4, 6, head_dim=2, shared_kv=False, latent_norm=True),
    "MLA, one normalised latent wider than its heads": lambda: mla(8, 1, 4, 6, head_dim=2, latent_norm=True),
    "MLA, one latent wider than its heads": lambda: mla(8, 1, 4, 6, head_dim=2),
}


@pytest.mark.parametrize("name", HEADS_TO_SPARE)
def test_ranks_beyond_a_mode_or_a_product_are_cut_without_a_loss(name):
    layer, x = HEADS_TO_SPARE[name](), tokens(2, 7, 8)
    x = x[..., : layer.d_model]
    tucker = as_tucker(layer)
    assert relative_error(tucker(x), layer(x)) < EXACT
    with torch.no_grad():
        tucker.pre.core.mul_(3.0)
    assert relative_error(tucker(x), layer(x)) > 1e-6  # control
    mine, theirs = ({p.data_ptr() for p in (*each.parameters(), *each.buffers())} for each in (tucker, layer))
    assert not mine & theirs  # weights and frequencies of its own


def test_a_tucker_form_lies_in_memory_as_it_reads():
    for shared in (True, False):
        tucker = as_tucker(MultiHeadLatentAttention(8, 2, 4, 4, shared_kv=shared))
        assert all(parameter.is_contiguous() for parameter in tucker.parameters())
