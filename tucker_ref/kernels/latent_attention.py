"""Rung 14. Flash attention with the core mixed inside: no per-head query ever reaches device memory (Triton).

Tucker Attention has one query latent per token, P (n, s), small per-head cores T_h (s, t), and one key and value for all heads.
A stock kernel wants every head's queries Q_h = P T_h in memory, h times as much as P. This one loads a tile of P and one T_h,
multiplies them on chip, and goes on as flash attention does (Dao et al. 2022): with Q_h K^T tile by tile, a running maximum and a
running sum per query, and a logarithm of the sum kept for the backward pass, which computes every tile again.

Rotary embedding turns Q_h on chip too. Turning is q cos + q' sin, where q' are q's channels in another order with other signs:
T'_h holds T_h's columns in that order, so q' = P T'_h, and any pairing and any frequencies work.

With MIX off the kernels take ready queries (b, h, n, t) and g key/value heads, and are ordinary flash attention.

Names in the kernels: a tile of queries has QUERIES rows, one of keys and values SOURCES rows; S, T, V are latent widths, and
S_PAD, T_PAD, V_PAD the powers of two above them that a tile needs. Widths, heads and flags are compile-time constants.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, n_rows, columns, n_columns):
    """(rows, columns) of a row-major matrix, zeros beyond its edges."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(base + rows[:, None] * n_columns + columns[None, :], mask=inside, other=0.0)


@triton.jit
def queries_of(
    p_ptr, core_ptr, turned_ptr, cos_ptr, sin_ptr, angle_step, b, h, rows, n, HEADS: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, S_PAD: tl.constexpr, T_PAD: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """A tile of head h's queries (QUERIES, T): mixed and turned from the latents, or loaded as they are."""
    t = tl.arange(0, T_PAD)
    if MIX:
        s = tl.arange(0, S_PAD)
        p = load_tile(p_ptr + b * n * S, rows, n, s, S)
        q = tl.dot(p, load_tile(core_ptr + h * S * T, s, S, t, T), input_precision="ieee")
        if ROTARY:
            turned = tl.dot(p, load_tile(turned_ptr + h * S * T, s, S, t, T), input_precision="ieee")
            cos = load_tile(cos_ptr + b * angle_step, rows, n, t, T)
            sin = load_tile(sin_ptr + b * angle_step, rows, n, t, T)
            q = q * cos + turned * sin
        return q.to(p.dtype)
    else:
        return load_tile(p_ptr + (b * HEADS + h) * n * T, rows, n, t, T)


@triton.jit
def logits_of(q, k, rows, columns, n, m, scale, CAUSAL: tl.constexpr):
    """Logits in units of log 2, (QUERIES, SOURCES): minus infinity where a query may not look."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
    allowed = columns[None, :] < m
    if CAUSAL:  # the last query is the last source
        allowed = allowed & (columns[None, :] <= rows[:, None] + (m - n))
    return tl.where(allowed, logits, float("-inf"))


@triton.jit
def forward_kernel(
    p_ptr, core_ptr, turned_ptr, cos_ptr, sin_ptr, angle_step, k_ptr, v_ptr, z_ptr, lse_ptr, n, m, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    S_PAD: tl.constexpr, T_PAD: tl.constexpr, V_PAD: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
    CAUSAL: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all of its sources."""
    b, h = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    t, v = tl.arange(0, T_PAD), tl.arange(0, V_PAD)
    group = b * GROUPS + h // (HEADS // GROUPS)
    q = queries_of(
        p_ptr, core_ptr, turned_ptr, cos_ptr, sin_ptr, angle_step, b, h, rows, n, HEADS, S, T, S_PAD, T_PAD, MIX, ROTARY
    )  # fmt: skip
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    z = tl.zeros((QUERIES, V_PAD), tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tl.program_id(0) + 1) * QUERIES + (m - n))
    for start in range(0, end, SOURCES):
        columns = start + tl.arange(0, SOURCES)
        logits = logits_of(q, load_tile(k_ptr + group * m * T, columns, m, t, T), rows, columns, n, m, scale, CAUSAL)
        new = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        shrink = tl.exp2(largest - new)  # what was summed so far had an older maximum
        total = total * shrink + tl.sum(weights, 1)
        values = load_tile(v_ptr + group * m * V, columns, m, v, V)
        z = z * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        largest = new
    inside = rows < n
    tl.store(lse_ptr + (b * HEADS + h) * n + rows, largest + tl.log2(total), mask=inside)
    z_at = z_ptr + (b * HEADS + h) * n * V + rows[:, None] * V + v[None, :]
    tl.store(z_at, (z / total[:, None]).to(z_ptr.dtype.element_ty), mask=inside[:, None] & (v[None, :] < V))


@triton.jit
def delta_kernel(z_ptr, dz_ptr, delta_ptr, count, V: tl.constexpr, V_PAD: tl.constexpr, QUERIES: tl.constexpr):
    """delta = sum_v z dz per query and head: the part of the softmax's gradient that all sources share."""
    rows, v = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, V_PAD)
    z, dz = load_tile(z_ptr, rows, count, v, V), load_tile(dz_ptr, rows, count, v, V)
    tl.store(delta_ptr + rows, tl.sum(z.to(tl.float32) * dz.to(tl.float32), 1), mask=rows < count)


@triton.jit
def sources_backward_kernel(
    p_ptr, core_ptr, turned_ptr, cos_ptr, sin_ptr, angle_step, k_ptr, v_ptr, dz_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, n, m, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    S_PAD: tl.constexpr, T_PAD: tl.constexpr, V_PAD: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
    CAUSAL: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of sources: the sum over all queries of the group's heads, PARTS programs sharing the heads."""
    share: tl.constexpr = HEADS // GROUPS // PARTS  # heads of this program
    first = tl.program_id(1) * share  # counted over batch, group and part
    b = first // HEADS
    group = b * GROUPS + (first % HEADS) // (HEADS // GROUPS)
    columns = tl.program_id(0) * SOURCES + tl.arange(0, SOURCES)
    t, v = tl.arange(0, T_PAD), tl.arange(0, V_PAD)
    k, values = load_tile(k_ptr + group * m * T, columns, m, t, T), load_tile(v_ptr + group * m * V, columns, m, v, V)
    dk, dv = tl.zeros((SOURCES, T_PAD), tl.float32), tl.zeros((SOURCES, V_PAD), tl.float32)
    begin = 0
    if CAUSAL:  # earlier queries do not see these sources
        begin = tl.maximum(0, tl.program_id(0) * SOURCES - (m - n)) // QUERIES * QUERIES
    for head in range(share):
        h = first % HEADS + head
        for start in range(begin, n, QUERIES):
            rows = start + tl.arange(0, QUERIES)
            at = (b * HEADS + h) * n + rows
            q = queries_of(
                p_ptr, core_ptr, turned_ptr, cos_ptr, sin_ptr, angle_step, b, h, rows, n, HEADS, S, T, S_PAD, T_PAD, MIX, ROTARY
            )  # fmt: skip
            lse = tl.load(lse_ptr + at, mask=rows < n, other=float("inf"))  # rows beyond the end weigh nothing
            delta = tl.load(delta_ptr + at, mask=rows < n, other=0.0)
            weights = tl.exp2(logits_of(q, k, rows, columns, n, m, scale, CAUSAL) - lse[:, None])
            dz = load_tile(dz_ptr + (b * HEADS + h) * n * V, rows, n, v, V)
            dv += tl.dot(tl.trans(weights.to(dz.dtype)), dz, input_precision="ieee")
            dlogits = weights * (tl.dot(dz, tl.trans(values), input_precision="ieee") - delta[:, None])
            dk += tl.dot(tl.trans(dlogits.to(q.dtype)), q, input_precision="ieee")
    inside = columns[:, None] < m
    tl.atomic_add(dk_ptr + group * m * T + columns[:, None] * T + t[None, :], dk * scale, mask=inside & (t[None, :] < T))
    tl.atomic_add(dv_ptr + group * m * V + columns[:, None] * V + v[None, :], dv, mask=inside & (v[None, :] < V))


@triton.jit
def queries_backward_kernel(
    p_ptr, core_ptr, turned_ptr, cos_ptr, sin_ptr, angle_step, k_ptr, v_ptr, dz_ptr, lse_ptr, delta_ptr, dp_ptr, dcore_ptr, dturned_ptr,
    n, m, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    S_PAD: tl.constexpr, T_PAD: tl.constexpr, V_PAD: tl.constexpr, QUERIES: tl.constexpr, SOURCES: tl.constexpr,
    CAUSAL: tl.constexpr, MIX: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """dQ_h of one tile of queries, and from it on chip this head's part of dP = sum_h dQ_h T_h^T, and of dT_h = P^T dQ_h."""
    b, h = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    t, v = tl.arange(0, T_PAD), tl.arange(0, V_PAD)
    group = b * GROUPS + h // (HEADS // GROUPS)
    at = (b * HEADS + h) * n + rows
    q = queries_of(
        p_ptr, core_ptr, turned_ptr, cos_ptr, sin_ptr, angle_step, b, h, rows, n, HEADS, S, T, S_PAD, T_PAD, MIX, ROTARY
    )  # fmt: skip
    dz = load_tile(dz_ptr + (b * HEADS + h) * n * V, rows, n, v, V)
    lse = tl.load(lse_ptr + at, mask=rows < n, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=rows < n, other=0.0)
    dq = tl.zeros((QUERIES, T_PAD), tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tl.program_id(0) + 1) * QUERIES + (m - n))
    for start in range(0, end, SOURCES):
        columns = start + tl.arange(0, SOURCES)
        k = load_tile(k_ptr + group * m * T, columns, m, t, T)
        values = load_tile(v_ptr + group * m * V, columns, m, v, V)
        weights = tl.exp2(logits_of(q, k, rows, columns, n, m, scale, CAUSAL) - lse[:, None])
        dlogits = weights * (tl.dot(dz, tl.trans(values), input_precision="ieee") - delta[:, None])
        dq += tl.dot(dlogits.to(k.dtype), k, input_precision="ieee")
    dq = dq * scale
    inside = rows[:, None] < n
    if MIX:
        s = tl.arange(0, S_PAD)
        p = load_tile(p_ptr + b * n * S, rows, n, s, S)
        core_at = h * S * T + s[:, None] * T + t[None, :]
        in_core = (s[:, None] < S) & (t[None, :] < T)
        plain = dq
        dp = tl.zeros((QUERIES, S_PAD), tl.float32)
        if ROTARY:
            plain = dq * load_tile(cos_ptr + b * angle_step, rows, n, t, T)
            dturned = (dq * load_tile(sin_ptr + b * angle_step, rows, n, t, T)).to(p.dtype)
            turned = load_tile(turned_ptr + h * S * T, s, S, t, T)
            dp += tl.dot(dturned, tl.trans(turned), input_precision="ieee")
            tl.atomic_add(dturned_ptr + core_at, tl.dot(tl.trans(p), dturned, input_precision="ieee"), mask=in_core)
        dplain = plain.to(p.dtype)
        core = load_tile(core_ptr + h * S * T, s, S, t, T)
        dp += tl.dot(dplain, tl.trans(core), input_precision="ieee")
        tl.atomic_add(dcore_ptr + core_at, tl.dot(tl.trans(p), dplain, input_precision="ieee"), mask=in_core)
        tl.atomic_add(dp_ptr + b * n * S + rows[:, None] * S + s[None, :], dp, mask=inside & (s[None, :] < S))
    else:
        dq_at = dp_ptr + (b * HEADS + h) * n * T + rows[:, None] * T + t[None, :]
        tl.store(dq_at, dq.to(dp_ptr.dtype.element_ty), mask=inside & (t[None, :] < T))


class FlashAttention(torch.autograd.Function):
    """The kernels as one differentiable function of p, core, turned, k and v; cos, sin are constants."""

    @staticmethod
    def forward(ctx, p, core, turned, cos, sin, k, v, heads: int, scale: float, causal: bool):
        mix, (b, g, m, t), n = core is not None, k.shape, p.shape[-2]
        p, k, v = p.contiguous(), k.contiguous(), v.contiguous()
        core, turned = (x if x is None else x.contiguous() for x in (core, turned))
        z = p.new_empty(b, heads, n, v.shape[3])
        lse = torch.empty(b, heads, n, dtype=torch.float32, device=p.device)
        sizes = tile_sizes(heads, g, p.shape[-1], t, v.shape[3], causal, mix, turned is not None)
        angles = (cos, sin, 0 if cos is None or cos.ndim == 2 else n * t)
        grid = (triton.cdiv(n, sizes["QUERIES"]), b * heads)
        forward_kernel[grid](p, core, turned, *angles, k, v, z, lse, n, m, scale, **sizes)
        ctx.save_for_backward(p, core, turned, cos, sin, k, v, z, lse)
        ctx.angle_step, ctx.scale, ctx.sizes = angles[2], scale, sizes
        return z

    @staticmethod
    def backward(ctx, dz):
        p, core, turned, cos, sin, k, v, z, lse = ctx.saved_tensors
        (b, heads, n, width), m, sizes = z.shape, k.shape[2], ctx.sizes
        dz, delta = dz.contiguous(), torch.empty_like(lse)
        rows = b * heads * n
        grid = (triton.cdiv(rows, sizes["QUERIES"]),)
        delta_kernel[grid](z, dz, delta, rows, V=width, V_PAD=sizes["V_PAD"], QUERIES=sizes["QUERIES"])
        inputs = (p, core, turned, cos, sin, ctx.angle_step, k, v, dz, lse, delta)

        def sums(x):  # added up by many programs, hence in float32
            return None if x is None else torch.zeros_like(x, dtype=torch.float32)

        dk, dv = sums(k), sums(v)
        parts = next(parts for parts in (4, 2, 1) if heads // k.shape[1] % parts == 0)
        grid = (triton.cdiv(m, sizes["SOURCES"]), b * k.shape[1] * parts)
        sources_backward_kernel[grid](*inputs, dk, dv, n, m, ctx.scale, PARTS=parts, **sizes)
        dp, dcore, dturned = (torch.empty_like(p) if core is None else sums(p)), sums(core), sums(turned)
        grid = (triton.cdiv(n, sizes["QUERIES"]), b * heads)
        queries_backward_kernel[grid](*inputs, dp, dcore, dturned, n, m, ctx.scale, **sizes)
        dp, dcore, dturned, dk, dv = (x if x is None else x.to(p.dtype) for x in (dp, dcore, dturned, dk, dv))
        return dp, dcore, dturned, None, None, dk, dv, None, None, None


def tile_sizes(heads: int, groups: int, s: int, t: int, v: int, causal: bool, mix: bool, rotary: bool) -> dict:
    """Compile-time constants of one call: widths, their powers of two (at least 16, as the tensor cores need), tiles, flags."""

    def pad(width: int) -> int:
        return max(16, triton.next_power_of_2(width))

    tile = 16 if interpreted() else 64
    return dict(
        HEADS=heads, GROUPS=groups, S=s, T=t, V=v, S_PAD=pad(s), T_PAD=pad(t), V_PAD=pad(v),
        QUERIES=tile, SOURCES=tile, CAUSAL=causal, MIX=mix, ROTARY=rotary,
    )  # fmt: skip


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1) instead of compiling them for a GPU."""
    return triton.knobs.runtime.interpret


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool) -> torch.Tensor:
    """softmax(Q K^T scale) V for ready queries: q (b, h, n, k), k (b, g, m, k), v (b, g, m, v).  Returns: (b, h, n, v)."""
    check_device(q)
    return FlashAttention.apply(q, None, None, None, None, k, v, q.shape[1], scale, causal)


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
    check_device(p)
    turned = cos = sin = None
    if rotary is not None:
        angles = positions.unsqueeze(-1).to(torch.float64) * rotary.channel_frequencies  # ([b,] n, t)
        cos, sin = angles.cos().float(), angles.sin().float()
        turned = cores[..., rotary.partner] * rotary.sign.to(cores.dtype)
    return FlashAttention.apply(p, cores, turned, cos, sin, k, v, len(cores), scale, causal)


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
