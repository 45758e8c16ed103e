"""The checks that every rung shares: what passes, what is refused, and what the refusal says."""

import math

import numpy as np
import pytest
import torch

from tucker_ref import Rotary
from tucker_ref.checks import (
    LARGEST,
    as_reals,
    check_angles,
    check_array,
    check_attention,
    check_decomposable,
    check_eps,
    check_factors,
    check_folded,
    check_held_scale,
    check_latents,
    check_mask,
    check_number,
    check_positive,
    check_product,
    check_ranks,
    check_scale,
    check_settling,
    check_tokens,
    check_tucker,
    check_unfolded,
)


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
    for good in (1, -2, 0.5, -0.5, 5e-324, LARGEST, -LARGEST, np.float64(3)):
        check_scale(good)
    check_scale(10**400, math.inf)
    with pytest.raises(ValueError, match="^scale is 10+; it must be finite"):  # control: float64 does not hold it
        check_scale(10**400)
    for largest in (LARGEST, math.inf):
        with pytest.raises(ValueError, match="^scale is .*; it must be finite and not zero"):
            check_scale(scale, largest)


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


def test_a_number_may_be_as_large_as_its_limits():
    for number in (1, 2.0, np.float32(1.5)):
        found = check_number("share", number, 1.0, 2.0)
        assert found == number and type(found) is float
    for number in (math.nextafter(1, 0), math.nextafter(2, 3)):
        with pytest.raises(ValueError, match="^share is .*; it must be a number from 1 to 2$"):
            check_number("share", number, 1.0, 2.0)
    with pytest.raises(ValueError, match="^share is 3; it must be less$"):
        check_number("share", 3, 1.0, 2.0, "less")


def test_eps_is_zero_or_what_single_precision_holds():
    limits = torch.finfo(torch.float32)
    for eps in (0, 0.0, limits.tiny, 1, limits.max):
        assert check_eps(eps) == eps and type(check_eps(eps)) is float
    for eps in (-0.5, math.nextafter(limits.tiny, 0), math.nextafter(limits.max, math.inf), math.nan):
        with pytest.raises(ValueError, match="^eps is .*; it must be a number from 1.18e-38 to 3.4e\\+38$"):
            check_eps(eps)


@pytest.mark.parametrize("dtype, computed", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_a_scale_is_held_up_to_the_limits_of_the_dtype_that_logits_have(dtype, computed):
    limits = torch.finfo(computed)
    for sign in (1, -1):
        for good in (limits.tiny, 1, limits.max):
            check_held_scale(sign * good, dtype)
        for bad in (math.nextafter(limits.tiny, 0), math.nextafter(limits.max, math.inf)):
            with pytest.raises(ValueError, match=f"^scale is .*; for {dtype} it must be from {limits.tiny:.1e} to "):
                check_held_scale(sign * bad, dtype)


def test_angles_may_be_as_large_as_float64_tells_them_apart():
    angles = torch.tensor([2.0**32, -(2.0**32), 0.0], dtype=torch.float64)
    assert check_angles(angles) is angles
    for bad in (math.nextafter(2.0**32, math.inf), -math.nextafter(2.0**32, math.inf)):
        with pytest.raises(
            ValueError, match="angles of up to 4.3e\\+09 radians; beyond 4.3e\\+09 float64 does not tell them apart"
        ):
            check_angles(torch.tensor([0.0, bad], dtype=torch.float64))


def test_an_iteration_may_have_no_sweeps_and_a_tolerance_above_one_means_one():
    for given, rtol in ((0, 0.0), (0.5, 0.5), (1, 1.0), (1.5, 1.0), (math.inf, 1.0), (10**400, 1.0)):
        found = check_settling(0, given)
        assert found == (0, rtol) and type(found[1]) is float
    with pytest.raises(ValueError, match="^max_sweeps is -1; it must be an integer of at least 0$"):
        check_settling(-1, 0.0)
    with pytest.raises(ValueError, match="^rtol is -5e-324; it must be at least 0$"):
        check_settling(0, -5e-324)


SQUARE = np.eye(2)


@pytest.mark.parametrize(
    "name, check",
    [
        ("tensor", lambda a: check_unfolded(a, 0)),
        ("matrix", lambda a: check_folded(a, 0, (2, 2))),
        ("tensor", lambda a: check_product(a, SQUARE, 0)),
        ("matrix", lambda a: check_product(SQUARE, a, 0)),
        ("tensor", lambda a: check_decomposable(a, (2, 2))),
        ("core", lambda a: check_factors(a, (SQUARE, SQUARE))),
        ("factors[0]", lambda a: check_factors(SQUARE, (a, SQUARE))),
        ("factors[1]", lambda a: check_factors(SQUARE, (SQUARE, a))),
        ("x", lambda a: as_reals(x=a)),
    ],
)
def test_what_is_no_array_is_refused_by_its_name(name, check):
    check(SQUARE)
    with pytest.raises(ValueError) as refusal:
        check(SQUARE.tolist())
    assert str(refusal.value).startswith(f"{name} is list; it must be a NumPy array of real numbers")


def test_an_array_of_real_numbers_may_be_of_any_kind_that_numpy_decomposes():
    for good in ("f4", "f8", ">f4", ">f8", "i1", "u2", ">i4", "i8", "u8", "?"):
        check_array("x", np.ones(2, good))
    extended = [np.longdouble] if np.dtype(np.longdouble).itemsize > 8 else []  # elsewhere it is float64 by another name
    for bad in ("f2", "c8", "c16", "O", "U3", "S4", "M8[s]", "m8[s]", "V4", *extended):
        with pytest.raises(
            ValueError, match="^x is .*; it must be a NumPy array of real numbers, at least float32 and at most float64$"
        ):
            check_array("x", np.zeros(2, bad))


def test_real_numbers_are_single_or_double():
    kinds = {np.float16: np.float32, np.float32: np.float32, np.float64: np.float64, np.int8: np.float64, bool: np.float64}
    for given, made in kinds.items():
        array = np.array([0, 1], given)
        (found,) = as_reals(x=array)
        assert found.dtype == made and np.array_equal(found, array)
        assert (found is array) == (given == made)


def test_a_shape_may_have_every_size_that_numpy_counts():
    assert check_folded(np.ones((0, 3)), 0, [0, np.int8(3)]) == (0, (0, 3))
    with pytest.raises(ValueError, match=rf"^matrix has shape \(2, 2\); .* needs \({2**63 - 1}, 1\)$"):
        check_folded(SQUARE, 0, (2**63 - 1,))
    with pytest.raises(ValueError, match=rf"^shape\[1\] has 64 binary digits; it must be at most {2**63 - 1}$"):
        check_folded(SQUARE, 0, (1, 2**63))


def test_no_latent_of_mla_is_wider_than_a_token():
    assert check_latents(24, 24, 24, 30, 0, None) == (24, 24, 30, 0)
    for ranks, name in (((25, 24), "q_rank"), ((24, 25), "kv_rank")):
        with pytest.raises(
            ValueError, match=f"^{name} is 25; a latent wider than d_model = 24 only adds redundant parameters$"
        ):
            check_latents(24, *ranks, 30, 0, None)


def tucker(ranks, post_ranks=(1, 1, 1), shared_kv=False, scale=None, bias=False, rotary=None, latent_norm=False, qk_norm=None):
    """The ranks of a layer of 24 channels and 6 heads."""
    return check_tucker(24, 6, ranks, post_ranks, shared_kv, scale, bias, rotary, latent_norm, qk_norm)[2:]


TURNED, SHARED, NORMED = dict(rotary=Rotary.latent(26)), dict(shared_kv=True), dict(latent_norm=True)


@pytest.mark.parametrize(
    "ranks, post_ranks, options",
    [
        ((6, 24, 24), (6, 24, 24), {}),
        ((6, 25, 25), (6, 24, 25), dict(bias=True)),  # the biases are a row more of all but the output factor
        ((6, 24, 26), (6, 24, 24), TURNED),
        ((6, 24, 26), (6, 24, 24), dict(qk_norm="head")),
        ((6, 24, 26), (6, 24, 26), TURNED | SHARED),
        ((1, 3, 3), (1, 3, 3), {}),
        ((1, 3, 26), (1, 3, 3), TURNED),
        ((1, 3, 4), (1, 3, 3), dict(qk_norm="all")),
        ((1, 3, 4), (1, 3, 4), SHARED),
        ((1, 3, 4), (1, 3, 4), NORMED),
        ((1, 4, 3), (1, 3, 3), NORMED),
    ],
)
def test_a_layer_may_have_ranks_up_to_their_limits(ranks, post_ranks, options):
    assert tucker(ranks, post_ranks, **options) == (ranks, post_ranks)


@pytest.mark.parametrize(
    "ranks, post_ranks, options, refused",
    [
        ((7, 24, 24), (6, 24, 24), {}, "ranks[0] is 7; "),
        ((6, 25, 24), (6, 24, 24), {}, "ranks[1] is 25; "),
        ((6, 24, 25), (6, 24, 24), {}, "ranks[2] is 25; "),
        ((6, 24, 24), (6, 25, 24), {}, "post_ranks[1] is 25; "),
        ((6, 24, 24), (6, 24, 25), {}, "post_ranks[2] is 25; "),
        ((6, 26, 25), (6, 24, 25), dict(bias=True), "ranks[1] is 26; "),
        ((6, 25, 26), (6, 24, 25), dict(bias=True), "ranks[2] is 26; "),
        ((6, 25, 25), (6, 25, 25), dict(bias=True), "post_ranks[1] is 25; "),
        ((6, 25, 25), (6, 24, 26), dict(bias=True), "post_ranks[2] is 26; "),
        ((6, 25, 26), (6, 24, 24), TURNED, "ranks[1] is 25; "),
        ((6, 24, 26), (6, 24, 25), TURNED, "post_ranks[2] is 25; "),
        ((6, 24, 26), (6, 24, 25), dict(qk_norm="head"), "post_ranks[2] is 25; "),
        ((6, 24, 25), (6, 24, 25), SHARED, "ranks[2] is 25; "),
        ((1, 3, 4), (1, 3, 3), {}, "ranks[2] is 4; "),
        ((1, 3, 3), (1, 3, 4), {}, "post_ranks[2] is 4; "),
        ((1, 3, 26), (1, 3, 4), TURNED, "post_ranks[2] is 4; "),
        ((1, 27, 26), (1, 3, 3), TURNED, "ranks[1] is 27; "),
        ((1, 4, 3), (1, 3, 3), {}, "ranks[1] is 4; "),
        ((1, 4, 3), (1, 3, 3), SHARED, "ranks[1] is 4; "),
        ((1, 3, 3), (1, 4, 3), NORMED, "post_ranks[1] is 4; "),
        ((6, 24, 24), (6, 24, 23), SHARED, "post_ranks[2] is 23; with shared_kv it must equal"),
    ],
)
def test_a_layer_has_no_ranks_beyond_their_limits(ranks, post_ranks, options, refused):
    with pytest.raises(ValueError) as refusal:
        tucker(ranks, post_ranks, **options)
    assert str(refusal.value).startswith(refused)


def test_a_layer_without_post_ranks_or_a_scale_has_the_other_ranks_and_a_scale_of_its_own():
    assert tucker((4, 9, 8), None) == ((4, 9, 8), (4, 9, 8))
    for scale in (math.nan, 0, "1"):
        with pytest.raises(ValueError, match="^scale is .*; it must be finite and not zero"):
            tucker((4, 9, 8), scale=scale)


def test_a_scale_beyond_float64_is_refused_with_what_the_dtype_holds():
    x = torch.ones(1, 1, 1, 1)
    check_attention(x, x, x, 2, False, None, "sdpa")
    for scale in (1e39, 10**400):
        with pytest.raises(ValueError, match="^scale is .*; for torch.float32 it must be from 1.2e-38 to 3.4e.38 in size$"):
            check_attention(x, x, x, scale, False, None, "sdpa")


@pytest.mark.parametrize("shape", [(), (9,), (1, 1), (1, 9), (1, 1, 9), (1, 1, 1, 9), (2, 1, 1, 9), (2, 1, 1, 1)])
def test_our_kernels_take_a_mask_of_a_single_query_for_all_its_heads(shape):
    q, k = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 9, 8)
    check_attention(q, k, k, 1.0, True, torch.ones(shape, dtype=torch.bool), "triton")


@pytest.mark.parametrize(
    "n, shape", [(1, (4, 1, 9)), (1, (4, 1, 1)), (1, (1, 4, 1, 9)), (1, (2, 4, 1, 9)), (2, ()), (2, (9,)), (2, (1, 1, 2, 9))]
)
def test_our_kernels_take_no_other_mask(n, shape):
    q, k, mask = torch.ones(2, 4, n, 8), torch.ones(2, 2, 9, 8), torch.ones(shape, dtype=torch.bool)
    check_mask(mask, (2, 4, n, 9), q.device, "sdpa")
    for check in (
        lambda: check_mask(mask, (2, 4, n, 9), q.device, "triton"),
        lambda: check_attention(q, k, k, 1.0, True, mask, "triton"),
    ):
        with pytest.raises(
            ValueError, match="^backend 'triton' takes no mask beside the causal rule, but one of a single query"
        ):
            check()
