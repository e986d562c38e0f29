"""Whole blocks, shared out among all heads of all layers: after a prompt, and again while tokens are generated (KV-Compress).

A schedule says which slots go so that each row frees the blocks it is to free where that costs least (`kernels.schedule_blocks`).
After a prompt it comes before anything is written, so only what stays takes blocks. Later the slots that stay are moved together,
and the blocks behind them are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfx.block import Block
from kvfx.extents import Extents
from kvfx.metric import Metric
from kvfx.policy import PREFILL, Policy
from kvfx.quota import Quota
from kvfx.ragged_cache import RaggedCache
from kvfx.ragged_slots import RaggedSlots
from kvfx.work_list import chunk_of

ops = torch.ops.kvfx


def keep_blocks(cache: RaggedCache, slots: RaggedSlots, block: Block, budget: Quota, policy: Policy) -> None:
    """Write what is kept of new tokens to blocks. One host sync, for the number of slots of each head.

    Args:
        cache: the tokens' own; extents that fail to be written are for the caller to undo.
        slots: after a forward, with keys, values and scores of the new tokens, which are given up layer by layer.
        block: the new tokens.
        budget: slots that each row keeps of them, in the mean over heads.
        policy: that of the model.

    Raises:
        PoolExhausted: there are not so many blocks.
    """
    if not cache.extents:
        return
    size, groups = cache.block_size, range(len(cache.extents))
    scores = torch.cat([torch.stack([slots.scores[index] for index in slots.members(g)], 1).flatten(1, 2) for g in groups], 1)
    held = np.concatenate([_by_row(extents.lengths) for extents in cache.extents], 1)  # [B, U]
    needed = -(-(held + np.array(block.lengths)[:, None]) // size) - -(-held // size)
    evictions = needed.sum(1) - _blocks_kept(budget.rows, held.shape[1], size)
    protected, _ = ops.protect(scores, slots.valid, policy.protect.sinks, policy.protect.recent)
    device = scores.device
    kept, counts = ops.schedule_blocks(protected, None, _sent(held, device), _sent(evictions, device), size)
    new = _by_extents(counts.cpu().numpy(), cache.extents)
    for extents, count in zip(cache.extents, new, strict=True):
        extents.claim(count)
    flags = _by_extents(kept, cache.extents)
    numbers = _by_extents(scores, cache.extents)
    for group, (extents, count) in enumerate(zip(cache.extents, new, strict=True)):
        before = torch.from_numpy(extents.lengths.copy()).to(device)
        for place, index in enumerate(slots.members(group)):
            longest = int(count[place].sum(1).max())
            where = ops.place_kept(flags[group][place], before[place], extents.device_table[place], longest, size)
            ops.pack(*extents.pool.tensors(), *slots.new.pop(index), slots.positions, *where)
        extents.written(count)
        if policy.when != PREFILL:
            extents.metric = _metric_of_kept(extents, flags[group], before, numbers[group])


def evict_blocks(cache: RaggedCache, policy: Policy) -> int:
    """Let each row go down to the blocks that the policy grants it, by what attention its slots have received.

    Two host syncs, one more where blocks are shared with other caches. A failure leaves the cache as it was.

    Returns:
        Blocks that were freed; 0 where rows hold no more than they may.

    Raises:
        PoolExhausted: slots would move into blocks that other caches share, and there is no room for copies.
    """
    size, device = cache.block_size, cache.lengths_seen.device
    held = np.concatenate([_by_row(extents.lengths) for extents in cache.extents], 1)  # [B, U]
    seen = cache.lengths_seen.tolist()
    wanted = [policy.counts(length, len(cache.layers))[0] for length in seen]
    evictions = (-(-held // size)).sum(1) - _blocks_kept(wanted, held.shape[1], size)
    if (evictions <= 0).all():
        cache.since = 0
        return 0
    numbers, positions = _numbers_and_positions(cache)
    first = cache.lengths_seen - policy.protect.recent
    there = torch.arange(numbers.shape[2], device=device) < _sent(held, device)[..., None]
    safe = (positions < policy.protect.sinks) | (positions >= first[:, None, None])
    scores = numbers.masked_fill(safe, torch.inf).masked_fill(~there, -torch.inf)
    kept, counts = ops.schedule_blocks(scores, positions, torch.zeros_like(_sent(held, device)), _sent(evictions, device), size)
    groups = (_by_extents(each, cache.extents) for each in (kept, counts.cpu().numpy(), numbers))
    edits = [Edit(*each) for each in zip(cache.extents, *groups, strict=True)]
    try:
        for edit in edits:
            edit.move()
    except BaseException:
        for edit in edits:
            edit.undo()
        raise
    cache.croppable = cache.since = 0
    return sum(edit.commit() for edit in edits)


class Edit:
    """Slots of the extents of one pool that move together, until the blocks behind them are given back.

    Attributes:
        extents: those.
        kept: which slots stay, `[L, B, Hkv, T]` bool.
        lengths: how many of each extent, `[L, B, Hkv]`.
        numbers: the metric of all slots, `[L, B, Hkv, T]`.
    """

    def __init__(self, extents: Extents, kept: Tensor, lengths: np.ndarray, numbers: Tensor) -> None:
        self.extents, self.kept, self.lengths, self.numbers = extents, kept, lengths, numbers
        self._written: tuple[Tensor, list[Tensor]] | None = None  # places of the pool, and what they held
        self._metric: Metric | None = None

    def move(self) -> None:
        """Move what stays to the first slots of its extent, in the pool and in the metric's copy."""
        extents, size = self.extents, self.extents.pool.block_size
        most = int(np.minimum(extents.lengths - self.lengths, self.lengths).sum())
        flat = self.numbers.reshape(-1)
        if most:
            self._part_from_others()
            table = extents.device_table.flatten(0, 2)
            moves, places = ops.block_moves(self.kept.flatten(0, 2), table, most, size)
            real = moves[0] >= 0
            pool = extents.pool.tensors()
            self._written = places[1], [tensor.flatten(0, 1)[places[1]] for tensor in pool]
            keys, values, positions = (tensor.flatten(0, 1) for tensor in pool)
            sources = torch.where(real, places[0], -1)[None]
            ops.pack(*pool, keys[None, None], values[None, None], positions[None], sources, places[1][None])
            spare = flat.numel()  # where those go that are none
            moved = torch.cat([flat, flat.new_zeros(1)])
            flat = moved.scatter(0, torch.where(real, moves[1], spare), flat[moves[0].clamp(min=0)])[:-1]
        self._metric = Metric.of_slots(flat.view(self.numbers.shape), self.lengths, chunk_of(size))

    def _part_from_others(self) -> None:
        """Own copies of those shared blocks that slots move into."""
        shared = self.extents.shared()
        if not shared.any():
            return
        size, (blocks,) = self.extents.pool.block_size, shared.shape[3:]
        slot = torch.arange(self.kept.shape[3], device=self.kept.device)
        gaps = ~self.kept & (slot < _sent(self.lengths, slot.device)[..., None])
        whole = torch.nn.functional.pad(gaps, (0, max(0, blocks * size - len(slot))))[..., : blocks * size]
        touched = whole.unflatten(3, (blocks, size)).any(-1).cpu().numpy()
        if (shared & touched).any():
            self.extents.part(np.nonzero(shared & touched))

    def undo(self) -> None:
        """Put back what the moves wrote over."""
        if self._written is not None:
            places, rows = self._written
            for tensor, row in zip(self.extents.pool.tensors(), rows, strict=True):
                tensor.flatten(0, 1)[places] = row

    def commit(self) -> int:
        """Give back the blocks behind what stays, and return how many of them held slots."""
        size = self.extents.pool.block_size
        freed = -(-self.extents.lengths // size) - -(-self.lengths // size)
        self.extents.metric = self._metric
        self.extents.undo(self.lengths)
        return int(freed.sum())


def _numbers_and_positions(cache: RaggedCache) -> tuple[Tensor, Tensor]:
    """The metric and the positions of all slots, `[B, U, T]`; anything behind those that are held."""
    tokens = max(int(extents.lengths.max()) for extents in cache.extents)
    numbers, positions = list[Tensor](), list[Tensor]()
    for extents in cache.extents:
        assert extents.metric is not None
        numbers.append(extents.metric.slots(tokens).transpose(0, 1).flatten(1, 2))
        at = extents.pool.positions[extents.device_table.long()].flatten(3)
        at = torch.nn.functional.pad(at, (0, max(0, tokens - at.shape[3])))[..., :tokens]
        positions.append(at.transpose(0, 1).flatten(1, 2))
    return torch.cat(numbers, 1), torch.cat(positions, 1)


def _metric_of_kept(extents: Extents, kept: Tensor, before: Tensor, numbers: Tensor) -> Metric:
    """The metric of extents to which kept new tokens were written, behind `before` slots that they had."""
    tokens, chunk = int(extents.lengths.max()), chunk_of(extents.pool.block_size)
    if extents.metric is None:
        base = numbers.new_zeros(*numbers.shape[:3], tokens)
    else:
        base = extents.metric.slots(tokens)
    place = torch.where(kept, before[..., None] + kept.cumsum(-1) - 1, tokens)
    base = torch.nn.functional.pad(base, (0, 1)).scatter(3, place, numbers)
    return Metric.of_slots(base[..., :-1], extents.lengths, chunk)


def _blocks_kept(slots: Sequence[int], heads: int, size: int) -> np.ndarray:
    """Blocks of a row whose heads, of all layers, keep so many slots each in the mean, `[B]`."""
    return -(-heads * np.array(slots) // size)


def _by_row(lengths: np.ndarray) -> np.ndarray:
    """`[L, B, Hkv]` as `[B, L * Hkv]`."""
    return lengths.swapaxes(0, 1).reshape(lengths.shape[1], -1)


def _by_extents(rows: Any, extents: Sequence[Extents]) -> list[Any]:
    """Cut `[B, U, ...]` into `[L, B, Hkv, ...]` of each of the extents."""
    parts, first = [], 0
    for each in extents:
        layers, batch, heads = each.lengths.shape
        part = rows[:, first : first + layers * heads]
        parts.append(part.reshape(batch, layers, heads, *rows.shape[2:]).swapaxes(0, 1))
        first += layers * heads
    return parts


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
