"""The columns of a causal softmax whose rows are some last queries: no row is ever written.

The logits are computed again, transposed, and what the queries behind a key pay is added up for each key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .softmax_tiles_triton import LOG2_E, Asked, hold, product, row_of, tiles_of
from .tiles_triton import slots_of


def columns(asked: Asked, lse: Tensor, buffer: int, reduce: str, together: bool) -> Tensor:
    """Launch the kernel of columns: what each key receives from the queries of each head, [B, Hkv, G, S]; anything at padding.

    One program for a tile of keys and a query head; if `together`, for all heads of a group in turn, which few queries are worth.
    Long programs come first.
    Floor: as of the rows, with queries and keys exchanged.

    Args:
        asked: queries and keys.
        lse: log-sum-exp of each query, [B, Hq, window].
        buffer: how far behind a key the first query stands that counts, 2^24 at most.
        reduce: over queries: `sum`, `max` or `squares`.
        together: whether keys stay for all heads.
    """
    query, key = asked.query, asked.key
    batch, heads, tokens = query.shape[:3]
    held, streamed = tiles_of(query)
    if together:
        streamed = min(streamed, max(16, triton.next_power_of_2(asked.window)))
    power = 2 if reduce == "squares" else 1  # of an exponential: a factor on its exponent
    received = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    programs = batch * (key.shape[1] if together else heads)  # for each tile of keys
    wrap_triton(_columns_kernel)[(triton.cdiv(tokens, held) * programs,)](
        *asked.arguments(), lse, received, *lse.stride(), batch, asked.factor() * power,
        BUFFER=buffer, POWER=power, TOGETHER=together, LARGEST=reduce == "max",
        **asked.options(held, streamed, 2 if together else 3),
    )  # fmt: skip
    return received.unflatten(1, (key.shape[1], -1))


@triton.jit
def _received(
    column, key, key_base, key_offset, key_live, since, stride_kd, query_base, lse_base, slot_ptr, start, first, asking, factor,
    stride_qs, stride_qd, stride_ls,
    POWER: tl.constexpr, LARGEST: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, STREAMED: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What keys have received after another tile of queries, of those that stand at `since` or behind."""
    asks = start + tl.arange(0, STREAMED)
    live = asks < asking
    offset = slots_of(slot_ptr, first + asks, live, PADDED).to(tl.int64) * stride_qs
    total = tl.load(lse_base + asks.to(tl.int64) * stride_ls, mask=live, other=float("inf"))  # no query pays nothing
    logits = product(key, key_base, key_offset, key_live, stride_kd, query_base, offset, live, stride_qd, DIM, BLOCK_D)
    exponent = tl.fma(logits, factor, -(total * (POWER * LOG2_E))[None])
    if MASKED:
        exponent = tl.where(since[:, None] <= (first + asks)[None], exponent, float("-inf"))
    weights = tl.exp2(exponent)
    if LARGEST:
        return tl.maximum(column, tl.max(weights, 1))
    return column + tl.sum(weights, 1)


@triton.jit
def _columns_kernel(
    query_ptr, key_ptr, slot_ptr, length_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd, heads, tokens, window,
    lse_ptr, column_ptr, stride_lb, stride_lh, stride_ls, rows, factor,
    BUFFER: tl.constexpr, POWER: tl.constexpr, TOGETHER: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    programs = rows * heads if TOGETHER else rows * heads * GROUPS  # for one tile
    tile = tl.program_id(0) // programs
    head = (tl.program_id(0) % programs).to(tl.int64)  # the (first) query head, of all rows
    if TOGETHER:
        head *= GROUPS
    batch = head // (heads * GROUPS)
    length, asking, first = row_of(length_ptr, batch, tokens, window, PADDED)
    if PADDED:
        slot_ptr += batch * tokens

    rank = tile * HELD + tl.arange(0, HELD)
    live = rank < length
    slot = slots_of(slot_ptr, rank, live, PADDED)
    query_head = head % (heads * GROUPS)
    key_base = key_ptr + batch * stride_kb + query_head // GROUPS * stride_kh
    offset = slot.to(tl.int64) * stride_ks
    key = hold(key_base, offset, live, stride_kd, DIM, BLOCK_D)

    since = rank + BUFFER
    start = tl.maximum(tile * HELD + BUFFER - first, 0) // STREAMED * STREAMED  # no earlier query counts for one of the keys
    query_base = query_ptr + batch * stride_qb + query_head * stride_qh
    lse_base = lse_ptr + batch * stride_lb + query_head * stride_lh
    column_ptr += head * tokens + slot
    column = tl.zeros((HELD,), tl.float32)
    if TOGETHER:  # one loop, so that tiles of the next head are under way; a mask costs less than another loop
        # With a buffer one at least, though of no queries, so that also keys for which none counts are written.
        tiles = tl.cdiv(tl.maximum(asking - start, 1 if BUFFER > 0 else 0), STREAMED)
        for turn in range(tiles * GROUPS):
            group = (turn // tiles).to(tl.int64)
            column = _received(
                column, key, key_base, offset, live, since, stride_kd, query_base + group * stride_qh, lse_base + group * stride_lh,
                slot_ptr, start + turn % tiles * STREAMED, first, asking, factor, stride_qs, stride_qd, stride_ls,
                POWER, LARGEST, DIM, BLOCK_D, STREAMED, PADDED, MASKED=True,
            )  # fmt: skip
            is_last = turn % tiles == tiles - 1
            tl.store(column_ptr + group * tokens, column, mask=rank < tl.where(is_last, length, 0))
            column = tl.where(is_last, 0.0, column)
    else:
        seeing = tl.maximum(tile * HELD + HELD - 1 + BUFFER - first, 0)  # the first query that counts for all
        middle = tl.cdiv(seeing, STREAMED) * STREAMED
        for at in range(start, tl.minimum(middle, asking), STREAMED):
            column = _received(
                column, key, key_base, offset, live, since, stride_kd, query_base, lse_base, slot_ptr, at, first, asking, factor,
                stride_qs, stride_qd, stride_ls, POWER, LARGEST, DIM, BLOCK_D, STREAMED, PADDED, MASKED=True,
            )  # fmt: skip
        for at in range(middle, asking, STREAMED):
            column = _received(
                column, key, key_base, offset, live, since, stride_kd, query_base, lse_base, slot_ptr, at, first, asking, factor,
                stride_qs, stride_qd, stride_ls, POWER, LARGEST, DIM, BLOCK_D, STREAMED, PADDED, MASKED=False,
            )  # fmt: skip
        tl.store(column_ptr, column, mask=live)
