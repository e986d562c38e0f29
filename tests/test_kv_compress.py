"""KV-Compress: blocks that are evicted behind a prompt, and again while tokens are generated."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvfx
from decoding import VOCABULARY, fresh_llama
from kvfx.lower import lower_program
from simulated import Simulation

ONCE = "kv_compress(tokens=24)"
FULL = "attn(q=all, mask=causal, over=squares, heads=sum, v=none, pool=none, scale=model, buffer=10)"


@functools.cache
def llama() -> Any:
    return fresh_llama()


@functools.cache
def compiled(policy: str) -> Any:
    return kvfx.compile(llama(), policy, backend="eager")


def text(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left(length: int, *padding: int) -> Tensor:
    return (torch.arange(length) >= torch.tensor(padding)[:, None]).long()


def logits(model: Any, cache: kvfx.Cache, new: Tensor, **options: Any) -> Tensor:
    return model(new, past_key_values=cache, **options).logits[:, -1]


def owned(cache: kvfx.RaggedCache) -> int:
    """Blocks that hold a slot."""
    return sum(int((-(-each.lengths // each.pool.block_size)).sum()) for each in cache.extents)


def held(cache: kvfx.RaggedCache, row: int = 0) -> list[list[tuple[int, ...]]]:
    """Positions of each head of each layer, in order."""
    return [
        [tuple(sorted(place for place in head if place >= 0)) for head in layer.positions[row].tolist()]
        for layer in cache.ragged.values()
    ]


def numbers(cache: kvfx.RaggedCache, row: int = 0) -> list[dict[int, float]]:
    """The metric of each head of all layers, by position."""
    (extents,) = cache.extents
    metric = extents.metric.slots(int(extents.lengths.max()))[:, row].flatten(0, 1)
    positions = extents.pool.positions[extents.device_table[:, row].long()].flatten(2).flatten(0, 1)
    lengths = extents.lengths[:, row].flatten()
    return [
        dict(zip(positions[each, :n].tolist(), metric[each, :n].tolist(), strict=True)) for each, n in enumerate(lengths.tolist())
    ]


def assert_simulated(cache: kvfx.RaggedCache, simulation: Simulation, row: int = 0) -> None:
    """The same tokens stay, and attention has paid the same to them."""
    expected = [[tuple(head.nonzero().flatten().tolist()) for head in layer] for layer in simulation.kept]
    assert held(cache, row) == expected
    paid = torch.cat(simulation.metric)
    for head, each in enumerate(numbers(cache, row)):
        torch.testing.assert_close(torch.tensor(list(each.values())).double(), paid[head, list(each)], rtol=2e-4, atol=1e-7)


# -- against the definition --------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("policy", "granted", "every", "options"),
    [
        ("kv_compress(tokens=24) | when=every(6)", lambda seen: 24, 6, {}),
        ("kv_compress(window=4):0.4 | when=every(1)", lambda seen: seen * 2 // 5, 1, {"window": 4, "recent": 4}),
        (
            f"{FULL} | budget=blocks(tokens=32) | protect(recent=6) | when=every(10)",
            lambda seen: 32,
            10,
            {"window": 10**6, "pool": 1, "buffer": 10, "sinks": 0, "recent": 6},
        ),
        (
            "attn(q=win(5), mask=causal, over=sum, heads=sum, v=none, pool=max(3), scale=model) | budget=blocks(rate=4) "
            "| protect(recent=6) | when=every(9)",
            lambda seen: max(6, seen // 4),
            9,
            {"window": 5, "pool": 3, "power": 1, "sinks": 0, "recent": 6},
        ),
    ],
    ids=["squares", "every token", "all queries", "L1"],
)
def test_decoding_evicts_what_its_definition_evicts(policy, granted, every, options):
    simulation, model = Simulation(fresh_llama(), granted, every, **options), compiled(policy)
    ids, following = text(90), text(60, seed=1)
    cache = model._kvfx.own(None)
    first = model(ids, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(first, simulation.forward(ids), rtol=1e-4, atol=1e-4)
    assert_simulated(cache, simulation)
    for index in range(60):
        new = following[:, index : index + 1]
        torch.testing.assert_close(logits(model, cache, new), simulation.forward(new), rtol=1e-4, atol=1e-4)
        assert cache.since == simulation.since
        slots = -(-4 * max(granted(simulation.seen), 8) // 16)  # of four heads
        assert owned(cache) <= slots + 4 * (1 + every // 16)
    assert_simulated(cache, simulation)


def test_a_block_of_tokens_pays_what_its_tokens_pay_one_by_one():
    model = compiled(f"{ONCE} | when=every(1000)")
    together, apart, new = model.compress(text(90)), model.compress(text(90)), text(30, seed=3)
    one = logits(model, together, new)
    for index in range(30):
        other = logits(model, apart, new[:, index : index + 1])
    torch.testing.assert_close(one, other)
    for ours, theirs in zip(numbers(together), numbers(apart), strict=True):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(torch.tensor(list(ours.values())), torch.tensor([theirs[place] for place in ours]))


def test_without_end_to_wait_for_nothing_is_evicted_again():
    once, ever = compiled(ONCE), compiled(f"{ONCE} | when=every({2**40})")
    ours, theirs = once.compress(text(90)), ever.compress(text(90))
    for seed in range(40):
        assert torch.equal(logits(once, ours, text(1, seed=seed)), logits(ever, theirs, text(1, seed=seed)))
    assert held(ours) == held(theirs)


def test_rows_are_evicted_as_they_are_alone():
    model = compiled(f"{ONCE} | when=every(5)")
    ids, mask, following = text(90, rows=3), left(90, 0, 37, 60), text(20, rows=3, seed=2)
    cache = model.compress(ids, mask)
    out = []
    for index in range(20):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        out.append(logits(model, cache, following[:, index : index + 1], attention_mask=mask))
    for row, padding in enumerate((0, 37, 60)):
        alone = model.compress(ids[row : row + 1, padding:])
        for index in range(20):
            torch.testing.assert_close(logits(model, alone, following[row : row + 1, index : index + 1]), out[index][row : row + 1])
        assert held(cache, row) == held(alone)


# -- memory ------------------------------------------------------------------------------------------------------------------------


def test_memory_falls_by_the_blocks_that_are_scheduled():
    ids, mask = text(100, rows=2), left(100, 0, 30)
    for policy, granted in ((ONCE, (96 // 16,) * 2), ("kv_compress:0.25", (7, 5)), ("kv_compress(rate=2)", (13, 9))):
        cache = compiled(policy).compress(ids, mask)
        for row in range(2):
            lengths = cache.extents[0].lengths[:, row]
            assert int((-(-lengths // 16)).sum()) == granted[row]  # ceil(heads * slots / 16)
        pool = cache.extents[0].pool
        assert pool.blocks - pool.free == sum(granted)
        assert pool.blocks <= sum(granted) + 1  # nothing was taken that had to be given back


@pytest.mark.slow
def test_the_process_holds_as_much_less_as_blocks_are_scheduled():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("resident.py")
    done = subprocess.run([sys.executable, "-P", str(script)], env=environment, capture_output=True, text=True, check=True)
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    (_, whole, held), *others = rows
    assert whole == 2 * 8 * 4096 // 16 * (16 * 2 * 128 * 4 + 16 * 4)
    for rate, blocks, resident in others:
        assert blocks == whole // rate
        assert held - resident == pytest.approx(whole - blocks, rel=0.05)


def test_what_is_evicted_while_decoding_is_free_for_others():
    model = compiled(f"{ONCE} | when=every(40)")
    cache = model.compress(text(90))
    pool, before = cache.extents[0].pool, owned(cache)
    for seed in range(40):
        logits(model, cache, text(1, seed=seed))
    grown = pool.blocks - pool.free
    assert grown > before + 8
    logits(model, cache, text(1))
    assert owned(cache) <= before + 4  # a new block for each head, whose last one is full
    assert pool.blocks - pool.free <= before + 8  # and one ahead


def test_pressure_evicts_where_a_pool_has_no_room():
    limit = 14  # of 16 slots for four heads
    model, plain = compiled(f"{ONCE} | when=pressure"), compiled(ONCE)
    roomy, tight, bare = kvfx.RaggedCache(), kvfx.RaggedCache(limit=limit), kvfx.RaggedCache(limit=limit)
    for each, cache in ((model, roomy), (model, tight), (plain, bare)):
        each.compress(text(90), past_key_values=cache)

    def to_the_end() -> None:
        for seed in range(100):
            logits(plain, bare, text(1, seed=seed))

    with pytest.raises(kvfx.PoolExhausted):
        to_the_end()
    until = bare.get_seq_length()
    for seed in range(100):
        out = logits(model, tight, text(1, seed=seed))
        if tight.get_seq_length() <= until:
            torch.testing.assert_close(out, logits(model, roomy, text(1, seed=seed)))
    assert tight.get_seq_length() == 190
    assert owned(tight) <= limit


def test_copies_go_their_own_way_and_free_no_blocks_of_others():
    model = compiled(f"{ONCE} | when=every(4)")
    cache = model.compress(text(90))
    twin, alone = cache.copy(), model.compress(text(90))
    before, paid = held(cache), numbers(cache)
    for seed in range(30):
        torch.testing.assert_close(logits(model, twin, text(1, seed=seed)), logits(model, alone, text(1, seed=seed)))
    assert (held(cache), numbers(cache)) == (before, paid)
    assert held(twin) == held(alone)
    pool = cache.extents[0].pool
    twin.reset()
    assert pool.blocks - pool.free == owned(cache)


def test_rows_that_beams_choose_take_their_metric_along():
    model = compiled(f"{ONCE} | when=every(3)")
    ids = text(90, rows=2)
    cache = model.compress(ids)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    expected = model.compress(ids[[1, 1, 0]])
    for seed in range(10):
        new = text(1, rows=3, seed=seed)
        torch.testing.assert_close(logits(model, cache, new), logits(model, expected, new))
    assert [held(cache, row) for row in range(3)] == [held(expected, row) for row in range(3)]


def test_generate_evicts_as_it_goes():
    model, ids = compiled(f"{ONCE} | when=every(4)"), text(90, rows=2)
    cache = kvfx.RaggedCache()
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=30)
    assert out.shape == (2, 120)
    assert owned(cache) <= 2 * (6 + 4)
    beams = model.generate(ids, do_sample=False, num_beams=2, max_new_tokens=12)
    assert beams.shape == (2, 102)


def test_files_keep_the_metric(tmp_path):
    model = compiled(f"{ONCE} | when=every(6)")
    cache = model.compress(text(90, rows=2))
    for seed in range(4):
        logits(model, cache, text(1, rows=2, seed=seed))
    cache.save(str(tmp_path / "doc.kvfx"))
    other = kvfx.load_cache(str(tmp_path / "doc.kvfx"))
    for seed in range(10):
        new = text(1, rows=2, seed=20 + seed)
        torch.testing.assert_close(logits(model, other, new), logits(model, cache, new))
    assert held(other, 1) == held(cache, 1)


def test_a_dense_cache_of_it_has_its_slots_in_order():
    model = compiled(f"{ONCE} | when=every(4)")
    cache = model.compress(text(90))
    for seed in range(12):
        logits(model, cache, text(1, seed=seed))
    dense = cache.to("dense")
    for layer in dense.layers:
        assert (layer.positions.diff(dim=-1) >= 0).all()
    new = text(1, seed=99)
    torch.testing.assert_close(logits(compiled("none"), dense, new), logits(compiled("none"), cache, new))


# -- what cannot be ----------------------------------------------------------------------------------------------------------------


def test_a_cache_without_a_record_is_refused():
    cache = compiled("knorm:0.5 | budget=heads(floor=0)").compress(text(40))
    with pytest.raises(kvfx.CacheMismatch, match="has no record of it"):
        logits(compiled(f"{ONCE} | when=every(4)"), cache, text(1))


def test_tokens_whose_payments_are_added_up_cannot_be_cropped():
    model = compiled(f"{ONCE} | when=every(4)")
    cache = model.compress(text(90))
    logits(model, cache, text(3))
    with pytest.raises(kvfx.CacheMismatch, match=r"cannot crop 3 tokens.*their part of it is not known apart"):
        cache.crop(-3)
    once = compiled(ONCE).compress(text(90))
    logits(compiled(ONCE), once, text(3))
    once.crop(-3)
    assert held(once) == held(compiled(ONCE).compress(text(90)))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("knorm:0.5 | when=every(4)", "frees blocks while tokens are generated. Write budget=blocks"),
        ("knorm | budget=blocks(0.5) | when=every(4)", "this score is not such a sum"),
        ("zscore(kv_compress) | budget=blocks(0.5)", "unknown"),
        ("kv_compress | when=every(0)", "when takes prefill or every(n), n an integer >= 1 or pressure"),
        ("kv_compress | when=sometimes", "unknown value of the axis when"),
        ("kv_compress | align=shared", "cannot compete"),
        ("kv_compress | unit=chunk(4)", "a block has one price"),
        ("splice(knorm, keydiff, 0.5) | budget=blocks(0.5)", "a block has one price"),
        ("knorm | budget=blocks(0.5, floor=0.2)", "means nothing in blocks"),
        ("knorm | budget=blocks(rate=0.5)", "rate=8 keeps an eighth"),
        ("knorm | budget=blocks(0.5, rate=2)", "another is given"),
        ("kv_compress(tokens=64, rate=2)", "given two amounts"),
        ("none | when=pressure", "takes no other axis"),
    ],
)
def test_policies_that_make_no_sense_are_refused(policy, said):
    with pytest.raises(kvfx.PolicyError) as error:
        kvfx.Policy.parse(policy)
    assert said in str(error.value)


def test_caches_and_programs_that_cannot_hold_unequal_heads_are_refused():
    for cache in (kvfx.Cache(), kvfx.StaticCache(40, 80)):
        with pytest.raises(kvfx.InputError, match="budget=blocks gives the heads of a layer unequally many slots"):
            compiled(ONCE).compress(text(40), past_key_values=cache)
    with pytest.raises(kvfx.PolicyError, match="how many slots each of the heads wins"):
        lower_program(kvfx.Policy.parse(ONCE))


# -- a pool that caches share ------------------------------------------------------------------------------------------------------


def test_caches_share_the_memory_of_a_pool():
    pool = kvfx.Pool(bytes=40_000)
    model = kvfx.compile(llama(), ONCE, backend="eager", pool=pool)
    first = model.compress(text(90))
    assert pool.bytes - pool.block_bytes < (pool.blocks + 1) * pool.block_bytes <= pool.bytes
    assert pool.blocks - pool.free == owned(first) == 6
    caches = [first]

    def fill() -> None:
        while True:
            caches.append(model.compress(text(90, seed=len(caches))))

    with pytest.raises(kvfx.PoolExhausted, match=f"the pool has {pool.blocks} blocks of 16 slots, {pool.blocks % 6} of them free"):
        fill()
    assert len(caches) == pool.blocks // 6
    for seed, cache in enumerate(caches):
        assert held(cache) == held(compiled(ONCE).compress(text(90, seed=seed)))
    caches.pop().reset()
    assert pool.free == 6 + pool.blocks % 6
    other = kvfx.RaggedCache(pool=pool)
    model.compress(text(90), past_key_values=other)
    assert held(other) == held(first)


def test_a_pool_is_of_one_kind_of_model():
    with pytest.raises(kvfx.InputError, match="two positive whole numbers"):
        kvfx.Pool(bytes=0)
    with pytest.raises(kvfx.PoolExhausted, match="100 bytes hold no block"):
        kvfx.compile(llama(), ONCE, backend="eager", pool=kvfx.Pool(bytes=100)).compress(text(40))
    with pytest.raises(kvfx.InputError, match="takes what the pool has"):
        kvfx.RaggedCache(limit=4, pool=kvfx.Pool(bytes=100))
    pool = kvfx.Pool(bytes=100_000)
    kvfx.compile(llama(), ONCE, backend="eager", pool=pool).compress(text(40))
    wider = fresh_llama(head_dim=32)
    with pytest.raises(kvfx.InputError, match="Give each model a pool of its own"):
        kvfx.compile(wider, ONCE, backend="eager", pool=pool).compress(text(40))


def test_a_pool_divides_its_memory_among_kinds_of_layers():
    pool, like = kvfx.Pool(bytes=100_000, block_size=8), torch.zeros(1, 1, 1, 16)
    kinds = {("a",): (like, like, 2), ("b",): (like[..., :8], like[..., :8], 4)}
    pools = pool.of(kinds)
    assert pools["b",].blocks == pytest.approx(2 * pools["a",].blocks, abs=2)
    used = sum(tensor.nbytes for each in pools.values() for tensor in each.tensors())
    assert 100_000 - pool.block_bytes - 600 < used <= 100_000
    assert (pool.blocks, pool.free) == (sum(each.blocks for each in pools.values()),) * 2


# -- caches that are joined --------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("policy", [ONCE, f"{ONCE} | when=every(4)"])
@pytest.mark.parametrize("lengths", [(90, 90), (90, 60, 33)], ids=str)
def test_joined_rows_say_what_they_say_alone(policy, lengths):
    pool = kvfx.Pool(bytes=400_000)
    model = kvfx.compile(llama(), policy, backend="eager", pool=pool)
    caches = [model.compress(text(length, seed=length)) for length in lengths]
    alone = [cache.copy() for cache in caches]
    joined = kvfx.RaggedCache.join(caches)
    del caches
    for step in range(12):
        new = text(1, rows=len(lengths), seed=step)
        out = logits(model, joined, new)
        for row, cache in enumerate(alone):
            torch.testing.assert_close(out[row : row + 1], logits(model, cache, new[row : row + 1]))
    assert joined.get_seq_length() == max(lengths) + 12
    joined.batch_select_indices(torch.tensor([len(lengths) - 1]))
    assert held(joined) == held(alone[-1])
    torch.testing.assert_close(logits(model, joined, text(1)), logits(model, alone[-1], text(1)))
    joined.reset()
    for cache in alone:
        cache.reset()
    assert pool.free == pool.blocks


def test_caches_that_do_not_belong_together_are_not_joined():
    ours, theirs = compiled(ONCE).compress(text(40)), compiled(ONCE).compress(text(40))
    for caches, said in (
        ([], "expected ragged caches that hold something"),
        ([ours, kvfx.RaggedCache()], "expected ragged caches"),
        ([ours, theirs], "cache 1 has blocks of another pool than cache 0"),
    ):
        with pytest.raises(kvfx.CacheMismatch, match=said):
            kvfx.RaggedCache.join(caches)
