"""Rung 12h: trained layers as GQA and MLA, and Tucker layers whose keys and values share a latent or get a fresh rotary embedding."""

import numpy as np
import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights
from test_compress import CELLS, EVERY, correlated, errors_on, full_ranks

from reproduce.experiments.exactness import D_MODEL, HEAD_DIM, N_HEADS, error
from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    compress,
    relative_errors,
    second_moment,
    to_gqa,
    to_mla,
    unfold,
)
from tucker_ref.compression.factored_tensor import factored_tensors
from tucker_ref.compression.truncation import read_from

GROUPED = pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if not cell.mechanism.startswith("MLA")])
UNBIASED = pytest.mark.parametrize(
    "name", [name for name, cell in CELLS.items() if not cell.mechanism.startswith("MLA") and cell.bias == "no bias"]
)


def same(layer, other) -> float:
    return max(error(layer, other, mask, "whole sequence") for mask in ("causal", "arbitrary"))


def tensors(layer) -> tuple[np.ndarray, np.ndarray]:
    tucker = as_tucker(layer)
    return tucker.pre.numpy().to_tensor(), tucker.post.numpy().to_tensor()


@pytest.mark.no_cover
@pytest.mark.parametrize("method", ["svd", "mean"])
@GROUPED
def test_as_many_groups_as_there_are_change_nothing(name, method):
    layer = CELLS[name].build()
    groups = layer.k_proj.out_features // HEAD_DIM
    assert same(layer, to_gqa(layer, groups, method=method)) < EXACT
    if groups > 1:  # control: one group for heads that differ
        assert same(layer, to_gqa(layer, 1, method=method)) > DIFFERENT


def expanded(layer: GroupedQueryAttention) -> MultiHeadAttention:
    """The same function as multi-head attention: every key and value head once per query head."""
    mha = MultiHeadAttention(D_MODEL, N_HEADS, head_dim=HEAD_DIM, bias=layer.bias, rotary=layer.rotary).double()
    mha.load_state_dict({
        name: tensor.unflatten(0, (2, 1, HEAD_DIM)).repeat_interleave(3, dim=1).flatten(0, 2) if name[:2] in ("k_", "v_") else tensor
        for name, tensor in layer.state_dict().items()
    })  # fmt: skip
    return mha


@pytest.mark.parametrize("method", ["svd", "mean"])
@pytest.mark.parametrize("name", [name for name in CELLS if name.startswith("GQA")])
def test_heads_that_agree_are_found_to_agree(name, method):
    layer = CELLS[name].build()
    assert same(layer, to_gqa(expanded(layer), 2, method=method)) < EXACT


@pytest.mark.parametrize("rotary", [None, Rotary.heads(HEAD_DIM), Rotary.heads(HEAD_DIM, pairing="interleaved")])
def test_heads_that_agree_up_to_a_change_of_basis_need_the_svd(rotary):
    layer = with_large_weights(GroupedQueryAttention(D_MODEL, N_HEADS, 2, head_dim=HEAD_DIM, bias=True, rotary=rotary))
    mha = expanded(layer)
    with torch.no_grad():  # the second head's key and query turn against each other; values and outputs too
        turn = torch.linalg.qr(tokens(1, HEAD_DIM, HEAD_DIM)[0]).Q
        if rotary is not None:  # only turns of the pairs themselves commute with the embedding
            angles = torch.tensor([0.7, 1.9], dtype=torch.float64)
            first, second = rotary.pairs(torch.arange(HEAD_DIM))
            turn = torch.diag(rotary.unpaired(angles, angles).cos())
            turn[first, second], turn[second, first] = -angles.sin(), angles.sin()
        head = slice(HEAD_DIM, 2 * HEAD_DIM)
        for projection in (mha.q_proj, mha.k_proj, mha.v_proj):
            projection.weight[head] = turn @ projection.weight[head]
            projection.bias[head] = turn @ projection.bias[head]
        mha.o_proj.weight[:, head] = mha.o_proj.weight[:, head] @ turn.T
    assert same(layer, mha) < EXACT
    assert same(layer, to_gqa(mha, 2)) < EXACT
    assert same(layer, to_gqa(mha, 2, method="mean")) > DIFFERENT  # control


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.mechanism in ("MHA", "GQA")])
def test_the_svd_is_never_worse_than_the_mean(name):
    layer = CELLS[name].build()
    for tensor, best, mean in zip(tensors(layer), *(tensors(to_gqa(layer, 1, method=m)) for m in ("svd", "mean"))):
        if layer.rotary is None:
            assert np.linalg.norm(tensor - best) < np.linalg.norm(tensor - mean)
        else:  # per frequency in the average over rotations: see the test of its optimality below
            assert np.linalg.norm(tensor - best) < np.linalg.norm(tensor)


@pytest.mark.parametrize("bias", [False, "qkv", True])
def test_the_svd_is_the_best_head_of_each_group(bias):
    """Eckart & Young: the error is what an SVD of the group's unfolding discards beyond d_H."""
    layer = with_large_weights(MultiHeadAttention(D_MODEL, N_HEADS, bias=bias))
    for tensor, approximation in zip(tensors(layer), tensors(to_gqa(layer, 2))):
        for heads in (slice(0, 3), slice(3, 6)):
            discarded = np.linalg.svd(unfold(tensor[heads], 2), compute_uv=False)[HEAD_DIM:]
            measured = np.linalg.norm(tensor[heads] - approximation[heads])
            assert measured**2 == pytest.approx((discarded**2).sum(), rel=1e-10)


def test_under_rope_the_svd_is_the_best_head_on_average_over_distances():
    """Mean squared difference of the turned slices over many distances: below the mean's, and that of perturbed SVD heads."""
    rotary = Rotary([1.0, 0.37])  # incommensurable: distances fill all angles
    layer = with_large_weights(MultiHeadAttention(D_MODEL, N_HEADS, rotary=rotary))

    def slices(attention, distances):
        """W_h(m) = W_h^Q R(m) W_h^K^T, (m, h, d, d)."""
        q = attention.q_proj.weight.unflatten(0, (-1, HEAD_DIM)).mT  # (h, d, k)
        k = attention.k_proj.weight.unflatten(0, (-1, HEAD_DIM)).mT
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        turned = torch.stack([rotary(q, torch.full((D_MODEL,), float(m))) for m in distances])
        return turned @ k.mT

    distances = range(0, 2000, 7)
    exact = slices(layer, distances)

    def distance_to(other):
        return (exact - slices(other, distances)).square().mean().item()

    best = to_gqa(layer, 2)
    found = distance_to(best)
    assert found < distance_to(to_gqa(layer, 2, method="mean"))
    for seed in range(5):  # no perturbation of keys or queries helps
        other = to_gqa(layer, 2)
        with torch.no_grad():
            for projection in (other.k_proj, other.q_proj):
                projection.weight += 0.02 * tokens(1, *projection.weight.shape, seed=seed)[0]
        assert distance_to(other) > found


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separated"])
@UNBIASED
def test_mla_at_full_rank_is_the_layer(name, shared):
    layer = CELLS[name].build()
    (_, q_rank, keys), (_, _, values) = full_ranks(layer)
    kv_rank = min(keys + values, D_MODEL) if shared else max(keys, values)
    if shared and layer.rotary is not None and keys + values > D_MODEL:
        pytest.skip("turned keys and unturned values of MHA need a latent wider than d_model, which MLA refuses")
    mla = to_mla(layer, q_rank, kv_rank, shared_kv=shared)
    assert mla.shared_kv == shared and same(layer, mla) < EXACT
    assert same(layer, to_mla(layer, q_rank, keys - 2, shared_kv=shared)) > DIFFERENT  # control


@pytest.mark.parametrize(
    "name", [name for name, cell in CELLS.items() if name.startswith("MHA, RoPE") and cell.bias == "no bias"]
)
def test_mla_is_the_hosvd_with_whole_head_and_output_modes(name):
    layer = CELLS[name].build()
    mla, tucker = to_mla(layer, 9, 6, shared_kv=False), compress(layer, (N_HEADS, 9, 6), (N_HEADS, D_MODEL, 6))
    assert same(tucker, mla) < EXACT
    assert same(tucker, to_mla(layer, 8, 6, shared_kv=False)) > DIFFERENT  # control


def test_a_shared_latent_is_the_joint_svd_of_both_unfoldings():
    layer = with_large_weights(MultiHeadAttention(D_MODEL, N_HEADS))
    pre, post = tensors(layer)
    joint = np.concatenate([unfold(t, 2) / np.linalg.norm(t) for t in (pre, post)], axis=1)  # (d, 2 h d)
    basis = np.linalg.svd(joint, full_matrices=False)[0][:, :7]
    mla = to_mla(layer, D_MODEL, 7)
    for ours, tensor in zip(tensors(mla), (pre, post)):
        assert relative_error(ours, tensor @ basis @ basis.T) < 1e-10
    own = np.linalg.svd(unfold(pre, 2))[0][:, :7]  # control: the keys' own subspace is another one
    assert relative_error(tensors(mla)[0], pre @ own @ own.T) > DIFFERENT


@pytest.mark.parametrize("method", ["hosvd", "sthosvd"])
@EVERY
def test_compress_with_a_shared_latent_is_exact_at_full_rank(name, method):
    layer = CELLS[name].build()
    pre, post = full_ranks(layer)
    width = pre[2] + post[2]
    if layer.rotary is None:
        width = min(width, layer.d_model + bool(getattr(layer, "bias", False)))
    compressed = compress(layer, (*pre[:2], width), (*post[:2], width), method=method, shared_kv=True)
    assert compressed.shared_kv and compressed.post.value is compressed.pre.key
    assert same(layer, compressed) < EXACT
    few = 2 if name.startswith("MQA") else 4  # control
    heads = min(N_HEADS, pre[0])
    assert same(layer, compress(layer, (heads, 8, few), (heads, 8, few), method=method, shared_kv=True)) > DIFFERENT


@pytest.mark.parametrize("rotary", ["none", "decoupled", "coupled"])
def test_a_shared_latent_stays_as_narrow_as_it_was(rotary):
    layer = next(c for c in CELLS.values() if c.mechanism == "MLA shared" and c.rotary == rotary and not c.absorb).build()
    pre, post = full_ranks(layer)
    cached = sum(s.numel() for s in layer.new_cache(1, 1).streams.values())
    compressed = compress(layer, (*pre[:2], cached), (*post[:2], cached), shared_kv=True)
    if (
        rotary != "coupled"
    ):  # values read a coupled latent unturned, keys turned: two sets of columns that joint_columns adds up
        assert same(layer, compressed) < EXACT
    assert sum(s.numel() for s in compressed.new_cache(1, 1).streams.values()) == cached


@pytest.mark.parametrize("name", [n for n, cell in CELLS.items() if cell.rotary not in ("none", "decoupled")])
def test_a_fresh_rotary_embedding_replaces_the_old_one(name):
    layer = CELLS[name].build()
    pre, post = full_ranks(layer)
    key_rank = min(pre[2], pre[0] * pre[1], layer.d_model + bool(getattr(layer, "bias", False)))
    ranks = (pre[0], pre[1], key_rank - key_rank % 2)
    fresh = compress(layer, ranks, post, rotary=Rotary.latent(ranks[2]))
    assert torch.equal(fresh.rotary.frequencies, Rotary.latent(ranks[2]).frequencies)
    if ranks[2] == key_rank:
        still = compress(layer, ranks, post, rotary=Rotary([0.0] * (ranks[2] // 2)))
        layer.rotary = None if layer.rotary is None else Rotary([0.0] * (layer.rotary.width // 2))
        assert same(layer, still) < EXACT  # what it approximates is the layer without rotation
    assert same(CELLS[name].build(), fresh) > DIFFERENT  # control: it is another function, at full rank too


@pytest.mark.parametrize("name", ["MHA, RoPE none", "MHA, RoPE head-width", "MHA, RoPE none, all biases"])
def test_knowing_the_inputs_helps_here_too(name):
    layer = CELLS[name].build()
    moment, unseen = second_moment(layer, correlated(8, 200, seed=0)), correlated(2, 30, seed=5)
    ways = [
        lambda m: to_gqa(layer, 2, moment=m),
        lambda m: compress(layer, (4, 8, 6), (4, 8, 6), shared_kv=True, moment=m),
    ]
    if not layer.bias:
        ways += [lambda m: to_mla(layer, 8, 6, moment=m), lambda m: to_mla(layer, 8, 6, shared_kv=False, moment=m)]
    for convert in ways:
        for ours, theirs in zip(errors_on(layer, convert(moment), unseen), errors_on(layer, convert(None), unseen)):
            assert ours < theirs


def test_a_scale_of_its_own_is_kept():
    """GPT-2 may divide logits by the layer's number."""
    layer = with_large_weights(MultiHeadAttention(D_MODEL, N_HEADS))
    layer.scale = 0.17
    exact = (compress(layer, *full_ranks(layer)), to_gqa(layer, 6), to_gqa(layer, 6, method="mean"), to_mla(layer, 24, 24))
    assert all(same(layer, converted) < EXACT for converted in exact)
    layer.scale = 0.34  # control
    assert all(same(layer, converted) > DIFFERENT for converted in exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_layer_are_left_as_they_are(dtype):
    layer = MultiHeadAttention(D_MODEL, N_HEADS, rotary=Rotary.heads(4)).to(dtype)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for converted in (
        to_gqa(layer, 2),
        to_gqa(layer, 3, method="mean"),
        to_mla(layer, 8, 6),
        compress(layer, (3, 6, 6), shared_kv=True),
    ):
        assert {p.dtype for p in converted.parameters()} == {dtype}
        assert converted(tokens(2, 5, D_MODEL).to(dtype)).isfinite().all()
        assert not any(p is q for p in converted.parameters() for q in layer.parameters())
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_columns_of_both_tensors_are_the_same_with_joint():
    pre, post = factored_tensors(CELLS["GQA, RoPE head-width"].build(), joint=True)
    assert all(torch.equal(a, b) for a, b in zip(pre.column_bases, post.column_bases))


@pytest.mark.parametrize(
    "convert, message",
    [
        (lambda: to_gqa(MultiHeadAttention(24, 6), 4), "n_kv_heads is 4; it must divide"),
        (lambda: to_gqa(GroupedQueryAttention(24, 6, 2), 3), "n_kv_heads is 3; it must divide the layer's 2 key/value heads"),
        (lambda: to_gqa(MultiHeadAttention(24, 6), 2, method="median"), "method is 'median'; it must be 'svd' or 'mean'"),
        (lambda: to_gqa(MultiHeadAttention(24, 6), 2, method="mean", moment=torch.eye(24)), "takes no moment"),
        (lambda: to_gqa(MultiHeadLatentAttention(24, 6, 8, 8), 2), "layer is MultiHeadLatentAttention; to_gqa converts"),
        (lambda: to_mla(MultiHeadAttention(24, 6, bias=True), 8, 8), "bias=True; MLA has no biases"),
        (lambda: to_mla(MultiHeadAttention(24, 6), 25, 8), r"\(n_heads, q_rank, kv_rank\)\[1\] is 25"),
        (lambda: to_mla(MultiHeadAttention(24, 6, rotary=Rotary.heads(4)), 8, 7), "is 7; under rotary.*even"),
        (lambda: compress(MultiHeadAttention(24, 6), (3, 4, 4), shared_kv=True, method="hooi"), "'hooi', which refits one"),
        (
            lambda: compress(MultiHeadAttention(24, 6), (3, 4, 4), (3, 4, 3), shared_kv=True),
            r"post_ranks\[2\] is 3; with shared_kv",
        ),
        (lambda: compress(MultiHeadAttention(24, 6), (3, 4, 4), rotary=Rotary.latent(6)), r"turns 6 channels.*ranks\[2\] = 4"),
    ],
)
def test_bad_arguments_are_named(convert, message):
    with pytest.raises(ValueError, match=message):
        convert()


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("d_model", [1, 24])
def test_a_rotary_embedding_that_turns_nothing_changes_nothing(pairing, d_model):
    """And a head wider than the model has channels to spare."""
    layer = with_large_weights(MultiHeadAttention(d_model, 3, head_dim=4, rotary=Rotary([0.0, 0.0], pairing)))
    x = tokens(2, 5, d_model)
    assert relative_error(to_gqa(layer, 3)(x), layer(x)) < 1e-10
    if d_model > 12:
        assert relative_error(to_mla(layer, 12, 12, shared_kv=False)(x), layer(x)) < 1e-10


def columns_lost(slices: torch.Tensor, rank: int) -> float:
    """Squared error of the best `rank` columns for all slices (h, d, e) together."""
    return (torch.linalg.svdvals(slices.flatten(0, 1))[rank:] ** 2).sum().item()


@pytest.mark.parametrize("head_dim", [4, 6])
def test_the_head_of_a_group_is_the_best_on_the_inputs_that_are_known(head_dim):
    """Logits weigh queries and keys by the inputs, outputs weigh values: the Frobenius optimum of the whitened slices."""
    layer = with_large_weights(MultiHeadAttention(12, 4, head_dim=head_dim))
    moment = second_moment(layer, correlated(8, 200, seed=0, width=12))
    root = torch.linalg.cholesky(moment).mT
    small = to_gqa(layer, 2, moment=moment)
    assert small.head_dim == head_dim
    pre, post = (torch.from_numpy(tensor) for tensor in tensors(layer))
    for whitened, measured in zip(
        (torch.einsum("ds,hst,et->hde", root, pre, root), torch.einsum("hst,et->hse", post, root)),
        relative_errors(layer, small, moment),
    ):
        least = sum(columns_lost(group, head_dim) for group in whitened.split(2))
        assert measured**2 * whitened.norm() ** 2 == pytest.approx(least, rel=1e-6)


def test_values_that_are_read_from_a_latent_have_one_class_which_does_not_turn():
    _, post = factored_tensors(CELLS["MHA, RoPE head-width"].build(), joint=True)
    assert post.turns()  # control: before, its columns are the keys' too
    read, _ = read_from(post, torch.randn(len(post.row_basis), 5, dtype=torch.float64), None)
    assert not read.turns() and [group.channels.shape for group in read.classes] == [(1, 5)]


@pytest.mark.parametrize("aware", [False, True])
def test_values_of_mla_are_read_from_the_shared_latent_as_well_as_can_be(aware):
    layer = with_large_weights(MultiHeadAttention(12, 3, head_dim=6))
    moment = second_moment(layer, correlated(8, 200, seed=0, width=12)) if aware else None
    root = torch.linalg.cholesky(moment).mT if aware else torch.eye(12, dtype=torch.float64)
    small = to_mla(layer, 12, 5, moment=moment)
    assert small.head_dim == 6
    latent = root @ small.kv_a_proj_with_mqa.weight.detach().T
    wanted, read = (torch.from_numpy(tensors(each)[1]) @ root.T for each in (layer, small))  # (h, outputs, whitened values)
    assert relative_error(read, wanted @ latent @ torch.linalg.pinv(latent)) < 1e-8


@pytest.mark.parametrize(("q_rank", "kv_rank"), [(12, 1), (1, 12), (1, 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_no_product_of_ranks_bounds_those_of_mla(q_rank, kv_rank, shared):
    small = to_mla(with_large_weights(MultiHeadAttention(12, 3)), q_rank, kv_rank, shared_kv=shared)
    assert (small.q_rank, small.kv_rank) == (q_rank, kv_rank)


@pytest.mark.parametrize(
    ("convert", "name"), [(lambda layer: to_gqa(layer, 2), "to_gqa"), (lambda layer: to_mla(layer, 2, 2), "to_mla")]
)
def test_what_converts_which_layers_is_said(convert, name):
    with pytest.raises(ValueError, match=f"layer is TuckerAttention; {name} converts MultiHeadAttention"):
        convert(TuckerAttention(12, 3, (2, 4, 4)))


def test_a_conversion_has_a_rotary_embedding_of_its_own():
    layer = MultiHeadAttention(8, 2, rotary=Rotary.heads(4))
    for other in (to_gqa(layer, 1), to_gqa(layer, 1, method="mean")):
        other.to("meta")
        assert layer.rotary is not other.rotary and layer(torch.randn(1, 3, 8)).isfinite().all()
