"""What Triton kernels share: which tiles they take, and how a tile of tokens is read.

A tile is some tokens of one head, `BLOCK_D` channels wide: a power of two, at least 16, as matrix units want. Programs are
numbered along one axis, which is the only one that may be long. Addresses are 64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import places, sources

INTERPRETED = triton.knobs.runtime.interpret  # kernels run on tensors of the CPU, to be tested
MAX_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def type_refused(tensor: Tensor) -> str | None:
    """Why kernels do not compute with a tensor's type; None if they do."""
    return None if tensor.dtype in DTYPES else f"{tensor.dtype} is not one of float32, bfloat16 and float16"


def refused(*tensors: Tensor | None) -> str | None:
    """Why tiles are not made of tensors like these, [..., D]; None if they are."""
    for tensor in tensors:
        if tensor is None:
            continue
        if (reason := type_refused(tensor)) is not None:
            return reason
        if tensor.shape[-1] > MAX_DIM:
            return f"{tensor.shape[-1]} channels are more than {MAX_DIM}"
    return None


def real_tokens(valid: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What `slots_of` and `length_of` read: slots of each row's tokens, real ones first, [B, S], and lengths, [B].

    Both are int64 and contiguous; None and None where every token is real.
    """
    place = places(valid)
    if valid is None or place is None:
        return None, None
    return sources(place).contiguous(), valid.sum(-1)


def block_of(channels: int) -> int:
    """Channels of a tile that holds so many."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def load_rows(base, rows, live, stride_row, stride_column, COLUMNS, BLOCK_D: tl.constexpr):
    """Rows of a matrix at `base`, [len(rows), BLOCK_D], in its own type; 0 where `live` is false and behind its last column."""
    column = tl.arange(0, BLOCK_D)
    offset = rows.to(tl.int64)[:, None] * stride_row + column[None] * stride_column
    return tl.load(base + offset, mask=live[:, None] & (column < COLUMNS)[None], other=0.0)


@triton.jit
def length_of(length_ptr, batch, tokens, PADDED: tl.constexpr):
    """Real tokens of a row."""
    if PADDED:
        return tl.load(length_ptr + batch).to(tl.int32)
    else:  # both branches return, as a compiled function has one type
        return tokens


@triton.jit
def slots_of(source_ptr, token, live, PADDED: tl.constexpr):
    """Where a row's real tokens stand; `source_ptr` is at the row's list of them, see `rows.sources`."""
    if PADDED:
        return tl.load(source_ptr + token, mask=live, other=0)
    else:
        return token
