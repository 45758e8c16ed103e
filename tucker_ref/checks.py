"""The argument checks that every rung shares: each raises a ValueError that says what, where and what is allowed."""

import math
import operator
import sys
from numbers import Real

import numpy as np
import torch

from .backends import BACKENDS

LARGEST_ANGLE = 2.0**32  # of a rotary embedding, radians; float64 resolves 5e-7 there
LARGEST_SIZE = 2**31 - 1  # of one mode: two of them together are still counted in 64 bits
SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max  # numbers of which float64 has all digits


def as_integer(value) -> int | None:
    """The int that `value` is to Python, whose own it is, NumPy's or a tensor's; None for all else, True and False among them."""
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # the latter of a tensor that holds no values
        return None


def check_integer(name: str, value, least: int, most: float = LARGEST_SIZE) -> int:
    """`value` as an int.  Raises ValueError unless it is an integer of this size (bool does not count as one)."""
    number = as_integer(value)
    if number is None or number < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
    if number > most:
        raise ValueError(f"{name} has {number.bit_length()} binary digits; it must be at most {most}")
    return number


def check_positive(name: str, value) -> int:
    """`value` as an int.  Raises ValueError unless it is an integer of at least 1, and one that sizes of a tensor may be."""
    return check_integer(name, value, 1)


def check_number(name: str, value, least: float, most: float = LARGEST, allowed: str = "") -> float:
    """`value` as a float.  Raises ValueError unless it is a real number in these limits, `allowed` in words (bool does not count)."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        raise ValueError(f"{name} is an integer of {value.bit_length()} binary digits; float64 holds 1024") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {value!r}; it must be {allowed or f'a number from {least:.3g} to {most:.3g}'}")
    return number


def check_flags(**flags) -> list[bool]:
    """All of them as bools.  Raises ValueError for one that is neither True nor False: a word such as "no" would count as True."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} is {value!r}; it must be True or False")
    return [bool(value) for value in flags.values()]


def check_eps(eps: float) -> float:
    """`eps` as a float.  Raises ValueError unless it is zero or in the limits of single precision, in which half is normalised."""
    limits = torch.finfo(torch.float32)
    return check_number("eps", eps, 0.0 if eps == 0 else limits.tiny, limits.max)


def check_scale(scale: float, largest: float = LARGEST) -> None:
    """Raise ValueError unless the softmax scale is a finite, non-zero number."""
    known = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not known or not 0 < abs(scale) < math.inf or abs(scale) > largest:
        raise ValueError(
            f"scale is {scale!r}; it must be finite and not zero (the paper's choice is 1/sqrt(d_H)), a float or an int"
        )


def check_held_scale(scale: float, dtype: torch.dtype) -> None:
    """Raise ValueError unless logits of queries of this dtype can be multiplied by this scale."""
    computed = torch.finfo(torch.promote_types(dtype, torch.float32))  # half precision is scaled in single
    if not computed.tiny <= abs(scale) <= computed.max:
        raise ValueError(f"scale is {scale!r}; for {dtype} it must be from {computed.tiny:.1e} to {computed.max:.1e} in size")


def check_tokens(x, d_model: int) -> None:
    """Raise ValueError unless x is a batch of token sequences, shape (B, N, d_model)."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 3 or shape[-1] != d_model:
        raise ValueError(f"x has shape {shape}; it must be (batch, tokens, d_model) with d_model = {d_model}")


def check_ranks(name: str, ranks, sizes: tuple[float, ...], uncapped=()) -> tuple[int, ...]:
    """Return `ranks` as a tuple, or raise ValueError.

    A Tucker rank may exceed neither the size of its mode nor the product of the other ranks: a larger one only adds
    redundant parameters. `uncapped` names modes exempt from the second rule (a key latent that values share, say).
    """
    try:
        ranks = tuple(ranks)
    except TypeError:
        raise ValueError(f"{name} is {ranks!r}; it must be {len(sizes)} integers, one per mode") from None
    if len(ranks) != len(sizes):
        raise ValueError(f"{name} is {ranks!r}; it must be {len(sizes)} integers, one per mode of a tensor of sizes {sizes}")
    ranks = tuple(check_positive(f"{name}[{mode}]", rank) for mode, rank in enumerate(ranks))
    for mode, (rank, size) in enumerate(zip(ranks, sizes)):
        others = math.prod(ranks) // rank
        limit = size if mode in uncapped else min(size, others)
        if rank > limit:
            raise ValueError(
                f"{name}[{mode}] is {rank}; with {name} = {ranks} it may be at most {limit}: "
                f"the smaller of the mode's size {size} and the product of the other ranks {others}"
            )
    return ranks


def check_array(name: str, array: np.ndarray) -> None:
    """Raise ValueError unless this is a NumPy array of real numbers, of a dtype in which NumPy decomposes matrices."""
    check_plain(name, array)
    if array.dtype.kind not in "fiub" or (array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8)):
        raise ValueError(
            f"{name} is {array.dtype}; it must be a NumPy array of real numbers, at least float32 and at most float64"
        )


def check_plain(name: str, array: np.ndarray) -> None:
    """Raise ValueError unless this is a NumPy array itself: masked arrays and matrices mean something else by the same operators."""
    if type(array) not in (np.ndarray, np.memmap):
        raise ValueError(
            f"{name} is {type(array).__name__}; it must be a NumPy array of real numbers, at least float32, and of no subclass"
        )


def as_reals(**arrays: np.ndarray) -> list[np.ndarray]:
    """The same arrays in float32 or float64: half precision in the former, integers in the latter.  Raises ValueError for others."""
    made = []
    for name, array in arrays.items():
        check_plain(name, array)
        array = array.astype(np.float32) if array.dtype == np.float16 else array
        check_array(name, array)
        made.append(array if array.dtype.kind == "f" else np.asarray(array, np.float64))
    return made


def as_matrix(**one: np.ndarray) -> np.ndarray:
    """As `as_reals`, and of two sizes."""
    [name], [array] = one, as_reals(**one)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; it must be a matrix, one row per token")
    return array


def as_spectrum(singular_values) -> torch.Tensor:
    """Singular values in float64, descending, the largest taken to one.  Raises ValueError for what cannot be any."""
    if not isinstance(singular_values, (torch.Tensor, np.ndarray)) or not singular_values.ndim == 1 or not len(singular_values):
        raise ValueError("singular_values must be a tensor or an array of one size, of at least 1")
    values = torch.as_tensor(singular_values)
    if values.is_meta or values.is_complex() or not ((values >= 0) & values.isfinite()).all():
        raise ValueError("singular_values must be finite real numbers of at least 0")
    values = values.to(torch.float64).sort(descending=True).values
    return values / values[0] if values[0] > 0 else values


def check_finite(tensor: np.ndarray, so: str) -> None:
    """Raise ValueError unless this is an array of finite real numbers whose squares have sums.  so: what another one does not have."""
    check_array("tensor", tensor)
    if not np.isfinite(tensor).all():
        raise ValueError(f"tensor holds NaN or infinity; {so}")
    limits = np.finfo(tensor.dtype if tensor.dtype.kind == "f" else np.float64)
    largest = max(float(tensor.max(initial=0)), -float(tensor.min(initial=0)))
    least, most = math.sqrt(limits.tiny), math.sqrt(limits.max * limits.eps)
    if largest and not least <= largest <= most:  # norms and singular values would be 0 or infinite
        raise ValueError(f"the largest entry of tensor is {largest:.2g}; it must be {least:.1g} to {most:.1g}, or {so}")


def check_decomposable(tensor: np.ndarray, ranks) -> tuple[int, ...]:
    """Return `ranks` as a tuple, or raise ValueError unless the tensor has a Tucker decomposition of these ranks."""
    check_finite(tensor, "it has no Tucker decomposition")
    return check_ranks("ranks", ranks, tensor.shape)


def check_factors(core: np.ndarray, factors: tuple[np.ndarray, ...]) -> None:
    """Raise ValueError unless there is one factor per mode, as wide as the core there."""
    for name, array in (("core", core), *((f"factors[{mode}]", factor) for mode, factor in enumerate(factors))):
        check_array(name, array)
    if len(factors) != core.ndim:
        raise ValueError(f"{len(factors)} factors given; a core of order {core.ndim} needs one per mode")
    for mode, (factor, rank) in enumerate(zip(factors, core.shape)):
        if factor.ndim != 2 or factor.shape[1] != rank:
            raise ValueError(f"factors[{mode}] has shape {factor.shape}; a core {core.shape} needs (any, {rank})")


def check_rtol(rtol: float) -> float:
    """The relative tolerance; above one it means what one does.  Raises ValueError if it is below zero, or no number."""
    if isinstance(rtol, bool) or not isinstance(rtol, Real) or not rtol >= 0:
        raise ValueError(f"rtol is {rtol!r}; it must be at least 0")
    return float(min(rtol, 1))


def check_settling(max_sweeps, rtol) -> tuple[int, float]:
    """When an iteration ends.  Raises ValueError for a number of sweeps that is none, or a tolerance as above."""
    return check_integer("max_sweeps", max_sweeps, 0), check_rtol(rtol)


def check_mode(order: int, mode) -> int:
    """`mode` as an int.  Raises ValueError unless a tensor of this order has it."""
    number = as_integer(mode)
    if number is None or not 0 <= number < order:
        modes = f"modes 0 to {order - 1}" if order else "no modes"
        raise ValueError(f"mode is {mode!r}; a tensor of order {order} has {modes}")
    return number


def check_unfolded(tensor: np.ndarray, mode) -> int:
    """`mode` as an int.  Raises ValueError unless this is a NumPy array with such a mode."""
    check_plain("tensor", tensor)
    return check_mode(tensor.ndim, mode)


def check_folded(matrix: np.ndarray, mode, shape) -> tuple[int, tuple[int, ...]]:
    """Mode and shape in ints.  Raises ValueError unless the matrix is a tensor of this shape, unfolded along this mode."""
    check_plain("matrix", matrix)
    try:
        given = tuple(shape)
    except TypeError:
        raise ValueError(f"shape is {shape!r}; it must be integers, one per mode") from None
    shape = tuple(check_integer(f"shape[{n}]", size, 0, 2**63 - 1) for n, size in enumerate(given))
    mode = check_mode(len(shape), mode)
    expected = (shape[mode], math.prod((*shape[:mode], *shape[mode + 1 :])))
    if matrix.shape != expected:
        raise ValueError(f"matrix has shape {matrix.shape}; folding mode {mode} of {tuple(shape)} needs {expected}")
    return mode, shape


def check_product(tensor: np.ndarray, matrix: np.ndarray, mode) -> tuple[np.ndarray, np.ndarray, int]:
    """Return all, integers in 64 bits, or raise ValueError unless the matrix can multiply the tensor along this mode."""
    check_array("tensor", tensor)
    check_array("matrix", matrix)
    mode = check_mode(tensor.ndim, mode)
    if matrix.ndim != 2 or matrix.shape[1] != tensor.shape[mode]:
        raise ValueError(
            f"matrix has shape {matrix.shape}; mode {mode} of a tensor {tensor.shape} needs (any, {tensor.shape[mode]})"
        )
    if "f" in (tensor.dtype.kind, matrix.dtype.kind):
        return tensor, matrix, mode
    if _largest(tensor) * _largest(matrix) * matrix.shape[1] >= 2**63:
        raise ValueError(f"tensor is {tensor.dtype} and matrix {matrix.dtype}; integers this large must be given as float64")
    return tensor.astype(np.int64), matrix.astype(np.int64), mode


def _largest(integers: np.ndarray) -> int:
    """The largest absolute value, 0 of none."""
    return max(int(integers.max()), -int(integers.min())) if integers.size else 0


def check_heads(**weights: np.ndarray) -> list[np.ndarray]:
    """Return all weights as real numbers, or raise ValueError unless they are such and for the same number of heads."""
    reals = as_reals(**weights)
    said = ", ".join(f"{name} {w.shape}" for name, w in weights.items())
    if any(w.ndim != 3 for w in reals):
        raise ValueError(f"{said}: each must have three sizes, heads first")
    if len({len(w) for w in reals}) > 1:
        raise ValueError(f"{said}: the numbers of heads, first, must agree")
    return reals


def check_even(name: str, width) -> int:
    """`width` as an int.  Raises ValueError unless it is an even, positive number of channels."""
    width = check_positive(name, width)
    if width % 2:
        raise ValueError(f"{name} is {width}; rotary embedding turns pairs of channels, so it must be even")
    return width


def check_pairing(pairing: str) -> None:
    """Raise ValueError for a way to pair channels that is not there."""
    if pairing not in ("half", "interleaved"):
        raise ValueError(f"pairing is {pairing!r}; it must be one of half, interleaved")


def check_blocks(blocks, width: int) -> tuple[int, ...]:
    """The blocks' widths, all in one if there are none.  Raises ValueError unless they are even and add up."""
    try:
        given = (width,) if blocks is None else tuple(blocks)
    except TypeError:
        raise ValueError(f"blocks is {blocks!r}; it must be even widths that add up to {width}") from None
    widths = tuple(check_even("a block's width", block) for block in given)
    if sum(widths) != width:
        raise ValueError(f"blocks {widths} add up to {sum(widths)}; {width // 2} frequencies need {width}")
    return widths


def check_turned(x: torch.Tensor, positions: torch.Tensor, width: int) -> None:
    """Raise ValueError unless x ([b, [h,]] n, width) can be turned by these positions."""
    for name, tensor in (("x", x), ("positions", positions)):
        if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is {kind}; it must be a tensor of real numbers")
    if not x.is_floating_point() or not 2 <= x.ndim <= 4:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; it must be floating-point numbers (n, width), (b, n, width) or (b, h, n, width)"
        )
    if x.shape[-1] != width:
        raise ValueError(f"x has width {x.shape[-1]}; this rotary embedding turns {width} channels")
    fitting = [(x.shape[-2],), (x.shape[0], x.shape[-2])][: x.ndim - 1]  # where there is no b all turn alike
    if positions.device != x.device or positions.shape not in fitting:
        raise ValueError(
            f"positions has shape {tuple(positions.shape)} on {positions.device}; x {tuple(x.shape)} on {x.device} needs "
            f"{' or '.join(map(str, fitting))}"
        )


def check_angles(angles: torch.Tensor) -> torch.Tensor:
    """Return these angles, in radians, or raise ValueError where float64 no longer tells them apart.

    On a GPU, whose values are not read, since that waits for all its work, they become infinite instead: their cosines are NaN.
    """
    if angles.is_cuda:
        return angles * (2.0**1023 / LARGEST_ANGLE) * (LARGEST_ANGLE / 2.0**1023)
    if (angles.abs() > LARGEST_ANGLE).any():
        raise ValueError(
            f"positions times frequencies give angles of up to {angles.abs().max():.1e} radians; beyond {LARGEST_ANGLE:.1e} float64 does "
            "not tell them apart. Only differences of positions count: let them begin nearer to 0"
        )
    return angles


def check_rotary(rotary, width: int, name: str) -> None:
    """Raise ValueError unless there is no rotary embedding or it turns exactly `width` channels."""
    if not (rotary is None or hasattr(rotary, "width")):
        raise ValueError(f"rotary is {rotary!r}; it must be a Rotary or None")
    if rotary is not None and rotary.width != width:
        raise ValueError(f"rotary turns {rotary.width} channels; here it must turn {name} = {width}")


def check_positions(positions: torch.Tensor, batch: int, n: int, device: torch.device) -> None:
    """Raise ValueError unless these are whole numbers, negative ones included, of shape (n,) or (batch, n), on this device."""
    if not isinstance(positions, torch.Tensor):
        raise ValueError(f"positions is {type(positions).__name__}; it must be a tensor of integers")
    whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
    if not (whole and positions.shape in ((n,), (batch, n))):
        raise ValueError(
            f"positions is {positions.dtype} {tuple(positions.shape)}; it must be integers of shape ({n},) or ({batch}, {n})"
        )
    if positions.device != device:
        raise ValueError(f"positions is on {positions.device}; the tokens are on {device}")


def resolve_sizes(d_model, n_heads, head_dim) -> tuple[int, int, int]:
    """All three, where no head_dim is given that of d_model / n_heads.  Raises ValueError if a size does not fit."""
    d_model, n_heads = check_positive("d_model", d_model), check_positive("n_heads", n_heads)
    if head_dim is None:
        if d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}; it must divide d_model = {d_model}, or head_dim must be given")
        head_dim = d_model // n_heads
    return d_model, n_heads, check_positive("head_dim", head_dim)


def check_room(batch, max_tokens, streams) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """What a cache has room for, in ints.  Raises ValueError unless all of it is at least one."""
    widths = {
        name: (check_positive(f"the number of heads of {name}", heads), check_positive(f"the width of {name}", width))
        for name, (heads, width) in streams.items()
    }
    return check_positive("batch", batch), check_positive("max_tokens", max_tokens), widths


def check_new_tokens(cache, new: dict[str, torch.Tensor]) -> int:
    """Return how many tokens these are, or raise ValueError unless each stream of the cache gets as many, of its kind, with room left."""
    if set(new) != set(cache.streams):
        raise ValueError(
            f"this cache holds {', '.join(cache.streams)}; the layer keeps {', '.join(new)}: it was made for another"
        )
    n = next(iter(new.values())).shape[2]
    for name, tensor in new.items():
        stream = cache.streams[name]
        expected = (cache.batch, stream.shape[1], n, stream.shape[3])
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this cache was made for {expected}, batch first")
        if tensor.dtype != stream.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; this cache holds {stream.dtype}: make it with dtype={tensor.dtype}")
        if tensor.device != stream.device:
            raise ValueError(f"{name} is on {tensor.device}; this cache is on {stream.device}: make it with device=")
    if cache.length + n > cache.max_tokens:
        raise ValueError(f"{n} more tokens after {cache.length} overflow a cache of max_tokens = {cache.max_tokens}")
    return n


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless numbers of this dtype are floating-point ones."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; it must be a floating-point dtype such as torch.bfloat16")


def check_length(length, stored: int) -> int:
    """`length` as an int.  Raises ValueError unless a cache that holds `stored` tokens can be cut to it."""
    number = as_integer(length)
    if number is None or not 0 <= number <= stored:
        raise ValueError(f"length is {length!r}; this cache holds {stored} tokens, so it must be an integer from 0 to {stored}")
    return number


def check_rows(rows: torch.Tensor, batch: int) -> None:
    """Raise ValueError unless these are `batch` whole numbers that name sequences of a cache."""
    whole = isinstance(rows, torch.Tensor) and rows.dtype in (torch.int32, torch.int64)
    if not whole or rows.shape != (batch,) or not ((rows >= 0) & (rows < batch)).all():
        raise ValueError(f"rows is {rows!r}; it must be {batch} integers from 0 to {batch - 1}, one per sequence")


def check_bias(bias: bool | str) -> None:
    """Raise ValueError unless this is False, True or "qkv"."""
    if not (bias is False or bias is True or bias == "qkv"):
        raise ValueError(f"bias is {bias!r}; it must be False, True or 'qkv'")


def check_groups(n_kv_heads, n_heads: int) -> int:
    """`n_kv_heads` as an int.  Raises ValueError unless the heads can be shared out evenly to so many groups."""
    n_kv_heads = check_positive("n_kv_heads", n_kv_heads)
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads is {n_kv_heads}; it must divide n_heads = {n_heads}")
    return n_kv_heads


def check_widths(q_rank, kv_rank, v_head_dim, rope_dim) -> tuple[int, int, int, int]:
    """All four in ints.  Raises ValueError unless MLA can have such widths; there may be no decoupled channels."""
    widths = {"q_rank": q_rank, "kv_rank": kv_rank, "v_head_dim": v_head_dim}
    q_rank, kv_rank, v_head_dim = (check_positive(name, width) for name, width in widths.items())
    return q_rank, kv_rank, v_head_dim, 0 if as_integer(rope_dim) == 0 else check_positive("rope_dim", rope_dim)


def check_latents(d_model: int, q_rank, kv_rank, v_head_dim, rope_dim, rotary) -> tuple[int, int, int, int]:
    """The last four in ints, but for rotary.  Raises ValueError unless MLA's latents are no wider than a token and its rotary
    embedding turns what it has to turn.
    """
    q_rank, kv_rank, v_head_dim, rope_dim = check_widths(q_rank, kv_rank, v_head_dim, rope_dim)
    for name, rank in (("q_rank", q_rank), ("kv_rank", kv_rank)):
        if rank > d_model:
            raise ValueError(f"{name} is {rank}; a latent wider than d_model = {d_model} only adds redundant parameters")
    if rope_dim and rotary is None:
        raise ValueError(f"rope_dim is {rope_dim}; decoupled channels need rotary=Rotary.heads({rope_dim})")
    check_rotary(rotary, rope_dim or kv_rank, "rope_dim" if rope_dim else "kv_rank")
    return q_rank, kv_rank, v_head_dim, rope_dim


def check_tucker(d_model, n_heads, ranks, post_ranks, shared_kv, scale, bias, rotary, latent_norm, qk_norm):
    """Return the sizes and both tensors' ranks in ints, or raise ValueError for an argument of TuckerAttention that is off.

    Latents that are normalised, turned or read by both tensors are more than a basis: no product of ranks bounds them.
    """
    d_model, n_heads = check_positive("d_model", d_model), check_positive("n_heads", n_heads)
    check_qk_norm(qk_norm)
    check_flags(shared_kv=shared_kv, latent_norm=latent_norm)
    if bias not in (False, True):  # "qkv", which other layers take, would get an output bias all the same
        raise ValueError(f"bias is {bias!r}; it must be False or True")
    rows = d_model + 1 if bias else d_model
    fixed = rotary is not None or qk_norm is not None  # a key whose coordinates may not be mixed
    widest_key = math.inf if fixed else rows
    uncapped = {1: latent_norm, 2: latent_norm or shared_kv or fixed}
    ranks = check_ranks("ranks", ranks, (n_heads, rows, widest_key), [mode for mode, free in uncapped.items() if free])
    post_ranks = check_ranks(
        "post_ranks",
        ranks if post_ranks is None else post_ranks,
        (n_heads, d_model, widest_key if shared_kv else rows),
        [2] if latent_norm or shared_kv else [],
    )
    if shared_kv and post_ranks[2] != ranks[2]:
        raise ValueError(f"post_ranks[2] is {post_ranks[2]}; with shared_kv it must equal ranks[2] = {ranks[2]}")
    check_rotary(rotary, ranks[2], "ranks[2]")
    if scale is not None:
        check_scale(scale)
    return d_model, n_heads, ranks, post_ranks


def check_qk_norm(qk_norm: str | None) -> None:
    """Raise ValueError unless this is None, "head" or "all"."""
    if not (qk_norm is None or (isinstance(qk_norm, str) and qk_norm in ("head", "all"))):
        raise ValueError(f"qk_norm is {qk_norm!r}; it must be None, 'head' or 'all'")


def check_init(init: str) -> None:
    """Raise ValueError for an initialisation that is not there."""
    if init not in ("orthonormal", "xavier"):
        raise ValueError(f"init is {init!r}; it must be 'orthonormal' or 'xavier'")


def check_weights(pre, post, output_bias: torch.Tensor | None, qk_norms) -> None:
    """Raise ValueError unless these cores and factors, the output bias and the norms of queries and keys make one layer."""
    for name, weights, factors in (("pre", pre, ("head", "query", "key")), ("post", post, ("head", "output", "value"))):
        if weights.names != factors:
            raise ValueError(f"{name} has the factors {', '.join(weights.names)}; it must have {', '.join(factors)}")
    heads, d = len(pre.head), len(post.output)
    rows = d if output_bias is None else d + 1
    (r, s, t), (u, o, v) = pre.core.shape, post.core.shape
    fitting: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
        "pre.head": (pre.head, (heads, r)),
        "pre.query": (pre.query, (rows, s)),
        "pre.key": (pre.key, (rows, t)),
        "post.head": (post.head, (heads, u)),
        "post.output": (post.output, (d, o)),
        "post.value": (post.value, (rows, v)),
    }
    fitting |= {} if output_bias is None else {"output_bias": (output_bias, (d,))}
    for name, (tensor, expected) in fitting.items():
        if tensor.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; beside the others it must have {expected}, where query, key and value "
                "have one row more than the output factor if there is an output_bias"
            )
    for name, norm, n_heads in zip(("q_norm", "k_norm"), qk_norms or (), (heads, 1)):
        if norm.width != t or norm.heads not in (None, n_heads):
            raise ValueError(
                f"{name} is for {norm.heads or 'any'} heads of width {norm.width}; here it must be for {n_heads} of {t}"
            )


def check_attention(q, k, v, scale, causal, mask, backend) -> None:
    """Raise ValueError unless these arguments of `attend` fit each other."""
    check_rules(causal, backend)
    check_scale(scale, math.inf)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_numbers(name, x, q)
    check_held_scale(scale, q.dtype)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (q.shape[1], k.shape[1]):
        raise ValueError(f"{shapes}: each must be (batch, heads, tokens, width), with at least one head")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]):
        raise ValueError(f"{shapes}: batch, key/value heads, source tokens and query/key width must agree")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: {q.shape[1]} query heads cannot be shared out evenly to {k.shape[1]} key/value heads")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"{shapes}: causal attention needs at least as many source tokens as queries")
    check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device, backend)


def check_numbers(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    """Raise ValueError unless x holds real floating-point numbers of the dtype (but under autocast) and on the device of `like`."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} is {kind}; it must be a tensor of floating-point numbers")
    if x.device != like.device or (x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"{name} is {x.dtype} on {x.device}; here it must be {like.dtype} on {like.device}")


def check_rules(causal: bool, backend: str) -> None:
    """Raise ValueError for an unknown backend, or a `causal` that is not a bool."""
    if causal is not True and causal is not False:
        raise ValueError(f"causal is {causal!r}; it must be True or False")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")


def check_mask(mask: torch.Tensor | None, full: tuple[int, int, int, int], device: torch.device, backend: str) -> None:
    """Raise ValueError unless the mask is boolean, broadcastable to `full`, on this device, and one that the backend takes."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"mask is {type(mask).__name__}; it must be a boolean tensor")
    fits = mask.ndim <= 4 and all(a == 1 or a == b for a, b in zip(mask.shape[::-1], full[::-1]))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be boolean (True: may look), broadcastable to {full}"
        )
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}; the tokens are on {device}")
    if backend == "triton" and (full[2] != 1 or (mask.ndim > 2 and mask.shape[-3] != 1)):
        raise ValueError(
            "backend 'triton' takes no mask beside the causal rule, but one of a single query for all its heads; 'sdpa', 'efficient' and "
            "'flex' do"
        )
