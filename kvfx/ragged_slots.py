"""A cache whose heads hold unequally many slots, as a traced forward sees it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfx.cache_layer import CacheLayer
from kvfx.passes.cache_write import slots_of
from kvfx.passes.plan import Plan, Splice
from kvfx.slot_cache import SlotCache
from kvfx.work_list import chunk_of


class Blocks(NamedTuple):
    """What graphs read and write of the extents of layers that are alike.

    Attributes:
        keys, values, positions: of a pool, see `kvfx.block_pool.BlockPool`.
        table: blocks of each extent, `[L, B, Hkv, m]` int32.
        lengths: slots of each extent, `[L, B, Hkv]` int64.
        work: how attention splits its work, `[L, ...]` each.
        fresh: blocks for what each layer keeps of the new tokens, `[L, R]` int32; None if all is kept, or the choice comes later.
        metric: what attention each slot has received, `[L, n, chunk]` float32, see `kvfx.metric`; None if nobody asks.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    table: Tensor
    lengths: Tensor
    work: tuple[Tensor, ...]
    fresh: Tensor | None
    metric: Tensor | None = None


class RaggedSlots(SlotCache):
    """Layers with a length for each head as a traced forward sees them: as if nothing had been evicted.

    Slots of the pool that are written belong to nobody before the step is over, so that one that fails changes nothing.

    Attributes:
        blocks: of the layers that share a pool and a number of heads.
        where: which of `blocks` holds a layer, and as which of its layers; the others are dense.
        plan: what is evicted.
        buffer: a query counts for what a token has received if it is at least that far behind it.
        kept: after a forward that evicts, slots that each head of a layer has kept, `[B, Hkv]`, by layer.
        new: keys and values that are not stored yet, by layer.
        scores: of new tokens, by layer, where the choice among all layers is made when they are known.
        metric: after a forward under a plan that asks for it, that of `blocks` and of the new tokens.
    """

    layout = "ragged"

    def __init__(
        self,
        layers: list[CacheLayer],
        blocks: list[Blocks],
        where: dict[int, tuple[int, int]],
        plan: Plan,
        lengths: tuple[list[Tensor] | None, list[Tensor] | None, Tensor | None],
        start: Tensor | None,
        padded: bool,
        whole: frozenset[int],
        buffer: int,
    ) -> None:
        super().__init__(layers, *lengths, start, padded, whole)
        self.blocks, self.where, self.plan, self.buffer = blocks, where, plan, buffer
        self.kept: dict[int, Tensor] = {}
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self.scores: dict[int, Tensor] = {}
        self.received: dict[int, tuple[Tensor, Tensor]] = {}
        self.metric: dict[int, Tensor] = {}

    def members(self, group: int) -> list[int]:
        """The layers of one of `blocks`, in order."""
        return [index for index, (owner, _) in self.where.items() if owner == group]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; what attention shall read: everything seen."""
        if layer_idx not in self.where:
            return super().update(key_states, value_states, layer_idx)
        key, value = key_states, value_states
        read = (key, value) if self.length is None else self._read_blocks(key, value, layer_idx)
        if self.sizes is None:
            self.new[layer_idx] = key, value
        elif self.plan.later:
            given = None if self.counts is None else self.counts[0]
            score = torch.ops.kvfx.cache_score(key, value, self.positions, given, layer_idx)
            self.scores[layer_idx], self.layers[layer_idx].finite = score[0], score[2]
            self.new[layer_idx] = key.contiguous(), value.contiguous()  # as `SlotCache.update`
        else:
            self._evict(key, value, layer_idx)
        return read

    def _read_blocks(self, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
        group, place = self.where[index]
        keys, values, positions, table, lengths, work, *_ = self.blocks[group]
        held = slots_of(self.length)  # type: ignore[arg-type]
        given = (
            keys, values, positions, key, value, held + key.shape[2], index, table[place], lengths[place],
            [part[place] for part in work], held - self.seen, chunk_of(keys.shape[1]),
        )  # fmt: skip
        if not self.plan.received:
            return torch.ops.kvfx.ragged_read(*given)
        read_keys, read_values, *self.received[index] = torch.ops.kvfx.ragged_read_received(
            *given, self.positions, self.plan.received, self.buffer
        )
        return read_keys, read_values

    def _evict(self, key: Tensor, value: Tensor, index: int) -> None:
        """Write what is kept of new keys and values to blocks."""
        assert self.sizes is not None
        assert self.positions is not None
        group, place = self.where[index]
        keys, values, positions, table, lengths, _, fresh, _ = self.blocks[group]
        given = None if self.counts is None else self.counts[0]
        first, scores, finite = torch.ops.kvfx.cache_score(key, value, self.positions, given, index)
        splice = self.plan.score if isinstance(self.plan.score, Splice) else None
        share = Fraction(1) if splice is None else splice.share
        chosen, kept = torch.ops.kvfx.select_heads(
            first, None if splice is None else scores, slots_of(self.sizes[0]), given,
            *self.plan.floor.as_integer_ratio(), self.plan.least, *share.as_integer_ratio(),
        )  # fmt: skip
        tokens, size = key.shape[2], keys.shape[1]
        slot = torch.ops.kvfx.place(chosen, kept, lengths[place], table[place], fresh[place], tokens, size)  # type: ignore[index]
        torch.ops.kvfx.pack(keys, values, positions, key, value, self.positions, chosen, slot)
        self.kept[index], self.layers[index].finite = kept, finite

    def end(self, seen: Tensor) -> None:
        """Write new tokens that are all kept, of all layers at once, and count them."""
        assert self.positions is not None
        if self.scores:
            return  # what is kept is not known yet
        for group, (keys, values, positions, table, lengths, *_) in enumerate(self.blocks):
            mine = [index for index in self.members(group) if index in self.new]
            if not mine:
                continue
            if self.received:
                self._add_up(group, mine)
            new_keys, new_values = (torch.stack([self.new[index][part] for index in mine]) for part in range(2))
            batch, length, size = new_keys.shape[1], new_keys.shape[3], keys.shape[1]
            real = torch.ones(batch, length, dtype=torch.long, device=keys.device) if self.valid is None else self.valid.long()
            at = lengths[..., None] + (real.cumsum(-1) - 1)[:, None]  # [L, B, Hkv, S]
            block = table.long().gather(3, (at // size).clamp(0, table.shape[3] - 1))
            slots = torch.arange(at[0, 0].numel(), device=at.device).view(at.shape[2:]).where(real[:, None] > 0, -1)
            torch.ops.kvfx.pack(
                keys, values, positions, new_keys.flatten(0, 1), new_values.flatten(0, 1), self.positions.repeat(len(mine), 1),
                slots.repeat(len(mine), 1, 1).flatten(1), (block * size + at % size).flatten(0, 1).flatten(1),
            )  # fmt: skip
            lengths.add_(real.sum(-1)[:, None])

    def _add_up(self, group: int, mine: list[int]) -> None:
        """Add to the metric what new tokens have paid, and give those a first one."""
        _, _, positions, _, lengths, (owner, _, blocks, merge), _, metric = self.blocks[group]
        assert metric is not None
        assert self.positions is not None
        held, new = (torch.stack([self.received[index][part] for index in mine]) for part in range(2))  # [L, n, C], [L, B, Hkv, S]
        if self.buffer and new.shape[3] == 1:
            latest = (self.positions[:, 0] - self.buffer)[:, None].expand(lengths.shape[1:]).flatten()
            held = held * (positions[blocks].flatten(2) <= latest[owner.long()][..., None])
            new = new * 0
        real = torch.ones_like(self.positions, dtype=torch.long) if self.valid is None else self.valid.long()
        at = lengths[..., None] + (real.cumsum(-1) - 1)[:, None]  # [L, B, Hkv, S]
        chunk = metric.shape[2]
        number = merge.gather(3, (at // chunk).clamp(0, merge.shape[3] - 1)).long()
        layer = torch.arange(len(mine), device=at.device).view(-1, 1, 1, 1)
        place = (layer * metric.shape[1] + number.clamp(min=0)) * chunk + at % chunk
        spare = metric.numel()  # where padding goes
        place = torch.where(real[:, None] > 0, place, spare).flatten()
        total = torch.cat([(metric + held).flatten(), new.new_zeros(1)])
        self.metric[group] = total.scatter(0, place, new.flatten())[:-1].view(metric.shape)
