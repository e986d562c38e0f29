"""Attention of a single query over a pool of blocks: chunks of slots side by side, then what belongs together is put together."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .tiles_triton import block_of, load_rows, refused

TILE = 16384  # bytes of a tile of keys
STAGES = 5  # two for keys and values, because a tile's blocks are asked for two steps before, and one at work
ROWS = 16  # query heads of a tile, the fewest that matrix units take
MERGED = 64  # chunks, and channels, of a tile of partial sums


def refusal(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pool_keys: Tensor, pool_values: Tensor, pool_positions: Tensor,
    table: Tensor, lengths: Tensor, owner: Tensor, first: Tensor, blocks: Tensor, merge: Tensor, shift: Tensor, chunk: int,
    scale: float | None, softcap: float | None = None, sinks: Tensor | None = None,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    if not isinstance(query.shape[2], int) or query.shape[2] != 1:
        return f"{query.shape[2]} queries of each head are not one"
    return refused(query, key, value, pool_keys, pool_values)


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pool_keys: Tensor, pool_values: Tensor, pool_positions: Tensor,
    table: Tensor, lengths: Tensor, owner: Tensor, first: Tensor, blocks: Tensor, merge: Tensor, shift: Tensor, chunk: int,
    scale: float | None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch two kernels: each chunk is attended to, and each query head puts its chunks and the new token together.

    More than 16 query heads of a KV head take turns of 16, which find the chunk in the L2 cache.

    The second one takes chunks in the order of `merge`, so that the answer is the same each time. Programs of chunks behind an
    extent's length end at once, and leave nothing that is read.
    Floor: (D + Dv) * itemsize bytes read per slot held. What chunks leave are 4 * G * (Dv + 2) bytes each, written and read once:
    6 % of that for 4 query heads and chunks of 128 slots in 16 bits, mostly within the L2 cache. The matrix unit's 16 rows make
    64 * D flops per slot of the 4 * G * D that are needed, hidden behind the bytes.
    """
    return launch(
        query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, owner, first, blocks, merge, shift, chunk,
        scale, softcap, sinks,
    )  # fmt: skip


def launch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pool_keys: Tensor, pool_values: Tensor, pool_positions: Tensor,
    table: Tensor, lengths: Tensor, owner: Tensor, first: Tensor, blocks: Tensor, merge: Tensor, shift: Tensor, chunk: int,
    scale: float | None, softcap: float | None, sinks: Tensor | None, logit: Tensor | None = None, of_all: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch the two kernels, which leave more where there is room for it.

    In `logit`, [n, G, chunk] float32, the logit of each slot that an extent holds. In `of_all`, [3, B * Hq] float32, of each query
    head what to subtract from a logit, and what to divide its exponential by, for a probability; and that of the new token.
    """
    (batch, asking, _, dim), heads, width, block = query.shape, key.shape[1], value.shape[3], pool_keys.shape[1]
    group, chunks = asking // heads, owner.shape[0]
    block_d, block_v = block_of(dim), block_of(width)
    # Tiles have as many bytes whatever the channels and their type: two of them, a whole chunk of 128 slots of 128 channels, are
    # in flight at once, and 70 kB a program let three of them share a processor.
    block_s = min(max(16, TILE // (max(block_d, block_v) * pool_keys.element_size())), 128, block_of(chunk))
    warps = 4 if mask is None and pool_keys.element_size() == 2 else 8  # products in parts, and masks, take more registers
    lengths, owner, first, blocks, merge, shift = (x.contiguous() for x in (lengths, owner, first, blocks, merge, shift))
    sinks = sinks if sinks is None else sinks.contiguous()
    top, total = (query.new_empty((chunks, group), dtype=torch.float32) for _ in range(2))
    part = query.new_empty((chunks, group, width), dtype=torch.float32)

    seen, stride_mask, mask_options = _mask_of(mask, asking, heads)
    logits = (dim**-0.5 if scale is None else scale, 1.0 if softcap is None else softcap)
    options = {"CAPPED": softcap is not None, "HEADS": heads, "GROUP": group, "CHUNK": chunk, "TOLD": of_all is not None}
    options |= mask_options
    strides = query.stride(0), query.stride(1), query.stride(3)
    shares = triton.cdiv(group, ROWS)
    wrap_triton(_chunk_kernel)[(chunks * shares,)](
        query, pool_keys, pool_values, pool_positions, mask, lengths, owner, first, blocks, shift, top, total, part, logit,
        *strides, *pool_keys.stride(), *pool_values.stride(), *pool_positions.stride(), *stride_mask, seen, *logits,
        SLOTS=block, DIM=dim, WIDTH=width, SHARES=shares, BLOCK_G=ROWS, BLOCK_S=block_s, BLOCK_D=block_d, BLOCK_V=block_v,
        num_warps=warps, num_stages=STAGES, **options,
    )  # fmt: skip

    out = query.new_empty((batch, asking, 1, width))
    block_v = min(block_v, MERGED)
    tiles = triton.cdiv(width, block_v)
    wrap_triton(_merge_kernel)[(batch * asking * tiles,)](
        query, key, value, mask, sinks, lengths, merge, top, total, part, out, of_all,
        *strides, key.stride(0), key.stride(1), key.stride(3), value.stride(0), value.stride(1), value.stride(3),
        *stride_mask, seen, *logits, merge.shape[2],
        SINKS=sinks is not None, DIM=dim, WIDTH=width, TILES=tiles, BLOCK_C=MERGED, BLOCK_D=block_d, BLOCK_V=block_v,
        num_warps=4, **options,
    )  # fmt: skip
    return out


def _mask_of(mask, asking, heads):
    """Columns of a mask, its strides by row, KV head, head of a group and column, and what kernels are compiled for."""
    if mask is None:
        return 0, (0, 0, 0, 0), {"MASKED": False, "COLUMNS": False, "EACH": False}
    rows, given, _, columns = mask.shape
    alone = isinstance(columns, int) and columns == 1
    stride = (
        0 if isinstance(rows, int) and rows == 1 else mask.stride(0),
        0 if given == 1 else given // heads * mask.stride(1),
        mask.stride(1) if given == asking else 0,
        0 if alone else mask.stride(3),
    )
    return columns, stride, {"MASKED": True, "COLUMNS": not alone, "EACH": given == asking and given > heads}


@triton.jit
def _tanh(x):
    """The hyperbolic tangent, as exact for small numbers as for large ones."""
    fade = tl.exp(-2 * tl.abs(x))
    far = (1 - fade) / (1 + fade)
    square = x * x
    near = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(products, mask_at, live, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Products of queries and keys become logits: scale, cap and mask; -inf where nothing is there to be seen."""
    logits = products * scale
    if CAPPED:
        logits = _tanh(logits / softcap) * softcap
    if MASKED:
        seen = tl.load(mask_at, mask=live, other=0)
        logits = tl.where(seen, logits, -float("inf")) if seen.dtype == tl.int1 else logits + seen.to(tl.float32)
    return tl.where(live, logits, -float("inf"))


@triton.jit
def _dot(left, right):
    """Products of 16-bit numbers as they are, of others nearly as exact as float32 has them; sums in float32."""
    if left.dtype == right.dtype and left.dtype != tl.float32:
        return tl.dot(left, right)
    return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="tf32x3")


@triton.jit
def _weighed(weights, values):
    """Sums of values by float32 weights; each weight is two numbers of 16 bits where values have so few."""
    high = weights.to(values.dtype)
    sums = _dot(high, values)
    if values.dtype != tl.float32:
        sums += _dot((weights - high.to(tl.float32)).to(values.dtype), values)
    return sums


@triton.jit
def _above(top):
    """What to subtract before the exponential: the maximum, if there is one."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _chunk_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, mask_ptr, length_ptr, owner_ptr, first_ptr, block_ptr, shift_ptr,
    top_ptr, total_ptr, part_ptr, logit_ptr,
    stride_qb, stride_qh, stride_qd, stride_kn, stride_kp, stride_kd, stride_vn, stride_vp, stride_vd, stride_pn, stride_pp,
    stride_mb, stride_mh, stride_mg, stride_mt, columns, scale, softcap,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    TOLD: tl.constexpr, SHARES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // SHARES).to(tl.int64)
    extent = tl.load(owner_ptr + number).to(tl.int64)
    held = tl.minimum(tl.load(length_ptr + extent) - tl.load(first_ptr + number), CHUNK).to(tl.int32)
    if held <= 0:
        return
    row, head = extent // HEADS, extent % HEADS
    one = tl.program_id(0) % SHARES * BLOCK_G + tl.arange(0, BLOCK_G)
    asks = load_rows(
        query_ptr + row * stride_qb + head * GROUP * stride_qh, one, one < GROUP, stride_qh, stride_qd, DIM, BLOCK_D
    )  # fmt: skip
    if MASKED:
        mask_ptr += row * stride_mb + head * stride_mh
        shift = tl.load(shift_ptr + row)
    block_ptr += number * (CHUNK // SLOTS)
    top = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    part = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    for start in range(0, held, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        live = slot < held
        block = tl.load(block_ptr + slot // SLOTS, mask=live, other=0).to(tl.int64)
        keys = _slots(key_ptr, block, slot % SLOTS, live, stride_kn, stride_kp, stride_kd, DIM, BLOCK_D)
        values = _slots(value_ptr, block, slot % SLOTS, live, stride_vn, stride_vp, stride_vd, WIDTH, BLOCK_V)
        mask_at = mask_ptr
        if MASKED:
            column = tl.zeros((BLOCK_S,), tl.int64)
            if COLUMNS:
                position = tl.load(position_ptr + block * stride_pn + slot % SLOTS * stride_pp, mask=live, other=0)
                column = tl.minimum(tl.maximum(position + shift, 0), columns - 2)
            mask_at = mask_ptr + column[None] * stride_mt
            if EACH:
                mask_at += tl.minimum(one, GROUP - 1)[:, None] * stride_mg
        logits = _logits(_dot(asks, tl.trans(keys)), mask_at, live[None], scale, softcap, CAPPED, MASKED)
        if TOLD:
            at = (number * GROUP + one)[:, None] * CHUNK + slot[None]
            tl.store(logit_ptr + at, logits, mask=(one < GROUP)[:, None] & live[None])
        higher = tl.maximum(top, tl.max(logits, 1))
        fade = tl.exp(top - _above(higher))
        weights = tl.exp(logits - _above(higher)[:, None])
        total = total * fade + tl.sum(weights, 1)
        part = part * fade[:, None] + _weighed(weights, values)
        top = higher
    at = number * GROUP + one
    tl.store(top_ptr + at, top, mask=one < GROUP)
    tl.store(total_ptr + at, total, mask=one < GROUP)
    channel = tl.arange(0, BLOCK_V)
    tl.store(part_ptr + at[:, None] * WIDTH + channel[None], part, mask=(one < GROUP)[:, None] & (channel < WIDTH)[None])


@triton.jit
def _slots(base, block, place, live, stride_n, stride_p, stride_d, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Slots of a pool, [len(block), BLOCK]; what is not live may be NaN and is not read."""
    column = tl.arange(0, BLOCK)
    offset = (block * stride_n + place * stride_p)[:, None] + column[None] * stride_d
    return tl.load(base + offset, mask=live[:, None] & (column < COLUMNS)[None], other=0.0)


@triton.jit
def _merge_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, sink_ptr, length_ptr, merge_ptr, top_ptr, total_ptr, part_ptr, out_ptr, all_ptr,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kd, stride_vb, stride_vh, stride_vd,
    stride_mb, stride_mh, stride_mg, stride_mt, columns, scale, softcap, depth,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr, SINKS: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, TOLD: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // TILES).to(tl.int64)  # of a row and query head
    extent, one = number // GROUP, number % GROUP
    row, head = extent // HEADS, extent % HEADS
    column = tl.arange(0, BLOCK_D)
    ask = tl.load(
        query_ptr + row * stride_qb + (head * GROUP + one) * stride_qh + column * stride_qd, mask=column < DIM, other=0.0
    )  # fmt: skip
    new = tl.load(key_ptr + row * stride_kb + head * stride_kh + column * stride_kd, mask=column < DIM, other=0.0)
    channel = tl.program_id(0) % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    kept = channel < WIDTH
    value = tl.load(value_ptr + row * stride_vb + head * stride_vh + channel * stride_vd, mask=kept, other=0.0)

    # The new token and the sink come first, so that what follows has something to be added to.
    product = tl.sum(ask.to(tl.float32) * new.to(tl.float32), 0)
    if MASKED:
        mask_ptr += row * stride_mb + head * stride_mh + one * stride_mg
    if COLUMNS:
        mask_ptr += tl.cast(columns - 1, tl.int64) * stride_mt
    logit = _logits(product, mask_ptr, True, scale, softcap, CAPPED, MASKED)
    top = logit
    norm = tl.exp(top - _above(top))
    out = norm * value.to(tl.float32)
    if SINKS:
        sink = tl.load(sink_ptr + head * GROUP + one).to(tl.float32)
        higher = tl.maximum(top, sink)
        fade = tl.exp(top - _above(higher))
        norm, out, top = norm * fade + tl.exp(sink - _above(higher)), out * fade, higher

    chunks = tl.minimum(tl.cdiv(tl.load(length_ptr + extent), CHUNK).to(tl.int32), depth)
    for start in range(0, chunks, BLOCK_C):
        place = start + tl.arange(0, BLOCK_C)
        which = tl.load(merge_ptr + extent * depth + place, mask=place < chunks, other=-1).to(tl.int64)
        at, alive = which * GROUP + one, which >= 0
        tops = tl.load(top_ptr + at, mask=alive, other=-float("inf"))
        totals = tl.load(total_ptr + at, mask=alive, other=0.0)
        parts = tl.load(part_ptr + at[:, None] * WIDTH + channel[None], mask=alive[:, None] & kept[None], other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        fade, shares = tl.exp(top - _above(higher)), tl.exp(tops - _above(higher))
        norm = norm * fade + tl.sum(shares * totals, 0)
        out = out * fade + tl.sum(shares[:, None] * parts, 0)
        top = higher
    norm = tl.where(norm > 0, norm, 1.0)
    out = out / norm
    if TOLD:  # each tile the same
        count = tl.num_programs(0) // TILES
        tl.store(all_ptr + number, _above(top))
        tl.store(all_ptr + count + number, norm)
        tl.store(all_ptr + 2 * count + number, tl.exp(logit - _above(top)) / norm)
    tl.store(out_ptr + number * WIDTH + channel, out.to(out_ptr.dtype.element_ty), mask=kept)
