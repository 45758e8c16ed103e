"""Rung 11a: what every mechanism is as core and factors, against the dense tensors of rung 3."""

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, with_large_weights
from test_special_cases import ALL, dense_tensors
from torch import nn

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, MultiHeadLatentAttention, Rotary, TuckerAttention, spectra
from tucker_ref.factors import Factors, factors_of, times_heads


def slices(factors: Factors) -> torch.Tensor:
    """W_h = P left_h right_h^T L^T, (h, D, D)."""
    dense = factors.dense()
    return dense.rows.double() @ dense.left.double() @ dense.right.double().mT @ dense.columns.double().T


@pytest.mark.parametrize("name", ALL)
def test_core_and_factors_are_the_dense_tensors(name):
    layer = ALL[name]()
    both = factors_of(layer)
    for factors, expected in zip((both.pre, both.post), dense_tensors(layer)):
        assert relative_error(slices(factors), expected) < EXACT
        assert relative_error(factors.rows @ factors.head_cores() @ factors.columns.T, expected) < EXACT
        if layer.n_heads > 1:
            assert relative_error(slices(factors).roll(1, 0), expected) > DIFFERENT  # control: heads in another order


@pytest.mark.parametrize("shared", [True, False])
def test_a_tucker_layer_is_its_own_core_and_factors(shared):
    layer = with_large_weights(TuckerAttention(24, 6, (4, 8, 5), (3, 6, 5), bias=True, shared_kv=shared))
    both = factors_of(layer)
    for factors, weights in ((both.pre, layer.pre), (both.post, layer.post)):
        assert relative_error(slices(factors), weights.to_tensor()) < EXACT
        assert factors.dense().left is factors.left and factors.dense().right is factors.right  # nothing to spell out
    assert both.output_bias is layer.output_bias and both.rotary is None and both.shared_kv == shared
    assert both.norms is both.qk_norms is None
    normed = TuckerAttention(24, 6, (4, 8, 5), shared_kv=shared, latent_norm=True, qk_norm="head")
    assert factors_of(normed).norms == (normed.query_norm, normed.key_norm, normed.value_norm)
    assert factors_of(normed).qk_norms == (normed.q_norm, normed.k_norm)
    with pytest.raises(ValueError, match="layer has latent_norm=True"):
        spectra(normed)


def test_heads_take_columns_as_they_are_by_number():
    """Nothing of size n_H x d x d_H is made for them, and the weights are not copied."""
    layer = with_large_weights(GroupedQueryAttention(24, 6, 2, head_dim=4))
    both = factors_of(layer)
    for factors, rows, columns in ((both.pre, layer.q_proj, layer.k_proj), (both.post, layer.o_proj, layer.v_proj)):
        assert factors.left.tolist() == [0, 1, 2, 3, 4, 5] and factors.right.tolist() == [0, 0, 0, 1, 1, 1]
        assert factors.rows.data_ptr() == rows.weight.data_ptr() and factors.columns.data_ptr() == columns.weight.data_ptr()
        assert not any(tensor.requires_grad for tensor in vars(factors).values())
    matrix, dense = torch.randn(5, 24), both.pre.dense()
    for heads, spelled_out, width in ((both.pre.left, dense.left, 24), (both.pre.right, dense.right, 8)):
        ours, theirs = times_heads(matrix[:, :width], heads), times_heads(matrix[:, :width], spelled_out)
        assert ours.shape == (6, 5, 4) and relative_error(ours, theirs) < 1e-6
        assert relative_error(ours.roll(1, 2), theirs) > DIFFERENT  # control
    for heads, copied in (([0, 1, 2, 3], False), ([1, 0, 3, 2], True), ([2, 3], True), ([0, 2, 1, 3, 3], True)):
        taken = times_heads(matrix, torch.tensor(heads))
        assert torch.equal(taken, matrix.unflatten(1, (4, 6)).transpose(0, 1)[heads])
        assert (taken.data_ptr() != matrix.data_ptr()) == copied


@pytest.mark.parametrize("bias, expected", [(False, None), ("qkv", 0.0), (True, 1.0)])
def test_a_bias_is_one_more_row_and_outputs_have_one_too(bias, expected):
    layer = MultiHeadAttention(24, 6, bias=bias)
    if bias is True:
        nn.init.ones_(layer.o_proj.bias)
    both = factors_of(layer)
    assert {len(both.pre.rows), len(both.pre.columns), len(both.post.columns)} == {24 + bool(bias)} and len(
        both.post.rows
    ) == 24
    assert both.output_bias is None if expected is None else torch.equal(both.output_bias, torch.full((24,), expected))


@pytest.mark.parametrize("shared", [True, False])
def test_what_stands_beside_the_tensors_of_mla(shared):
    layer = MultiHeadLatentAttention(24, 3, 10, 9, rope_dim=4, rotary=Rotary.heads(4), shared_kv=shared, latent_norm=True)
    nn.init.constant_(layer.kv_a_layernorm.weight, 3.0)
    both = factors_of(layer)
    assert both.shared_kv == shared and both.output_bias is None
    assert both.pre.columns.shape == (24, 14) and not both.pre.columns[:, 9].any()  # nine, one of zeros, four that turn
    assert both.post.columns.shape == (24, 9) and torch.equal(both.post.columns, both.pre.columns[:, :9]) == shared
    assert both.rotary.width == 14 and both.rotary.frequencies[:5].count_nonzero() == 0
    query, key, value = both.norms
    assert torch.equal(key.weight, torch.full((9,), 3.0)) and key.weight is not layer.kv_a_layernorm.weight
    assert len(query.weight) == 10 and isinstance(value, nn.Identity) == shared


def test_another_module_has_no_factors():
    with pytest.raises(ValueError, match="layer is Linear; it must be MultiHeadAttention"):
        factors_of(nn.Linear(3, 3))
