"""Score by the attention received inside a chunk, whose logits never leave the chip."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import from_front, places, pooled
from .tiles_triton import block_of, length_of, load_rows, real_tokens, refused, slots_of

MAX_CHUNK = 256  # logits of a block of queries with all keys of the chunk stand in registers
HEADS = 4  # query heads whose queries one program takes; more make more programs
SLICE = 128  # bytes of a value that are read at a time


def refusal(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, chunk: int, scale: float, pool: int
) -> str | None:
    """See `KernelOp.refusal`."""
    if chunk > MAX_CHUNK:
        return f"chunks of {chunk} tokens are longer than {MAX_CHUNK}"
    if not scale > 0:
        return f"a scale of {scale} is not positive"
    if query.dtype != key.dtype:
        return f"queries of {query.dtype} and keys of {key.dtype} differ"
    return refused(query, key, value)


def chunk_attention(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, chunk: int, scale: float, pool: int
) -> Tensor:
    """Launch one kernel: a program for each chunk of a KV head, and each HEADS query heads of its group.

    The chunk's keys stay in shared memory while blocks of queries pass, and each logit is computed once. What a key receives is
    added up in registers until the end. Neighbours are pooled in torch, because they may stand in other chunks.

    Floor: (G*D + D + Dv) * itemsize bytes and 2*G*chunk*D flops per token and KV head. In bf16, D = Dv = 128, G = 4, chunks of
    256, that is 171 flops per byte, where an H100 does 295: reading the queries bounds it, at 58 % of the matrix rate. Exponentials
    take as many cycles as the products. In chunks of 128 three programs fit a multiprocessor of sm_90 and take turns at the two; in
    chunks of 256 one does. In float32 a product is three of TF32, and each block of queries reads the keys again.
    """
    batch, heads, tokens, dim = key.shape
    group = query.shape[1] // heads
    place = places(valid)
    source, length = real_tokens(valid)
    chunks = triton.cdiv(tokens, chunk)
    parts = triton.cdiv(group, HEADS)
    # In float32 two keys' tiles, high and low parts, do not fit: keys pass in steps, and half as many queries leave them room.
    step, block_m = (16, 32) if key.dtype == torch.float32 else (block_of(dim), 64)
    blocks = triton.cdiv(group * chunk, block_m)
    strides = (*query.stride(), *key.stride(), *((0,) * 4 if value is None else value.stride()))
    paid = key.new_empty((batch, heads, parts, tokens), dtype=torch.float32)
    wrap_triton(_chunk_attention_kernel)[(batch * heads * chunks * parts,)](
        query, key, value, source, length, paid, *strides, heads, tokens, chunks, parts, scale * math.log2(math.e),
        GROUP=group, CHUNK=chunk, BLOCKS=triton.cdiv(blocks, parts),
        DIM=dim, DIM_V=0 if value is None else value.shape[-1], BLOCK_M=block_m, BLOCK_N=block_of(chunk), BLOCK_D=block_of(dim),
        STEP=step, STEP_V=SLICE // key.element_size(), WHOLE=key.dtype != torch.float32, PADDED=valid is not None,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    score = paid.sum(2) if parts > 1 else paid.squeeze(2)
    slot = torch.arange(tokens, device=key.device)
    present = torch.ones_like(slot).view(1, 1, -1) if length is None else slot < length.view(-1, 1, 1)
    score = from_front(pooled(score, present.float(), "avg", pool), place)
    return score if valid is None else score.masked_fill(~valid.unsqueeze(1), 0)


@triton.jit
def _norms(base, slot, live, stride_s, stride_d, DIM: tl.constexpr, STEP: tl.constexpr):
    """Lengths of the rows at `slot`, [len(slot)] float32."""
    squares = tl.zeros((slot.shape[0],), tl.float32)
    for start in tl.static_range(0, DIM, STEP):
        rows = load_rows(base + start * stride_d, slot, live, stride_s, stride_d, DIM - start, STEP).to(tl.float32)
        squares += tl.sum(rows * rows, 1)
    return tl.sqrt(squares)


@triton.jit
def _chunk_attention_kernel(
    query_ptr, key_ptr, value_ptr, source_ptr, length_ptr, paid_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, heads, tokens, chunks, parts, scale,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, STEP_V: tl.constexpr,
    WHOLE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    # The parts of a chunk are neighbours, and so are the chunks of a head: they find each other's rows in the cache.
    part = tl.program_id(0) % parts
    first = tl.program_id(0) // parts % chunks * CHUNK
    row = (tl.program_id(0) // parts // chunks).to(tl.int64)
    batch, head = row // heads, row % heads
    if PADDED:
        source_ptr += batch * tokens
    count = tl.minimum(length_of(length_ptr, batch, tokens, PADDED) - first, CHUNK)  # real tokens of the chunk
    column = tl.arange(0, BLOCK_N)
    live = column < count
    slot = slots_of(source_ptr, first + column, live, PADDED)
    queries = query_ptr + batch * stride_qb + head * GROUP * stride_qh
    keys = key_ptr + batch * stride_kb + head * stride_kh
    if WHOLE:
        key = load_rows(keys, slot, live, stride_ks, stride_kd, DIM, BLOCK_D).T  # before the loop, so that it is stored once
    # Tensor cores leave rows r and r + 8 of a tile in one thread: these two are added before they are kept.
    paid = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    for block in range(BLOCKS if count > 0 else 0):
        # The queries of the group's heads are one list, so that blocks are full in short chunks too.
        item = (part * BLOCKS + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        token = item % CHUNK
        asks = (item < GROUP * CHUNK) & (token < count)
        base = queries + (item // CHUNK).to(tl.int64)[:, None] * stride_qh
        place = slots_of(source_ptr, first + token, asks, PADDED)
        if WHOLE:
            query = load_rows(base, place, asks, stride_qs, stride_qd, DIM, BLOCK_D)
            logits = tl.dot(query, key)
        else:
            logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, DIM, STEP):  # not unrolled, so that keys are read again and not kept
                query = load_rows(base + start * stride_qd, place, asks, stride_qs, stride_qd, DIM - start, STEP)
                key = load_rows(keys + start * stride_kd, slot, live, stride_ks, stride_kd, DIM - start, STEP).T
                logits = tl.dot(query, key, logits, input_precision="tf32x3")
        if count < BLOCK_N:  # most chunks are full and need no mask
            logits = tl.where(live[None], logits, float("-inf"))
        weights = tl.exp2(logits * scale - (tl.max(logits, 1) * scale)[:, None])
        share = tl.where(asks, 1.0 / tl.sum(weights, 1), 0.0)
        weights *= share[:, None]
        paid += tl.sum(weights.reshape(BLOCK_M // 16, 2, 8, BLOCK_N), 1)
    score = tl.sum(paid.reshape(BLOCK_M // 2, BLOCK_N), 0)
    if DIM_V > 0:
        values = value_ptr + batch * stride_vb + head * stride_vh
        score *= _norms(values, slot, live, stride_vs, stride_vd, DIM_V, STEP_V)
    tl.store(paid_ptr + (row * parts + part) * tokens + first + column, score, mask=live)
