"""Room in a pool for what a step writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfx.extents import Extents
from kvfx.metric import Metric
from kvfx.passes.capture import mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.quota import Quota
from kvfx.ragged_cache import RaggedCache
from kvfx.ragged_slots import Blocks, RaggedSlots


class Room:
    """Room in a pool for the new tokens of a step, given back if it is not used.

    Attributes:
        before: lengths and metric of each of the cache's extents.
        fresh: of each, blocks for what a step keeps, until they are theirs; empty if it keeps all, or chooses later.
    """

    def __init__(self, cache: RaggedCache, lengths: Sequence[int], budget: Quota, plan: Plan) -> None:
        """Make room for `lengths[b]` tokens of each row, or for what `budget` keeps of them, unless that is chosen later.

        Raises:
            PoolExhausted: there is none. Nothing has changed.
        """
        self.extents, self.fresh = cache.extents, list[np.ndarray]()
        self.before = [(extents.lengths.copy(), extents.metric) for extents in cache.extents]
        try:
            for extents in cache.extents:
                if budget.sizes is None:
                    extents.make_room(lengths)
                elif not plan.later:
                    self.fresh.append(extents.reserve(budget.rows))
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Undo it, and what extents have taken over."""
        for extents, fresh in zip(self.extents, self.fresh, strict=False):
            extents.pool.release(fresh.flatten())
        for extents, (lengths, metric) in zip(self.extents, self.before, strict=True):
            extents.undo(lengths)
            extents.metric = metric

    def blocks(self) -> list[Blocks]:
        """What the graph reads and writes."""
        fresh: list[Any] = [_uploaded(blocks, extents) for blocks, extents in zip(self.fresh, self.extents, strict=False)]
        fresh = fresh or [None] * len(self.extents)
        return [_blocks(extents, new) for extents, new in zip(self.extents, fresh, strict=True)]

    def settle(self, slots: RaggedSlots, lengths: Sequence[int]) -> None:
        """Account for what the graph has written. One host sync where it chose."""
        if not self.fresh:
            for group, extents in enumerate(self.extents):
                extents.grow(lengths)
                if group in slots.metric and extents.metric is not None:
                    extents.metric = Metric(slots.metric[group], extents.metric.merge)
            return
        for group, extents in enumerate(self.extents):
            kept = [slots.kept[index] for index in slots.members(group)]
            extents.adopt(torch.stack(kept).cpu().numpy(), self.fresh[group])
            self.fresh[group] = self.fresh[group][:, :0]


def _blocks(extents: Extents, fresh: Tensor | None) -> Blocks:
    work = tuple(extents.work)  # after which the metric is laid out alike
    metric = None if extents.metric is None else extents.metric.received
    return Blocks(*extents.pool.tensors(), extents.device_table, extents.device_lengths, work, fresh, metric)


def _uploaded(blocks: np.ndarray, extents: Extents) -> Tensor:
    tensor = torch.from_numpy(blocks).to(extents.pool.keys.device)
    mark_dynamic(tensor, 1)
    return tensor
