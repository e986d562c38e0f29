"""The log-sum-exp of each row of a causal softmax."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .softmax_tiles_triton import LN_2, Asked, hold, product, row_of, tiles_of
from .tiles_triton import slots_of

PIECE = 256  # keys of a piece of a row, where the queries are too few to occupy a chip; whole tiles


def log_sum_exp(asked: Asked, split: bool) -> Tensor:
    """Launch the kernel of rows: of each query, natural, [B, Hq, window] float32; anything where a row is shorter.

    One program for a tile of queries, all heads of a group among them, and all keys that these see; if `split`, for a piece of
    the keys, and torch puts the pieces together in order. Long programs come first.
    Floor: keys are read once for each tile of queries; 2 * D flops and an exponential for each query and key, which take an
    H100 the same time at D = 128.
    """
    query, key, window = asked.query, asked.key, asked.window
    batch, heads, tokens = query.shape[:3]
    held, streamed = tiles_of(query)
    if split:  # few queries: a tile need not be wider than all of them
        held = min(held, max(64, triton.next_power_of_2(window * asked.groups)))
    tiles = triton.cdiv(window * asked.groups, held)
    piece = PIECE if split else tokens
    # Two or more, though one may do: tracing specialises sizes of 1, and one graph shall serve all lengths.
    pieces = torch.sym_max(2, triton.cdiv(tokens, PIECE)) if split else 1
    part = query.new_empty((pieces, batch, heads, window), dtype=torch.float32)
    wrap_triton(_lse_kernel)[(tiles * pieces * batch * key.shape[1],)](
        *asked.arguments(), part, batch, tiles, piece, asked.factor(), **asked.options(held, streamed, 3)
    )
    return part.logsumexp(0) if split else part[0]


@triton.jit
def _more(
    largest, total, query, query_base, query_offset, query_live, query_rank, stride_qd, key_base, slot_ptr, start, end, factor,
    stride_ks, stride_kd,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, STREAMED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials after another tile of keys."""
    rank = start + tl.arange(0, STREAMED)
    live = rank < end
    offset = slots_of(slot_ptr, rank, live, PADDED).to(tl.int64) * stride_ks
    logits = product(query, query_base, query_offset, query_live, stride_qd, key_base, offset, live, stride_kd, DIM, BLOCK_D)
    if MASKED:
        logits = tl.where((rank[None] <= query_rank[:, None]) & live[None], logits, float("-inf"))
    larger = tl.maximum(largest, tl.max(logits, 1))
    exponent = tl.fma(logits, factor, -(larger * factor)[:, None])
    return larger, total * tl.exp2((largest - larger) * factor) + tl.sum(tl.exp2(exponent), 1)


@triton.jit
def _lse_kernel(
    query_ptr, key_ptr, slot_ptr, length_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd, heads, tokens, window,
    part_ptr, rows, tiles, piece, factor,
    GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % (rows * heads)).to(tl.int64)  # of all rows
    rest = tl.program_id(0) // (rows * heads)
    tile = tiles - 1 - rest % tiles
    batch = head // heads
    _, asking, first = row_of(length_ptr, batch, tokens, window, PADDED)
    if PADDED:
        slot_ptr += batch * tokens

    # A query's heads lie side by side in the tile: they see the same keys.
    place = tile * HELD + tl.arange(0, HELD)
    asks, group = place // GROUPS, place % GROUPS
    live = asks < asking
    slot = slots_of(slot_ptr, first + asks, live, PADDED).to(tl.int64)
    offset = slot * stride_qs + group.to(tl.int64) * stride_qh
    query_base = query_ptr + batch * stride_qb + head % heads * GROUPS * stride_qh
    query = hold(query_base, offset, live, stride_qd, DIM, BLOCK_D)

    start = rest // tiles * piece
    behind = first + tl.minimum((tile * HELD + HELD - 1) // GROUPS + 1, asking)  # keys that the last query sees
    end = tl.where(tile * HELD < asking * GROUPS, tl.minimum(start + piece, behind), start)
    seen = first + tile * HELD // GROUPS + 1  # keys that the first query sees, as do all
    middle = tl.minimum(start + tl.maximum(seen - start, 0) // STREAMED * STREAMED, tl.maximum(end, start))

    key_base = key_ptr + batch * stride_kb + head % heads * stride_kh
    largest = tl.full((HELD,), -1e30, tl.float32)  # finite, so that it may be subtracted where no key is seen
    total = tl.zeros((HELD,), tl.float32)
    for at in range(start, middle, STREAMED):
        largest, total = _more(
            largest, total, query, query_base, offset, live, first + asks, stride_qd, key_base, slot_ptr, at, end, factor,
            stride_ks, stride_kd, DIM, BLOCK_D, STREAMED, PADDED, MASKED=False,
        )  # fmt: skip
    for at in range(middle, end, STREAMED):
        largest, total = _more(
            largest, total, query, query_base, offset, live, first + asks, stride_qd, key_base, slot_ptr, at, end, factor,
            stride_ks, stride_kd, DIM, BLOCK_D, STREAMED, PADDED, MASKED=True,
        )  # fmt: skip
    # A piece may hold no key that a query sees.
    lse = tl.where(total > 0, (largest * factor + tl.log2(tl.maximum(total, 1e-30))) * LN_2, float("-inf"))
    row = (rest // tiles * rows * heads + head) * GROUPS + group
    tl.store(part_ptr + row * window + asks, lse, mask=live)
