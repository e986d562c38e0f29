"""Caches of one small pool that append, compress, evict, fork, choose rows and go, in any order, against plain dictionaries."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import kvfx
from examples import examples
from kvfx.block import Block
from kvfx.block_schedule import evict_blocks, keep_blocks
from kvfx.errors import PoolExhausted
from kvfx.metric import Metric
from kvfx.quota import Quota
from kvfx.ragged_cache import RaggedCache
from schedule_by_definition import schedule

LAYERS, ROWS, HEADS, BLOCK, SINKS, RECENT = 2, 2, 2, 4, 1, 2
STATES = torch.randn(2, 8192, 4, generator=torch.Generator().manual_seed(0))  # the key and the value of each token
SCORE = "attn(q=win(8), mask=causal, over=squares, heads=sum, v=none, pool=none, scale=model)"
Held = list[list[dict[int, tuple[int, float]]]]  # of each row and head of all layers, by position: the token, and its metric
WHICH = st.integers(0, 3)


def policy(tokens: int) -> kvfx.Policy:
    ends = f"protect(sinks={SINKS}, recent={RECENT})"
    return kvfx.Policy.parse(f"{SCORE} | budget=blocks(tokens={max(tokens, SINKS + RECENT)}) | {ends} | when=every(1)")


def granted(tokens: int, seen: int) -> int:
    """Blocks of a row."""
    return -(-LAYERS * HEADS * min(seen, max(tokens, SINKS + RECENT)) // BLOCK)


def worth(numbers: Iterable[float], places: Iterable[int], seen: int) -> list[tuple[float, int]]:
    """Scores and positions of tokens of a row that has seen so many, protected ones at infinity."""
    safe = lambda place: place < SINKS or place >= seen - RECENT  # noqa: E731
    return [(math.inf if safe(place) else number, place) for number, place in zip(numbers, places, strict=True)]


class Blocks(RuleBasedStateMachine):
    """Each token of each head has a key of its own, which says where it went."""

    @initialize(bytes=st.integers(9_000, 20_000))
    def begin(self, bytes: int) -> None:
        self.pool, self.next = kvfx.Pool(bytes=bytes, block_size=BLOCK), 0
        self.all: list[tuple[RaggedCache, Held, int]] = []
        self.random = np.random.default_rng(0)
        self.make()

    @rule()
    def make(self) -> None:
        if len(self.all) < 4:
            cache, like = RaggedCache(pool=self.pool), torch.zeros(1, HEADS, 1, 4)
            made = cache.allocate(dict.fromkeys(range(LAYERS), (like, like)), ROWS)
            cache.layers, cache.lengths_seen = list(made.values()), torch.zeros(ROWS, dtype=torch.long)
            self.all.append((cache, [[{} for _ in range(LAYERS * HEADS)] for _ in range(ROWS)], 0))

    def new(self, count: int) -> np.ndarray:
        """Numbers of new tokens, `[L, B, Hkv, n]`."""
        ids = self.next + np.arange(LAYERS * ROWS * HEADS * count).reshape(LAYERS, ROWS, HEADS, count)
        self.next += ids.size
        return ids % STATES.shape[1]

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.random.random(shape).astype(np.float32)).mul(8).round()  # many are equal

    @rule(which=WHICH, count=st.integers(1, 9))
    def append(self, which: int, count: int) -> None:
        """Write as a graph does: behind what is held, and add to the metric what is paid."""
        at = which % len(self.all)
        cache, held, seen = self.all[at]
        (extents,) = cache.extents
        if extents.metric is None:
            return
        before = [each.clone() for each in (extents.metric.received, extents.pool.keys)]
        try:
            extents.make_room([count] * ROWS)
        except PoolExhausted:
            assert torch.equal(extents.metric.received, before[0])
            assert torch.equal(extents.pool.keys, before[1])
            return
        first, ids = extents.lengths.copy(), self.new(count)
        extents.device_lengths.add_(count)
        extents.grow([count] * ROWS)
        longest = int(extents.lengths.max())
        paid = self.numbers(LAYERS, ROWS, HEADS, longest)
        fresh = torch.arange(longest) >= torch.from_numpy(first)[..., None]
        extents.metric = Metric.of_slots(
            extents.metric.slots(longest).masked_fill(fresh, 0) + paid, extents.lengths, extents.metric.chunk
        )
        for layer, row, head in np.ndindex(LAYERS, ROWS, HEADS):
            tokens = held[row][layer * HEADS + head]
            places = extents.slots(layer)[extents.lengths[layer].flatten()[: row * HEADS + head].sum() :]
            places = torch.from_numpy(places[: extents.lengths[layer, row, head]])
            behind = places[first[layer, row, head] :]
            numbers = ids[layer, row, head]
            self.write(behind, numbers, seen)
            where = self.pool_positions()[places]
            for place, more in zip(where.tolist(), paid[layer, row, head].tolist(), strict=False):
                token, metric = tokens.get(place, (None, 0.0))
                tokens[place] = (int(numbers[place - seen]) if token is None else token, metric + more)
        cache.lengths_seen = cache.lengths_seen + count
        self.all[at] = cache, held, seen + count

    def pool_positions(self) -> torch.Tensor:
        return self.blocks().positions.flatten()

    def blocks(self) -> Any:
        return self.all[0][0].extents[0].pool

    def write(self, places: torch.Tensor, numbers: np.ndarray, seen: int) -> None:
        pool = self.blocks()
        pool.keys.flatten(0, 1)[places], pool.values.flatten(0, 1)[places] = STATES[:, numbers]
        pool.positions.flatten()[places] = torch.arange(seen, seen + len(places), dtype=torch.int32)

    @rule(which=WHICH, count=st.integers(1, 30), tokens=st.integers(1, 12))
    def compress(self, which: int, count: int, tokens: int) -> None:
        at = which % len(self.all)
        cache, held, seen = self.all[at]
        ids, scores = self.new(count), self.numbers(LAYERS, ROWS, HEADS, count)
        positions = torch.arange(seen, seen + count, dtype=torch.int32).expand(ROWS, -1)
        kept = min(count, max(tokens, SINKS + RECENT))
        slots: Any = SimpleNamespace(
            scores=dict(enumerate(scores)), new={index: tuple(STATES[:, ids[index]]) for index in range(LAYERS)},
            positions=positions, valid=None, members=lambda group: list(range(LAYERS)),
        )  # fmt: skip
        block = Block(ROWS, count, torch.device("cpu"), None, [count] * ROWS)
        (extents,) = cache.extents
        lengths, metric = extents.lengths.copy(), extents.metric
        try:
            keep_blocks(cache, slots, block, Quota(None, None, [kept], False, [kept] * ROWS), policy(tokens))
        except PoolExhausted:
            extents.undo(lengths)
            extents.metric = metric
            return
        for row, heads in enumerate(held):
            new = [
                [
                    (math.inf if t < SINKS or t >= count - RECENT else score, t)
                    for t, score in enumerate(scores[layer, row, head].tolist())
                ]
                for layer, head in np.ndindex(LAYERS, HEADS)
            ]
            before = [len(tokens) for tokens in heads]
            added = sum(-(-(n + count) // BLOCK) - -(-n // BLOCK) for n in before)
            gone = schedule(new, before, added - -(-LAYERS * HEADS * kept // BLOCK), BLOCK)
            for number, tokens_of in enumerate(heads):
                layer, head = divmod(number, HEADS)
                for t in set(range(count)) - gone[number]:
                    tokens_of[seen + t] = int(ids[layer, row, head, t]), float(scores[layer, row, head, t])
        cache.lengths_seen = cache.lengths_seen + count
        self.all[at] = cache, held, seen + count

    @rule(which=WHICH, tokens=st.integers(1, 12))
    def evict(self, which: int, tokens: int) -> None:
        cache, held, seen = self.all[which % len(self.all)]
        if cache.extents[0].metric is None:
            return
        used = int((-(-cache.extents[0].lengths // BLOCK)).sum())
        try:
            freed = evict_blocks(cache, policy(tokens))
        except PoolExhausted:
            return  # no room for copies of blocks that others share
        assert used - int((-(-cache.extents[0].lengths // BLOCK)).sum()) == freed
        for heads in held:
            row = [
                [
                    (math.inf if place < SINKS or place >= seen - RECENT else metric, place)
                    for place, (_, metric) in tokens_of.items()
                ]
                for tokens_of in heads
            ]
            blocks = sum(-(-len(tokens_of) // BLOCK) for tokens_of in heads)
            for tokens_of, gone in zip(heads, schedule(row, [0] * len(row), blocks - granted(tokens, seen), BLOCK), strict=True):
                for place in [list(tokens_of)[slot] for slot in gone]:
                    del tokens_of[place]

    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        cache, held, seen = self.all[which % len(self.all)]
        if len(self.all) < 4:
            self.all.append((cache.copy(), copy.deepcopy(held), seen))

    @rule(which=WHICH, index=st.tuples(st.integers(0, 1), st.integers(0, 1)))
    def choose_rows(self, which: int, index: tuple[int, int]) -> None:
        cache, held, _ = self.all[which % len(self.all)]
        cache.batch_select_indices(torch.tensor(index))
        held[:] = [copy.deepcopy(held[row]) for row in index]

    @rule(which=WHICH)
    def free(self, which: int) -> None:
        if len(self.all) > 1:
            self.all.pop(which % len(self.all))

    @invariant()
    def every_slot_holds_what_it_shall(self) -> None:
        pool = self.blocks()
        owners = np.zeros(pool.blocks + 1, dtype=int)
        for cache, held, _ in self.all:
            (extents,) = cache.extents
            np.add.at(owners, extents.blocks, 1)
            metric = None if extents.metric is None else extents.metric.slots(max(1, int(extents.lengths.max())))
            for layer in range(LAYERS):
                places = torch.from_numpy(extents.slots(layer)).split(extents.lengths[layer].flatten().tolist())
                for number, each in enumerate(places):
                    row, head = divmod(number, HEADS)
                    tokens = held[row][layer * HEADS + head]
                    positions = pool.positions.flatten()[each].tolist()
                    assert sorted(positions) == sorted(tokens)
                    ids = [tokens[place][0] for place in positions]
                    assert torch.equal(pool.keys.flatten(0, 1)[each], STATES[0, ids])
                    assert torch.equal(pool.values.flatten(0, 1)[each], STATES[1, ids])
                    if metric is not None:
                        assert metric[layer, row, head, : len(each)].tolist() == [tokens[place][1] for place in positions]
        assert (owners[1:] == pool.owners(np.arange(1, pool.blocks + 1))).all()
        assert pool.free == (owners[1:] == 0).sum()


TestBlocks: Any = Blocks.TestCase
TestBlocks.settings = settings(max_examples=examples(90), stateful_step_count=20, deadline=None)
