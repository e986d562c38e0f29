"""Score by the length of the key, in one pass over it."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .tiles_triton import block_of, load_rows, refused

TILE = 8192  # elements of a tile


def refusal(key: Tensor) -> str | None:
    """See `KernelOp.refusal`."""
    return refused(key)


def key_norm(key: Tensor) -> Tensor:
    """Launch the kernel: one program for each tile of tokens of a head.

    Floor: D * itemsize bytes read and 4 written per token and head; 3 flops per element are hidden behind them.
    """
    batch, heads, tokens, dim = key.shape
    score = key.new_empty((batch, heads, tokens), dtype=torch.float32)
    block_d = block_of(dim)
    block_s = TILE // block_d
    grid = (batch * heads * triton.cdiv(tokens, block_s),)
    wrap_triton(_key_norm_kernel)[grid](
        key, score, *key.stride(), heads, tokens, DIM=dim, BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4
    )  # fmt: skip
    return score


@triton.jit
def _key_norm_kernel(
    key_ptr, score_ptr, stride_b, stride_h, stride_s, stride_d, heads, tokens,
    DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_S)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    live = token < tokens
    base = key_ptr + row // heads * stride_b + row % heads * stride_h
    key = load_rows(base, token, live, stride_s, stride_d, DIM, BLOCK_D).to(tl.float32)
    tl.store(score_ptr + row * tokens + token, -tl.sqrt(tl.sum(key * key, 1)), mask=live)
