"""One step over a cache whose heads hold unequally many slots: make room, run the graph, and take over what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfx.block import Block
from kvfx.block_schedule import evict_blocks, keep_blocks
from kvfx.cache_layer import CacheLayer
from kvfx.cache_step import push_empty_left, took
from kvfx.engine import refused
from kvfx.errors import CacheMismatch, PoolExhausted
from kvfx.passes.cache_write import size_of
from kvfx.passes.capture import mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.passes.report import Stranded, Unscored
from kvfx.policy import Policy
from kvfx.quota import Quota
from kvfx.ragged_cache import RaggedCache
from kvfx.ragged_layer import RaggedLayer
from kvfx.ragged_slots import RaggedSlots
from kvfx.room import Room

if TYPE_CHECKING:
    from kvfx.runner import Inputs, Runner


def run(
    runner: Runner, phase: str, plan: Plan, cache: RaggedCache, windows: Any, block: Block, budget: Quota, inputs: Inputs
) -> Any:
    """A step over blocks. What it writes belongs to nobody before it is over, so one that fails leaves all as it was.

    Where a policy evicts while tokens are generated, that comes first, and stays done if the step fails.
    """
    engine, policy = runner.engine, runner.policy
    if plan.received:
        _check_metric(cache, policy)
        if policy.when.name == "every" and cache.since >= (policy.when.arg or 0):
            evict_blocks(cache, policy)
    work = cache.view()
    if phase == "prefill":
        allocate(work, engine.slots_like(runner.base), windows, block.batch, engine.whole)
    held = [layer.slots for layer in work.layers]
    try:
        room = Room(work, block.lengths, budget, plan)
    except PoolExhausted:
        if not plan.received or not evict_blocks(cache, policy):
            raise
        return run(runner, phase, plan, cache, windows, block, budget, inputs)
    try:
        whole = engine.whole if phase != "prefill" else frozenset()
        slots = traced_view(work, room, plan, budget, whole, (policy.received or (0, 0))[1])
        given = (work.lengths_seen, *inputs, runner.takes_positions)
        out, seen = engine.run(runner.base, phase, plan, runner.on_refuse, slots, *given)
        runner._check_after(phase, plan, work, block)
        took(work, inputs[1].get("input_ids"), block.valid, seen, block.length, held, budget.whole)
        if phase != "decode":
            push_empty_left(work, fixed=engine.whole)
        if plan.later:
            keep_blocks(work, slots, block, budget, policy)
        else:
            room.settle(slots, block.lengths)
    except Unscored as unscored:
        room.give_back()
        engine.whole |= frozenset(unscored.layers)
        if phase != "prefill":
            raise refused(engine.name, unscored) from unscored
        return run(runner, phase, plan, cache, windows, block, budget, inputs)
    except Stranded as stranded:
        room.give_back()
        raise refused(engine.name, stranded) from stranded
    except BaseException:
        room.give_back()
        raise
    finally:
        work.layers = _forgotten_by_traces(work.layers)
    work.since = 0 if plan.later else work.since + block.length
    cache.__dict__.update(work.__dict__)
    return out


def _forgotten_by_traces(layers: Sequence[CacheLayer]) -> list[CacheLayer]:
    """The layers again, as other objects: a trace keeps those that it saw, and their blocks, until garbage is collected."""
    again = [layer.copy() for layer in layers]
    for layer in layers:
        if isinstance(layer, RaggedLayer):
            layer.__dict__.clear()
    return again


def _check_metric(cache: RaggedCache, policy: Policy) -> None:
    if cache.extents and any(extents.metric is None for extents in cache.extents):
        raise CacheMismatch(
            f"when={policy.when} evicts by the attention that slots have received, and this cache, filled under {cache.policy}, "
            "has no record of it. Compress the prompt with this model."
        )


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


def traced_view(cache: RaggedCache, room: Room, plan: Plan, budget: Quota, whole: frozenset[int], buffer: int) -> RaggedSlots:
    """The cache as a graph shall see it."""
    group = {id(extents): number for number, extents in enumerate(cache.extents)}
    where = {index: (group[id(layer.extents)], layer.index) for index, layer in cache.ragged.items()}
    length = None
    if cache.get_seq_length():
        length = size_of(cache.get_seq_length(), cache.lengths_seen.device)
        mark_dynamic(length, 0)
    dense = [layer for index, layer in enumerate(cache.layers) if index not in where]
    start = next((layer.next_position for layer in dense if layer.window is None), None)
    padded, lengths = cache._real is not None, (budget.sizes, budget.counts, length)
    return RaggedSlots(cache.layers, room.blocks(), where, plan, lengths, start, padded, whole, buffer)
