"""Caches whose heads hold unequally many slots: they hold what was chosen and nothing else, and every edit keeps it so."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import kvfx
from decoding import GREEDY, VOCABULARY, fresh_llama, prefill, tokens
from kvfx.engine import engine_of
from kvfx.passes.capture import pytree
from test_windows import mixed

HEADS = "-knorm | budget=heads(0.5)"


@functools.cache
def llama() -> Any:
    return fresh_llama()


@functools.cache
def compiled(policy: str = HEADS) -> Any:
    return kvfx.compile(llama(), policy, backend="eager")


def left(length: int, *padding: int) -> Tensor:
    return (torch.arange(length) >= torch.tensor(padding)[:, None]).long()


def logits(model: Any, cache: kvfx.Cache, new: Tensor, **options: Any) -> Tensor:
    return model(new, past_key_values=cache, **options).logits[:, -1]


def assert_same_slots(a: kvfx.Cache, b: kvfx.Cache) -> None:
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def owned(cache: kvfx.RaggedCache) -> int:
    return cache.extents[0].pool.blocks - cache.extents[0].pool.free


# -- what is kept ------------------------------------------------------------------------------------------------------------------


def test_heads_of_a_layer_share_their_slots_by_the_largest_scores():
    ids = tokens(2, 40)
    cache = compiled().compress(ids)
    for layer, (keys, values) in zip(cache.layers, prefill(llama(), ids), strict=True):
        scores = -keys.norm(dim=-1)
        kept = scores >= scores.flatten(1).topk(2 * 20).values[:, -1, None, None]
        assert torch.equal(layer.lengths, kept.sum(-1))
        assert layer.lengths.unique().numel() > 1  # else the heads did not compete
        state = layer.state()
        torch.testing.assert_close(state["keys"], keys[kept])
        torch.testing.assert_close(state["values"], values[kept])
        assert torch.equal(state["positions"].long(), torch.arange(40).expand_as(kept)[kept])


def test_memory_is_that_of_the_slots_held():
    cache = compiled().compress(tokens(2, 60))
    slots = sum(int(layer.lengths.sum()) for layer in cache.layers)
    whole = kvfx.compile(llama(), "none", backend="eager").compress(tokens(2, 60))
    assert slots == 2 * 2 * 2 * 30
    assert owned(cache) == sum(int((-(-layer.lengths // 16)).sum()) for layer in cache.layers)
    pool = cache.extents[0].pool
    assert pool.blocks <= owned(cache) + 2 * 4  # of what was reserved, before it was known who takes it
    assert cache.nbytes < whole.nbytes


@pytest.mark.sample(1)
@pytest.mark.parametrize("policy", [HEADS, "adakv(window=4):0.5"])
def test_every_turn_attends_to_the_slots_held(policy):
    model = compiled(policy)
    cache = model.compress(tokens(2, 40))
    dense = cache.to("dense")
    for new in (tokens(2, 1, seed=5), tokens(2, 1, seed=6), tokens(2, 7, seed=7), tokens(2, 1, seed=8)):
        torch.testing.assert_close(logits(model, cache, new), logits(model, dense, new))
    assert_same_slots(cache.to("dense"), dense)
    model.compress(tokens(2, 20, seed=9), past_key_values=cache)
    assert [int(layer.lengths.sum()) for layer in cache.layers] == [2 * 2 * (20 + 10 + 10)] * 2
    assert cache.get_seq_length() == 70
    dense = cache.to("dense")
    torch.testing.assert_close(logits(model, cache, tokens(2, 1, seed=10)), logits(model, dense, tokens(2, 1, seed=10)))


def test_a_padded_row_keeps_what_it_keeps_alone():
    ids, mask = tokens(2, 40), left(40, 13, 0)
    cache = compiled().compress(ids, mask)
    more, follow = torch.cat([mask, left(6, 2, 0)], 1), tokens(2, 6, seed=4)
    out = compiled()(follow, attention_mask=more, past_key_values=cache).logits[:, -1]
    last = compiled()(follow[:, :1], attention_mask=torch.cat([more, left(1, 0, 0)], 1), past_key_values=cache).logits[:, -1]
    for row, start, begin in ((0, 13, 2), (1, 0, 0)):
        alone = compiled().compress(ids[row : row + 1, start:])
        torch.testing.assert_close(logits(compiled(), alone, follow[row : row + 1, begin:]), out[row : row + 1])
        torch.testing.assert_close(logits(compiled(), alone, follow[row : row + 1, :1]), last[row : row + 1])
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            assert torch.equal(ours.lengths[row], theirs.lengths[0])


@pytest.mark.slow
def test_a_head_may_keep_nothing():
    """All scores of one head are lower than those of the other: it is left with what comes."""
    model = fresh_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[:16] *= 20
    small = kvfx.compile(model, "-knorm | budget=heads(0.25)", backend="eager")
    cache = small.compress(tokens(1, 40))
    assert cache.layers[0].lengths.tolist() == [[0, 20]]
    dense = cache.to("dense")
    for new in (tokens(1, 1, seed=5), tokens(1, 5, seed=6)):
        torch.testing.assert_close(logits(small, cache, new), logits(small, dense, new))


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [3, 100, 256])
def test_blocks_may_have_any_size(block_size):
    """Also one that goes into no piece of attention's work evenly, or is larger than one."""
    cache = kvfx.RaggedCache(block_size=block_size)
    ids = torch.randint(1, VOCABULARY, (1, 1000), generator=torch.Generator().manual_seed(0))
    compiled().compress(ids, past_key_values=cache)
    dense = cache.to("dense")
    for new in (tokens(1, 1, seed=5), tokens(1, 1, seed=6)):
        torch.testing.assert_close(logits(compiled(), cache, new), logits(compiled(), dense, new))


@pytest.mark.slow
def test_equal_budgets_fill_a_ragged_cache_with_what_they_fill_a_dense_one():
    model, ragged = compiled("knorm:0.5"), kvfx.RaggedCache()
    model.compress(tokens(2, 40), past_key_values=ragged)
    assert_same_slots(ragged, model.compress(tokens(2, 40)))


@pytest.mark.slow
def test_windows_stay_dense_beside_heads():
    model = kvfx.compile(mixed(), HEADS, backend="eager", on_refuse="error")
    cache = model.compress(tokens(1, 20))
    assert sorted(cache.ragged) == [index for index, layer in enumerate(cache.layers) if layer.window is None] != []
    dense = cache.to("dense")
    for length in (1, 1, 5, 1):
        new = tokens(1, length, seed=length + 40)
        torch.testing.assert_close(logits(model, cache, new), logits(model, dense, new))


# -- edits -------------------------------------------------------------------------------------------------------------------------


def test_copies_share_blocks_until_one_grows():
    cache = compiled().compress(tokens(1, 40))
    before, kept = owned(cache), cache.to("dense")
    twin = cache.copy()
    assert owned(cache) == before
    logits(compiled(), twin, tokens(1, 3, seed=3))
    assert_same_slots(cache, kept)
    del twin
    gc.collect()  # the first step of its kind was traced, and a trace has cycles
    assert owned(cache) == before


def test_rows_are_chosen_repeated_and_cropped():
    cache = compiled().compress(tokens(2, 40))
    dense = cache.to("dense")
    for held in (cache, dense):
        held.reorder_cache(torch.tensor([1, 0]))
        held.batch_repeat_interleave(2)
        logits(compiled(), held, tokens(4, 6, seed=3))
        held.crop(-4)
        held.batch_select_indices(torch.tensor([3, 1]))
    assert_same_slots(cache.to("dense"), dense)
    new = tokens(2, 1, seed=4)
    torch.testing.assert_close(logits(compiled(), cache, new), logits(compiled(), dense, new))
    with pytest.raises(kvfx.CacheMismatch, match="cannot crop 4 tokens: 3 came after"):
        cache.crop(-4)
    cache.reset()
    assert cache.is_empty


def test_generate_makes_a_ragged_cache_and_goes_on_from_one():
    ids = tokens(2, 40)
    out = compiled().generate(ids, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, kvfx.RaggedCache)
    cache = compiled().compress(ids[:, :-1])
    dense = cache.to("dense")
    for options in (GREEDY, {**GREEDY, "num_beams": 2}):
        ours, theirs = (compiled().generate(ids, past_key_values=held.copy(), **options) for held in (cache, dense))
        assert torch.equal(ours, theirs)


def test_files_and_trees_keep_what_heads_hold(tmp_path):
    cache = compiled().compress(tokens(2, 40))
    logits(compiled(), cache, tokens(2, 3, seed=3))
    cache.save(str(tmp_path / "doc.kvfx"))
    leaves, spec = pytree.tree_flatten(cache)
    for other in (kvfx.load_cache(str(tmp_path / "doc.kvfx")), pytree.tree_unflatten(leaves, spec), cache.to("dense").to("ragged")):
        assert isinstance(other, kvfx.RaggedCache)
        assert_same_slots(other, cache)
        new = tokens(2, 1, seed=4)
        torch.testing.assert_close(logits(compiled(), other, new), logits(compiled(), cache.copy(), new))
    shapes = pytree.tree_map(lambda tensor: tuple(tensor.shape), cache)
    assert shapes.lengths_seen == (2,)


def test_engines_read_blocks():
    cache = compiled().compress(tokens(2, 40))
    paged = cache.paged(1)
    for row in range(2):
        for head in range(2):
            length = int(paged.lengths[row, head])
            blocks = paged.table[row, head, : -(-length // 16)].long()
            assert 0 not in blocks
            held = paged.keys[blocks].flatten(0, 1)[:length]
            torch.testing.assert_close(held, cache.layers[1].keys[row, head, -length:])


# -- what cannot be ----------------------------------------------------------------------------------------------------------------


def test_a_pool_without_room_refuses_and_everything_stays_readable():
    cache = kvfx.RaggedCache(limit=14)
    compiled().compress(tokens(1, 40), past_key_values=cache)
    kept, free = cache.to("dense"), cache.extents[0].pool.free
    with pytest.raises(kvfx.PoolExhausted, match="14 blocks of 16 slots"):
        logits(compiled(), cache, tokens(1, 60, seed=3))
    with pytest.raises(kvfx.PoolExhausted):
        compiled().compress(tokens(1, 60, seed=3), past_key_values=cache)
    assert cache.extents[0].pool.free == free
    assert_same_slots(cache, kept)
    torch.testing.assert_close(logits(compiled(), cache, tokens(1, 1)), logits(compiled(), kept, tokens(1, 1)))


def test_a_step_that_fails_leaves_the_cache_as_it_was():
    model = fresh_llama(num_hidden_layers=1)
    small = kvfx.compile(model, HEADS, backend="eager")
    cache = small.compress(tokens(1, 40))
    kept, blocks = cache.to("dense"), owned(cache)
    weight = model.model.layers[0].self_attn.k_proj.weight
    before = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(kvfx.InputError, match="not finite in layers"):
        small.compress(tokens(1, 30, seed=3), past_key_values=cache)
    weight.data.copy_(before)
    assert (owned(cache), cache.get_seq_length()) == (blocks, 40)
    assert_same_slots(cache, kept)
    torch.testing.assert_close(logits(small, cache, tokens(1, 1)), logits(small, kept, tokens(1, 1)))


def test_what_cannot_hold_unequal_heads_is_refused():
    for cache in (kvfx.Cache(), kvfx.StaticCache(40, 80)):
        with pytest.raises(kvfx.InputError, match="budget=heads gives the heads of a layer unequally many slots"):
            compiled().compress(tokens(1, 40), past_key_values=cache)
    with pytest.raises(kvfx.InputError, match="layers unequally many slots"):
        compiled("-knorm | budget=layers(0.5)").compress(tokens(1, 40), past_key_values=kvfx.RaggedCache())
    with pytest.raises(kvfx.CacheMismatch, match="no stock model can read"):
        llama()(tokens(1, 1), past_key_values=compiled().compress(tokens(1, 40)))
    with pytest.raises(kvfx.CacheMismatch, match="heads of a row hold unequally many"):
        compiled().compress(tokens(1, 40)).to("static", capacity=60, tokens=90)


def test_the_graphs_of_a_prompt_and_of_a_step_serve_all_lengths_and_numbers_of_rows():
    model = kvfx.compile(fresh_llama(), HEADS, backend="eager")
    for rows, length in ((2, 40), (5, 23), (3, 55)):
        cache = model.compress(tokens(rows, length, seed=rows))
        for new in range(20):
            logits(model, cache, tokens(rows, 1, seed=new))
    built = {key.phase: len(reports) for key, reports in model._kvfx.engine.reports.items()}
    assert built["prefill"] <= 2
    assert built["decode"] <= 2


@pytest.mark.slow
@pytest.mark.inductor
def test_one_compiled_step_serves_all_lengths_and_makes_nothing_of_the_size_of_the_pool():
    base = fresh_llama(num_hidden_layers=1)
    quick, model = (kvfx.compile(base, HEADS, backend=backend) for backend in ("eager", "inductor"))
    prompts = [quick.compress(tokens(2, length, seed=length)) for length in (40, 57)]
    for cache in (*prompts, quick.compress(tokens(2, 23, seed=3), past_key_values=prompts[1].copy())):
        first, twin = len(cache.extents[0].pool.keys), cache.copy()
        for index in range(150):  # over the ends of blocks, and of the pieces that attention works on
            new = tokens(2, 1, seed=index)
            ours, theirs = logits(model, cache, new), logits(quick, twin, new)
            if index % 25 == 0:
                torch.testing.assert_close(ours, theirs)
        assert len(cache.extents[0].pool.keys) > first
        assert cache.layers[0].lengths.unique().numel() > 1
    pool = cache.extents[0].pool
    pool.release(pool.take(8192))
    logits(model, cache, tokens(2, 1))
    with torch.profiler.profile(profile_memory=True) as profile:
        logits(model, cache, tokens(2, 1))
    # Not `profile.events()`, which give what a compiled region has allocated less what it has freed.
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert 0 < largest < pool.positions.nbytes  # the smallest of the pool's three
    assert {key.phase: len(reports) for key, reports in engine_of(base, "inductor").reports.items()} == {"decode": 1}
