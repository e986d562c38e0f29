"""What Triton kernels share: which tiles they take, and how a tile of tokens is read.

A tile is some tokens of one head, `BLOCK_D` channels wide: a power of two, at least 16, as matrix units want. Programs are
numbered along one axis, which is the only one that may be long. Addresses are 64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # kernels run on tensors of the CPU, to be tested
MAX_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refused(*tensors: Tensor | None) -> str | None:
    """Why tiles are not made of tensors like these, [..., D]; None if they are."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{tensor.dtype} is not one of float32, bfloat16 and float16"
        if tensor.shape[-1] > MAX_DIM:
            return f"{tensor.shape[-1]} channels are more than {MAX_DIM}"
    return None


def block_of(channels: int) -> int:
    """Channels of a tile that holds so many."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def load_rows(base, rows, live, stride_row, stride_column, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix at `base`, [len(rows), BLOCK_D], in its own type; 0 where `live` is false and behind its last column."""
    column = tl.arange(0, BLOCK_D)
    offset = rows.to(tl.int64)[:, None] * stride_row + column[None] * stride_column
    return tl.load(base + offset, mask=live[:, None] & (column < COLUMNS)[None], other=0.0)


@triton.jit
def length_of(length_ptr, batch, tokens, PADDED: tl.constexpr):
    """Real tokens of a row."""
    if PADDED:
        return tl.load(length_ptr + batch).to(tl.int32)
    return tokens


@triton.jit
def slots_of(source_ptr, token, live, PADDED: tl.constexpr):
    """Where a row's real tokens stand; `source_ptr` is at the row's list of them, see `rows.sources`."""
    if PADDED:
        return tl.load(source_ptr + token, mask=live, other=0)
    else:  # so that Triton does not see both returns, whose types differ
        return token
