"""Blocks of a pool and who owns them, and attention to them: a state machine against plain lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfx.block_pool import BlockPool
from kvfx.errors import PoolExhausted
from kvfx.extents import Extents
from kvfx.kernels.ragged_attention import ragged_attention
from kvfx.work_list import chunk_of
from yardstick import assert_within_rounding

STATES = torch.randn(2, 4096, 4, generator=torch.Generator().manual_seed(0))  # the key and the value of each token
Held = list[list[list[list[int]]]]  # what each layer, row and head holds
ROWS = st.tuples(st.integers(0, 1), st.integers(0, 1))


class Blocks(RuleBasedStateMachine):
    """Extents of a small pool against lists of the tokens that each shall hold; the pool's positions say which they are."""

    @initialize(lengths=st.lists(st.integers(0, 9), min_size=8, max_size=8), limit=st.none() | st.integers(24, 60))
    def fill(self, lengths: list[int], limit: int | None) -> None:
        self.pool, self.next = BlockPool(STATES[0, :1], STATES[1, :1], block_size=4, limit=limit), 0
        extents = Extents(self.pool, 2, 2, 2)
        extents.fill(np.array(lengths).reshape(2, 2, 2))
        self.all: list[tuple[Extents, Held]] = [(extents, [[[[] for _ in range(2)] for _ in range(2)] for _ in range(2)])]
        self.write(0, extents.lengths)

    def write(self, which: int, counts: np.ndarray) -> None:
        """Fill new slots as a graph does, only behind what was there; and attend to all, as the next one does."""
        (extents, held), first = self.all[which], self.next
        for layer, numbers in enumerate(counts):
            for row, pair in enumerate(numbers):
                for head, count in enumerate(pair.tolist()):
                    held[layer][row][head] += range(self.next, self.next + count)
                    self.next += count
            flat = torch.tensor([token for row in held[layer] for head in row for token in head], dtype=torch.int32)
            slots = torch.from_numpy(extents.slots(layer))
            slots, new = slots[flat >= first], flat[flat >= first].long()
            self.pool.positions.view(-1)[slots] = new.int()
            self.pool.keys.flatten(0, 1)[slots], self.pool.values.flatten(0, 1)[slots] = STATES[:, new]
        for layer in range(2):
            assert_attends(extents, layer, held[layer])

    def of(self, which: int) -> int:
        return which % len(self.all)

    @rule(which=st.integers(0, 3), new=st.tuples(st.integers(0, 6), st.integers(0, 6)))
    def append(self, which: int, new: tuple[int, int]) -> None:
        extents, _ = self.all[self.of(which)]
        try:
            extents.make_room(new)
        except PoolExhausted:
            return
        extents.device_lengths.add_(torch.tensor(new)[:, None])  # which the graph does
        extents.grow(new)
        self.write(self.of(which), np.broadcast_to(np.array(new)[None, :, None], (2, 2, 2)))

    @rule(which=st.integers(0, 3), kept=st.tuples(st.integers(0, 5), st.integers(0, 5)), share=st.integers(0, 10))
    def compress(self, which: int, kept: tuple[int, int], share: int) -> None:
        extents, _ = self.all[self.of(which)]
        try:
            reserved = extents.reserve(kept)
        except PoolExhausted:
            return
        counts = np.array([[[min(share, 2 * n), 2 * n - min(share, 2 * n)] for n in kept]] * 2)
        extents.adopt(counts, reserved)
        self.write(self.of(which), counts)

    @rule(which=st.integers(0, 3))
    def give_up(self, which: int) -> None:
        extents, _ = self.all[self.of(which)]
        try:
            extents.pool.release(extents.reserve((3, 4)).flatten())
            extents.make_room((5, 2))
        except PoolExhausted:
            pass
        extents.undo()

    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        extents, held = self.all[self.of(which)]
        if len(self.all) < 4:
            self.all.append((extents.fork(), [[[list(head) for head in row] for row in layer] for layer in held]))

    @rule(which=st.integers(0, 3), index=ROWS)
    def choose_rows(self, which: int, index: tuple[int, int]) -> None:
        extents, held = self.all[self.of(which)]
        extents.rows(index)
        for layer in held:
            layer[:] = [[list(head) for head in layer[row]] for row in index]

    @rule(which=st.integers(0, 3), tokens=st.integers(0, 3))
    def cut(self, which: int, tokens: int) -> None:
        extents, held = self.all[self.of(which)]
        tokens = min(tokens, int(extents.lengths.min()))
        extents.cut(tokens)
        for head in (head for layer in held for row in layer for head in row):
            del head[len(head) - tokens :]

    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        if len(self.all) > 1:
            self.all.pop(self.of(which))

    @invariant()
    def extents_hold_what_they_shall(self) -> None:
        owners = np.zeros(self.pool.blocks + 1, dtype=int)
        for extents, held in self.all:
            for layer in range(2):
                flat = [token for row in held[layer] for head in row for token in head]
                assert self.pool.positions.view(-1)[torch.from_numpy(extents.slots(layer))].tolist() == flat
            assert (extents.blocks > 0).all()
            np.add.at(owners, extents.blocks, 1)
        assert (owners[1:] == self.pool.owners(np.arange(1, self.pool.blocks + 1))).all()
        assert self.pool.limit is None or self.pool.blocks <= self.pool.limit


def assert_attends(extents: Extents, layer: int, held: list[list[list[int]]]) -> None:
    """Attention over blocks is that over the keys and values of the tokens held, and of a new one."""
    query, (key, value) = STATES[0, -8:].view(2, 4, 1, 4), STATES[:, -12:-8].view(2, 2, 2, 1, 4)
    places = extents.device_table[layer], extents.device_lengths[layer], *(part[layer] for part in extents.work)
    pool = extents.pool.tensors()
    out = ragged_attention(query, key, value, None, *pool, *places, torch.zeros(2, dtype=torch.long), chunk_of(4), None)
    for row, head in np.ndindex(2, 4):
        tokens = held[row][head // 2]
        keys = torch.cat([STATES[0, tokens], key[row, head // 2]])
        values = torch.cat([STATES[1, tokens], value[row, head // 2]])
        low, exact = (
            torch.softmax(keys.to(dtype) @ query[row, head, 0].to(dtype) / 2, 0) @ values.to(dtype)
            for dtype in (torch.float32, torch.float64)
        )
        assert_within_rounding(out[row, head, 0], low, exact)


TestBlocks: Any = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_consecutive_blocks_are_preferred():
    pool = BlockPool(torch.zeros(1, 1), torch.zeros(1, 1))
    taken = pool.take(10)
    pool.release(taken[[1, 4, 5, 6]])
    assert pool.take(3).tolist() == taken[[4, 5, 6]].tolist()
    assert pool.take(1).tolist() == [taken[1]]
    assert pool.free == 0
