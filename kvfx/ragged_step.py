"""One step over a cache whose heads hold unequally many slots: make room, run the graph, and take over what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfx.cache_layer import CacheLayer
from kvfx.extents import Extents
from kvfx.passes.cache_write import size_of
from kvfx.passes.capture import mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.quota import Quota
from kvfx.ragged_cache import RaggedCache
from kvfx.ragged_slots import Blocks, RaggedSlots


class Room:
    """Room in a pool for the new tokens of a step, given back if it is not used.

    Attributes:
        before: lengths of each of the cache's extents.
        fresh: of each, blocks for what a step keeps, until they are theirs; empty if it keeps all.
    """

    def __init__(self, cache: RaggedCache, lengths: Sequence[int], budget: Quota) -> None:
        """Make room for `lengths[b]` tokens of each row, or for what `budget` keeps of them.

        Raises:
            PoolExhausted: there is none. Nothing has changed.
        """
        self.extents, self.fresh = cache.extents, list[np.ndarray]()
        self.before = [extents.lengths.copy() for extents in cache.extents]
        try:
            for extents in cache.extents:
                if budget.sizes is None:
                    extents.make_room(lengths)
                else:
                    self.fresh.append(extents.reserve(budget.rows))
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Undo it, and what extents have taken over."""
        for extents, fresh in zip(self.extents, self.fresh, strict=False):
            extents.pool.release(fresh.flatten())
        for extents, lengths in zip(self.extents, self.before, strict=True):
            extents.undo(lengths)

    def blocks(self) -> list[Blocks]:
        """What the graph reads and writes."""
        fresh: list[Any] = [_uploaded(blocks, extents) for blocks, extents in zip(self.fresh, self.extents, strict=False)]
        return [
            Blocks(*extents.pool.tensors(), extents.device_table, extents.device_lengths, tuple(extents.work), new)
            for extents, new in zip(self.extents, fresh or [None] * len(self.extents), strict=True)
        ]

    def settle(self, slots: RaggedSlots, lengths: Sequence[int]) -> None:
        """Account for what the graph has written. One host sync where it chose."""
        if not self.fresh:
            for extents in self.extents:
                extents.grow(lengths)
            return
        kept = [[slots.kept[index] for index in _members(slots.where, group)] for group in range(len(self.extents))]
        for group, (extents, counts) in enumerate(zip(self.extents, kept, strict=True)):
            extents.adopt(torch.stack(counts).cpu().numpy(), self.fresh[group])
            self.fresh[group] = self.fresh[group][:, :0]


def _uploaded(blocks: np.ndarray, extents: Extents) -> Tensor:
    tensor = torch.from_numpy(blocks).to(extents.pool.keys.device)
    mark_dynamic(tensor, 1)
    return tensor


def _members(where: dict[int, tuple[int, int]], group: int) -> list[int]:
    return [index for index, (owner, _) in where.items() if owner == group]


def allocate(
    cache: RaggedCache, like: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int | None], rows: int, whole: frozenset[int]
) -> None:
    """Give an empty cache its layers: with a length for each head where a policy may choose, else dense."""
    chosen = [index for index, window in enumerate(windows) if window is None and index not in whole]
    cache.extents = []
    made = cache.allocate({index: like[index] for index in chosen}, rows)
    cache.layers = [made.get(index) or CacheLayer(window) for index, window in enumerate(windows)]
    cache.lengths_seen = torch.zeros(rows, dtype=torch.long, device=like[0][0].device)
    mark_dynamic(cache.lengths_seen, 0)


def traced_view(cache: RaggedCache, room: Room, plan: Plan, budget: Quota, whole: frozenset[int]) -> RaggedSlots:
    """The cache as a graph shall see it."""
    group = {id(extents): number for number, extents in enumerate(cache.extents)}
    where = {index: (group[id(layer.extents)], layer.index) for index, layer in cache.ragged.items()}
    length = None
    if cache.get_seq_length():
        length = size_of(cache.get_seq_length(), cache.lengths_seen.device)
        mark_dynamic(length, 0)
    dense = [layer for index, layer in enumerate(cache.layers) if index not in where]
    start = next((layer.next_position for layer in dense if layer.window is None), None)
    padded = cache._real is not None
    return RaggedSlots(cache.layers, room.blocks(), where, plan, (budget.sizes, budget.counts, length), start, padded, whole)
