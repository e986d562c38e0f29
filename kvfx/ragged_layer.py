"""One layer of a cache whose heads hold unequally many slots: a view of what blocks of a pool hold of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvfx.cache_layer import CacheLayer, Rows
from kvfx.extents import Extents

STATE = ("keys", "values", "positions", "lengths")
METRIC = "metric"  # which is there where a policy goes by it


class RaggedLayer(CacheLayer):
    """Keys, values and positions of one layer, layout `ragged`: worked out from the blocks, where other layers store them.

    Attributes:
        extents: those of all layers like it, and `index`, which of them it is.
        tokens: logical length: tokens seen, padding included.
    """

    window = None
    is_initialized = True

    def __init__(self, extents: Extents, index: int) -> None:
        self.extents, self.index = extents, index
        self.tokens = 0
        self.finite: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Slots of each head, `[B, Hkv]` int64."""
        return torch.from_numpy(self.extents.lengths[self.index].copy()).to(self.extents.pool.keys.device)

    @property
    def slots(self) -> int:
        """Physical length: slots of the head that has most."""
        return int(self.extents.lengths[self.index].max())

    @property
    def evicted(self) -> int:  # type: ignore[override]
        """Logical minus physical length."""
        return self.tokens - self.slots

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of keys and values."""
        return self.extents.pool.keys.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the slots are."""
        return self.extents.pool.keys.device

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """A copy of all keys, `[B, Hkv, T, D]`, T being the length of the longest head: empty slots are zero, on the left."""
        return self._padded(self.extents.pool.keys, 0)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """A copy of all values, as of `keys`."""
        return self._padded(self.extents.pool.values, 0)

    @property
    def positions(self) -> Tensor:
        """RoPE index of each slot's token within its row, `[B, Hkv, T]` int32; -1 = empty slot."""
        return self._padded(self.extents.pool.positions[..., None], -1)[..., 0]

    def _padded(self, states: Tensor, empty: int) -> Tensor:
        lengths, size = self.extents.lengths[self.index], self.extents.pool.block_size
        at = np.arange(self.slots) - (self.slots - lengths[..., None])
        block = np.take_along_axis(self.extents.table[self.index], np.maximum(at, 0) // size, 2)
        slot = torch.from_numpy(block.astype(np.int64) * size + np.maximum(at, 0) % size).to(states.device)
        there = torch.from_numpy(at >= 0).to(states.device)
        return states.flatten(0, 1)[slot].masked_fill(~there[..., None], empty)

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, without a slot that nobody fills: `[sum of lengths, D]`, `lengths` `[B, Hkv]`.

        Where a policy goes by it also `metric`, what attention each slot has received, `[sum of lengths]`.
        """
        slots = torch.from_numpy(self.extents.slots(self.index)).to(self.device)
        held = [tensor.flatten(0, 1)[slots] for tensor in self.extents.pool.tensors()]
        state = dict(zip(STATE, (*held, self.lengths), strict=True))
        if self.extents.metric is not None:
            numbers = self.extents.metric.slots(self.slots)[self.index]
            state[METRIC] = numbers[torch.arange(self.slots, device=self.device) < self.lengths[..., None]]
        return state

    def write(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Fill all slots, given as `state` has them."""
        slots = torch.from_numpy(self.extents.slots(self.index)).to(self.device)
        for held, given in zip(self.extents.pool.tensors(), (keys, values, positions), strict=True):
            held.flatten(0, 1)[slots] = given

    def memory(self) -> list[Tensor]:
        """The tensors that it keeps alive."""
        return [*self.extents.pool.tensors(), *self.extents.tensors()]

    def mark(self) -> None:
        """Nothing to do: pool and extents mark their own."""

    def get_seq_length(self) -> int:
        """Logical length."""
        return self.tokens

    def take(self, length: int, held: int, before: Tensor, seen: Tensor, valid: Tensor | None) -> bool:
        """Account for `length` new tokens, whose slots the extents account for."""
        self.tokens += length
        self.finite = None
        return True

    def cut(self, tokens: int, seen: Tensor) -> None:
        """Forget the last `tokens` tokens, whose slots the extents forget."""
        self.tokens -= tokens

    def map_rows(self, rows: Rows) -> None:
        """Nothing to do: extents choose rows for all layers at once."""

    def copy(self) -> RaggedLayer:
        """A layer of the same extents."""
        other = RaggedLayer(self.extents, self.index)
        other.__dict__.update(self.__dict__)
        return other
