"""Rung 14. One new token against the cache: the sources are split over many programs, and their parts put together (Triton).

While a model writes, attention has one query per head and reads the whole cache for it: memory bandwidth is all that counts. With
one program per sequence most of a GPU would idle, so each sequence's sources are cut into parts (Dao et al. 2023, "Flash-Decoding").
All heads that share a key sit in one tile of queries: in Tucker Attention these are all heads, and the cache is read once.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from .latent_attention import check_device, grid_of, interpreted, load_tile, pad, tile_at, within


@dataclasses.dataclass(frozen=True)
class Known:
    """What `part_kernel` knows at compile time, all of it written down here: Triton tells compiled kernels apart by these values."""

    HEADS: int  # of a group
    T: int  # widths: of a key and a query,
    V: int  # and a value
    HEADS_PAD: int  # the powers of two that a tile needs
    T_PAD: int
    V_PAD: int
    MASKED: bool
    GROUPS: int  # of a sequence, which share its mask


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, z_ptr, lse_ptr, k_step, v_step, mask_step, m, part, scale,
    known: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """The softmax over one part of the sources: z and the logarithm (base 2) of its sum, for all heads of a group.

    Where the mask hides all of them, z is zero and the logarithm minus infinity.
    """
    HEADS_PAD: tl.constexpr = known.HEADS_PAD
    V_PAD: tl.constexpr = known.V_PAD
    group, number = tl.program_id(0).to(tl.int64), tl.program_id(1)  # caches may hold more than 2^31 numbers
    heads, t, v = tl.arange(0, HEADS_PAD), tl.arange(0, known.T_PAD), tl.arange(0, V_PAD)
    q = load_tile(q_ptr + group * known.HEADS * known.T, heads, known.HEADS, known.T, t, known.T)
    largest = tl.full((HEADS_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_PAD,), tl.float32)
    z = tl.zeros((HEADS_PAD, V_PAD), tl.float32)
    end = tl.minimum(m, (number + 1) * part)
    for start in range(number * part, end, SOURCES):
        columns = start + tl.arange(0, SOURCES)
        k = load_tile(k_ptr + group * k_step, columns, end, known.T, t, known.T)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        seen = columns < end
        if known.MASKED:
            seen = tl.load(mask_ptr + group // known.GROUPS * mask_step + columns, mask=seen, other=0) != 0
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        base = new
        if known.MASKED:  # while all is hidden, weights are zero, not NaN
            base = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp2(logits - base[:, None]), tl.exp2(largest - base)
        values = load_tile(v_ptr + group * v_step, columns, end, known.V, v, known.V)
        total = total * shrink + tl.sum(weights, 1)
        z = z * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        largest = new
    if known.MASKED:
        total = tl.where(total > 0, total, 1.0)  # where all is hidden: a sum without terms, whose largest is minus infinity
    first = (group * tl.num_programs(1) + number) * known.HEADS
    tl.store(lse_ptr + first + heads, largest + tl.log2(total), mask=heads < known.HEADS)
    z_at = tile_at(z_ptr + first * known.V, heads, known.V, v)
    tl.store(z_at, z / total[:, None], mask=within(heads, known.HEADS, v, known.V))


@triton.jit
def join_kernel(
    z_ptr, lse_ptr, out_ptr, parts,
    HEADS: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, PARTS_PAD: tl.constexpr,
):  # fmt: skip
    """WIDTH channels of one head's parts, weighed by their sums."""
    at = tl.program_id(0).to(tl.int64)  # of all groups' heads
    number, v = tl.arange(0, PARTS_PAD), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    rows = (at // HEADS * parts + number) * HEADS + at % HEADS
    lse = tl.load(lse_ptr + rows, mask=number < parts, other=float("-inf"))
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))  # all zero where all is hidden
    total = tl.sum(weights, 0)
    z = tl.load(tile_at(z_ptr, rows, V, v), mask=within(number, parts, v, V), other=0.0)
    joined = tl.sum(z * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + at * V + v, joined.to(out_ptr.dtype.element_ty), mask=v < V)


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(Q K^T * scale) V for one query per head, without a gradient (Dao et al. 2023, "Flash-Decoding").

    Args:
        q: Queries, (b, h, 1, k).
        k: Keys, (b, g, m, k), where g divides h; it may be a view of a longer cache, and is not copied then.
        v: Values, (b, g, m, v); as the keys.
        scale: Multiplies the logits.
        mask: Boolean, True where the query may look, broadcastable to (b, 1, 1, m).

    Returns:
        The values, weighed and summed, (b, h, 1, v); zeros where nothing may be looked at.

    Raises:
        ValueError: Triton cannot run where the tensors are, or not so many programs at once.
    """
    return decode(q, k, v, scale, mask)


@torch.library.custom_op("tucker_ref::decode", mutates_args=())
def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    check_device(q)
    (b, h, _, t), (_, g, m, width) = q.shape, v.shape
    columns = min(32, pad(width))  # of one program that joins: few, so that few heads too occupy the GPU
    join_grid = grid_of(b * h, triton.cdiv(width, columns))
    k, v = (x if _is_rows(x) else x.contiguous() for x in (k, v))
    q, heads = q.contiguous(), h // g
    tiles = tiling(max(t, width), q.element_size())
    tile_bytes = tiles["SOURCES"] * (t + width) * q.element_size() * tiles.get("num_stages", 1)
    parts = max(1, min(triton.cdiv(m, tiles["SOURCES"]), programs_at_once(tile_bytes, q.device) // (b * g), 256))
    part = triton.cdiv(triton.cdiv(m, parts), tiles["SOURCES"]) * tiles["SOURCES"]
    parts = triton.cdiv(m, part)  # none is empty
    z = torch.empty(b * g, parts, heads, width, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * g, parts, heads, dtype=torch.float32, device=q.device)
    out = q.new_empty(b, h, 1, width)
    masked = mask is not None
    known = Known(HEADS=heads, T=t, V=width, HEADS_PAD=pad(heads), T_PAD=pad(t), V_PAD=pad(width), MASKED=masked, GROUPS=g)
    rows = k if mask is None else mask.expand(*mask.shape[:-1], m).reshape(-1, m).view(torch.uint8)  # (b, m) or (1, m)
    step = m if masked and len(rows) > 1 else 0
    part_kernel[grid_of(b * g, parts)](q, k, v, rows, z, lse, _step(k), _step(v), step, m, part, scale, known, **tiles)
    join_kernel[join_grid](z, lse, out, parts, HEADS=heads, V=width, WIDTH=columns, PARTS_PAD=triton.next_power_of_2(parts))
    return out


@decode.register_fake
def _(q, k, v, scale, mask=None):
    return q.new_empty(*q.shape[:3], v.shape[3])


def tiling(width: int, itemsize: int) -> dict:
    """Sources of a tile, warps and pipeline stages, as measured on an H200: three tiles of keys and values under way."""
    if interpreted():
        return dict(SOURCES=16)
    return dict(SOURCES=128 if width * itemsize <= 256 else 32, num_warps=4, num_stages=3 if width * itemsize <= 512 else 1)


def programs_at_once(tile_bytes: int, device: torch.device) -> int:
    """How many programs run side by side, as far as their tiles of keys and values fit on chip."""
    if interpreted():
        return 6
    chip = torch.cuda.get_device_properties(device)
    return chip.multi_processor_count * max(1, chip.shared_memory_per_multiprocessor // tile_bytes)


def _is_rows(x: torch.Tensor) -> bool:
    """Whether a (b, g, m, width) view holds rows without gaps, at equal distances from group to group."""
    b, g, _, width = x.shape
    return x.stride(3) == 1 and x.stride(2) == width and (1 in (b, g) or x.stride(0) == g * x.stride(1))


def _step(x: torch.Tensor) -> int:
    """From one group to the next; where a sequence has but one, its stride says nothing, not even in a contiguous tensor."""
    return x.stride(0 if x.shape[1] == 1 else 1)
