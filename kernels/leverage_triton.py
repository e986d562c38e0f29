"""Score by how far a key stands outside the span of its neighbours, in two passes over the keys.

A chunk is made of pieces, each the work of one program; so a chunk may be a whole row of any length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .tiles_triton import block_of, length_of, load_rows, real_tokens, refused, slots_of

MAX_SIZE = 64  # columns of a sketch: their Gram matrix stands in registers
PIECE = 128  # tokens of a piece: their sketched keys stand in registers
STEP = 32  # channels that are multiplied at a time: centred keys are split in two for the product, and take room
GRAM_STEP = 16  # where the Gram matrix wants room too


def refusal(key: Tensor, valid: Tensor | None, sketch: Tensor, chunk: int) -> str | None:
    """See `KernelOp.refusal`."""
    if sketch.dtype != torch.float32:
        return f"a sketch of {sketch.dtype} is not of float32"
    if sketch.shape[-1] > MAX_SIZE:
        return f"{sketch.shape[-1]} columns of the sketch are more than {MAX_SIZE}"
    return refused(key)


def leverage(key: Tensor, valid: Tensor | None, sketch: Tensor, chunk: int) -> Tensor:
    """Launch three kernels: each piece's mean and Gram matrix, each chunk's factor, each token's score.

    With L the Cholesky factor of a chunk's Gram matrix plus its ridge, a score is the squared length of the centred key times
    sketch * L⁻ᵀ, found by substitution. A piece is centred on its own mean; pieces of a chunk are joined by theirs.

    Floor: 2 * D * itemsize bytes read and 4 written per token and KV head, and 8*k*k / PIECE for Gram matrices on their way; the
    second pass finds keys of up to 50 MB in the L2 cache. 4*D*k + 2*k*k flops, each three times in TF32, since centred keys are
    float32: with D = 128 and k = 48, multiplied as 64, an H100 needs 1.6 times as long for these as for 512 bytes of bf16 keys. A
    factor is k steps that wait for each other, all chunks side by side.
    """
    batch, heads, tokens, dim = key.shape
    size = sketch.shape[-1]
    source, length = real_tokens(valid)
    width = chunk or tokens
    # Two where one would do: tracing specialises sizes of 1, and one graph shall serve all lengths. Empty ones cost nothing.
    chunks = torch.sym_max(2, triton.cdiv(tokens, chunk)) if chunk else 1
    piece = min(PIECE, block_of(chunk) * 2) if chunk else PIECE
    parts = triton.cdiv(chunk, piece) if chunk else torch.sym_max(2, triton.cdiv(tokens, piece))
    sizes = {"DIM": dim, "SIZE": size, "PIECE": piece, "BLOCK_K": block_of(size), "PADDED": valid is not None, "num_warps": 8}
    strides = (0, *sketch.stride()) if sketch.dim() == 3 else sketch.stride()
    mean = sketch.new_empty((batch, heads, chunks * parts, dim))
    gram = sketch.new_empty((batch, heads, chunks * parts, size, size))
    wrap_triton(_gram_kernel)[(batch * heads * chunks * parts,)](
        key, source, length, sketch, mean, gram, *key.stride(), *strides, heads, tokens, width, chunks, parts,
        STEP=GRAM_STEP, **sizes,
    )  # fmt: skip
    if not chunk:
        mean, gram = _joined(mean, gram, length, tokens, sketch)
    centre, factor = sketch.new_empty((batch, heads, chunks, dim)), sketch.new_empty((batch, heads, chunks, dim, size))
    wrap_triton(_factor_kernel)[(batch * heads * chunks,)](
        length, sketch, mean, gram, centre, factor, *strides, heads, tokens, width, chunks, parts if chunk else 1,
        BLOCK_D=block_of(dim), **sizes,
    )  # fmt: skip
    score = sketch.new_empty((batch, heads, tokens))
    wrap_triton(_score_kernel)[(batch * heads * chunks * parts,)](
        key, source, length, centre, factor, score, *key.stride(), heads, tokens, width, chunks, parts, STEP=STEP, **sizes,
    )  # fmt: skip
    return score if valid is None else score.masked_fill(~valid.unsqueeze(1), 0)


def _joined(mean: Tensor, gram: Tensor, length: Tensor | None, tokens: int, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Make one piece of all pieces of a row, side by side: a program which takes them one after the other makes long rows wait."""
    first = torch.arange(mean.shape[2], device=mean.device) * PIECE
    behind = tokens if length is None else length.view(-1, 1)
    count = (behind - first).clamp(0, PIECE).view(-1, 1, first.shape[0], 1).float()
    centre = (mean * count).sum(2, keepdim=True) / count.sum(2, keepdim=True).clamp(min=1)
    away = torch.where(count > 0, mean - centre, 0) @ sketch
    return centre, gram.sum(2, keepdim=True) + ((away * count).mT @ away).unsqueeze(2)


@triton.jit
def _piece(piece, length, width, parts, PIECE: tl.constexpr):
    """First token of a piece of a row, and the token behind its last; the same where it is empty."""
    first = tl.minimum(piece // parts * width + piece % parts * PIECE, length)
    return first, tl.minimum(tl.minimum(first + PIECE, (piece // parts + 1) * width), length)


@triton.jit
def _gram_kernel(
    key_ptr, source_ptr, length_ptr, sketch_ptr, mean_ptr, gram_ptr,
    stride_b, stride_h, stride_s, stride_d, stride_pb, stride_ph, stride_pd, stride_pk, heads, tokens, width, chunks, parts,
    DIM: tl.constexpr, SIZE: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, piece = place // (chunks * parts), tl.program_id(0) % (chunks * parts)
    batch, head = row // heads, row % heads
    first, end = _piece(piece, length_of(length_ptr, batch, tokens, PADDED), width, parts, PIECE)
    if PADDED:
        source_ptr += batch * tokens
    # Two halves, since the product of all tokens with themselves takes more registers than there are.
    token = first + tl.arange(0, PIECE // 2)
    here, there = token < end, token + PIECE // 2 < end
    slot, other = slots_of(source_ptr, token, here, PADDED), slots_of(source_ptr, token + PIECE // 2, there, PADDED)
    key_ptr += batch * stride_b + head * stride_h
    sketch_ptr += batch * stride_pb + head * stride_ph
    column = tl.arange(0, BLOCK_K)
    x, y = tl.zeros((PIECE // 2, BLOCK_K), tl.float32), tl.zeros((PIECE // 2, BLOCK_K), tl.float32)
    for start in range(0, DIM, STEP):
        channel = start + tl.arange(0, STEP)
        base = key_ptr + start * stride_d
        key = load_rows(base, slot, here, stride_s, stride_d, DIM - start, STEP).to(tl.float32)
        far = load_rows(base, other, there, stride_s, stride_d, DIM - start, STEP).to(tl.float32)
        mean = (tl.sum(key, 0) + tl.sum(far, 0)) / tl.maximum(end - first, 1)
        tl.store(mean_ptr + place * DIM + channel, mean, mask=channel < DIM)
        sketch = load_rows(sketch_ptr, channel, channel < DIM, stride_pd, stride_pk, SIZE, BLOCK_K)
        x = tl.dot(tl.where(here[:, None], key - mean[None], 0.0), sketch, x, "tf32x3")
        y = tl.dot(tl.where(there[:, None], far - mean[None], 0.0), sketch, y, "tf32x3")
    gram = tl.dot(y.T, y, tl.dot(x.T, x, input_precision="tf32x3"), "tf32x3")
    cell = column[:, None] * SIZE + column[None]
    tl.store(gram_ptr + place * SIZE * SIZE + cell, gram, mask=(column[:, None] < SIZE) & (column[None] < SIZE))


@triton.jit
def _factor_kernel(
    length_ptr, sketch_ptr, mean_ptr, gram_ptr, centre_ptr, factor_ptr, stride_pb, stride_ph, stride_pd, stride_pk,
    heads, tokens, width, chunks, parts,
    DIM: tl.constexpr, SIZE: tl.constexpr, PIECE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    batch, head = row // heads, row % heads
    length = length_of(length_ptr, batch, tokens, PADDED)
    last = tl.maximum(length // width - 1, 0)  # the chunk which takes in the short tail; those behind it are asked for nothing
    begin = chunk * parts
    end = tl.where(chunk < last, begin + parts, tl.where(chunk == last, tl.minimum(begin + 2 * parts, chunks * parts), begin))
    channel, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    held = channel < DIM
    mean_ptr += row * chunks * parts * DIM
    gram_ptr += row * chunks * parts * SIZE * SIZE
    count, mean = 0, tl.zeros((BLOCK_D,), tl.float32)
    for piece in tl.range(begin, end, num_stages=3):
        first, behind = _piece(piece, length, width, parts, PIECE)
        count += behind - first
        mean += tl.load(mean_ptr + piece * DIM + channel, mask=held, other=0.0) * (behind - first)
    mean /= tl.maximum(count, 1)
    factor = load_rows(sketch_ptr + batch * stride_pb + head * stride_ph, channel, held, stride_pd, stride_pk, SIZE, BLOCK_K)
    inside = (column[:, None] < SIZE) & (column[None] < SIZE)
    gram = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for piece in tl.range(begin, end, num_stages=3):
        first, behind = _piece(piece, length, width, parts, PIECE)
        cell = gram_ptr + tl.cast(piece, tl.int64) * SIZE * SIZE + column[:, None] * SIZE + column[None]
        away = tl.load(mean_ptr + piece * DIM + channel, mask=held, other=0.0) - mean
        away = tl.sum(tl.where(behind > first, away, 0.0)[:, None] * factor, 0)
        gram += tl.load(cell, mask=inside, other=0.0) + (away * (behind - first))[:, None] * away[None]
    diagonal = column[:, None] == column[None]
    ridge = 1e-4 / SIZE * tl.sum(tl.where(diagonal, gram, 0.0)) + 1e-6
    gram += tl.where(diagonal, ridge, 0.0)
    # Column by column: gram = L Lᵀ, and what stands beside it becomes sketch * L⁻ᵀ.
    for step in range(SIZE if end > begin else 0):
        at = (column == step)[None]
        line = tl.sum(tl.where(at, gram, 0.0), 1)[None]  # [1, BLOCK_K]; the column's numbers, laid out as a row
        pivot = tl.sum(tl.where(at, line, 0.0), 1)  # [1]
        scale = 1.0 / tl.sqrt(tl.where(pivot < ridge, ridge, pivot))  # smaller by rounding alone
        line = tl.where(column[None] > step, line * scale[:, None], 0.0)
        gram -= line.T * line
        done = tl.sum(tl.where(at, factor, 0.0), 1)[:, None] * scale[:, None]
        factor = tl.where(at, done, factor - done * line)
    place = tl.program_id(0).to(tl.int64)
    tl.store(centre_ptr + place * DIM + channel, mean, mask=held)
    cell = channel[:, None] * SIZE + column[None]
    tl.store(factor_ptr + place * DIM * SIZE + cell, factor, mask=held[:, None] & (column < SIZE)[None])


@triton.jit
def _score_kernel(
    key_ptr, source_ptr, length_ptr, centre_ptr, factor_ptr, score_ptr,
    stride_b, stride_h, stride_s, stride_d, heads, tokens, width, chunks, parts,
    DIM: tl.constexpr, SIZE: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, piece = (tl.program_id(0) // (chunks * parts)).to(tl.int64), tl.program_id(0) % (chunks * parts)
    batch, head = row // heads, row % heads
    length = length_of(length_ptr, batch, tokens, PADDED)
    first, end = _piece(piece, length, width, parts, PIECE)
    token = first + tl.arange(0, PIECE)
    live = token < end
    if PADDED:
        source_ptr += batch * tokens
    slot = slots_of(source_ptr, token, live, PADDED)
    key_ptr += batch * stride_b + head * stride_h
    chunk = row * chunks + tl.minimum(piece // parts, tl.maximum(length // width - 1, 0))
    y = tl.zeros((PIECE, BLOCK_K), tl.float32)
    for start in range(0, DIM, STEP):
        channel = start + tl.arange(0, STEP)
        key = load_rows(key_ptr + start * stride_d, slot, live, stride_s, stride_d, DIM - start, STEP).to(tl.float32)
        mean = tl.load(centre_ptr + chunk * DIM + channel, mask=channel < DIM, other=0.0)
        factor = load_rows(factor_ptr + chunk * DIM * SIZE, channel, channel < DIM, SIZE, 1, SIZE, BLOCK_K)
        y = tl.dot(tl.where(live[:, None], key - mean[None], 0.0), factor, y, "tf32x3")
    score = tl.sum(y * y, 1)
    tl.store(score_ptr + row * tokens + slot, tl.where(score > 1, 1.0, score), mask=live)  # what is not a number stays that
