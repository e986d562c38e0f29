"""Score by how far a key points away from the others' common direction, in two passes over the keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .directions import unit
from .tiles_triton import block_of, load_rows, refused

TILE = 8192  # elements of a tile
PIECE = 8  # tiles whose directions are added up before they leave the chip


def refusal(key: Tensor, valid: Tensor | None) -> str | None:
    """See `KernelOp.refusal`."""
    return refused(key)


def key_diff(key: Tensor, valid: Tensor | None) -> Tensor:
    """Launch two kernels: directions are added up in pieces of a row, and each key is held against their sum.

    Pieces are added in order, so that the answer is the same each time.
    Floor: 2 * D * itemsize bytes read and 4 written per token and head; the second pass finds keys of up to 50 MB in the L2 cache.
    """
    batch, heads, tokens, dim = key.shape
    block_d = block_of(dim)
    sizes = {"DIM": dim, "BLOCK_S": TILE // block_d, "BLOCK_D": block_d, "PADDED": valid is not None, "num_warps": 4}
    tiles = triton.cdiv(tokens, sizes["BLOCK_S"])
    pieces = triton.cdiv(tiles, PIECE)
    real = valid if valid is None or valid.stride(1) == 1 else valid.contiguous()
    stride_valid = 0 if real is None else real.stride(0)
    sums = key.new_empty((batch, heads, pieces, dim), dtype=torch.float32)
    wrap_triton(_sum_kernel)[(batch * heads * pieces,)](
        key, real, sums, *key.stride(), stride_valid, heads, tokens, pieces, PIECE=PIECE, **sizes
    )
    common = unit(sums.sum(2))
    score = key.new_empty((batch, heads, tokens), dtype=torch.float32)
    wrap_triton(_cosine_kernel)[(batch * heads * tiles,)](
        key, real, common, score, *key.stride(), stride_valid, heads, tokens, tiles, **sizes
    )
    return score


@triton.jit
def _directions(
    base, valid_ptr, token, tokens, stride_s, stride_d,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Unit keys of some tokens, [BLOCK_S, BLOCK_D] float32; 0 at padding."""
    live = token < tokens
    if PADDED:
        live = live & (tl.load(valid_ptr + token, mask=live, other=0) != 0)
    key = load_rows(base, token, live, stride_s, stride_d, DIM, BLOCK_D).to(tl.float32)
    return key / tl.maximum(tl.sqrt(tl.sum(key * key, 1)), 1e-12)[:, None]


@triton.jit
def _sum_kernel(
    key_ptr, valid_ptr, sum_ptr, stride_b, stride_h, stride_s, stride_d, stride_valid, heads, tokens, pieces,
    PIECE: tl.constexpr, DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    base = key_ptr + row // heads * stride_b + row % heads * stride_h
    if PADDED:
        valid_ptr += row // heads * stride_valid
    total = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(PIECE):
        token = (piece * PIECE + tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        total += tl.sum(_directions(base, valid_ptr, token, tokens, stride_s, stride_d, DIM, BLOCK_D, PADDED), 0)
    column = tl.arange(0, BLOCK_D)
    tl.store(sum_ptr + tl.program_id(0).to(tl.int64) * DIM + column, total, mask=column < DIM)


@triton.jit
def _cosine_kernel(
    key_ptr, valid_ptr, common_ptr, score_ptr, stride_b, stride_h, stride_s, stride_d, stride_valid, heads, tokens, tiles,
    DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    base = key_ptr + row // heads * stride_b + row % heads * stride_h
    if PADDED:
        valid_ptr += row // heads * stride_valid
    directions = _directions(base, valid_ptr, token, tokens, stride_s, stride_d, DIM, BLOCK_D, PADDED)
    column = tl.arange(0, BLOCK_D)
    common = tl.load(common_ptr + row * DIM + column, mask=column < DIM, other=0.0)
    tl.store(score_ptr + row * tokens + token, -tl.sum(directions * common[None], 1), mask=token < tokens)
