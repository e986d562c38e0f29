"""The columns of a causal softmax whose rows are some last queries: no row is ever written.

Two kernels. One gives the log-sum-exp of each query's logits; the other computes the logits again, transposed, and adds up for
each key what the queries behind it pay. In both one tile of tokens stays on the chip while tiles of the others stream past it,
and only the tiles on the diagonal are masked.

Tokens go by their rank among a row's real ones, so that padding is not met at all; `slots` says where a rank stands.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import places, sources
from .tiles_triton import block_of, load_rows, refused

LOG2_E = math.log2(math.e)
PIECE = 256  # keys of a piece of a row, where the queries are too few to occupy a chip; whole tiles


class Asked(NamedTuple):
    """Some last queries of each row, and the keys that they see.

    Attributes:
        query, key: [B, Hq, S, D] and [B, Hkv, S, D].
        slots: of each row's tokens, real ones first, [B, S] int64; None without padding.
        lengths: of the rows, [B] int64; None without padding.
        window: how many queries ask; a row shorter than that asks with all of its own.
        scale: factor on the logits; None means 1/sqrt(D).
    """

    query: Tensor
    key: Tensor
    slots: Tensor | None
    lengths: Tensor | None
    window: int
    scale: float | None

    @property
    def groups(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    def arguments(self) -> tuple:
        """What both kernels take alike."""
        return (
            self.query, self.key, self.slots, self.lengths, *self.query.stride(), *self.key.stride(),
            self.key.shape[1], self.key.shape[2], self.window,
        )  # fmt: skip

    def factor(self) -> float:
        """On logits, so that they are exponents of two."""
        return (self.query.shape[-1] ** -0.5 if self.scale is None else self.scale) * LOG2_E

    def options(self, held: int, streamed: int) -> dict[str, int | bool]:
        """Constants of both kernels, and warps and stages."""
        dim = self.query.shape[-1]
        return {
            "GROUPS": self.groups, "DIM": dim, "BLOCK_D": block_of(dim), "HELD": held, "STREAMED": streamed,
            "PADDED": self.slots is not None, "num_warps": 8 if held >= 128 else 4, "num_stages": 3,
        }  # fmt: skip


def refusal(query: Tensor, key: Tensor, scale: float | None) -> str | None:
    """Why the columns of such queries and keys are not computed here; None if they are."""
    if query.dtype != key.dtype:
        return f"queries are {query.dtype} and keys {key.dtype}"
    if scale is not None and scale <= 0:
        return f"the scale {scale} is not positive"
    return refused(query, key)


def asked_of(query: Tensor, key: Tensor, valid: Tensor | None, window: int, scale: float | None) -> Asked:
    """The last `window` queries of each row."""
    place = places(valid)
    if valid is None or place is None:
        return Asked(query, key, None, None, window, scale)
    return Asked(query, key, sources(place), valid.sum(-1), window, scale)


def log_sum_exp(asked: Asked, split: bool) -> Tensor:
    """Launch the kernel of rows: of each query, natural, [B, Hq, window] float32; anything where a row is shorter.

    One program for a tile of queries, all heads of a group among them, and all keys that these see; if `split`, for a piece of
    the keys, and torch puts the pieces together in order. Long programs come first.
    Floor: keys are read once for each tile of queries; 2 * D flops and an exponential for each query and key, which take an
    H100 the same time at D = 128.
    """
    query, key, window = asked.query, asked.key, asked.window
    batch, heads, tokens = query.shape[:3]
    held, streamed = _tiles(query)
    if split:  # few queries: a tile need not be wider than all of them
        held = min(held, max(64, triton.next_power_of_2(window * asked.groups)))
    tiles = triton.cdiv(window * asked.groups, held)
    piece = PIECE if split else tokens
    pieces = triton.cdiv(tokens, PIECE) if split else 1
    part = query.new_empty((pieces, batch, heads, window), dtype=torch.float32)
    wrap_triton(_lse_kernel)[(tiles * pieces * batch * key.shape[1],)](
        *asked.arguments(), part, batch, tiles, piece, asked.factor(), **asked.options(held, streamed)
    )
    return part.logsumexp(0) if split else part[0]


def columns(asked: Asked, lse: Tensor, reduce: str, together: bool) -> Tensor:
    """Launch the kernel of columns: what each key receives from the queries of each head, [B, Hkv, G, S]; anything at padding.

    One program for a tile of keys and a query head; if `together`, for all heads of a group in turn, which few queries are worth.
    Long programs come first.
    Floor: as of the rows, with queries and keys exchanged.

    Args:
        asked: queries and keys.
        lse: log-sum-exp of each query, [B, Hq, window].
        reduce: over queries: `sum`, `max` or `squares`.
        together: whether keys stay for all heads.
    """
    query, key = asked.query, asked.key
    batch, heads, tokens = query.shape[:3]
    held, streamed = _tiles(query)
    if together:
        streamed = min(streamed, max(16, triton.next_power_of_2(asked.window)))
    power = 2 if reduce == "squares" else 1  # of an exponential: a factor on its exponent
    received = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    programs = batch * (key.shape[1] if together else heads)  # for each tile of keys
    wrap_triton(_columns_kernel)[(triton.cdiv(tokens, held) * programs,)](
        *asked.arguments(), lse, received, *lse.stride(), batch, asked.factor() * power,
        POWER=power, TOGETHER=together, LARGEST=reduce == "max", **asked.options(held, streamed),
    )  # fmt: skip
    return received.unflatten(1, (key.shape[1], -1))


def _tiles(query: Tensor) -> tuple[int, int]:
    """How many tokens stay on the chip, and how many stream past.

    256 and 64 rows of 128 bfloat16 channels leave room for two programs in 227 KB, one of which computes exponentials while the
    other multiplies; a product of theirs takes 64 registers of a thread.
    """
    width = block_of(query.shape[-1]) * query.element_size()
    if query.dtype == torch.float32:
        return 128, 64 if width <= 256 else 32 if width <= 512 else 16
    return 256 if width <= 256 else 128, 64


@triton.jit
def _at(slot_ptr, rank, live, PADDED: tl.constexpr):
    """Slots of tokens of these ranks."""
    if PADDED:
        rank = tl.load(slot_ptr + rank, mask=live, other=0)
    return rank


@triton.jit
def _row(slot_ptr, length_ptr, batch, tokens, window, PADDED: tl.constexpr):
    """A row of the batch: its slots, its length, how many of its queries ask, and the rank of the first."""
    length = tokens
    if PADDED:
        slot_ptr += batch * tokens
        length = tl.load(length_ptr + batch).to(tl.int32)
    asking = tl.minimum(length, window)
    return slot_ptr, length, asking, length - asking


@triton.jit
def _product(left, right):
    """Rows of left times rows of right; float32 as exact as tensor cores allow."""
    PRECISION: tl.constexpr = "tf32x3" if left.dtype == tl.float32 else "tf32"  # narrower types take no notice
    return tl.dot(left, tl.trans(right), input_precision=PRECISION)


@triton.jit
def _more(
    largest, total, query, query_rank, key_base, slot_ptr, start, end, factor, stride_ks, stride_kd,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, STREAMED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials after another tile of keys."""
    rank = start + tl.arange(0, STREAMED)
    live = rank < end
    key = load_rows(key_base, _at(slot_ptr, rank, live, PADDED), live, stride_ks, stride_kd, DIM, BLOCK_D)
    logits = _product(query, key)
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
    slot_ptr, length, asking, first = _row(slot_ptr, length_ptr, batch, tokens, window, PADDED)

    # A query's heads lie side by side in the tile: they see the same keys.
    place = tile * HELD + tl.arange(0, HELD)
    asks, group = place // GROUPS, place % GROUPS
    live = asks < asking
    slot = _at(slot_ptr, first + asks, live, PADDED).to(tl.int64)
    offset = slot * stride_qs + group.to(tl.int64) * stride_qh
    query_base = query_ptr + batch * stride_qb + head % heads * GROUPS * stride_qh
    query = load_rows(query_base, offset, live, 1, stride_qd, DIM, BLOCK_D)

    start = rest // tiles * piece
    behind = first + tl.minimum((tile * HELD + HELD - 1) // GROUPS + 1, asking)  # keys that the last query sees
    end = tl.where(tile * HELD < asking * GROUPS, tl.minimum(start + piece, behind), start)
    seen = first + tile * HELD // GROUPS + 1  # keys that the first query sees, as do all
    middle = tl.minimum(start + tl.maximum(seen - start, 0) // STREAMED * STREAMED, tl.maximum(end, start))
    middle = start + (middle - start) // STREAMED * STREAMED

    key_base = key_ptr + batch * stride_kb + head % heads * stride_kh
    largest = tl.full((HELD,), -1e30, tl.float32)  # finite, so that it may be subtracted where no key is seen
    total = tl.zeros((HELD,), tl.float32)
    for at in range(start, middle, STREAMED):
        largest, total = _more(
            largest, total, query, first + asks, key_base, slot_ptr, at, end, factor, stride_ks, stride_kd,
            DIM, BLOCK_D, STREAMED, PADDED, MASKED=False,
        )  # fmt: skip
    for at in range(middle, end, STREAMED):
        largest, total = _more(
            largest, total, query, first + asks, key_base, slot_ptr, at, end, factor, stride_ks, stride_kd,
            DIM, BLOCK_D, STREAMED, PADDED, MASKED=True,
        )  # fmt: skip
    lse = (largest * factor + tl.log2(total)) * 0.6931471805599453
    row = (rest // tiles * rows * heads + head) * GROUPS + group
    tl.store(part_ptr + row * window + asks, lse, mask=live)


@triton.jit
def _received(
    column, key, rank, query_base, lse_base, slot_ptr, start, first, asking, factor, stride_qs, stride_qd, stride_ls,
    POWER: tl.constexpr, LARGEST: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, STREAMED: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What keys have received after another tile of queries."""
    asks = start + tl.arange(0, STREAMED)
    live = asks < asking
    query = load_rows(query_base, _at(slot_ptr, first + asks, live, PADDED), live, stride_qs, stride_qd, DIM, BLOCK_D)
    total = tl.load(lse_base + asks.to(tl.int64) * stride_ls, mask=live, other=float("inf"))  # no query pays nothing
    weights = tl.exp2(tl.fma(_product(key, query), factor, -(total * (POWER * 1.4426950408889634))[None]))
    if MASKED:
        weights = tl.where(rank[:, None] <= (first + asks)[None], weights, 0.0)
    if LARGEST:
        return tl.maximum(column, tl.max(weights, 1))
    return column + tl.sum(weights, 1)


@triton.jit
def _columns_kernel(
    query_ptr, key_ptr, slot_ptr, length_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd, heads, tokens, window,
    lse_ptr, column_ptr, stride_lb, stride_lh, stride_ls, rows, factor,
    POWER: tl.constexpr, TOGETHER: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    programs = rows * heads if TOGETHER else rows * heads * GROUPS  # for one tile
    tile = tl.program_id(0) // programs
    head = (tl.program_id(0) % programs).to(tl.int64)  # the (first) query head, of all rows
    if TOGETHER:
        head *= GROUPS
    batch = head // (heads * GROUPS)
    slot_ptr, length, asking, first = _row(slot_ptr, length_ptr, batch, tokens, window, PADDED)

    rank = tile * HELD + tl.arange(0, HELD)
    live = rank < length
    slot = _at(slot_ptr, rank, live, PADDED)
    query_head = head % (heads * GROUPS)
    key_base = key_ptr + batch * stride_kb + query_head // GROUPS * stride_kh
    key = load_rows(key_base, slot, live, stride_ks, stride_kd, DIM, BLOCK_D)

    start = tl.maximum(tile * HELD - first, 0) // STREAMED * STREAMED  # no earlier query sees one of the keys
    query_base = query_ptr + batch * stride_qb + query_head * stride_qh
    lse_base = lse_ptr + batch * stride_lb + query_head * stride_lh
    column_ptr += head * tokens + slot
    column = tl.zeros((HELD,), tl.float32)
    if TOGETHER:  # one loop, so that tiles of the next head are under way; a mask costs less than another loop
        tiles = tl.cdiv(tl.maximum(asking - start, 0), STREAMED)
        for turn in range(tiles * GROUPS):
            group = (turn // tiles).to(tl.int64)
            column = _received(
                column, key, rank, query_base + group * stride_qh, lse_base + group * stride_lh, slot_ptr,
                start + turn % tiles * STREAMED, first, asking, factor, stride_qs, stride_qd, stride_ls,
                POWER, LARGEST, DIM, BLOCK_D, STREAMED, PADDED, MASKED=True,
            )  # fmt: skip
            is_last = turn % tiles == tiles - 1
            tl.store(column_ptr + group * tokens, column, mask=rank < tl.where(is_last, length, 0))
            column = tl.where(is_last, 0.0, column)
    else:
        seeing = tl.maximum(tile * HELD + HELD - 1 - first, 0)  # the first query that sees all
        middle = tl.cdiv(seeing, STREAMED) * STREAMED
        for at in range(start, tl.minimum(middle, asking), STREAMED):
            column = _received(
                column, key, rank, query_base, lse_base, slot_ptr, at, first, asking, factor, stride_qs, stride_qd, stride_ls,
                POWER, LARGEST, DIM, BLOCK_D, STREAMED, PADDED, MASKED=True,
            )  # fmt: skip
        for at in range(middle, asking, STREAMED):
            column = _received(
                column, key, rank, query_base, lse_base, slot_ptr, at, first, asking, factor, stride_qs, stride_qd, stride_ls,
                POWER, LARGEST, DIM, BLOCK_D, STREAMED, PADDED, MASKED=False,
            )  # fmt: skip
        tl.store(column_ptr, column, mask=live)
