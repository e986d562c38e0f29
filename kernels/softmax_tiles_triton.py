"""What the kernels of a causal softmax share: which queries ask, which tiles are taken, and how two tiles are multiplied.

Of a product of queries and keys one tile stays on the chip while tiles of the others stream past it. Tokens go by their rank among
a row's real ones, so that padding is not met at all.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles_triton
from .tiles_triton import block_of, length_of, real_tokens

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


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
        return (self.query.shape[-1] ** -0.5 if self.scale is None else self.scale) * LOG2_E.value

    def options(self, held: int, streamed: int, stages: int) -> dict[str, int | bool]:
        """Constants of both kernels, and warps and stages."""
        dim = self.query.shape[-1]
        block_d = min(32, block_of(dim)) if self.query.dtype == torch.float32 else block_of(dim)
        return {
            "GROUPS": self.groups, "DIM": dim, "BLOCK_D": block_d, "HELD": held, "STREAMED": streamed,
            "PADDED": self.slots is not None, "num_warps": 8 if held >= 128 else 4, "num_stages": stages,
        }  # fmt: skip


def refused(query: Tensor, key: Tensor, scale: float | None) -> str | None:
    """Why the columns of such queries and keys are not computed here; None if they are."""
    if query.dtype != key.dtype:
        return f"queries are {query.dtype} and keys {key.dtype}"
    if scale is not None and scale <= 0:
        return f"the scale {scale} is not positive"
    return tiles_triton.refused(query, key)


def asked_of(query: Tensor, key: Tensor, valid: Tensor | None, window: int, scale: float | None) -> Asked:
    """The last `window` queries of each row."""
    return Asked(query, key, *real_tokens(valid), window, scale)


def tiles_of(query: Tensor) -> tuple[int, int]:
    """How many tokens stay on the chip, and how many stream past.

    256 and 64 rows of 128 channels of 16 bits leave room for two programs in 227 KB, one of which computes exponentials while the
    other multiplies; a product of theirs takes 64 registers of a thread. Of float32 nothing stays: see `product`.
    """
    return 256 if query.dtype != torch.float32 and query.shape[-1] <= 128 else 128, 64


@triton.jit
def row_of(length_ptr, batch, tokens, window, PADDED: tl.constexpr):
    """A row of the batch: its length, how many of its queries ask, and the rank of the first."""
    length = length_of(length_ptr, batch, tokens, PADDED)
    asking = tl.minimum(length, window)
    return length, asking, length - asking


@triton.jit
def channels_of(base, offset, live, channel, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels of the tokens at these offsets, [len(offset), BLOCK_D]; 0 where `live` is false and behind the last."""
    column = channel + tl.arange(0, BLOCK_D)
    return tl.load(base + offset[:, None] + column[None] * stride, mask=live[:, None] & (column < DIM)[None], other=0.0)


@triton.jit
def hold(base, offset, live, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile that stays on the chip; where none does, something that is not read."""
    if BLOCK_D >= DIM:
        return channels_of(base, offset, live, 0, stride, DIM, BLOCK_D)
    else:
        return offset


@triton.jit
def product(
    held, held_base, held_offset, held_live, held_stride, base, offset, live, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Products of the tokens that stay with those that stream past, float32 [len(held_offset), len(offset)].

    Tensor cores multiply float32 as three pairs of shorter numbers. The pairs of a whole tile do not fit into registers, so both
    tiles are read again some channels at a time.
    """
    if BLOCK_D >= DIM:
        return tl.dot(held, tl.trans(channels_of(base, offset, live, 0, stride, DIM, BLOCK_D)), input_precision="tf32x3")
    else:
        total = tl.zeros((held_offset.shape[0], offset.shape[0]), tl.float32)
        for channel in range(0, DIM, BLOCK_D):
            left = channels_of(held_base, held_offset, held_live, channel, held_stride, DIM, BLOCK_D)
            right = channels_of(base, offset, live, channel, stride, DIM, BLOCK_D)
            total = tl.dot(left, tl.trans(right), total, input_precision="tf32x3")
        return total
