"""A step over a ragged cache that fails anywhere leaves it as it was: the same slots, every block owned or free, ready to go on."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx
from transformers.models.llama.modeling_llama import LlamaAttention

import kvfx
from decoding import fresh_llama, tokens
from kvfx import block_schedule, extents, ragged_step, runner
from kvfx.block_pool import BlockPool
from kvfx.block_schedule import evict_blocks
from kvfx.extents import Extents
from kvfx.metric import Metric
from kvfx.passes import capture
from kvfx.ragged_cache import RaggedCache

Step = Callable[[RaggedCache], Any]


class Planted(Exception):
    """What the faults here raise, as a device does that is out of memory."""


class Fault:
    """Raises at the call that is number `at`, once; counts them all."""

    def __init__(self) -> None:
        self.at, self.calls = -1, 0

    def arm(self, at: int) -> None:
        self.at, self.calls = at, 0

    def pass_by(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            self.at = -1
            raise Planted


FAULT = Fault()


class Fragile(fx.Interpreter):
    """Runs a graph, and passes by the fault before and after every write in place."""

    def run_node(self, node: fx.Node) -> Any:
        writes = re.match(r"aten\.\w+_\.", str(node.target))
        if writes:
            FAULT.pass_by()
        out = super().run_node(node)
        if writes:
            FAULT.pass_by()
        return out


class FragileOps:
    """Operators that run behind a graph, which pass by the fault before and after they run."""

    def __getattr__(self, name: str) -> Any:
        return fragile(getattr(torch.ops.kvfx, name))


def fragile(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        FAULT.pass_by()
        out = real(*args, **kwargs)
        FAULT.pass_by()
        return out

    return call


@functools.cache
def compiled() -> Any:
    """Layers of 2 and of 4 KV heads, whose extents share a pool. Two rows, knorm."""
    model = fresh_llama()
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    torch.manual_seed(5)
    model.model.layers[1].self_attn = LlamaAttention(config, 1).eval()
    return kvfx.compile(model, "-knorm | budget=heads(0.5)", backend="eager")


@pytest.fixture(autouse=True)
def fragile_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    FAULT.arm(-1)
    monkeypatch.setitem(capture.BACKENDS, "eager", lambda graph, inputs: lambda *given: Fragile(graph).run(*given))
    monkeypatch.setattr(block_schedule, "ops", FragileOps())  # which run behind graphs


def pools_are_sound(*caches: RaggedCache) -> None:
    """Every block has as many owners as extents hold it; the caches are all that there are."""
    every = [each for cache in caches for each in cache.extents]
    for pool in {id(each.pool): each.pool for each in every}.values():
        held = [each.blocks for each in every if each.pool is pool]
        owners = np.bincount(np.concatenate(held), minlength=pool.blocks + 1)
        assert owners[0] == 0
        assert pool.owners(np.arange(1, pool.blocks + 1)).tolist() == owners[1:].tolist()
        assert pool.free + np.count_nonzero(owners) == pool.blocks


def state(cache: RaggedCache) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in cache.tensors().items()} | cache.about()


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value) if isinstance(value, torch.Tensor) else now[name] == value, name


def alone(cache: RaggedCache) -> RaggedCache:
    """The same slots in a pool of their own."""
    return RaggedCache.of_tensors(state(cache), cache.about())


def prompt(seed: int = 1, length: int = 40) -> RaggedCache:
    return compiled().compress(tokens(2, length, seed=seed))


def forward(length: int, seed: int = 3, model: Callable[[], Any] = compiled) -> Step:
    return lambda cache: model()(tokens(2, length, seed=seed), past_key_values=cache).logits


def compress(length: int = 20, model: Callable[[], Any] = compiled) -> Step:
    return lambda cache: model().compress(tokens(2, length, seed=4), past_key_values=cache)


@functools.cache
def blocks() -> Any:
    """The same, but that all heads compete for blocks, again and again."""
    policy = "kv_compress(window=4) | budget=blocks(tokens=8) | protect(sinks=1) | when=every(1000)"
    return kvfx.compile(compiled()._kvfx.base, policy, backend="eager")


def scheduled() -> RaggedCache:
    return blocks().compress(tokens(2, 40))


def grown() -> RaggedCache:
    """With more blocks than the policy grants."""
    cache = scheduled()
    for seed in range(12):
        forward(1, seed, blocks)(cache)
    return cache


def shared(make: Callable[[], RaggedCache]) -> Callable[[], tuple[RaggedCache, ...]]:
    """With a copy, so that a step parts the blocks that both hold."""

    def both() -> tuple[RaggedCache, ...]:
        cache = make()
        return cache, cache.copy()

    return both


# What is done, to which caches, of which the first is stepped and the others share its pool.
STEPS: dict[str, tuple[Step, Callable[[], tuple[RaggedCache, ...]]]] = {
    "prefill": (compress(40), lambda: (RaggedCache(),)),
    "compress": (compress(), lambda: (prompt(),)),
    "compress a copy": (compress(), shared(prompt)),
    "several tokens": (forward(21), lambda: (prompt(),)),
    "several tokens of a copy": (forward(21), shared(prompt)),
    "one token": (forward(1), lambda: (prompt(),)),
    "one token of a copy": (forward(1), shared(prompt)),
    "prefill, blocks": (compress(40, blocks), lambda: (RaggedCache(),)),
    "compress, blocks": (compress(20, blocks), lambda: (scheduled(),)),
    "one token, blocks": (forward(1, model=blocks), lambda: (scheduled(),)),
    "several tokens of a copy, blocks": (forward(21, model=blocks), shared(scheduled)),
}


def check_every_fault(name: str) -> int:
    """Let the step fail at one place after the other, and compare; return how many places there were."""
    step, make = STEPS[name]
    caches = make()
    cache, before = caches[0], [state(each) for each in caches]
    step(make()[0])  # builds its graphs
    twin = alone(cache) if not cache.is_empty else RaggedCache()
    expected, follow = step(twin), forward(1, seed=9)
    after = follow(twin)
    for place in range(10_000):
        FAULT.arm(place)
        try:
            out = step(cache)
        except Planted:
            for each, was in zip(caches, before, strict=True):
                assert_same(state(each), was)
            pools_are_sound(*caches)
            continue
        break
    FAULT.arm(-1)
    assert out is cache or torch.equal(out, expected)
    torch.testing.assert_close(follow(cache), after)
    pools_are_sound(*caches)
    for each, was in zip(caches[1:], before[1:], strict=True):
        assert_same(state(each), was)
    return place


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if "copy" in name else name for name in STEPS])
def test_a_graph_that_fails_between_its_writes_changes_nothing(name):
    assert check_every_fault(name) >= 6


@contextmanager
def fragile_host(monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str) -> Iterator[None]:
    """Pass by the fault before every call; after it too, where nothing is returned that somebody would have to give back."""
    real = getattr(owner, attribute)

    def call(*args: Any, **kwargs: Any) -> Any:
        FAULT.pass_by()
        out = real(*args, **kwargs)
        if owner is not Extents:
            FAULT.pass_by()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, call)
        patch.setattr(Fragile, "run_node", fx.Interpreter.run_node)
        patch.setattr(block_schedule, "ops", torch.ops.kvfx)
        yield


HOST = [
    (BlockPool, "_grow"), (BlockPool, "copy_blocks"), (Extents, "make_room"), (Extents, "reserve"), (Extents, "adopt"),
    (Extents, "grow"), (Extents, "_uploaded"), (extents, "work_list"), (ragged_step, "traced_view"),
    (runner.Runner, "_check_after"), (ragged_step, "took"), (ragged_step, "push_empty_left"),
]  # fmt: skip


@pytest.mark.sample(4)
@pytest.mark.parametrize(("owner", "attribute"), HOST, ids=lambda value: getattr(value, "__name__", value).rpartition(".")[2])
def test_a_host_that_fails_around_a_step_changes_nothing(owner, attribute, monkeypatch):
    places = 0
    for name in STEPS:
        with fragile_host(monkeypatch, owner, attribute):
            places += check_every_fault(name)
    assert places


EVICTION = [(block_schedule, "_by_extents"), (BlockPool, "copy_blocks"), (BlockPool, "_grow"), (Extents, "part"), (Metric, "_cut")]


@pytest.mark.parametrize("make", [lambda: (grown(),), shared(grown)], ids=["alone", "a copy"])
@pytest.mark.parametrize(("owner", "attribute"), EVICTION, ids=lambda value: getattr(value, "__name__", value).rpartition(".")[2])
def test_an_eviction_that_fails_leaves_a_cache_old_or_new(owner, attribute, make, monkeypatch):
    caches, policy, places = make(), blocks()._kvfx.policy, 0
    cache, before = caches[0], [state(each) for each in caches]
    twin = alone(cache)
    assert evict_blocks(twin, policy) > 0
    real = vars(owner)[attribute]
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, classmethod(fragile(real.__func__)) if owner is Metric else fragile(real))
        while True:
            FAULT.arm(places)
            try:
                evict_blocks(cache, policy)
            except Planted:
                for each, was in zip(caches, before, strict=True):
                    assert_same(state(each), was)
                pools_are_sound(*caches)
                places += 1
                continue
            break
    FAULT.arm(-1)
    assert places >= (0 if owner in (BlockPool, Extents) else 2)
    assert_same(state(cache), state(twin) | {"limit": cache.limit})
    pools_are_sound(*caches)
    for each, was in zip(caches[1:], before[1:], strict=True):
        assert_same(state(each), was)
    torch.testing.assert_close(forward(1, 9, blocks)(cache), forward(1, 9, blocks)(twin))


def test_a_pool_too_small_for_a_prompt_leaves_the_cache_empty():
    cache = RaggedCache(limit=20)
    with pytest.raises(kvfx.PoolExhausted, match="20 blocks of 16 slots"):
        compress(60)(cache)
    assert cache.is_empty
    assert (cache.extents, cache.ids, cache.get_seq_length()) == ([], None, 0)
    compress(20)(cache)
    assert_same(state(cache), state(compress(20)(RaggedCache(limit=20))))
    pools_are_sound(cache)


def test_decoding_ends_where_the_pool_does_and_goes_on_once_another_cache_is_gone():
    cache = compress(40)(RaggedCache(limit=48))
    other = cache.copy()
    before = state(cache), state(other)

    def decode(steps: int) -> None:
        nonlocal before
        for index in range(steps):
            forward(1)((cache, other)[index % 2])
            before = state(cache), state(other)

    with pytest.raises(kvfx.PoolExhausted):
        decode(200)
    assert cache.get_seq_length() > 40
    assert_same(state(cache), before[0])
    assert_same(state(other), before[1])
    pools_are_sound(cache, other)
    twin = RaggedCache.of_tensors(before[0], {**cache.about(), "limit": None})
    other.reset()
    pools_are_sound(cache)
    for new in (1, 1, 5):
        torch.testing.assert_close(forward(new, seed=7)(cache), forward(new, seed=7)(twin))
    pools_are_sound(cache)


@pytest.mark.parametrize("held", [RaggedCache, prompt], ids=["prefill", "compress"])
def test_scores_that_are_not_finite_change_nothing(held):
    weight, cache = compiled()._kvfx.base.model.layers[1].self_attn.k_proj.weight, held()
    twin = cache.copy()
    before, row = state(cache), weight[0].detach().clone()
    weight.data[0] = torch.inf
    try:
        with pytest.raises(kvfx.InputError, match=r"not finite in layers \[1\]"):
            compress()(cache)
    finally:
        weight.data[0] = row
    assert_same(state(cache), before)
    pools_are_sound(cache, twin)
    assert_same(state(compress()(cache)), state(compress()(twin)))
    pools_are_sound(cache, twin)
