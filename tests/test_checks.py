"""The checks that every rung shares: what passes, what is refused, and what the refusal says."""

import math

import numpy as np
import pytest
import torch

from tucker_ref.checks import check_positive, check_ranks, check_scale, check_tokens


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", None, np.int64(0), np.True_])
def test_sizes_are_integers_of_at_least_one(value):
    for good in (1, np.int64(1), 2**31 - 1):
        assert check_positive("size", good) == good and type(check_positive("size", good)) is int
    with pytest.raises(ValueError, match="^size has 32 binary digits; it must be at most 2147483647$"):
        check_positive("size", 2**31)
    with pytest.raises(ValueError) as refusal:
        check_positive("size", value)
    assert str(refusal.value) == f"size is {value!r}; it must be an integer of at least 1"


@pytest.mark.parametrize("scale", [0, 0.0, -0.0, math.nan, math.inf, -math.inf, True, False, 1j, "1", None, np.ones(1)])
def test_scales_are_finite_and_not_zero(scale):
    for good in (1, -2, 0.5, -0.5, 5e-324, 1e308, np.float64(3)):
        check_scale(good)
    check_scale(10**400, math.inf)
    with pytest.raises(ValueError, match="^scale is 10+; it must be finite"):  # control: float64 does not hold it
        check_scale(10**400)
    with pytest.raises(ValueError, match="^scale is .*; it must be finite and not zero"):
        check_scale(scale)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4), torch.ones(4), torch.ones(1, 2, 3, 4), torch.ones(2, 3, 5), torch.ones(2, 4, 3), 3]
)
def test_tokens_are_batches_of_sequences(x):
    check_tokens(torch.ones(2, 3, 4), 4)
    check_tokens(np.ones((0, 0, 4)), 4)
    with pytest.raises(ValueError, match=r"^x has shape \(.*\); it must be \(batch, tokens, d_model\) with d_model = 4$"):
        check_tokens(x, 4)


def test_ranks_come_back_as_a_tuple():
    assert check_ranks("ranks", [2, 3, 4], (2, 3, 4)) == (2, 3, 4)
    assert check_ranks("ranks", (r for r in (1, 1)), (2, 2)) == (1, 1)
    assert check_ranks("ranks", (2, 2, 4), (9, 9, 4)) == (2, 2, 4)  # both limits met exactly
    assert check_ranks("ranks", (5,), (5,), uncapped=(0,)) == (5,)
    assert check_ranks("ranks", (1, 2, 7), (9, 9, math.inf), uncapped=(1, 2)) == (1, 2, 7)


@pytest.mark.parametrize(
    "ranks, sizes, uncapped, message",
    [
        (3, (2, 2, 2), (), "ranks is 3; it must be 3 integers, one per mode"),
        ((1, 1), (2, 2, 2), (), "ranks is (1, 1); it must be 3 integers, one per mode of a tensor of sizes (2, 2, 2)"),
        ((1, 0, 1), (2, 2, 2), (), "ranks[1] is 0; it must be an integer of at least 1"),
        ((1, 1, 1.0), (2, 2, 2), (), "ranks[2] is 1.0; it must be an integer of at least 1"),
        ((3, 2, 2), (2, 2, 2), (), "ranks[0] is 3; with ranks = (3, 2, 2) it may be at most 2: the smaller of the mode's size 2 and "
         "the product of the other ranks 4"),
        ((2, 1, 1), (9, 9, 9), (), "ranks[0] is 2; with ranks = (2, 1, 1) it may be at most 1: the smaller of the mode's size 9 and "
         "the product of the other ranks 1"),
        ((2, 2, 5), (9, 9, 9), (0, 1), "ranks[2] is 5; with ranks = (2, 2, 5) it may be at most 4: the smaller of the mode's size 9 "
         "and the product of the other ranks 4"),
        ((1, 1, 10), (9, 9, 9), (2,), "ranks[2] is 10; with ranks = (1, 1, 10) it may be at most 9: the smaller of the mode's size 9 "
         "and the product of the other ranks 1"),
    ],
)  # fmt: skip
def test_ranks_that_no_tensor_has_are_refused(ranks, sizes, uncapped, message):
    with pytest.raises(ValueError) as refusal:
        check_ranks("ranks", ranks, sizes, uncapped)
    assert str(refusal.value) == message
