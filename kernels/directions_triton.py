"""Directions of keys, in two passes over them: added up, and held against what their sum is made into."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .tiles_triton import block_of, load_rows

TILE = 8192  # elements of a tile
PIECE = 8  # tiles whose directions are added up before they leave the chip


def sums(key: Tensor, valid: Tensor | None) -> Tensor:
    """Sum of the unit keys of each row and head, [B, Hkv, D] float32; see `unit_keys`.

    Pieces of a row are added in order, so that the answer is the same each time.
    """
    batch, heads, tokens, dim = key.shape
    sizes = _sizes(key, valid)
    # Two at least, although one may hold the row: tracing specialises sizes of 1, and one graph shall serve all lengths.
    pieces = torch.sym_max(2, triton.cdiv(triton.cdiv(tokens, sizes["BLOCK_S"]), PIECE))
    total = key.new_empty((batch, heads, pieces, dim), dtype=torch.float32)
    wrap_triton(_sum_kernel)[(batch * heads * pieces,)](
        key, *_flags(valid), total, *key.stride(), heads, tokens, pieces, PIECE=PIECE, **sizes
    )
    return total.sum(2)


def products(key: Tensor, valid: Tensor | None, common: Tensor, others: bool = False) -> Tensor:
    """Dot product of each unit key with `common`, [B, Hkv, D] float32, from which `others` takes the key's own: [B, Hkv, S]."""
    batch, heads, tokens, _ = key.shape
    sizes = _sizes(key, valid)
    tiles = triton.cdiv(tokens, sizes["BLOCK_S"])
    product = key.new_empty((batch, heads, tokens), dtype=torch.float32)
    wrap_triton(_product_kernel)[(batch * heads * tiles,)](
        key, *_flags(valid), common, product, *key.stride(), heads, tokens, tiles, OTHERS=others, **sizes
    )
    return product


def _sizes(key: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """What kernels are compiled for."""
    dim = key.shape[3]
    block_d = block_of(dim)
    return {"DIM": dim, "BLOCK_S": TILE // block_d, "BLOCK_D": block_d, "PADDED": valid is not None, "num_warps": 4}


def _flags(valid: Tensor | None) -> tuple[Tensor | None, int]:
    """Flags of tokens side by side, and how far apart those of two rows are."""
    real = valid if valid is None or valid.stride(1) == 1 else valid.contiguous()
    return real, 0 if real is None else real.stride(0)


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
    key_ptr, valid_ptr, stride_valid, sum_ptr, stride_b, stride_h, stride_s, stride_d, heads, tokens, pieces,
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
def _product_kernel(
    key_ptr, valid_ptr, stride_valid, common_ptr, product_ptr, stride_b, stride_h, stride_s, stride_d, heads, tokens, tiles,
    OTHERS: tl.constexpr, DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    base = key_ptr + row // heads * stride_b + row % heads * stride_h
    if PADDED:
        valid_ptr += row // heads * stride_valid
    directions = _directions(base, valid_ptr, token, tokens, stride_s, stride_d, DIM, BLOCK_D, PADDED)
    column = tl.arange(0, BLOCK_D)
    common = tl.load(common_ptr + row * DIM + column, mask=column < DIM, other=0.0)[None]
    if OTHERS:
        common = common - directions
    tl.store(product_ptr + row * tokens + token, tl.sum(directions * common, 1), mask=token < tokens)
