"""The sizes at which kernels are compiled and timed: one layer of Llama-3.1-8B, and what else they must take.

An operator adds its rows here; nothing else names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ragged_problem import half_of
from torch import Tensor

from kvfx.kernels import Dims
from kvfx.work_list import chunk_of, work_list

# As the presets of policies have them.
CHUNK = 256
COLUMNS = 48
WINDOW = 64
KEEP = 0.5
LLAMA = Dims(B=1, Hkv=8, G=4, S=8192, D=128)


@dataclass(frozen=True)
class Sizes:
    """A layer, a prompt and a precision."""

    dims: Dims
    dtype: torch.dtype
    device: str = "meta"
    padded: bool = False

    def valid(self) -> Tensor | None:
        """[B, S] bool where rows are padded."""
        return torch.ones(self.dims.B, self.dims.S, dtype=torch.bool, device=self.device) if self.padded else None

    def counts(self) -> Tensor | None:
        """[B] int64, how many tokens rows keep where they are padded."""
        return torch.full((self.dims.B,), self.kept(), device=self.device) if self.padded else None

    def tensor(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def keys(self) -> Tensor:
        """[B, Hkv, S, D]."""
        return self.tensor(self.dims.B, self.dims.Hkv, self.dims.S, self.dims.D)

    def sketch(self) -> Tensor:
        """[Hkv, D, 48] float32."""
        return torch.randn(self.dims.Hkv, self.dims.D, 48, device=self.device)

    def queries(self) -> Tensor:
        """[B, Hq, S, D]."""
        return self.tensor(self.dims.B, self.dims.Hkv * self.dims.G, self.dims.S, self.dims.D)

    def scores(self) -> Tensor:
        """[B, Hkv, S] float32, whatever the precision of the keys."""
        return torch.randn(self.dims.B, self.dims.Hkv, self.dims.S, device=self.device)

    def rotations(self) -> Tensor:
        """A rotation of each query head, [B, Hq, D, D] float32."""
        return torch.eye(self.dims.D, device=self.device).repeat(self.dims.B, self.dims.Hkv * self.dims.G, 1, 1)

    def positions(self) -> Tensor:
        """[B, S] int32."""
        return torch.arange(self.dims.S, dtype=torch.int32, device=self.device).repeat(self.dims.B, 1)

    def slots(self, heads: int, count: int) -> Tensor:
        """The first of each head, [B, heads, count] int64."""
        return torch.arange(count, device=self.device).repeat(self.dims.B, heads, 1)

    def pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of as many blocks of 16 slots as hold all, and one more."""
        blocks = self.dims.B * self.dims.Hkv * self.dims.S // 16 + 1
        return self.tensor(blocks, 16, self.dims.D), self.tensor(blocks, 16, self.dims.D), self.tensor(blocks, 16).int()

    def written(self) -> tuple[Tensor, Tensor]:
        """Half of the tokens of all heads, and their places in the pool, [B, M] int64."""
        count = self.dims.Hkv * self.kept()
        return self.slots(1, count)[:, 0], torch.arange(16, 16 + self.dims.B * count, device=self.device).reshape(
            self.dims.B, count
        )

    def turns(self) -> Tensor:
        """Cosines and sines of RoPE over all channels, [2, S, D/2] float32."""
        return torch.randn(2, self.dims.S, self.dims.D // 2, device=self.device)

    def moved(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
        """Half of the tokens of each head, to be moved together."""
        return self.keys(), self.keys(), self.positions(), self.slots(self.dims.Hkv, self.kept()), self.padded

    def moved_into(self) -> tuple[Any, ...]:
        """The same, into buffers that have room for all and hold nothing."""
        *rows, _ = self.moved()
        held, length = (torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in (
            ((self.dims.B, self.dims.Hkv, self.dims.S), torch.int32), ((self.dims.B,), torch.int64)
        ))  # fmt: skip
        return self.keys(), self.keys(), held, *rows, self.counts(), length

    def kept(self) -> int:
        """Half of the tokens."""
        return self.dims.S // 2


@dataclass(frozen=True)
class Case:
    """Arguments of an operator.

    Attributes:
        op: name of the operator.
        name: of the sizes and options.
        make: arguments, from sizes.
        sizes: of them.
    """

    op: str
    name: str
    make: Callable[[Sizes], tuple[Any, ...]]
    sizes: Sizes

    def arguments(self) -> tuple[Any, ...]:
        """Of the operator."""
        return self.make(self.sizes)


def blocks_held(sizes: Sizes, size: int = 16) -> tuple[Any, ...]:
    """One query behind a prompt of which heads hold half, unequally many each, in shuffled blocks of `size` slots."""
    B, H, G, S, D = sizes.dims
    lengths = half_of(np.full((1, B, H), S))
    needs = -(-lengths // size)
    order = 1 + np.random.default_rng(0).permutation(needs.sum()).astype(np.int32)
    table = np.zeros((*needs.shape, needs.max()), dtype=np.int32)
    table[np.arange(needs.max()) < needs[..., None]] = order
    chunk = chunk_of(size)
    work = [part[0] for part in work_list(lengths, table, size, chunk)]
    places = [torch.from_numpy(table[0]), torch.from_numpy(lengths[0]), *work, torch.zeros(B, dtype=torch.int64)]
    asks = sizes.tensor(B, H * G, 1, D), sizes.tensor(B, H, 1, D), sizes.tensor(B, H, 1, D)
    pool = [sizes.tensor(1 + len(order), size, D) for _ in range(2)]
    positions = torch.zeros(1 + len(order), size, dtype=torch.int32)
    return *asks, None, *pool, *(x.to(sizes.device) for x in (positions, *places)), chunk, None, None, None


def blocks_masked(sizes: Sizes) -> tuple[Any, ...]:
    """The same with all that can be done to logits."""
    query, key, value, _, *rest = blocks_held(sizes)
    mask = sizes.tensor(sizes.dims.B, query.shape[1], 1, sizes.dims.S + 1)
    return query, key, value, mask, *rest[:-2], 30.0, sizes.tensor(query.shape[1])


def told(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of `ragged_attention`, and the power of probabilities that are summed."""
    *tensors, scale, softcap, sinks = arguments
    return *tensors, 2, scale, softcap, sinks


# Arguments of each operator as policies call it.
MAKE: dict[str, Callable[[Sizes], tuple[Any, ...]]] = {
    "key_norm": lambda sizes: (sizes.keys(),),
    "zscore": lambda sizes: (sizes.scores(), sizes.valid(), 8, 4),
    "key_diff": lambda sizes: (sizes.keys(), sizes.valid()),
    "compact": lambda sizes: sizes.moved(),
    "compact_cast": lambda sizes: (*sizes.moved(), sizes.turns(), False, torch.int8),
    "compact_into": lambda sizes: sizes.moved_into(),
    "pack": lambda sizes: (*sizes.pool(), sizes.keys(), sizes.keys(), sizes.positions(), *sizes.written()),
    "select": lambda sizes: (sizes.scores(), sizes.kept(), sizes.counts()),
    "select_heads": lambda sizes: (sizes.scores(), sizes.scores(), sizes.kept(), sizes.counts(), 1, 5, 1, 1, 2),
    "splice": lambda sizes: (sizes.scores(), sizes.scores(), sizes.kept(), sizes.counts(), 1, 2),
    "redundancy": lambda sizes: (sizes.keys(), sizes.valid()),
    "ragged_attention": blocks_held,
    "ragged_probabilities": lambda sizes: told(blocks_held(sizes)),
    "window_attention": lambda sizes: (
        sizes.queries(), sizes.keys(), None, sizes.valid(), WINDOW, 0, None, "mean", "mean", 5, "avg",
    ),
    "column_attention": lambda sizes: (
        sizes.queries(), sizes.keys(), None, sizes.valid(), None, 0, None, "count", "mean", 1, "avg",
    ),
    "chunk_attention": lambda sizes: (sizes.queries(), sizes.keys(), sizes.keys(), sizes.valid(), CHUNK, 1.0, 3),
    "leverage": lambda sizes: (sizes.keys(), sizes.valid(), sizes.sketch(), 512),
    "expected_attention": lambda sizes: (
        sizes.queries(), sizes.keys(), sizes.rotations(), sizes.keys(), sizes.valid(), 4, True, 0.0, None,
    ),
}  # fmt: skip

SIZES = {
    "bf16": Sizes(LLAMA, torch.bfloat16),
    "padded": Sizes(LLAMA, torch.bfloat16, padded=True),
    "fp32": Sizes(LLAMA, torch.float32),
    "D 32": Sizes(LLAMA._replace(D=32), torch.bfloat16),
    "D 80": Sizes(LLAMA._replace(D=80), torch.float16),
    "D 256": Sizes(LLAMA._replace(D=256), torch.bfloat16),
    "D 256 fp32": Sizes(LLAMA._replace(D=256), torch.float32),
}

RAGGED = {
    "B 8": (blocks_held, LLAMA._replace(B=8)),
    "S 32768": (blocks_held, LLAMA._replace(S=32768)),
    "no groups": (blocks_held, LLAMA._replace(Hkv=32, G=1)),
    "groups of 64": (blocks_held, LLAMA._replace(Hkv=2, G=64)),
    "masked": (blocks_masked, LLAMA),
    "blocks of 48": (lambda sizes: blocks_held(sizes, 48), LLAMA),
}

# The metrics of KV-Compress: squares of 8 queries, or of all but those right behind a key, summed over heads.
SQUARES: dict[str, Callable[[Sizes], tuple[Any, ...]]] = {
    "window_attention": lambda sizes: (
        sizes.queries(), sizes.keys(), None, sizes.valid(), 8, 0, None, "squares", "sum", 7, "max",
    ),
    "column_attention": lambda sizes: (
        sizes.queries(), sizes.keys(), None, sizes.valid(), None, 10, None, "squares", "sum", 1, "avg",
    ),
}  # fmt: skip

CASES = [Case(op, name, make, sizes) for op, make in MAKE.items() for name, sizes in SIZES.items()]
CASES += [Case("ragged_attention", name, make, Sizes(dims, torch.bfloat16)) for name, (make, dims) in RAGGED.items()]
CASES.append(Case("ragged_probabilities", "masked", lambda sizes: told(blocks_masked(sizes)), Sizes(LLAMA, torch.bfloat16)))
CASES += [Case(op, "squares", make, Sizes(LLAMA, torch.bfloat16)) for op, make in SQUARES.items()]
