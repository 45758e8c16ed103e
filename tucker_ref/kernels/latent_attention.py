"""Rung 14. Flash attention with the core mixed inside: no per-head query ever reaches device memory (Triton).

Tucker Attention has one query latent per token, P (n, s), small per-head cores T_h (s, t), and one key and value for all heads.
A stock kernel wants every head's queries Q_h = P T_h in memory, h t numbers a token in place of s. This one loads a tile of P and
one T_h, multiplies them on chip, and goes on as flash attention does (Dao et al. 2022): with Q_h K^T tile by tile, a running maximum
and a running sum per query, and a logarithm of the sum kept for the backward pass, which computes every tile again.

Rotary embedding turns Q_h on chip too. Keys and cores come with their channels in pair order: the first channels of all pairs, then
the second ones. A dot product does not mind, and a tile held as these two halves is turned as complex numbers are multiplied:
(q1 cos - q2 sin, q2 cos + q1 sin). Without rotary embedding the halves are the two halves of the channels, whatever they are.

With MIX off the kernels take ready queries (b, h, n, t) and g key/value heads, and are ordinary flash attention.

Names in the kernels: a tile of queries has QUERIES rows, one of keys and values SOURCES rows; S, T, V are latent widths, HALF is
T / 2 rounded up, and S_PAD, HALF_PAD, V_PAD the powers of two above them that a tile needs. Queries are scaled when they are made,
so that logits come in units of log 2, for exp2. The output z lies in memory as (b, n, h, v), as the next product reads it.
"""

import math

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


@triton.jit
def load_tile(base, rows, n_rows, stride, columns, n_columns):
    """(rows, columns) of a matrix whose rows lie `stride` apart, zeros beyond its edges."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_halves(base, rows, n_rows, T: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Channels 0 .. HALF - 1 and HALF .. T - 1 of some rows, (rows, HALF_PAD) each."""
    half = tl.arange(0, HALF_PAD)
    return load_tile(base, rows, n_rows, T, half, HALF), load_tile(base + HALF, rows, n_rows, T, half, T - HALF)


@triton.jit
def dot_halves(a1, a2, b1, b2):
    """A B^T for matrices held as two halves of their columns."""
    return tl.dot(a2, tl.trans(b2), tl.dot(a1, tl.trans(b1), input_precision="ieee"), input_precision="ieee")


@triton.jit
def queries_of(
    p_ptr, core1, core2, cos_ptr, sin_ptr, angle_step, b, h, rows, n, factor,
    HEADS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, S_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    MIX: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """A tile of head h's queries times `factor`, as halves: mixed and turned from the latents, or loaded as they are."""
    if MIX:
        p = load_tile(p_ptr + b * n * S, rows, n, S, tl.arange(0, S_PAD), S)
        q1, q2 = tl.dot(p, core1, input_precision="ieee"), tl.dot(p, core2, input_precision="ieee")
        if ROTARY:
            half = tl.arange(0, HALF_PAD)
            cos = load_tile(cos_ptr + b * angle_step, rows, n, HALF, half, HALF).to(tl.float32)
            sin = load_tile(sin_ptr + b * angle_step, rows, n, HALF, half, HALF).to(tl.float32)
            q1, q2 = q1 * cos - q2 * sin, q2 * cos + q1 * sin
    else:
        q1, q2 = load_halves(p_ptr + (b * HEADS + h) * n * T, rows, n, T, HALF, HALF_PAD)
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
def seen_by_all(first_row, n, m, SOURCES: tl.constexpr, CAUSAL: tl.constexpr):
    """How many sources, in whole tiles, every query from first_row on may see: there nothing needs hiding."""
    count = m
    if CAUSAL:
        count = first_row + 1 + m - n
    return count // SOURCES * SOURCES


@triton.jit
def forward_step(
    start, q1, q2, k_at, v_at, largest, total, z, rows, n, m,
    T: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, V_PAD: tl.constexpr, SOURCES: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of sources: the running maximum, the running sum and the running output."""
    columns = start + tl.arange(0, SOURCES)
    k1, k2 = load_halves(k_at, columns, m, T, HALF, HALF_PAD)
    logits = dot_halves(q1, q2, k1, k2)  # (QUERIES, SOURCES)
    if EDGE:
        logits = hide(logits, rows[:, None], columns[None, :], n, m, CAUSAL)
    new = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new[:, None])
    shrink = tl.exp2(largest - new)  # what was summed so far had an older maximum
    values = load_tile(v_at, columns, m, V, tl.arange(0, V_PAD), V)
    z = tl.dot(weights.to(values.dtype), values, z * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(weights, 1), z


@triton.jit
def forward_kernel(
    p_ptr, core_ptr, cos_ptr, sin_ptr, angle_step, k_ptr, v_ptr, z_ptr, lse_ptr, n, m, factor,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    S_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, V_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all of its sources. Late tiles see most, and start first."""
    b, h = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    rows, v = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, V_PAD)
    group = b * GROUPS + h // (HEADS // GROUPS)
    k_at, v_at = k_ptr + group * m * T, v_ptr + group * m * V
    core1, core2 = 0, 0
    if MIX:
        core1, core2 = load_halves(core_ptr + h * S * T, tl.arange(0, S_PAD), S, T, HALF, HALF_PAD)
    q1, q2 = queries_of(
        p_ptr, core1, core2, cos_ptr, sin_ptr, angle_step, b, h, rows, n, factor, HEADS, S, T, S_PAD, HALF, HALF_PAD, MIX, ROTARY
    )  # fmt: skip
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    z = tl.zeros((QUERIES, V_PAD), tl.float32)
    clear = seen_by_all(tile * QUERIES, n, m, SOURCES, CAUSAL)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tile + 1) * QUERIES + (m - n))
    for start in range(0, clear, SOURCES):
        largest, total, z = forward_step(
            start, q1, q2, k_at, v_at, largest, total, z, rows, n, m, T, V, HALF, HALF_PAD, V_PAD, SOURCES, CAUSAL, False
        )  # fmt: skip
    for start in range(clear, end, SOURCES):
        largest, total, z = forward_step(
            start, q1, q2, k_at, v_at, largest, total, z, rows, n, m, T, V, HALF, HALF_PAD, V_PAD, SOURCES, CAUSAL, True
        )  # fmt: skip
    tl.store(lse_ptr + (b * HEADS + h) * n + rows, largest + tl.log2(total), mask=rows < n)
    z_at = z_ptr + (b * n * HEADS + h) * V + rows[:, None] * (HEADS * V) + v[None, :]
    tl.store(z_at, (z / total[:, None]).to(z_ptr.dtype.element_ty), mask=(rows[:, None] < n) & (v[None, :] < V))


@triton.jit
def queries_step(
    start, q1, q2, dz, lse, delta, k_at, v_at, dq1, dq2, rows, n, m,
    T: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, V_PAD: tl.constexpr, SOURCES: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of sources' part of dQ_h: the weights again, their gradient, and with it the keys."""
    columns = start + tl.arange(0, SOURCES)
    k1, k2 = load_halves(k_at, columns, m, T, HALF, HALF_PAD)
    logits = dot_halves(q1, q2, k1, k2)
    if EDGE:
        logits = hide(logits, rows[:, None], columns[None, :], n, m, CAUSAL)
    values = load_tile(v_at, columns, m, V, tl.arange(0, V_PAD), V)
    dweights = tl.dot(dz, tl.trans(values), input_precision="ieee")
    dlogits = (tl.exp2(logits - lse[:, None]) * (dweights - delta[:, None])).to(k1.dtype)
    return tl.dot(dlogits, k1, dq1, input_precision="ieee"), tl.dot(dlogits, k2, dq2, input_precision="ieee")


@triton.jit
def queries_backward_kernel(
    p_ptr, core_ptr, cos_ptr, sin_ptr, angle_step, k_ptr, v_ptr, z_ptr, dz_ptr, lse_ptr, delta_ptr, dp_ptr, dcore_ptr, n, m, factor, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    S_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, V_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """dQ_h of one tile of queries, and from it on chip this head's part of dP = sum_h dQ_h T_h^T, and of dT_h = P^T dQ_h.

    On the way delta = sum_v z dz per query, the part of the softmax's gradient that all sources share, for the next kernel too.
    """
    b, h = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    rows, v, half = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, V_PAD), tl.arange(0, HALF_PAD)
    group = b * GROUPS + h // (HEADS // GROUPS)
    k_at, v_at = k_ptr + group * m * T, v_ptr + group * m * V
    core1, core2 = 0, 0
    if MIX:
        core1, core2 = load_halves(core_ptr + h * S * T, tl.arange(0, S_PAD), S, T, HALF, HALF_PAD)
    q1, q2 = queries_of(
        p_ptr, core1, core2, cos_ptr, sin_ptr, angle_step, b, h, rows, n, factor, HEADS, S, T, S_PAD, HALF, HALF_PAD, MIX, ROTARY
    )  # fmt: skip
    z_at = (b * n * HEADS + h) * V
    z, dz = load_tile(z_ptr + z_at, rows, n, HEADS * V, v, V), load_tile(dz_ptr + z_at, rows, n, HEADS * V, v, V)
    delta = tl.sum(z.to(tl.float32) * dz.to(tl.float32), 1)
    tl.store(delta_ptr + (b * HEADS + h) * n + rows, delta, mask=rows < n)
    lse = tl.load(lse_ptr + (b * HEADS + h) * n + rows, mask=rows < n, other=float("inf"))
    dq1, dq2 = tl.zeros((QUERIES, HALF_PAD), tl.float32), tl.zeros((QUERIES, HALF_PAD), tl.float32)
    clear = seen_by_all(tile * QUERIES, n, m, SOURCES, CAUSAL)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tile + 1) * QUERIES + (m - n))
    for start in range(0, clear, SOURCES):
        dq1, dq2 = queries_step(
            start, q1, q2, dz, lse, delta, k_at, v_at, dq1, dq2, rows, n, m, T, V, HALF, HALF_PAD, V_PAD, SOURCES, CAUSAL, False
        )  # fmt: skip
    for start in range(clear, end, SOURCES):
        dq1, dq2 = queries_step(
            start, q1, q2, dz, lse, delta, k_at, v_at, dq1, dq2, rows, n, m, T, V, HALF, HALF_PAD, V_PAD, SOURCES, CAUSAL, True
        )  # fmt: skip
    dq1, dq2 = dq1 * scale, dq2 * scale
    inside = rows[:, None] < n
    if MIX:
        if ROTARY:  # turn back
            cos = load_tile(cos_ptr + b * angle_step, rows, n, HALF, half, HALF).to(tl.float32)
            sin = load_tile(sin_ptr + b * angle_step, rows, n, HALF, half, HALF).to(tl.float32)
            dq1, dq2 = dq1 * cos + dq2 * sin, dq2 * cos - dq1 * sin
        s = tl.arange(0, S_PAD)
        p = load_tile(p_ptr + b * n * S, rows, n, S, s, S)
        dq1, dq2 = dq1.to(p.dtype), dq2.to(p.dtype)
        dp = dot_halves(dq1, dq2, core1, core2)
        tl.atomic_add(dp_ptr + b * n * S + rows[:, None] * S + s[None, :], dp, mask=inside & (s[None, :] < S))
        dcore1 = tl.dot(tl.trans(p), dq1, input_precision="ieee")
        dcore2 = tl.dot(tl.trans(p), dq2, input_precision="ieee")
        dcore_at = dcore_ptr + h * S * T + s[:, None] * T + half[None, :]
        tl.atomic_add(dcore_at, dcore1, mask=(s[:, None] < S) & (half[None, :] < HALF))
        tl.atomic_add(dcore_at + HALF, dcore2, mask=(s[:, None] < S) & (half[None, :] < T - HALF))
    else:
        dq_at = dp_ptr + (b * HEADS + h) * n * T + rows[:, None] * T + half[None, :]
        tl.store(dq_at, dq1.to(dp_ptr.dtype.element_ty), mask=inside & (half[None, :] < HALF))
        tl.store(dq_at + HALF, dq2.to(dp_ptr.dtype.element_ty), mask=inside & (half[None, :] < T - HALF))


@triton.jit
def sources_step(
    start, k1, k2, values, core1, core2, dk1, dk2, dv, p_ptr, cos_ptr, sin_ptr, angle_step, dz_ptr, lse_ptr, delta_ptr,
    b, h, columns, n, m, factor,
    HEADS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr, S_PAD: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, V_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr, QUERIES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of head h's queries' part of dK and dV. Logits stand transposed: their products then read them from registers."""
    rows = start + tl.arange(0, QUERIES)
    at = (b * HEADS + h) * n + rows
    q1, q2 = queries_of(
        p_ptr, core1, core2, cos_ptr, sin_ptr, angle_step, b, h, rows, n, factor, HEADS, S, T, S_PAD, HALF, HALF_PAD, MIX, ROTARY
    )  # fmt: skip
    lse = tl.load(lse_ptr + at, mask=rows < n, other=float("inf"))  # rows beyond the end weigh nothing
    delta = tl.load(delta_ptr + at, mask=rows < n, other=0.0)
    logits = dot_halves(k1, k2, q1, q2)  # (SOURCES, QUERIES)
    if EDGE:
        logits = hide(logits, rows[None, :], columns[:, None], n, m, CAUSAL)
    weights = tl.exp2(logits - lse[None, :])
    dz = load_tile(dz_ptr + (b * n * HEADS + h) * V, rows, n, HEADS * V, tl.arange(0, V_PAD), V)
    dv = tl.dot(weights.to(dz.dtype), dz, dv, input_precision="ieee")
    dweights = tl.dot(values, tl.trans(dz), input_precision="ieee")
    dlogits = (weights * (dweights - delta[None, :])).to(q1.dtype)
    return tl.dot(dlogits, q1, dk1, input_precision="ieee"), tl.dot(dlogits, q2, dk2, input_precision="ieee"), dv


@triton.jit
def sources_backward_kernel(
    p_ptr, core_ptr, cos_ptr, sin_ptr, angle_step, k_ptr, v_ptr, dz_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, n, m, factor,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    S_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, V_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of sources: the sum over all queries of the group's heads, PARTS programs sharing the heads."""
    share: tl.constexpr = HEADS // GROUPS // PARTS  # heads of this program
    first = tl.program_id(0) * share  # counted over batch, group and part
    b = (first // HEADS).to(tl.int64)
    group = b * GROUPS + (first % HEADS) // (HEADS // GROUPS)
    columns = tl.program_id(1) * SOURCES + tl.arange(0, SOURCES)
    half, v = tl.arange(0, HALF_PAD), tl.arange(0, V_PAD)
    k1, k2 = load_halves(k_ptr + group * m * T, columns, m, T, HALF, HALF_PAD)
    values = load_tile(v_ptr + group * m * V, columns, m, V, v, V)
    dk1, dk2 = tl.zeros((SOURCES, HALF_PAD), tl.float32), tl.zeros((SOURCES, HALF_PAD), tl.float32)
    dv = tl.zeros((SOURCES, V_PAD), tl.float32)
    begin, clear = 0, 0
    if CAUSAL:  # queries before `begin` see none of these sources, queries from `clear` on all of them
        begin = tl.maximum(0, tl.program_id(1) * SOURCES - (m - n)) // QUERIES * QUERIES
        clear = tl.maximum(0, (tl.program_id(1) + 1) * SOURCES - 1 - (m - n) + QUERIES - 1) // QUERIES * QUERIES
    for head in range(share):
        h = first % HEADS + head
        core1, core2 = 0, 0
        if MIX:
            core1, core2 = load_halves(core_ptr + h * S * T, tl.arange(0, S_PAD), S, T, HALF, HALF_PAD)
        for start in range(begin, tl.minimum(clear, n), QUERIES):
            dk1, dk2, dv = sources_step(
                start, k1, k2, values, core1, core2, dk1, dk2, dv, p_ptr, cos_ptr, sin_ptr, angle_step, dz_ptr, lse_ptr, delta_ptr,
                b, h, columns, n, m, factor, HEADS, S, T, V, S_PAD, HALF, HALF_PAD, V_PAD, CAUSAL, MIX, ROTARY, QUERIES, True
            )  # fmt: skip
        for start in range(clear, n, QUERIES):
            dk1, dk2, dv = sources_step(
                start, k1, k2, values, core1, core2, dk1, dk2, dv, p_ptr, cos_ptr, sin_ptr, angle_step, dz_ptr, lse_ptr, delta_ptr,
                b, h, columns, n, m, factor, HEADS, S, T, V, S_PAD, HALF, HALF_PAD, V_PAD, CAUSAL, MIX, ROTARY, QUERIES, False
            )  # fmt: skip
    unscaled = 0.6931471805599453  # q holds scale * log2(e); dK wants scale
    inside = columns[:, None] < m
    dk_at = dk_ptr + group * m * T + columns[:, None] * T + half[None, :]
    tl.atomic_add(dk_at, dk1 * unscaled, mask=inside & (half[None, :] < HALF))
    tl.atomic_add(dk_at + HALF, dk2 * unscaled, mask=inside & (half[None, :] < T - HALF))
    tl.atomic_add(dv_ptr + group * m * V + columns[:, None] * V + v[None, :], dv, mask=inside & (v[None, :] < V))


def constants(p, core, cos, k, v, heads: int, causal: bool) -> dict:
    """What the kernels know at compile time: widths, their powers of two (at least 16, as the tensor cores need) and flags."""
    s, t, width = p.shape[-1], k.shape[3], v.shape[3]
    half = (t + 1) // 2
    return dict(
        HEADS=heads, GROUPS=k.shape[1], S=s, T=t, V=width, S_PAD=pad(s), HALF=half, HALF_PAD=pad(half), V_PAD=pad(width),
        CAUSAL=causal, MIX=core is not None, ROTARY=cos is not None,
    )  # fmt: skip


def pad(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def tiling(kernel: str, widths: dict, itemsize: int) -> dict:
    """Tile sizes, warps and pipeline stages of one kernel ("forward", "queries" or "sources"), as measured on an H200."""
    if interpreted():
        return dict(QUERIES=32, SOURCES=16) if kernel == "sources" else dict(QUERIES=16, SOURCES=32)
    widest = max(widths["S_PAD"] if widths["MIX"] else 0, 2 * widths["HALF_PAD"], widths["V_PAD"])
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
    p, k, v = p.contiguous(), k.contiguous(), v.contiguous()
    core = None if core is None else core.contiguous()
    z, lse = _empty_outputs(p, v, heads)
    known = constants(p, core, cos, k, v, heads, causal)
    tiles = tiling("forward", known, p.element_size())
    grid = (len(k) * heads, triton.cdiv(p.shape[-2], tiles["QUERIES"]))
    forward_kernel[grid](
        p, core, cos, sin, _angle_step(cos), k, v, z, lse, p.shape[-2], k.shape[2], scale * LOG2_E, **known, **tiles
    )
    return z, lse


@flash.register_fake
def _(p, core, cos, sin, k, v, heads, scale, causal):
    return _empty_outputs(p, v, heads)


def _empty_outputs(p, v, heads):
    b, n = len(v), p.shape[-2]
    return p.new_empty(b, n, heads, v.shape[3]), torch.empty(b, heads, n, dtype=torch.float32, device=p.device)


def _angle_step(cos) -> int:
    """How far one sequence's angles lie from the next one's: zero where all sequences share them."""
    return 0 if cos is None or cos.ndim == 2 else cos.shape[1] * cos.shape[2]


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
    latents = (p, core, cos, sin, _angle_step(cos), k, v)

    def sums(x):  # added up by many programs, hence in float32
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    dp, dcore = (torch.empty_like(p), p.new_empty(0)) if core is None else (sums(p), sums(core))
    tiles = tiling("queries", known, p.element_size())
    grid = (b * heads, triton.cdiv(n, tiles["QUERIES"]))
    queries_backward_kernel[grid](
        *latents, z, dz, lse, delta, dp, dcore, n, m, scale * LOG2_E, scale, **known, **tiles
    )  # fmt: skip
    dk, dv = sums(k), sums(v)
    tiles = tiling("sources", known, p.element_size())
    parts = next(parts for parts in (4, 2, 1) if heads // groups % parts == 0)
    grid = (b * groups * parts, triton.cdiv(m, tiles["SOURCES"]))
    sources_backward_kernel[grid](*latents, dz, lse, delta, dk, dv, n, m, scale * LOG2_E, PARTS=parts, **known, **tiles)
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
    """softmax(Q K^T scale) V for ready queries: q (b, h, n, k), k (b, g, m, k), v (b, g, m, v).  Returns: (b, h, n, v)."""
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

    p: query latents (b, n, s); cores: T_h (h, s, t); k: (b, 1, m, t), turned already; v: (b, 1, m, v).
    rotary: turns the queries, as `tucker_ref.Rotary`; positions: (n,) or (b, n).  Returns: (b, h, n, v).
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
