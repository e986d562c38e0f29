"""Choose the slots to keep: the threshold of each row digit by digit, then its winners to their places.

Scores become integers of the same order. The threshold, which is the smallest winner, is found from its highest digit down: count
the digits of all scores that agree with it so far, and see in which the last winner falls. A row is cut into pieces, each counted
by a program of its own, so that few rows occupy a whole chip; what pieces count is added up by the programs of the next launch.
Nothing is added atomically in memory, and no program waits for another of its launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .tiles_triton import type_refused

TILE = 2048  # scores looked at together; below 2^15, so that two counts fit one integer
PROGRAMS = 256  # about how many there are of a launch, where rows are long: two for each multiprocessor. At most BINS
DIGITS = (24, 16, 8, 0)  # lowest bits of the digits, highest digit first
# Of a digit. Some versions of Triton count with a popcount for every 32 bins, which makes more of them slow.
BINS = tl.constexpr(256)
GROUP = tl.constexpr(32)  # pieces whose counts are read together


def refusal(scores: Tensor, count: int, counts: Tensor | None) -> str | None:
    """See `KernelOp.refusal`."""
    return type_refused(scores)


def select(scores: Tensor, count: int, counts: Tensor | None) -> Tensor:
    """Launch five kernels: one for each of the four digits of the threshold, and one that writes the slots.

    Floor: 4 bytes read per score and launch, 20 in all, and 8 written per winner. Scores of up to 50 MB stay in the L2 cache.
    """
    batch, heads, _ = scores.shape
    # One more than needed, as the reference has: of `count` tracing would ask whether it is 1.
    slots = scores.new_empty((batch, heads, count + 1), dtype=torch.int64)
    _launch(scores.unsqueeze(2), count, counts, slots, False)
    return slots.narrow(2, 0, count)


def best(scores: Tensor, count: int, counts: Tensor | None) -> Tensor:
    """See `select.best`; launches the same kernels as `select`.

    Floor: 20 bytes read and 1 written per score.
    """
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    _launch(scores.unsqueeze(2), count, counts, chosen, True)
    return chosen


def joint_best(scores: Tensor, count: int, counts: Tensor | None) -> Tensor:
    """Mark the best of each row's scores of all heads together; of equal scores the earlier token wins, then the lower head.

    Args:
        scores: [B, Hkv, S].
        count: how many of a row, 1 <= count <= Hkv * S.
        counts: [B] int64, as in `best`.

    Returns:
        [B, Hkv, S] bool. Floor: as `best`.
    """
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    _launch(scores.unsqueeze(1), count, counts, chosen, True)
    return chosen


def _launch(scores: Tensor, count: int, counts: Tensor | None, out: Tensor, mark: bool) -> None:
    """Choose among scores, [B, H, U, S]: each of the B H rows has U S places, token by token, and in a token unit by unit."""
    batch, heads, units, tokens = scores.shape
    rows, places = batch * heads, units * tokens
    tiles = triton.cdiv(places, TILE)
    pieces = torch.sym_min(tiles, torch.sym_max(1, PROGRAMS // rows))
    span = triton.cdiv(tiles, pieces)
    # One vector, whatever the shapes in it: of more axes tracing would ask whether the number of pieces is 1.
    scratch = scores.new_empty((rows * (len(DIGITS) * pieces + 2) * BINS.value,), dtype=torch.int32)
    by_row = (0, 0) if counts is None else (counts.stride(0), counts.stride(1) if counts.dim() == 2 else 0)
    given = (*scores.stride(), heads, places, pieces, span)
    fixed = {"UNITS": units, "TILE": TILE, "num_warps": 8}
    for shift in DIGITS:
        wrap_triton(_digit_kernel)[(rows * pieces,)](
            scores, counts, scratch, count, *by_row, *given, SHIFT=shift, COUNTED=counts is not None, **fixed
        )
    wrap_triton(_write_kernel)[(rows * pieces,)](
        scores, counts, scratch, out, count, *by_row, *given, COUNTED=counts is not None, MARK=mark, **fixed
    )


@triton.jit
def _offset(place, stride_u, stride_s, UNITS: tl.constexpr):
    return (place // UNITS).to(tl.int64) * stride_s + (place % UNITS).to(tl.int64) * stride_u


@triton.jit
def _ordered(score):
    """Scores as unsigned integers of the same order.

    It does not load them: what a function makes of a pointer torch takes for a pointer to the same memory, and winners, which
    places are made of, would seem to be written to the scores.
    """
    bits = score.to(tl.float32).to(tl.uint32, bitcast=True)
    negative = bits > 0x80000000  # and not -0, which equals 0
    return tl.where(negative, ~bits, bits | 0x80000000)


@triton.jit
def _scratch(scratch_ptr, row, pieces, SHIFT: tl.constexpr):
    """Where stand, of a row: what its pieces count of a digit, the threshold before that digit, and scores above it by piece."""
    row_ptr = scratch_ptr + row * (4 * pieces + 2) * BINS
    level: tl.constexpr = 3 - SHIFT // 8
    above_ptr = row_ptr + 4 * pieces * BINS
    return row_ptr + level * pieces * BINS, above_ptr + BINS + 2 * level, above_ptr


@triton.jit
def _counted(table_ptr, pieces, piece):
    """How many scores of a row have each digit, [BINS]: in all pieces, and in those before one."""
    every, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    digit = tl.arange(0, BINS)
    for first in range(0, pieces, GROUP):
        other = first + tl.arange(0, GROUP)
        counted = tl.load(table_ptr + other[:, None] * BINS + digit[None], mask=(other < pieces)[:, None], other=0)
        every += tl.sum(counted, 0)
        before += tl.sum(tl.where((other < piece)[:, None], counted, 0), 0)
    return every, before


@triton.jit
def _narrowed(state_ptr, every, SHIFT: tl.constexpr):
    """The threshold down to one more digit, that digit, and how many of the scores that agree with it win."""
    digit = tl.arange(0, BINS)
    rest = tl.load(state_ptr + 1)
    last = tl.sum((tl.cumsum(every, 0, reverse=True) >= rest).to(tl.int32), 0) - 1  # that the last winner has
    rest -= tl.sum(tl.where(digit > last, every, 0), 0)
    threshold = tl.load(state_ptr).to(tl.uint32, bitcast=True) | (last.to(tl.uint32) << SHIFT)
    return threshold, last, rest


@triton.jit
def _digit_kernel(
    score_ptr, counts_ptr, scratch_ptr, count, stride_row, stride_head,
    stride_b, stride_h, stride_u, stride_s, heads, places, pieces, span,
    SHIFT: tl.constexpr, COUNTED: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    table_ptr, state_ptr, above_ptr = _scratch(scratch_ptr, row, pieces, SHIFT)
    threshold = tl.zeros((), tl.uint32)
    if SHIFT == 24:
        kept = count
        if COUNTED:
            kept = tl.load(counts_ptr + row // heads * stride_row + row % heads * stride_head)
        rest = tl.cast(kept, tl.int32)  # `count` has no methods where it is 1
    else:  # what the launch before has counted
        earlier_table, earlier_state, _ = _scratch(scratch_ptr, row, pieces, SHIFT + 8)
        every, _ = _counted(earlier_table, pieces, 0)
        threshold, _, rest = _narrowed(earlier_state, every, SHIFT + 8)
    if piece == 0:
        tl.store(state_ptr, threshold.to(tl.int32, bitcast=True))
        tl.store(state_ptr + 1, rest)
    score_ptr += row // heads * stride_b + row % heads * stride_h
    counted, above = tl.zeros((BINS,), tl.int32), tl.zeros((), tl.int32)
    for tile in range(span):
        place = (piece * span + tile) * TILE + tl.arange(0, TILE)
        live = place < places
        key = _ordered(tl.load(score_ptr + _offset(place, stride_u, stride_s, UNITS), mask=live, other=0.0))
        agrees = live
        if SHIFT < 24:
            agrees = live & (key >> (SHIFT + 8) == threshold >> (SHIFT + 8))
        counted += tl.histogram((key >> SHIFT & (BINS - 1)).to(tl.int32), BINS, mask=agrees)
        if SHIFT == 0:
            above += tl.sum((live & (key >> 8 > threshold >> 8)).to(tl.int32), 0)
    tl.store(table_ptr + piece * BINS + tl.arange(0, BINS), counted)
    if SHIFT == 0:
        tl.store(above_ptr + piece, above)


@triton.jit
def _write_kernel(
    score_ptr, counts_ptr, scratch_ptr, out_ptr, count, stride_row, stride_head,
    stride_b, stride_h, stride_u, stride_s, heads, places, pieces, span,
    COUNTED: tl.constexpr, MARK: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    table_ptr, state_ptr, above_ptr = _scratch(scratch_ptr, row, pieces, 0)
    every, before = _counted(table_ptr, pieces, piece)
    threshold, last, rest = _narrowed(state_ptr, every, 0)
    digit = tl.arange(0, BINS)
    # Winners of the pieces before this one: those above the threshold, and those equal to it, of which `rest` win.
    equal = tl.sum(tl.where(digit == last, before, 0), 0)
    above = tl.sum(tl.where(digit > last, before, 0), 0)
    for first in range(0, pieces, GROUP):
        other = first + tl.arange(0, GROUP)
        above += tl.sum(tl.load(above_ptr + other, mask=other < piece, other=0), 0)
    if MARK:
        out_ptr += row * places
    else:
        kept = count
        if COUNTED:
            kept = tl.load(counts_ptr + row // heads * stride_row + row % heads * stride_head)
        empty = tl.cast(count - kept, tl.int32)
        out_ptr += row * (count + 1)
    score_ptr += row // heads * stride_b + row % heads * stride_h
    for tile in range(span):
        place = (piece * span + tile) * TILE + tl.arange(0, TILE)
        live = place < places
        key = _ordered(tl.load(score_ptr + _offset(place, stride_u, stride_s, UNITS), mask=live, other=0.0))
        larger, same = live & (key > threshold), live & (key == threshold)
        both = larger.to(tl.int32) << 16 | same.to(tl.int32)
        earlier = tl.cumsum(both, 0) - both
        equals = equal + (earlier & 0xFFFF)
        wins = larger | same & (equals < rest)
        if MARK:
            tl.store(out_ptr + place % UNITS * (places // UNITS) + place // UNITS, wins, mask=live)
        else:
            rank = above + (earlier >> 16) + tl.minimum(equals, rest)
            tl.store(out_ptr + empty + rank, place.to(tl.int64), mask=wins)
            if COUNTED:
                tl.store(out_ptr + place, tl.full((TILE,), -1, tl.int64), mask=place < empty)
        total = tl.sum(both, 0)
        above += total >> 16
        equal += total & 0xFFFF
