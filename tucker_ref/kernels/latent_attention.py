"""Rung 14. Flash attention with the core mixed inside: no per-head query ever reaches device memory (Triton).

A lesson, and the layer that needs least memory; not the fastest one. Beside the same layer around cuDNN's kernel it needs between a
third and a half of the peak memory, and takes from a third more time to more than twice as much (docs/speed.md). The algorithm makes
ten matrix products for a pair of tiles where cuDNN makes seven from ready queries: two forward, three for dQ, and five for dK and dV,
where queries are mixed again for every tile of keys. The rest is the rate at which Triton's programs make them. In training the
product is `layer.recompute = True` around a stock kernel (`tucker_ref.recompute`), which keeps latents in place of queries.

Tucker Attention has one query latent per token, P (n, s), small per-head cores T_h (s, t), and one key and value for all heads.
A stock kernel wants every head's queries Q_h = P T_h in memory, h t numbers a token in place of s. This one loads a tile of P and
one T_h, multiplies them on chip, and goes on as flash attention does (Dao et al. 2022): with Q_h K^T tile by tile, a running maximum
and a running sum per query, and a logarithm of the sum kept for the backward pass, which computes every tile again.

Rotary embedding turns Q_h on chip too. Keys and cores come with their channels in pair order: the first channels of all pairs, then
the second ones. A dot product does not mind, and a tile held as these two halves is turned as complex numbers are multiplied:
(q1 cos - q2 sin, q2 cos + q1 sin). Without rotary embedding the halves are the two halves of the channels, whatever they are.

With MIX off the kernels take ready queries (b, h, n, t) and g key/value heads, and are ordinary flash attention: for multi-head
attention and its kin, and wherever something stands between the core and the logits, as a norm of each head's queries does.

Names in the kernels: a tile of queries has QUERIES rows, one of keys and values SOURCES rows; the widths are explained with `Known`.
Queries are scaled when they are made, so that logits come in units of log 2, for exp2. The output z lies in memory as (b, n, h, v),
as the next product reads it. `latents` are the pointer to P, or to ready queries, the halves of T_h, and the pointers to the angles.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Known:
    """What the kernels know at compile time, all of it written down here: Triton tells compiled kernels apart by these values."""

    HEADS: int
    GROUPS: int  # of heads that share a key
    S: int  # widths: of a query latent,
    T: int  # a key
    V: int  # and a value
    HALF: int  # T / 2, rounded up
    S_PAD: int  # the powers of two that a tile needs, at least 16 for the tensor cores
    HALF_PAD: int
    V_PAD: int
    CAUSAL: bool
    MIX: bool  # queries are made from latents and cores
    ROTARY: bool  # and turned
    OWN_ANGLES: bool  # in each sequence by angles of its own


@triton.jit
def program_tile(HEADS):
    """This program's tile, sequence and head, the latter two in 64 bits, as what they lead to. See `grid_of`."""
    number, tile = tl.program_id(0), tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    return tile, (number // HEADS).to(tl.int64), (number % HEADS).to(tl.int64)


@triton.jit
def program_tile_from_the_end(HEADS):
    """The same with the last tile first, which sees most sources."""
    tile, b, h = program_tile(HEADS)
    return tl.num_programs(1) * tl.num_programs(2) - 1 - tile, b, h


@triton.jit
def tile_at(base, rows, stride, columns):
    """Where (rows, columns) of a matrix are whose rows lie `stride` apart: in 64 bits, as 2^31 numbers are no rarity."""
    return base + rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def within(rows, n_rows, columns, n_columns):
    """Which of these rows and columns a matrix has."""
    return (rows[:, None] < n_rows) & (columns[None, :] < n_columns)


@triton.jit
def load_tile(base, rows, n_rows, stride, columns, n_columns):
    """(rows, columns) of a matrix whose rows lie `stride` apart, zeros beyond its edges."""
    return tl.load(tile_at(base, rows, stride, columns), mask=within(rows, n_rows, columns, n_columns), other=0.0)


@triton.jit
def load_halves(base, rows, n_rows, known: tl.constexpr):
    """Channels 0 .. HALF - 1 and HALF .. T - 1 of some rows, (rows, HALF_PAD) each."""
    half = tl.arange(0, known.HALF_PAD)
    first = load_tile(base, rows, n_rows, known.T, half, known.HALF)
    return first, load_tile(base + known.HALF, rows, n_rows, known.T, half, known.T - known.HALF)


@triton.jit
def load_core(core_ptr, h, known: tl.constexpr):
    """T_h, as halves."""
    return load_halves(core_ptr + h * known.S * known.T, tl.arange(0, known.S_PAD), known.S, known)


@triton.jit
def load_angles(cos_ptr, sin_ptr, b, rows, n, known: tl.constexpr):
    """Cosines and sines of some rows of sequence b, (rows, HALF_PAD) each."""
    half = tl.arange(0, known.HALF_PAD)
    first = b * n * (known.HALF if known.OWN_ANGLES else 0)
    cos = load_tile(cos_ptr + first, rows, n, known.HALF, half, known.HALF).to(tl.float32)
    return cos, load_tile(sin_ptr + first, rows, n, known.HALF, half, known.HALF).to(tl.float32)


@triton.jit
def dot_halves(a1, a2, b1, b2):
    """A B^T for matrices held as two halves of their columns."""
    return tl.dot(a2, tl.trans(b2), tl.dot(a1, tl.trans(b1), input_precision="ieee"), input_precision="ieee")


@triton.jit
def queries_of(latents, b, h, rows, n, factor, known: tl.constexpr):
    """A tile of head h's queries times `factor`, as halves: mixed and turned from the latents, or loaded as they are."""
    p_ptr, core1, core2, cos_ptr, sin_ptr = latents
    if known.MIX:
        p = load_tile(p_ptr + b * n * known.S, rows, n, known.S, tl.arange(0, known.S_PAD), known.S)
        q1, q2 = tl.dot(p, core1, input_precision="ieee"), tl.dot(p, core2, input_precision="ieee")
        if known.ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, b, rows, n, known)
            q1, q2 = q1 * cos - q2 * sin, q2 * cos + q1 * sin
    else:
        q1, q2 = load_halves(p_ptr + (b * known.HEADS + h) * n * known.T, rows, n, known)
    kept = p_ptr.dtype.element_ty
    return (q1 * factor).to(kept), (q2 * factor).to(kept)


@triton.jit
def hide(logits, rows, columns, n, m, CAUSAL: tl.constexpr):
    """Minus infinity where a query may not look: beyond the sources, or with CAUSAL past its own place, the last being m - 1."""
    allowed = columns < m
    if CAUSAL:
        allowed = allowed & (columns <= rows + (m - n))
    return tl.where(allowed, logits, float("-inf"))


@triton.jit
def sources_seen(tile, n, m, QUERIES: tl.constexpr, SOURCES: tl.constexpr, CAUSAL: tl.constexpr):
    """How many sources, in whole tiles, every query of this tile may see, so that nothing needs hiding; and how many any of them may."""
    all_see, any_sees = m, m
    if CAUSAL:
        all_see = tile * QUERIES + 1 + m - n
        any_sees = tl.minimum(m, (tile + 1) * QUERIES + (m - n))
    return all_see // SOURCES * SOURCES, any_sees


@triton.jit
def forward_step(
    start, q1, q2, k_at, v_at, largest, total, z, rows, n, m, known: tl.constexpr, SOURCES: tl.constexpr, EDGE: tl.constexpr
):
    """One tile of sources: the running maximum, the running sum and the running output."""
    columns = start + tl.arange(0, SOURCES)
    k1, k2 = load_halves(k_at, columns, m, known)
    logits = dot_halves(q1, q2, k1, k2)  # (QUERIES, SOURCES)
    if EDGE:
        logits = hide(logits, rows[:, None], columns[None, :], n, m, known.CAUSAL)
    new = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new[:, None])
    shrink = tl.exp2(largest - new)  # what was summed so far had an older maximum
    values = load_tile(v_at, columns, m, known.V, tl.arange(0, known.V_PAD), known.V)
    z = tl.dot(weights.to(values.dtype), values, z * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(weights, 1), z


@triton.jit
def forward_kernel(
    p_ptr, core_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, z_ptr, lse_ptr, n, m, factor,
    known: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all of its sources. Late tiles see most, and start first."""
    V_PAD: tl.constexpr = known.V_PAD  # Triton 3.6 wants it so where it is part of a shape
    tile, b, h = program_tile_from_the_end(known.HEADS)
    rows, v = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, known.V_PAD)
    group = b * known.GROUPS + h // (known.HEADS // known.GROUPS)
    k_at, v_at = k_ptr + group * m * known.T, v_ptr + group * m * known.V
    core1, core2 = 0, 0
    if known.MIX:
        core1, core2 = load_core(core_ptr, h, known)
    q1, q2 = queries_of((p_ptr, core1, core2, cos_ptr, sin_ptr), b, h, rows, n, factor, known)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    z = tl.zeros((QUERIES, V_PAD), tl.float32)
    clear, end = sources_seen(tile, n, m, QUERIES, SOURCES, known.CAUSAL)
    for start in range(0, clear, SOURCES):
        largest, total, z = forward_step(start, q1, q2, k_at, v_at, largest, total, z, rows, n, m, known, SOURCES, False)
    for start in range(clear, end, SOURCES):
        largest, total, z = forward_step(start, q1, q2, k_at, v_at, largest, total, z, rows, n, m, known, SOURCES, True)
    tl.store(lse_ptr + (b * known.HEADS + h) * n + rows, largest + tl.log2(total), mask=rows < n)
    z_at = tile_at(z_ptr + (b * n * known.HEADS + h) * known.V, rows, known.HEADS * known.V, v)
    tl.store(z_at, (z / total[:, None]).to(z_ptr.dtype.element_ty), mask=within(rows, n, v, known.V))


@triton.jit
def queries_step(
    start, q1, q2, dz, lse, delta, k_at, v_at, dq1, dq2, rows, n, m,
    known: tl.constexpr, SOURCES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of sources' part of dQ_h: the weights again, their gradient, and with it the keys."""
    columns = start + tl.arange(0, SOURCES)
    k1, k2 = load_halves(k_at, columns, m, known)
    logits = dot_halves(q1, q2, k1, k2)
    if EDGE:
        logits = hide(logits, rows[:, None], columns[None, :], n, m, known.CAUSAL)
    values = load_tile(v_at, columns, m, known.V, tl.arange(0, known.V_PAD), known.V)
    dweights = tl.dot(dz, tl.trans(values), input_precision="ieee")
    dlogits = (tl.exp2(logits - lse[:, None]) * (dweights - delta[:, None])).to(k1.dtype)
    return tl.dot(dlogits, k1, dq1, input_precision="ieee"), tl.dot(dlogits, k2, dq2, input_precision="ieee")


@triton.jit
def queries_backward_kernel(
    p_ptr, core_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, z_ptr, dz_ptr, lse_ptr, delta_ptr, dp_ptr, dcore_ptr, n, m, factor, scale,
    known: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """dQ_h of one tile of queries, and from it on chip this head's part of dP = sum_h dQ_h T_h^T, and of dT_h = P^T dQ_h.

    On the way delta = sum_v z dz per query, the part of the softmax's gradient that all sources share, for the next kernel too.
    """
    HALF_PAD: tl.constexpr = known.HALF_PAD
    tile, b, h = program_tile_from_the_end(known.HEADS)
    rows, v, half = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, known.V_PAD), tl.arange(0, known.HALF_PAD)
    group = b * known.GROUPS + h // (known.HEADS // known.GROUPS)
    k_at, v_at = k_ptr + group * m * known.T, v_ptr + group * m * known.V
    core1, core2 = 0, 0
    if known.MIX:
        core1, core2 = load_core(core_ptr, h, known)
    q1, q2 = queries_of((p_ptr, core1, core2, cos_ptr, sin_ptr), b, h, rows, n, factor, known)
    first = (b * n * known.HEADS + h) * known.V
    z = load_tile(z_ptr + first, rows, n, known.HEADS * known.V, v, known.V)
    dz = load_tile(dz_ptr + first, rows, n, known.HEADS * known.V, v, known.V)
    delta = tl.sum(z.to(tl.float32) * dz.to(tl.float32), 1)
    tl.store(delta_ptr + (b * known.HEADS + h) * n + rows, delta, mask=rows < n)
    lse = tl.load(lse_ptr + (b * known.HEADS + h) * n + rows, mask=rows < n, other=float("inf"))
    dq1, dq2 = tl.zeros((QUERIES, HALF_PAD), tl.float32), tl.zeros((QUERIES, HALF_PAD), tl.float32)
    clear, end = sources_seen(tile, n, m, QUERIES, SOURCES, known.CAUSAL)
    for start in range(0, clear, SOURCES):
        dq1, dq2 = queries_step(start, q1, q2, dz, lse, delta, k_at, v_at, dq1, dq2, rows, n, m, known, SOURCES, False)
    for start in range(clear, end, SOURCES):
        dq1, dq2 = queries_step(start, q1, q2, dz, lse, delta, k_at, v_at, dq1, dq2, rows, n, m, known, SOURCES, True)
    dq1, dq2 = dq1 * scale, dq2 * scale
    if known.MIX:
        if known.ROTARY:  # turn back
            cos, sin = load_angles(cos_ptr, sin_ptr, b, rows, n, known)
            dq1, dq2 = dq1 * cos + dq2 * sin, dq2 * cos - dq1 * sin
        s = tl.arange(0, known.S_PAD)
        p = load_tile(p_ptr + b * n * known.S, rows, n, known.S, s, known.S)
        dq1, dq2 = dq1.to(p.dtype), dq2.to(p.dtype)
        dp_at = tile_at(dp_ptr + b * n * known.S, rows, known.S, s)
        tl.atomic_add(dp_at, dot_halves(dq1, dq2, core1, core2), mask=within(rows, n, s, known.S))
        dcore1 = tl.dot(tl.trans(p), dq1, input_precision="ieee")
        dcore2 = tl.dot(tl.trans(p), dq2, input_precision="ieee")
        dcore_at = tile_at(dcore_ptr + h * known.S * known.T, s, known.T, half)
        tl.atomic_add(dcore_at, dcore1, mask=within(s, known.S, half, known.HALF))
        tl.atomic_add(dcore_at + known.HALF, dcore2, mask=within(s, known.S, half, known.T - known.HALF))
    else:
        dq_at = tile_at(dp_ptr + (b * known.HEADS + h) * n * known.T, rows, known.T, half)
        tl.store(dq_at, dq1.to(dp_ptr.dtype.element_ty), mask=within(rows, n, half, known.HALF))
        tl.store(dq_at + known.HALF, dq2.to(dp_ptr.dtype.element_ty), mask=within(rows, n, half, known.T - known.HALF))


@triton.jit
def sources_step(
    start, k1, k2, values, dk1, dk2, dv, latents, dz_ptr, lse_ptr, delta_ptr, b, h, columns, n, m, factor,
    known: tl.constexpr, QUERIES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of head h's queries' part of dK and dV. Logits stand transposed: their products then read them from registers."""
    rows = start + tl.arange(0, QUERIES)
    at = (b * known.HEADS + h) * n + rows
    q1, q2 = queries_of(latents, b, h, rows, n, factor, known)
    lse = tl.load(lse_ptr + at, mask=rows < n, other=float("inf"))  # rows beyond the end weigh nothing
    delta = tl.load(delta_ptr + at, mask=rows < n, other=0.0)
    logits = dot_halves(k1, k2, q1, q2)  # (SOURCES, QUERIES)
    if EDGE:
        logits = hide(logits, rows[None, :], columns[:, None], n, m, known.CAUSAL)
    weights = tl.exp2(logits - lse[None, :])
    first = (b * n * known.HEADS + h) * known.V
    dz = load_tile(dz_ptr + first, rows, n, known.HEADS * known.V, tl.arange(0, known.V_PAD), known.V)
    dv = tl.dot(weights.to(dz.dtype), dz, dv, input_precision="ieee")
    dweights = tl.dot(values, tl.trans(dz), input_precision="ieee")
    dlogits = (weights * (dweights - delta[None, :])).to(q1.dtype)
    return tl.dot(dlogits, q1, dk1, input_precision="ieee"), tl.dot(dlogits, q2, dk2, input_precision="ieee"), dv


@triton.jit
def sources_backward_kernel(
    p_ptr, core_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, dz_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, n, m, factor,
    PARTS: tl.constexpr, known: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of sources: the sum over all queries of the group's heads, PARTS programs sharing the heads."""
    HALF_PAD: tl.constexpr = known.HALF_PAD
    V_PAD: tl.constexpr = known.V_PAD
    tile, b, part = program_tile(known.GROUPS * PARTS)
    group, share = b * known.GROUPS + part // PARTS, known.HEADS // known.GROUPS // PARTS  # heads of this program
    columns = tile * SOURCES + tl.arange(0, SOURCES)
    half, v = tl.arange(0, known.HALF_PAD), tl.arange(0, known.V_PAD)
    k1, k2 = load_halves(k_ptr + group * m * known.T, columns, m, known)
    values = load_tile(v_ptr + group * m * known.V, columns, m, known.V, v, known.V)
    dk1, dk2 = tl.zeros((SOURCES, HALF_PAD), tl.float32), tl.zeros((SOURCES, HALF_PAD), tl.float32)
    dv = tl.zeros((SOURCES, V_PAD), tl.float32)
    begin, clear = 0, 0
    if known.CAUSAL:  # queries before `begin` see none of these sources, queries from `clear` on all of them
        begin = tl.maximum(0, tile * SOURCES - (m - n)) // QUERIES * QUERIES
        clear = tl.maximum(0, (tile + 1) * SOURCES - 1 - (m - n) + QUERIES - 1) // QUERIES * QUERIES
    for head in range(share):
        h = part * share + head
        core1, core2 = 0, 0
        if known.MIX:
            core1, core2 = load_core(core_ptr, h, known)
        latents = (p_ptr, core1, core2, cos_ptr, sin_ptr)
        for start in range(begin, tl.minimum(clear, n), QUERIES):
            dk1, dk2, dv = sources_step(
                start, k1, k2, values, dk1, dk2, dv, latents, dz_ptr, lse_ptr, delta_ptr, b, h, columns, n, m, factor,
                known, QUERIES, True,
            )  # fmt: skip
        for start in range(clear, n, QUERIES):
            dk1, dk2, dv = sources_step(
                start, k1, k2, values, dk1, dk2, dv, latents, dz_ptr, lse_ptr, delta_ptr, b, h, columns, n, m, factor,
                known, QUERIES, False,
            )  # fmt: skip
    unscaled = 0.6931471805599453  # q holds scale * log2(e); dK wants scale
    dk_at = tile_at(dk_ptr + group * m * known.T, columns, known.T, half)
    tl.atomic_add(dk_at, dk1 * unscaled, mask=within(columns, m, half, known.HALF))
    tl.atomic_add(dk_at + known.HALF, dk2 * unscaled, mask=within(columns, m, half, known.T - known.HALF))
    tl.atomic_add(tile_at(dv_ptr + group * m * known.V, columns, known.V, v), dv, mask=within(columns, m, v, known.V))


def constants(p, core, cos, k, v, heads: int, causal: bool) -> Known:
    """What the kernels know of these tensors at compile time."""
    s, t, width = p.shape[-1], k.shape[3], v.shape[3]
    half = (t + 1) // 2
    return Known(
        HEADS=heads, GROUPS=k.shape[1], S=s, T=t, V=width, HALF=half, S_PAD=pad(s), HALF_PAD=pad(half), V_PAD=pad(width),
        CAUSAL=causal, MIX=core is not None, ROTARY=cos is not None, OWN_ANGLES=cos is not None and cos.ndim == 3,
    )  # fmt: skip


def grid_of(each: int, tiles: int) -> tuple[int, int, int]:
    """Programs for every tile of `each` head of a sequence: the tiles in two dimensions, in which CUDA takes no more than 65,535.

    There may be some programs more than tiles, whose rows lie beyond the end.  Raises ValueError where there are too many of them.
    """
    deep = triton.cdiv(tiles, 65535)
    grid = each, triton.cdiv(tiles, deep), deep
    if math.prod(grid) >= 2**31:  # Triton multiplies them in 32 bits
        raise ValueError(
            f"backend 'triton' would start {math.prod(grid):,} programs and may start 2,147,483,647: "
            "attend with fewer sequences, heads or tokens at a time"
        )
    return grid


def pad(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def tiling(kernel: str, known: Known, itemsize: int) -> dict:
    """Tile sizes, warps and pipeline stages of one kernel ("forward", "queries" or "sources"), as measured on an H200."""
    if interpreted():
        return dict(QUERIES=32, SOURCES=16) if kernel == "sources" else dict(QUERIES=16, SOURCES=32)
    widest = max(known.S_PAD if known.MIX else 0, 2 * known.HALF_PAD, known.V_PAD)
    if itemsize > 2 or widest > 128:  # small tiles, or they do not fit on chip
        return dict(QUERIES=32, SOURCES=32, num_warps=4, num_stages=1)
    if kernel == "forward":
        return dict(QUERIES=64, SOURCES=64, num_warps=4, num_stages=3)
    if kernel == "queries":
        return dict(QUERIES=128, SOURCES=64 if widest > 64 else 32, num_warps=8, num_stages=3)
    if widest > 64:
        return dict(QUERIES=32, SOURCES=128, num_warps=8, num_stages=3)
    return dict(QUERIES=64, SOURCES=64, num_warps=4, num_stages=3)


@torch.library.custom_op("tucker_ref::flash", mutates_args=())
def flash(
    p: torch.Tensor,
    core: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z (b, n, h, v) and, per head and query, the logarithm (base 2) of the softmax's sum, (b, h, n)."""
    check_device(p)
    n, known = p.shape[-2], constants(p, core, cos, k, v, heads, causal)
    tiles = tiling("forward", known, p.element_size())
    grid = grid_of(len(k) * heads, triton.cdiv(n, tiles["QUERIES"]))
    p, k, v = p.contiguous(), k.contiguous(), v.contiguous()
    core = None if core is None else core.contiguous()
    z, lse = _empty_outputs(p, v, heads)
    forward_kernel[grid](p, core, cos, sin, k, v, z, lse, n, k.shape[2], scale * LOG2_E, known, **tiles)
    return z, lse


@flash.register_fake
def _(p, core, cos, sin, k, v, heads, scale, causal):
    return _empty_outputs(p, v, heads)


def _empty_outputs(p, v, heads):
    b, n = len(v), p.shape[-2]
    return p.new_empty(b, n, heads, v.shape[3]), torch.empty(b, heads, n, dtype=torch.float32, device=p.device)


@torch.library.custom_op("tucker_ref::flash_backward", mutates_args=())
def flash_backward(
    dz: torch.Tensor,
    p: torch.Tensor,
    core: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of p, core (empty without one), k and v."""
    dz, p, k, v = dz.contiguous(), p.contiguous(), k.contiguous(), v.contiguous()
    core = None if core is None else core.contiguous()
    (b, n, heads, _), (_, groups, m, _) = z.shape, k.shape
    known, delta = constants(p, core, cos, k, v, heads, causal), torch.empty_like(lse)
    given = (p, core, cos, sin, k, v)

    def sums(x):  # added up by many programs, hence in float32
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    dp, dcore = (torch.empty_like(p), p.new_empty(0)) if core is None else (sums(p), sums(core))
    tiles = tiling("queries", known, p.element_size())
    grid = grid_of(b * heads, triton.cdiv(n, tiles["QUERIES"]))
    queries_backward_kernel[grid](*given, z, dz, lse, delta, dp, dcore, n, m, scale * LOG2_E, scale, known, **tiles)
    dk, dv = sums(k), sums(v)
    tiles = tiling("sources", known, p.element_size())
    parts = next(parts for parts in (4, 2, 1) if heads // groups % parts == 0)
    grid = grid_of(b * groups * parts, triton.cdiv(m, tiles["SOURCES"]))
    sources_backward_kernel[grid](*given, dz, lse, delta, dk, dv, n, m, scale * LOG2_E, parts, known, **tiles)
    return dp.to(p.dtype), dcore.to(p.dtype), dk.to(p.dtype), dv.to(p.dtype)


@flash_backward.register_fake
def _(dz, p, core, cos, sin, k, v, z, lse, scale, causal):
    dcore = p.new_empty(0) if core is None else core.new_empty(core.shape)
    return p.new_empty(p.shape), dcore, k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output):
    p, core, cos, sin, k, v, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(p, core, cos, sin, k, v, *output)


def _backward(ctx, dz, _dlse):
    dp, dcore, dk, dv = flash_backward(dz, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return dp, None if ctx.saved_tensors[1] is None else dcore, None, None, dk, dv, None, None, None


flash.register_autograd(_backward, setup_context=_keep)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool) -> torch.Tensor:
    """softmax(Q K^T * scale) V for ready queries (Dao et al. 2022, "FlashAttention").

    Args:
        q: Queries, (b, h, n, k).
        k: Keys, (b, g, m, k), where g divides h.
        v: Values, (b, g, m, v).
        scale: Multiplies the logits.
        causal: The last query is the last source token, and none sees a later one than itself.

    Returns:
        The values, weighed and summed, (b, h, n, v).

    Raises:
        ValueError: Triton cannot run where the tensors are, or not so many programs at once.
    """
    q, k, v = _autocast(q, k, v)
    return flash(q, None, None, None, k, v, q.shape[1], scale, causal)[0].transpose(1, 2)


def latent_attention(
    p: torch.Tensor,
    cores: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    rotary=None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same with queries Q_h = R(positions) (P T_h) made on chip.

    Args:
        p: Query latents, (b, n, s).
        cores: One core T_h a head, (h, s, t).
        k: The keys of all heads, (b, 1, m, t), turned already.
        v: The values of all heads, (b, 1, m, v).
        scale: As above.
        causal: As above.
        rotary: Turns the queries, a `tucker_ref.Rotary`; None leaves them as they are.
        positions: Where the queries stand, (n,) or (b, n); wanted with `rotary` only.

    Returns:
        The values, weighed and summed, (b, h, n, v).

    Raises:
        ValueError: As above.
    """
    p, cores, k, v = _autocast(p, cores, k, v)
    cos = sin = None
    if rotary is not None:
        cos, sin = rotary.cos_sin(positions, p.dtype)
        cores, k = (torch.cat(rotary.pairs(x), dim=-1) for x in (cores, k))
    return flash(p, cores, cos, sin, k, v, len(cores), scale, causal)[0].transpose(1, 2)


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Under autocast these products run in its precision, as PyTorch's own attention does."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return [x.to(dtype) for x in tensors]


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1) instead of compiling them for a GPU."""
    return triton.knobs.runtime.interpret


def check_device(x: torch.Tensor) -> None:
    """Raise ValueError unless Triton can run here."""
    if interpreted() and x.dtype == torch.bfloat16:
        raise ValueError(
            "backend 'triton': Triton's interpreter multiplies bfloat16 matrices as integers; take float32 or float16"
        )
    if x.is_cuda == interpreted():
        raise ValueError(
            f"backend 'triton' got tensors on {x.device}; kernels are compiled for a GPU, or run on the CPU with TRITON_INTERPRET=1"
        )
