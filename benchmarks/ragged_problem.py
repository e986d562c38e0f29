"""Attention of one token to heads that hold unequally many slots: what is asked, and what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LAYERS = 4
WORK = 2**27  # bytes of keys and values of all tokens that one timed run goes through, so that it takes milliseconds
SHORTEST, LONGEST = 0.10, 0.95  # what a head keeps, of its tokens


@dataclass(frozen=True)
class Shape:
    """Rows, query heads, KV heads and channels of a layer."""

    rows: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    def repeats(self, length: int) -> int:
        """Steps that are timed together."""
        return max(1, WORK // (LAYERS * 2 * self.rows * self.kv_heads * self.dim * length * self.dtype.itemsize))


class Problem:
    """Queries, keys and values of a few layers, and how many slots each head holds, the new token's among them.

    Attributes:
        queries: of each layer, [B, Hq, 1, D].
        keys: of each layer, [B, Hkv, S, D]; of those that a head does not keep the last ones are dropped.
        values: as `keys`.
    """

    def __init__(self, shape: Shape, length: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, tokens: int) -> list[Tensor]:
            size = (shape.rows, heads, tokens, shape.dim)
            return [torch.randn(size, generator=generator).to(shape.dtype) for _ in range(LAYERS)]

        self.shape, self.length = shape, length
        self.queries, self.keys, self.values = draw(shape.heads, 1), draw(shape.kv_heads, length), draw(shape.kv_heads, length)
        self.full = np.full((LAYERS, shape.rows, shape.kv_heads), length)

    def drawn(self) -> np.ndarray:
        """Lengths that are half of `full` in the mean of each row of each layer, `[L, B, Hkv]`."""
        return half_of(self.full)

    def slots(self, states: Sequence[Tensor], layer: int, lengths: np.ndarray) -> Tensor:
        """Those of `keys` or `values` that heads hold, head behind head, [sum of lengths, D]."""
        held = states[layer].flatten(0, 1)
        return torch.cat([head[:length] for head, length in zip(held, lengths[layer].flatten().tolist(), strict=True)])


def half_of(full: np.ndarray) -> np.ndarray:
    """Lengths of extents, `[L, B, Hkv]`, that are half of `full`, the same for all, in the mean of each row of each layer."""
    if full.shape[2] == 1:
        return full // 2
    apart = np.random.default_rng(0).uniform(-1, 1, full.shape)
    apart -= apart.mean(2, keepdims=True)
    room = np.where(apart > 0, LONGEST - 0.5, SHORTEST - 0.5)
    lengths = 0.5 + apart * (room / apart).min(2, keepdims=True)  # so that one head is as long, or as short, as may be
    lengths = (lengths * full).astype(np.int64)
    lengths[..., 0] += full.sum(2) // 2 - lengths.sum(2)  # what rounding has lost
    return lengths


def after(query: Tensor, outs: list[Tensor]) -> Tensor:
    """A layer's query, which needs what the layer before has given."""
    return query + outs[-1] if outs else query


def seen(lengths: Tensor, longest: int) -> Tensor:
    """Which slots heads hold, where all have room for as many, [B, Hkv, 1, T]."""
    return torch.arange(longest) < lengths[..., None, None]


def definition(problem: Problem, layer: int, query: Tensor, lengths: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Attention of each head to the slots that it holds, as it is defined, in `dtype`."""
    shape = problem.shape
    asks = query.to(dtype).view(shape.rows, shape.kv_heads, -1, shape.dim)
    logits = asks @ problem.keys[layer].to(dtype).mT * shape.dim**-0.5
    logits = logits.masked_fill(~seen(torch.from_numpy(lengths[layer]), problem.length), -torch.inf)
    return (logits.softmax(-1) @ problem.values[layer].to(dtype)).view(query.shape)
