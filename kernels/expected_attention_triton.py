"""Score by the attention expected from later queries: one pass over the queries for their moments, one over the keys."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import ranks
from .tiles_triton import block_of, length_of, load_rows, real_tokens, refused, slots_of

PIECE = 2048  # tokens whose moments leave the chip together
RUN = 256  # tokens that tensor cores add up: they cut sums off where others round, and long sums would drift
WIDE = 128  # channels of a block of second moments, which stands in registers twice
LARGEST = 2.0**15  # of the numbers that a covariance is cut into for keys of 16 bits; float16 ends above it


class Moments(NamedTuple):
    """Of the queries of each piece of a row.

    Attributes:
        counts: how many, [B or 1, 1, pieces, 1] float32.
        mean: theirs, [B, Hq, pieces, D] float32; 0 where there are none.
        square: sum of the outer products of what they differ by from their mean, [B, Hq, pieces, D, D] float32: it is the mean of
            this and its transpose. None if it was not asked for.
    """

    counts: Tensor
    mean: Tensor
    square: Tensor | None


def refusal(
    pre_query: Tensor, key: Tensor, rotation: Tensor | None, value: Tensor | None, valid: Tensor | None, sinks: int,
    covariance: bool, epsilon: float, scale: float | None,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    return refused(pre_query, key)


def expected_attention(
    pre_query: Tensor, key: Tensor, rotation: Tensor | None, value: Tensor | None, valid: Tensor | None, sinks: int,
    covariance: bool, epsilon: float, scale: float | None,
) -> Tensor:  # fmt: skip
    """Launch two kernels: the moments of the queries in pieces of a row, and the logits of each key.

    Between them the pieces of a head are put together, B*Hq*S*D*D/2048 floats, and its mean and covariance are turned and scaled;
    behind them is the softmax of B*Hq*S logits, and values are read once for their norms.
    Floor: queries, keys and values are read once, (G + 2) * D * itemsize bytes per token and KV head, and 4 written per query head.
    4*B*Hq*S*D*D flops: half of them twice in TF32, since centred queries are of float32; half of them three times, since a
    covariance is that long too, in 16 bits with keys of those, else in TF32. With D = 128, G = 4 and 16 bits that is 66 and 98
    kflop per token and query head for 388 bytes: an H100 multiplies twice as long as it reads.
    """
    (batch, groups, tokens, dim), heads = key.shape, pre_query.shape[1]
    scale = dim**-0.5 if scale is None else scale
    rank, length = ranks(valid, tokens, key.device)
    counted = rank >= sinks if valid is None else (rank >= sinks) & valid
    number = (length - sinks).clamp(min=1)[:, :, None, None]
    moments = _moments(pre_query, valid, sinks, covariance)
    near = moments.mean[:, :, :1]  # large means would round in a sum that holds them; and one piece alone stays what it is
    mean = near + ((moments.mean - near) * moments.counts).sum(2, keepdim=True) / number
    slope = scale * (mean if rotation is None else mean @ rotation)
    spread = None
    if moments.square is not None:
        away = torch.where(moments.counts > 0, moments.mean - mean, 0)
        square = moments.square.sum(2)
        square = (square + square.mT) / 2 + (away * moments.counts).mT @ away
        spread = square * (scale**2 / 2 / number)
        if rotation is not None:
            spread = rotation.mT @ spread @ rotation
    logits = _logits(key, slope, spread).view(batch, groups, heads // groups, tokens)
    logits = logits.masked_fill(~counted[:, None, None], torch.finfo(torch.float32).min)
    score = (logits - logits.logsumexp(3, keepdim=True)).exp().mean(2)
    if value is not None:
        score = (score + epsilon) * torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
    return score.masked_fill(~counted[:, None], 0)


def _moments(query: Tensor, valid: Tensor | None, sinks: int, covariance: bool) -> Moments:
    """Moments of the real queries behind the first `sinks`."""
    batch, heads, tokens, dim = query.shape
    source, length = real_tokens(valid)
    # Two at least, although one may hold the row: tracing specialises sizes of 1, and one graph shall serve all lengths.
    pieces = torch.sym_max(2, triton.cdiv(tokens, PIECE))
    mean = query.new_empty((batch, heads, pieces, dim), dtype=torch.float32)
    square = query.new_empty((batch, heads, pieces, dim, dim), dtype=torch.float32) if covariance else None
    width = min(block_of(dim), WIDE) if covariance else block_of(dim)
    blocks = triton.cdiv(dim, width)
    # Queries come by registers, where wide blocks leave little room, least of all beside a second block's.
    rows = 64 if width < WIDE else 16 if blocks > 1 and query.dtype == torch.float32 else 32
    wrap_triton(_moments_kernel)[(batch * heads * pieces * blocks**2,)](
        query, source, length, mean, square, *query.stride(), heads, tokens, pieces, sinks,
        PIECE=PIECE, RUN=RUN, DIM=dim, BLOCK_S=rows, BLOCK_D=width, BLOCKS=blocks, COVARIANCE=covariance,
        PADDED=valid is not None, num_warps=4 if width < 128 else 8, num_stages=2,
    )  # fmt: skip
    behind = (tokens if length is None else length.view(-1, 1, 1, 1)) - sinks
    count = (behind - torch.arange(pieces, device=query.device)[:, None] * PIECE).clamp(0, PIECE).float()
    return Moments(count.view(-1, 1, pieces, 1), mean, square)


def _logits(key: Tensor, slope: Tensor, spread: Tensor | None) -> Tensor:
    """Products of keys with `slope`, [B, Hq, 1, D], and with what `spread`, [B, Hq, D, D], makes of them: [B, Hq, S] float32."""
    batch, groups, tokens, dim = key.shape
    heads = slope.shape[1]
    unit = None
    if spread is not None and key.dtype != torch.float32:
        # Three numbers of 16 bits are as long as one of float32, and tensor cores multiply them by keys exactly. A unit of each
        # channel, since float16 has small exponents: channels that vary little count with keys that are long there.
        unit = spread.abs().amax(3, keepdim=True).clamp(min=1e-30) / LARGEST
        rest, parts = spread / unit, []
        for _ in range(3):
            parts.append(rest.to(key.dtype))
            rest = rest - parts[-1].float()
        spread = torch.stack(parts, 2)
    sizes = _tiles_of(dim, cut=unit is not None)
    tiles = triton.cdiv(tokens, sizes["BLOCK_S"])
    logits = key.new_empty((batch, heads, tokens), dtype=torch.float32)
    wrap_triton(_logits_kernel)[(batch * groups * tiles,)](
        key, None if spread is None else spread.contiguous(), unit, slope.contiguous(), logits, *key.stride(),
        groups, tokens, tiles,
        GROUPS=heads // groups, DIM=dim, CUT=unit is not None, COVARIANCE=spread is not None, num_warps=8, num_stages=2, **sizes,
    )  # fmt: skip
    return logits


def _tiles_of(dim: int, cut: bool) -> dict[str, int]:
    """Tokens of a tile of keys, channels that are multiplied at a time, and channels whose logits are made at a time.

    Keys of 16 bits stay on the chip, and the more of them, the seldomer is a covariance read: at 128 channels 256 tokens ask the L2
    cache for 100 kB in the time of 25 Mflop. Of float32 nothing stays, because its likes are multiplied as pairs, in registers.
    """
    held = block_of(dim)
    if not cut:
        return {"BLOCK_S": 128, "BLOCK_D": 16, "STEP": min(64, held)}
    return {"BLOCK_S": 256 if held <= 128 else 128, "BLOCK_D": held, "STEP": min(32, held)}


@triton.jit
def _centred(base, slot, live, pivot, channel, stride_s, stride_d, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """What some queries differ by from `pivot`, [len(slot), BLOCK_D] float32; 0 where `live` is false."""
    query = load_rows(base + channel * stride_d, slot, live, stride_s, stride_d, DIM - channel, BLOCK_D).to(tl.float32)
    return tl.where(live[:, None], query - pivot[None], 0.0)


@triton.jit
def _short(x):
    """The nearest number of 11 bits, which tensor cores take as it is."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _moments_kernel(
    query_ptr, source_ptr, length_ptr, mean_ptr, square_ptr, stride_b, stride_h, stride_s, stride_d, heads, tokens, pieces, sinks,
    PIECE: tl.constexpr, RUN: tl.constexpr, DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
    COVARIANCE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    place = (tl.program_id(0) // (BLOCKS * BLOCKS)).to(tl.int64)
    row, piece = place // pieces, tl.program_id(0) // (BLOCKS * BLOCKS) % pieces
    left = tl.program_id(0) // BLOCKS % BLOCKS * BLOCK_D  # first channel of the block's rows, and of its columns
    right = tl.program_id(0) % BLOCKS * BLOCK_D
    batch = row // heads
    query_ptr += batch * stride_b + row % heads * stride_h
    if PADDED:
        source_ptr += batch * tokens
    begin = sinks + piece * PIECE
    end = tl.minimum(begin + PIECE, length_of(length_ptr, batch, tokens, PADDED))
    number = tl.maximum(end - begin, 0)
    # A pivot near the mean, so that a large mean does not drown the spread; what it misses by is put right behind the loop.
    token = begin + tl.arange(0, BLOCK_S)
    slot, none = slots_of(source_ptr, token, token < end, PADDED), tl.zeros((BLOCK_D,), tl.float32)
    few = tl.maximum(tl.minimum(number, BLOCK_S), 1)
    x_pivot = tl.sum(_centred(query_ptr, slot, token < end, none, left, stride_s, stride_d, DIM, BLOCK_D), 0) / few
    y_pivot = x_pivot
    if BLOCKS > 1:
        y_pivot = tl.sum(_centred(query_ptr, slot, token < end, none, right, stride_s, stride_d, DIM, BLOCK_D), 0) / few
    x_sum, y_sum = none, none
    if COVARIANCE:
        square = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for run in range(begin, end, RUN):
        if COVARIANCE:
            part = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        for start in range(run, tl.minimum(run + RUN, end), BLOCK_S):
            token = start + tl.arange(0, BLOCK_S)
            slot = slots_of(source_ptr, token, token < end, PADDED)
            x = _centred(query_ptr, slot, token < end, x_pivot, left, stride_s, stride_d, DIM, BLOCK_D)
            x_sum += tl.sum(x, 0)
            y = x
            if BLOCKS > 1:
                y = _centred(query_ptr, slot, token < end, y_pivot, right, stride_s, stride_d, DIM, BLOCK_D)
                y_sum += tl.sum(y, 0)
            if COVARIANCE:
                # With x = s + r, s short, xᵀx is sᵀs + sᵀr + rᵀs but for less than float32 rounds: sᵀs + 2sᵀr made symmetric.
                short = _short(y)
                rest = 2 * (y - short)
                if BLOCKS > 1:
                    part = tl.dot(_short(x).T, rest, tl.dot(_short(x).T, short, part, "tf32"), "tf32")
                else:
                    part = tl.dot(short.T, rest, tl.dot(short.T, short, part, "tf32"), "tf32")
        if COVARIANCE:
            square += part
    number = tl.maximum(number, 1)
    row_of, column_of = left + tl.arange(0, BLOCK_D), right + tl.arange(0, BLOCK_D)
    if right == 0:
        tl.store(mean_ptr + place * DIM + row_of, x_pivot + x_sum / number, mask=row_of < DIM)
    if COVARIANCE:
        if BLOCKS == 1:
            y_sum = x_sum
        square -= x_sum[:, None] * (y_sum / number)[None]
        cell = place * DIM * DIM + row_of[:, None] * DIM + column_of[None]
        tl.store(square_ptr + cell, square, mask=(row_of < DIM)[:, None] & (column_of < DIM)[None])


@triton.jit
def _logits_kernel(
    key_ptr, spread_ptr, unit_ptr, slope_ptr, logit_ptr, stride_b, stride_h, stride_s, stride_d, groups, tokens, tiles,
    GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, CUT: tl.constexpr,
    COVARIANCE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    live = token < tokens
    key_ptr += row // groups * stride_b + row % groups * stride_h
    if CUT:
        key = load_rows(key_ptr, token, live, stride_s, stride_d, DIM, BLOCK_D)
    logit = tl.zeros((BLOCK_S,), tl.float32)
    steps = (DIM + STEP - 1) // STEP
    # The matrices of a group's heads, some rows at a time: they are symmetric, so rows are columns.
    for step in range(GROUPS * steps):
        head, first = row * GROUPS + step // steps, step % steps * STEP
        channel = first + tl.arange(0, STEP)
        slope = tl.load(slope_ptr + head * DIM + channel, mask=channel < DIM, other=0.0)[None]
        if CUT:
            base = spread_ptr + head * 3 * DIM * DIM
            # The shortest first, since tensor cores cut off what hangs below a sum.
            product = tl.dot(key, load_rows(base + 2 * DIM * DIM, channel, channel < DIM, DIM, 1, DIM, BLOCK_D).T)
            product = tl.dot(key, load_rows(base + DIM * DIM, channel, channel < DIM, DIM, 1, DIM, BLOCK_D).T, product)
            product = tl.dot(key, load_rows(base, channel, channel < DIM, DIM, 1, DIM, BLOCK_D).T, product)
            slope = slope + product * tl.load(unit_ptr + head * DIM + channel, mask=channel < DIM, other=0.0)[None]
        elif COVARIANCE:
            product = tl.zeros((BLOCK_S, STEP), tl.float32)
            for start in range(0, DIM, BLOCK_D):
                part = load_rows(key_ptr + start * stride_d, token, live, stride_s, stride_d, DIM - start, BLOCK_D)
                spread = load_rows(spread_ptr + head * DIM * DIM + start, channel, channel < DIM, DIM, 1, DIM - start, BLOCK_D)
                product = tl.dot(part, spread.T, product, "tf32x3")
            slope = slope + product
        near = load_rows(key_ptr + first * stride_d, token, live, stride_s, stride_d, DIM - first, STEP).to(tl.float32)
        logit = tl.where(first == 0, 0.0, logit) + tl.sum(slope * near, 1)
        if first + STEP >= DIM:
            tl.store(logit_ptr + head * tokens + token, logit, mask=live)
