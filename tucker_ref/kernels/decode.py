"""Rung 14. One new token against the cache: the sources are split over many programs, and their parts put together (Triton).

While a model writes, attention has one query per head and reads the whole cache for it: memory bandwidth is all that counts. With
one program per sequence most of a GPU would idle, so each sequence's sources are cut into parts (Dao et al. 2023, "Flash-Decoding").
All heads that share a key sit in one tile of queries: in Tucker Attention these are all heads, and the cache is read once. Values
that are the first channels of their keys, as in multi-head latent attention, are read with them.

A second kernel joins the parts. The last program to end could not: a long sequence has a part on every multiprocessor, megabytes in
all, and one of them alone would need as long to read these as all together need for the cache. Nor need another kernel cost a start.
Its programs are launched while the first one runs, take places beside it, and wait there until it has ended and its results are in
memory (programmatic dependent launch, from Hopper on). Before Hopper the stream keeps them apart, and the result is the same.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from .latent_attention import check_device, grid_of, interpreted, load_tile, pad, tile_at, within


@dataclasses.dataclass(frozen=True)
class Known:
    """What `part_kernel` knows at compile time, all of it written down here: Triton tells compiled kernels apart by these values."""

    HEADS: int  # of a group
    GROUPS: int  # of a sequence, which share its mask
    T: int  # widths: of a key and a query,
    V: int  # a value,
    OWN: int  # and what of a key is no value: all of it, or its last channels where it begins with its value
    K_ROW: int  # from one token's key to the next one's
    V_ROW: int
    BLOCKS: int  # of heads, each with a program of its own where they are too many for one
    HEADS_PAD: int  # heads of a block. These are the powers of two that a tile needs
    V_PAD: int
    OWN_PAD: int
    MASKED: bool
    EARLY: bool  # the next kernel may be launched already


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, z_ptr, lse_ptr, k_sequence, k_group, v_sequence, v_group, mask_sequence, m, part, scale,
    known: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """The softmax over one part of the sources: z and the logarithm (base 2) of its sum, for all heads of a group.

    Where the mask hides all of them, z is zero and the logarithm minus infinity. k_sequence, k_group: from one to the next in memory.
    """
    if known.EARLY:  # once all programs of this kernel have begun, those that join take places that are left
        tl.extra.cuda.gdc_launch_dependents()
    HEADS_PAD: tl.constexpr = known.HEADS_PAD
    V_PAD: tl.constexpr = known.V_PAD
    group, number = (tl.program_id(0) // known.BLOCKS).to(tl.int64), tl.program_id(1)  # caches may hold more than 2^31 numbers
    b, g = group // known.GROUPS, group % known.GROUPS
    heads = tl.program_id(0) % known.BLOCKS * HEADS_PAD + tl.arange(0, HEADS_PAD)
    own, v = tl.arange(0, known.OWN_PAD), tl.arange(0, V_PAD)
    k_at, v_at = k_ptr + b * k_sequence + g * k_group + (known.T - known.OWN), v_ptr + b * v_sequence + g * v_group
    q_at = q_ptr + group * known.HEADS * known.T
    q_own = load_tile(q_at + (known.T - known.OWN), heads, known.HEADS, known.T, own, known.OWN)  # (heads, own)
    if known.OWN < known.T:
        q_shared = load_tile(q_at, heads, known.HEADS, known.T, v, known.V)  # (heads, v)
    largest = tl.full((HEADS_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_PAD,), tl.float32)
    z = tl.zeros((HEADS_PAD, V_PAD), tl.float32)
    end = tl.minimum(m, (number + 1) * part)
    for start in range(number * part, end, SOURCES):
        columns = start + tl.arange(0, SOURCES)
        logits = tl.zeros((HEADS_PAD, SOURCES), tl.float32)
        if known.OWN > 0:
            k = load_tile(k_at, columns, end, known.K_ROW, own, known.OWN)  # (sources, own)
            logits = tl.dot(q_own, tl.trans(k), logits, input_precision="ieee")  # (heads, sources)
        values = load_tile(v_at, columns, end, known.V_ROW, v, known.V)  # (sources, v)
        if known.OWN < known.T:
            logits = tl.dot(q_shared, tl.trans(values), logits, input_precision="ieee")
        logits = logits * (scale * 1.4426950408889634)  # in units of log 2, for exp2
        seen = columns < end
        if known.MASKED:
            seen = tl.load(mask_ptr + b * mask_sequence + columns, mask=seen, other=0) != 0
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        base = new
        if known.MASKED:  # while all is hidden, weights are zero, not NaN
            base = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp2(logits - base[:, None]), tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        z = z * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        largest = new
    if known.MASKED:
        total = tl.where(total > 0, total, 1.0)  # where all is hidden: a sum without terms, whose largest is minus infinity
    first = (group * tl.num_programs(1) + number) * known.HEADS
    tl.store(lse_ptr + first + heads, largest + tl.log2(total), mask=heads < known.HEADS)
    z_at = tile_at(z_ptr + first * known.V, heads, known.V, v)
    tl.store(z_at, (z / total[:, None]).to(z_ptr.dtype.element_ty), mask=within(heads, known.HEADS, v, known.V))


@triton.jit
def join_kernel(
    z_ptr, lse_ptr, out_ptr, parts,
    HEADS: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, PARTS_PAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """WIDTH channels of one head's parts, weighed by their sums."""
    at = tl.program_id(0).to(tl.int64)  # of all groups' heads
    number, v = tl.arange(0, PARTS_PAD), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    rows = (at // HEADS * parts + number) * HEADS + at % HEADS
    if EARLY:  # until all parts are in memory, for this program to see
        tl.extra.cuda.gdc_wait()
    lse = tl.load(lse_ptr + rows, mask=number < parts, other=float("-inf"))
    z = tl.load(tile_at(z_ptr, rows, V, v), mask=within(number, parts, v, V), other=0.0)  # (parts, width)
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))  # all zero where all is hidden
    total = tl.sum(weights, 0)
    joined = tl.sum(z * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + at * V + v, joined.to(out_ptr.dtype.element_ty), mask=v < V)


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(Q K^T * scale) V for one query per head, without a gradient (Dao et al. 2023, "Flash-Decoding").

    Args:
        q: Queries, (b, h, 1, k).
        k: Keys, (b, g, m, k), where g divides h; a view of a longer cache, or in another order, is not copied while each key lies
            in one piece.
        v: Values, (b, g, m, v); as the keys. Where they are a view of the keys' first channels, they are not read again.
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
    grid_of(b * h, 1)  # refuses what is too much before anything is copied
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    q, heads, own = q.contiguous(), h // g, t - width if _begin_with(k, v) else t
    row_bytes = (own + width) * q.element_size()  # of one source
    at_once = min(pad(heads), 64, max(16, 32768 // pad(width)))  # whose queries and sums fit into one program
    blocks = triton.cdiv(heads, at_once)
    tiles = tiling(row_bytes, (pad(own) + pad(width)) * q.element_size(), at_once, pad(width))
    slots = programs_at_once(tiles, row_bytes, q.device)
    parts, part = split(b * g * blocks, m, tiles["SOURCES"], slots)
    out, early = q.new_empty(b, h, 1, width), starts_early(q.device)
    # One part alone is the result.
    z = out if parts == 1 else torch.empty(b * g, parts, heads, width, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * g, parts, heads, dtype=torch.float32, device=q.device)
    known = Known(
        HEADS=heads, GROUPS=g, T=t, V=width, OWN=own, K_ROW=k.stride(2), V_ROW=v.stride(2),
        BLOCKS=blocks, HEADS_PAD=at_once, V_PAD=pad(width), OWN_PAD=pad(own), MASKED=mask is not None,
        EARLY=bool(early) and parts > 1,
    )  # fmt: skip
    rows = k if mask is None else mask.expand(*mask.shape[:-1], m).reshape(-1, m).view(torch.uint8)  # (b, m) or (1, m)
    steps = *k.stride()[:2], *v.stride()[:2], m if mask is not None and len(rows) > 1 else 0
    part_kernel[grid_of(b * g * blocks, parts)](q, k, v, rows, z, lse, *steps, m, part, scale, known, **tiles)
    if parts > 1:
        _join(z, lse, out, early)
    return out


@decode.register_fake
def _(q, k, v, scale, mask=None):
    return q.new_empty(*q.shape[:3], v.shape[3])


def _join(z: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, early: dict) -> None:
    """z: (groups, parts, heads, v), lse: (groups, parts, heads), out: as many heads in all, v each."""
    groups, parts, heads, width = z.shape
    padded = triton.next_power_of_2(parts)
    columns = min(pad(width), max(16, 4096 // padded))  # of one program: 4,096 numbers, enough to wait for together
    grid = grid_of(groups * heads, triton.cdiv(width, columns))
    join_kernel[grid](z, lse, out, parts, HEADS=heads, V=width, WIDTH=columns, PARTS_PAD=padded, EARLY=bool(early), **early)


def _begin_with(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the values are views of the first channels of their keys."""
    return k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and k.shape[3] >= v.shape[3]


@functools.lru_cache(maxsize=4096)
def split(groups: int, m: int, sources: int, slots: int) -> tuple[int, int]:
    """How to cut the sources of every group, so that all programs together end early.

    Programs run in rounds of at most `slots`. A round takes as long as one program: its tiles, and some time to begin and to end.
    Few parts leave slots empty, many parts begin and end often.

    Args:
        groups: of all sequences.
        m: sources of each.
        sources: of a tile.
        slots: programs that run side by side.

    Returns:
        Parts of a group, at most 256 and none of them empty; and the sources of each but the last, whole tiles.
    """
    tiles = triton.cdiv(m, sources)

    def time(parts: int) -> float:
        return triton.cdiv(groups * parts, slots) * (triton.cdiv(tiles, parts) + 1.0)  # in tiles

    each = triton.cdiv(tiles, min(range(1, min(tiles, 256) + 1), key=time))
    return triton.cdiv(tiles, each), each * sources


def tiling(row_bytes: int, on_chip: int, heads: int, width: int) -> dict:
    """Sources of a tile, warps and pipeline stages, as measured on an H200: two or three tiles of keys and values under way.

    Args:
        row_bytes: of the key and the value of one source.
        on_chip: the same where tiles are as wide as powers of two; they have to fit, with the queries beside them.
        heads: of a program.
        width: of its tile of values; of heads times these it sums up so many in registers.
    """
    if interpreted():
        return dict(SOURCES=16)
    warps = 4 if heads * width <= 8192 else 8
    if row_bytes <= 512:
        return dict(SOURCES=128, num_warps=warps, num_stages=4 if heads * width <= 1024 and on_chip <= 256 else 3)
    if row_bytes <= 1280:
        return dict(SOURCES=64 if heads <= 32 and on_chip <= 1280 else 32, num_warps=warps, num_stages=3)
    return dict(SOURCES=32, num_warps=warps, num_stages=1)


def programs_at_once(tiles: dict, row_bytes: int, device: torch.device) -> int:
    """How many programs run side by side, as far as their tiles fit on chip, and the registers of 8 warps that take all they may."""
    if interpreted():
        return 6
    chip = torch.cuda.get_device_properties(device)
    queries = 2**14  # bytes; they and the weights change their layout on chip
    held = max(1, tiles["num_stages"] - 1) * tiles["SOURCES"] * row_bytes + queries
    fit = chip.shared_memory_per_multiprocessor // held
    return chip.multi_processor_count * max(1, min(fit, 8 // tiles["num_warps"]))


def starts_early(device: torch.device) -> dict:
    """How to launch a kernel before the last one has ended; nothing where the device does not know how."""
    if interpreted() or torch.cuda.get_device_capability(device)[0] < 9:
        return {}
    return dict(launch_pdl=True)
