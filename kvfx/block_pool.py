"""The memory of ragged caches: blocks of slots, handed out, shared and taken back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvfx.errors import InputError, PoolExhausted
from kvfx.passes.capture import mark_dynamic

BLOCK = 16
NOBODY = 0  # the block that is never handed out: where what nobody wants is written


class BlockPool:
    """Blocks of `block_size` slots on one device. Caches of one model may share it; every block has a count of its owners.

    Attributes:
        keys: `[N, P, D]`, N blocks of P slots.
        values: `[N, P, Dv]`.
        positions: RoPE index of each slot's token within its row, `[N, P]` int32. What slots hold that nobody owns means nothing.
        limit: the most blocks that it may grow to, or None.
    """

    def __init__(self, key: Tensor, value: Tensor, block_size: int = BLOCK, limit: int | None = None) -> None:
        """Make an empty pool for slots like those of `key` and `value`, `[..., D]`. It grows when blocks are taken."""
        if block_size < 1 or (limit is not None and limit < 1):
            raise InputError(f"block_size={block_size}, limit={limit}: a pool needs room for at least one slot")
        self.keys, self.values = (like.new_zeros(1, block_size, like.shape[-1]) for like in (key, value))
        self.positions = torch.zeros(1, block_size, dtype=torch.int32, device=key.device)
        self.limit = limit
        self._owners = np.ones(1, dtype=np.int64)
        self._mark()

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        return int(self.positions.shape[1])

    @property
    def blocks(self) -> int:
        """Blocks that there are, owned or free, without the one that is nobody's."""
        return len(self._owners) - 1

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return int((self._owners == 0).sum())

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys, values and positions."""
        return sum(tensor[0].nbytes for tensor in self.tensors())

    def allows(self, count: int) -> bool:
        """Whether `count` more blocks can be owned."""
        return self.limit is None or count <= self.free + self.limit - self.blocks

    def check(self, count: int) -> None:
        """Make sure that `count` more blocks can be owned.

        Raises:
            PoolExhausted: the limit does not allow for so many.
        """
        if self.limit is not None and not self.allows(count):
            raise PoolExhausted(
                f"the pool has {self.limit} blocks of {self.block_size} slots, {self.free + self.limit - self.blocks} of them "
                f"free, and {count} are needed. Nothing was written. Drop caches that share it, keep less, or make it larger."
            )

    def fill_up(self) -> None:
        """Make all blocks that the limit allows, so that the pool never moves."""
        assert self.limit is not None
        self._grow(self.limit - self.blocks)

    def owners(self, blocks: np.ndarray) -> np.ndarray:
        """How many own each block."""
        return self._owners[blocks]

    def take(self, count: int) -> np.ndarray:
        """Own `count` free blocks, consecutive ones if there are; more are made where too few are free.

        Raises:
            PoolExhausted: the limit does not allow for so many. Nothing has changed.
        """
        self.check(count)
        missing = count - self.free
        if missing > 0:
            self._grow(missing)
        free = np.flatnonzero(self._owners == 0)
        run = free[count - 1 :] - free[: len(free) - count + 1] == count - 1 if count else np.zeros(0)
        first = int(run.argmax()) if run.any() else 0
        taken = free[first : first + count]
        self._owners[taken] = 1
        return taken.astype(np.int32)

    def share(self, blocks: np.ndarray) -> None:
        """Own blocks once more that are owned already."""
        np.add.at(self._owners, blocks, 1)

    def release(self, blocks: np.ndarray) -> None:
        """Own blocks no more; those without an owner are free."""
        np.subtract.at(self._owners, blocks, 1)
        assert (self._owners >= 0).all(), "a block was released that nobody owned"

    def copy_blocks(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy what blocks hold to others."""
        if len(source):
            here, there = (torch.from_numpy(blocks.astype(np.int64)).to(self.keys.device) for blocks in (source, target))
            for tensor in self.tensors():
                tensor[there] = tensor[here]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions."""
        return self.keys, self.values, self.positions

    def _grow(self, missing: int) -> None:
        """Make room for `missing` more blocks, and some more, lest it be copied at every turn."""
        wanted = self.blocks + max(missing, self.blocks // 32)
        blocks = wanted if self.limit is None else min(wanted, self.limit)
        for name in ("keys", "values", "positions"):  # one after the other, so that one alone is there twice
            held: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([held, held.new_zeros(max(0, 1 + blocks - len(held)), *held.shape[1:])]))
        self._owners = np.concatenate([self._owners, np.zeros(blocks - self.blocks, dtype=np.int64)])
        self._mark()

    def _mark(self) -> None:
        for tensor in self.tensors():
            mark_dynamic(tensor, 0)
