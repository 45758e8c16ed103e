"""Rung 3: Eqs. 2-6, attention as two tensors, equals textbook multi-head attention."""

import numpy as np
import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error

from tucker_ref import multi_head_attention, post_softmax_tensor, pre_softmax_tensor, tensor_attention
from tucker_ref.attention_tensors import causal_mask, softmax

SHAPES = [(1, 6, 1, 6), (7, 15, 3, 5), (63, 24, 12, 2), (10, 9, 3, 4)]  # n, d, h, k; the last has n_H d_H > d


def random_head_weights(d, h, k, seed=0):
    rng = np.random.default_rng(seed)
    w_q, w_k, w_v = rng.standard_normal((3, h, d, k)) / np.sqrt(d) * 1.5
    return w_q, w_k, w_v, rng.standard_normal((h, k, d)) / np.sqrt(h * k)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, d, h, k", SHAPES)
def test_eq6_tensor_attention_is_multi_head_attention(n, d, h, k, causal):
    x = np.random.default_rng(1).standard_normal((n, d))
    w_q, w_k, w_v, w_o = random_head_weights(d, h, k)
    w_pre, w_post = pre_softmax_tensor(w_q, w_k), post_softmax_tensor(w_v, w_o)
    expected = multi_head_attention(x, w_q, w_k, w_v, w_o, causal)
    assert w_pre.shape == w_post.shape == (h, d, d)
    assert relative_error(tensor_attention(x, w_pre, w_post, k**-0.5, causal), expected) < EXACT

    def missed(w_pre=w_pre, w_post=w_post, scale=k**-0.5, causal=causal):
        return relative_error(tensor_attention(x, w_pre, w_post, scale, causal), expected) > DIFFERENT

    assert missed(w_post=w_post.transpose(0, 2, 1))  # control: W~ stacked without the transpose
    if n > 1:  # a single token attends to itself whatever the logits are
        assert missed(w_pre=w_pre.transpose(0, 2, 1))  # control: query and key modes exchanged
        assert missed(scale=(2 * k) ** -0.5)  # control: a rank's scale
        assert missed(causal=not causal)
    if n > 1 and h > 1:
        assert missed(w_pre=w_pre[::-1])  # control: heads in another order on one side


def test_only_the_products_matter():
    """Any invertible A between W^Q and W^K, and B between W^V and W^O, leaves attention as it was."""
    n, d, h, k = 7, 12, 3, 4
    rng = np.random.default_rng(2)
    x = rng.standard_normal((n, d))
    w_q, w_k, w_v, w_o = random_head_weights(d, h, k)
    a, b = rng.standard_normal((2, h, k, k)) + 2 * np.eye(k)
    mixed = (w_q @ a, w_k @ np.linalg.inv(a).transpose(0, 2, 1), w_v @ b, np.linalg.inv(b) @ w_o)
    expected = multi_head_attention(x, w_q, w_k, w_v, w_o)
    assert relative_error(multi_head_attention(x, *mixed), expected) < 1e-10  # the inverse costs two digits
    assert relative_error(multi_head_attention(x, w_q @ a, w_k, w_v, w_o), expected) > DIFFERENT  # control: one side only


def test_causal_outputs_do_not_see_later_tokens():
    x = np.random.default_rng(1).standard_normal((9, 12))
    w_q, w_k, w_v, w_o = random_head_weights(12, 3, 4)
    tensors = pre_softmax_tensor(w_q, w_k), post_softmax_tensor(w_v, w_o)
    changed = x.copy()
    changed[5:] += 1.0
    for causal in (True, False):
        before, after = (tensor_attention(t, *tensors, 0.5, causal) for t in (x, changed))
        assert np.array_equal(before[:5], after[:5]) == causal


def test_softmax_is_torchs_and_does_not_overflow():
    logits = np.random.default_rng(0).standard_normal((3, 5, 7)) * 1000
    assert relative_error(softmax(logits), torch.from_numpy(logits).softmax(-1)) < EXACT
    assert relative_error(softmax(logits + 5), torch.from_numpy(logits).softmax(-1)) < EXACT
    assert softmax(np.array([1.0, -np.inf])).tolist() == [1.0, 0.0]


def test_the_causal_mask_is_boolean():
    assert causal_mask(2).dtype == bool and causal_mask(2).tolist() == [[True, False], [True, True]]


def test_attention_is_not_causal_unless_told_so():
    x = np.random.default_rng(1).standard_normal((5, 12))
    w_q, w_k, w_v, w_o = random_head_weights(12, 3, 4)
    tensors = pre_softmax_tensor(w_q, w_k), post_softmax_tensor(w_v, w_o)
    for attention, given in ((tensor_attention, (*tensors, 0.5)), (multi_head_attention, (w_q, w_k, w_v, w_o))):
        assert np.array_equal(attention(x, *given), attention(x, *given, False))
        assert relative_error(attention(x, *given), attention(x, *given, True)) > DIFFERENT  # control: it is heard


@pytest.mark.parametrize("wrong", range(4))
def test_all_four_weights_need_the_same_heads(wrong):
    weights = list(random_head_weights(12, 3, 4))
    weights[wrong] = weights[wrong][:2]
    with pytest.raises(ValueError, match="the numbers of heads, first, must agree"):
        multi_head_attention(np.ones((5, 12)), *weights)


@pytest.mark.parametrize("w_pre, w_post", [((3, 12, 12), (1, 12, 12)), ((1, 12, 12), (3, 12, 12)), ((12, 12), (12, 12))])
def test_both_tensors_need_the_same_heads(w_pre, w_post):
    """One head would be broadcast to all of the other tensor."""
    with pytest.raises(ValueError, match="the numbers of heads, first, must agree|each must have three sizes, heads first"):
        tensor_attention(np.ones((5, 12)), np.ones(w_pre), np.ones(w_post), 0.5)


@pytest.mark.parametrize("shape", [(12,), (1, 4, 12)])
def test_tokens_are_a_matrix(shape):
    """With as many tokens as a head is wide NumPy would multiply something."""
    weights = random_head_weights(12, 3, 4)
    with pytest.raises(ValueError, match="^x has shape .*; it must be a matrix, one row per token$"):
        multi_head_attention(np.ones(shape), *weights)
    with pytest.raises(ValueError, match="^x has shape .*; it must be a matrix, one row per token$"):
        tensor_attention(np.ones(shape), pre_softmax_tensor(*weights[:2]), post_softmax_tensor(*weights[2:]), 0.5)


def test_outputs_are_as_wide_as_the_output_weights():
    """A width of one would be broadcast to all channels of a token."""
    w_q, w_k, w_v, w_o = random_head_weights(12, 3, 4)
    x = np.random.default_rng(2).standard_normal((5, 12))
    y = multi_head_attention(x, w_q, w_k, w_v, w_o)
    assert relative_error(multi_head_attention(x, w_q, w_k, w_v, w_o[..., :1]), y[:, :1]) < EXACT


@pytest.mark.parametrize("causal", [True, False])
def test_no_tokens_give_no_outputs(causal):
    w_q, w_k, w_v, w_o = random_head_weights(12, 3, 4)
    x, tensors = np.ones((0, 12)), (pre_softmax_tensor(w_q, w_k), post_softmax_tensor(w_v, w_o))
    assert tensor_attention(x, *tensors, 0.5, causal).shape == (0, 12)
    assert multi_head_attention(x, w_q, w_k, w_v, w_o, causal).shape == (0, 12)


def test_the_textbook_computes_as_precisely_as_its_weights():
    x, rng = np.eye(3, dtype=int), np.random.default_rng(0)
    w_q, w_k, w_v = rng.standard_normal((3, 2, 3, 4))
    w_o = rng.standard_normal((2, 4, 3))
    y = multi_head_attention(x, w_q, w_k, w_v, w_o)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, multi_head_attention(x.astype(float), w_q, w_k, w_v, w_o))


def test_the_textbook_sums_over_heads_in_the_finest_precision_of_its_operands_and_float32_at_least():
    operands = [np.ones((4, 6)), *random_head_weights(6, 2, 3)]
    for number in range(len(operands)):
        mixed = [operand.astype(np.float64 if n == number else np.float32) for n, operand in enumerate(operands)]
        assert multi_head_attention(*mixed).dtype == np.float64
    for dtype in (np.float16, np.float32):
        assert multi_head_attention(*(operand.astype(dtype) for operand in operands)).dtype == np.float32
