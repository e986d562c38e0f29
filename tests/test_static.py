"""Caches of fixed capacity: whatever is done with one gives what a cache that grows gives, in tensors that never move."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor
from transformers import StaticCache

import kvfx
import zoo
from decoding import GREEDY, fresh_llama, ones, tokens
from kvfx.engine import engine_of
from kvfx.passes.capture import pytree
from test_scores_asked import unread
from test_windows import mixed

HALF, PYRAMID = "knorm:0.5", "knorm | budget=uniform(0.5, shape=pyramid(4))"
ROOM, LONGEST = 96, 200


@functools.cache
def llama() -> Any:
    """One layer, because what takes long here is tracing."""
    return fresh_llama(num_hidden_layers=1)


@functools.cache
def compiled(policy: str) -> Any:
    return kvfx.compile(fresh_llama() if policy == PYRAMID else llama(), policy, backend="eager")


def left(length: int, *padding: int) -> Tensor:
    """A mask of rows with that much padding on the left."""
    return (torch.arange(length) >= torch.tensor(padding)[:, None]).long()


def assert_same_slots(static: kvfx.StaticCache, dense: kvfx.Cache) -> None:
    """The same tokens are held, in order, with the same keys and values up to rounding."""
    grown = static.to("dense")
    assert grown.get_seq_length() == dense.get_seq_length() == static.get_seq_length()
    assert torch.equal(grown.lengths_seen, dense.lengths_seen)
    assert dense.has_empty or not grown.has_empty  # which chosen rows may no longer have
    assert (static.croppable, static.policy) == (0 if windows(static) else dense.croppable, dense.policy)
    assert (static.ids is None) == (dense.ids is None)
    assert dense.ids is None or torch.equal(static.ids, dense.ids)
    for a, b in zip(grown.layers, dense.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        blank = b.slots - a.slots  # left behind by rows that were not chosen
        assert bool((b.positions[:, :, :blank] == -1).all())
        assert torch.equal(a.positions, b.positions[:, :, blank:])
        torch.testing.assert_close(a.keys, b.keys[:, :, blank:])
        torch.testing.assert_close(a.values, b.values[:, :, blank:])


def windows(cache: kvfx.Cache) -> bool:
    return any(layer.window for layer in cache.layers)


def addresses(cache: kvfx.Cache) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in cache.tensors().items() if name not in ("ids", "real")}


class Both:
    """A dense and a static cache that are given the same tokens."""

    def __init__(self, model: Any, rows: int = 2) -> None:
        self.model, self.rows, self.drawn = model, rows, 0
        self.dense, self.static = kvfx.Cache(), kvfx.StaticCache(ROOM, LONGEST)
        self.mask: Tensor | None = None

    def feed(self, length: int, padding: tuple[int, ...] | None = None, compress: bool = False) -> None:
        """Let both see `length` new tokens, and compare what comes out."""
        self.drawn += 1
        new = tokens(self.rows, length, seed=100 + self.drawn)
        if padding is not None or self.mask is not None:
            more = ones(self.rows, length) if padding is None else left(length, *padding)
            held = ones(self.rows, self.dense.get_seq_length()) if self.mask is None else self.mask
            self.mask = torch.cat([held, more], 1)
        if compress:
            for cache in (self.dense, self.static):
                self.model.compress(new, self.mask, past_key_values=cache)
        else:
            outs = [self.model(new, attention_mask=self.mask, past_key_values=cache) for cache in (self.dense, self.static)]
            torch.testing.assert_close(outs[1].logits[:, -1], outs[0].logits[:, -1])
        assert_same_slots(self.static, self.dense)


@pytest.mark.sample(1)
@pytest.mark.parametrize("policy", [HALF, "none", pytest.param(PYRAMID, marks=pytest.mark.slow)], ids=["half", "all", "pyramid"])
def test_turns_without_padding(policy):
    both = Both(compiled(policy))
    both.feed(40)
    for length in (1, 1, 1, 5, 1):
        both.feed(length)
    both.feed(12, compress=policy != "none")
    both.feed(1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [HALF, "none"])
def test_turns_with_padding(policy):
    both = Both(compiled(policy))
    both.feed(40, (3, 9))
    both.feed(1)
    both.feed(6, (0, 2))
    both.feed(1)
    both.feed(12, (4, 0), compress=policy != "none")
    both.feed(1)


def check_windows(steps: int) -> None:
    """A window and full attention, a few steps behind an eviction."""
    both = Both(kvfx.compile(mixed(), HALF, backend="eager", on_refuse="error"))
    both.feed(20)
    for _ in range(steps):
        both.feed(1)


def test_a_window_moves_on_beside_an_eviction():
    check_windows(steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [None, (0, 3)], ids=["full", "padded"])
def test_windows_go_round(padding):
    """Of 8 tokens, over prompts shorter and longer than that, and past several times their length."""
    both = Both(kvfx.compile(mixed(), HALF, backend="eager", on_refuse="error"))
    both.feed(6 if padding is None else 20, padding)
    for length in (1, 1, 1, 1, 11, 1):
        both.feed(length)
    both.feed(9, compress=True)
    for _ in range(10):
        both.feed(1)


@pytest.mark.slow  # minutes, for all families
@pytest.mark.filterwarnings("ignore:no cache layer of .* is compressed")
@pytest.mark.filterwarnings(r"ignore:.*autograd.function.Function. should not be:DeprecationWarning")  # Dynamo, of BLOOM
@pytest.mark.parametrize("family", [name for name in zoo.ROWS if name != "mpt"])  # refused, see below
def test_every_family_decodes_in_place(family):
    for padding in (None, (0, 5)):
        both = Both(kvfx.compile(zoo.make(zoo.ROWS[family]), HALF, backend="eager"))
        both.feed(40, padding)
        for length in (1, 1, 4, 1):
            both.feed(length)
    torch._dynamo.reset()


def test_a_model_that_counts_tokens_in_python_is_refused():
    model, cache = kvfx.compile(zoo.make(zoo.ROWS["mpt"]), HALF, backend="eager"), kvfx.StaticCache(ROOM, LONGEST)
    model.compress(tokens(1, 40), past_key_values=cache)
    before = state(cache)
    with pytest.raises(kvfx.UnsupportedModel, match=r"cannot be traced with a static cache.*Use a kvfx\.Cache, which grows"):
        model(tokens(1, 1), past_key_values=cache)
    assert_untouched(cache, before)
    model(tokens(1, 1), past_key_values=cache.to("dense"))


NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)  # each step runs models: shrinking would take minutes


class Turns(RuleBasedStateMachine):
    """Anything that may be done with a cache, in any order."""

    @initialize(length=st.integers(2, 30), padding=st.sampled_from([None, (0, 1), (1, 0)]))
    def prompt(self, length: int, padding: tuple[int, ...] | None) -> None:
        self.both = Both(compiled(HALF))
        self.both.feed(length, padding)

    def fits(self, more: int) -> bool:
        return self.both.static.layers[0].filled + more <= ROOM

    @rule(length=st.integers(1, 9))
    def append(self, length: int) -> None:
        if self.fits(length):
            self.both.feed(length)

    @rule(length=st.integers(4, 20), padding=st.sampled_from([None, (0, 2), (2, 0)]))
    def compress(self, length: int, padding: tuple[int, ...] | None) -> None:
        if self.fits(length):
            self.both.feed(length, padding, compress=True)

    @precondition(lambda self: self.both.dense.croppable)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.both.dense.croppable))
        if count < self.both.dense.get_seq_length():
            for cache in (self.both.dense, self.both.static):
                cache.crop(-count)
            self.both.mask = None if self.both.mask is None else self.both.mask[:, :-count]

    @rule(order=st.sampled_from([(1, 0), (0, 0), (1, 1)]))
    def reorder(self, order: tuple[int, int]) -> None:
        before = addresses(self.both.static)
        for cache in (self.both.dense, self.both.static):
            cache.reorder_cache(torch.tensor(order))
        self.both.mask = None if self.both.mask is None else self.both.mask[list(order)]
        assert addresses(self.both.static) == before

    @rule()
    def go_on_with_a_copy(self) -> None:
        copy = self.both.static.copy()
        self.both.feed(1) if self.fits(1) else None
        again = copy.copy()
        self.both.static.reset()  # which the copy does not see
        self.both.dense = copy.to("dense")
        self.both.mask = None if self.both.mask is None else self.both.mask[:, : copy.get_seq_length()]
        self.both.static = again

    @rule()
    def go_on_from_leaves(self) -> None:
        leaves, spec = pytree.tree_flatten(self.both.static)
        self.both.static = pytree.tree_unflatten(leaves, spec)
        assert_same_slots(self.both.static, self.both.dense)

    @rule()
    def go_on_from_a_growing_one(self) -> None:
        self.both.static = self.both.static.to("dense").to("static", ROOM, LONGEST)
        assert_same_slots(self.both.static, self.both.dense)


Turns.TestCase.settings = settings(max_examples=3, stateful_step_count=8, deadline=None, phases=NO_SHRINK)
test_any_order_of_turns = Turns.TestCase


def test_no_graph_is_built_and_nothing_moves_in_500_steps():
    model = compiled(HALF)
    dense, static = kvfx.Cache(), kvfx.StaticCache(600, 1000)
    text = tokens(1, 40), torch.randint(3, 60, (1, 500), generator=torch.Generator().manual_seed(5))
    for cache in (dense, static):
        model.compress(text[0], past_key_values=cache)
        model(text[1][:, :1], past_key_values=cache)
    reports = engine_of(model._kvfx.base, "eager").reports
    graphs, places = {key: len(each) for key, each in reports.items()}, addresses(static)
    held = static.layers[0].keys.untyped_storage().nbytes()
    for index in range(1, 500):
        outs = [model(text[1][:, index : index + 1], past_key_values=cache).logits for cache in (dense, static)]
        if index % 50 == 0:
            torch.testing.assert_close(outs[1], outs[0])
    assert {key: len(each) for key, each in reports.items()} == graphs
    assert addresses(static) == places
    assert static.layers[0].keys.untyped_storage().nbytes() == held
    assert_same_slots(static, dense)


def test_rows_may_keep_different_fractions_in_one_graph():
    model, ids = compiled(HALF), tokens(3, 40)
    cache = model.compress(ids, past_key_values=kvfx.StaticCache(ROOM, LONGEST), keep=[0.5, 0.25, 1.0])
    assert cache.layers[0].length.tolist() == [20, 10, 40]
    reports = engine_of(llama(), "eager").reports
    graphs = {key: len(each) for key, each in reports.items()}
    other = model.compress(ids, past_key_values=kvfx.StaticCache(ROOM, LONGEST), keep=[0.1, 0.75, 0.3])
    assert other.layers[0].length.tolist() == [4, 30, 12]
    assert {key: len(each) for key, each in reports.items()} == graphs
    logits = model(tokens(3, 1, seed=9), past_key_values=cache).logits
    for row, keep in enumerate([0.5, 0.25, 1.0]):
        alone = model.compress(ids[row : row + 1], keep=keep)
        count = alone.layers[0].slots
        assert torch.equal(cache.layers[0].positions[row, :, :count], alone.layers[0].positions[0])
        torch.testing.assert_close(logits[row], model(tokens(3, 1, seed=9)[row : row + 1], past_key_values=alone).logits[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 of 2 cache layers")  # each graph says so
def test_a_layer_that_cannot_be_scored_is_held_whole(monkeypatch):
    model = fresh_llama(num_hidden_layers=2)
    other = model.model.layers[1].self_attn
    monkeypatch.setattr(other, "forward", unread(other))
    model, ids = kvfx.compile(model, HALF, backend="eager"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.warns(UserWarning, match="1 of 2 cache layers of LlamaForCausalLM are compressed"):
        cache = model.compress(ids, attention_mask=mask, past_key_values=kvfx.StaticCache(44, 60))
    dense = model.compress(ids, attention_mask=mask)
    assert [layer.filled for layer in cache.layers] == [20, 40]
    for ours, theirs, counts in zip(cache.layers, dense.layers, ([20, 18], [40, 37]), strict=True):
        for row, count in enumerate(counts):
            assert torch.equal(ours.positions[row, :, :count], theirs.positions[row, :, -count:])
            assert torch.equal(ours.keys[row, :, :count], theirs.keys[row, :, -count:])
            assert bool((ours.positions[row, :, count:] == -1).all())
    with pytest.raises(kvfx.PoolExhausted, match=r"layer 1 holds 0 of 30 slots and 40 are to be stored"):
        model.compress(ids, past_key_values=kvfx.StaticCache(30, 60))


@pytest.mark.parametrize(
    ("policy", "keep", "message"),
    [
        (HALF, [0.5], "keep has 1 fractions for 2 rows; expected one for all, or one for each"),
        ("none", 0.5, "keep=0.5: the policy none keeps everything. Compile with one that scores"),
    ],
)
def test_fractions_that_make_no_sense_are_refused(policy, keep, message):
    with pytest.raises(kvfx.InputError, match=message):
        compiled(policy).compress(tokens(2, 40), keep=keep)


def test_the_buffers_serve_one_prompt_after_the_other():
    model, cache = compiled(HALF), kvfx.StaticCache(ROOM, LONGEST)
    first = model.generate(tokens(1, 40), past_key_values=cache, **GREEDY)
    places = addresses(cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.ids, cache.croppable) == (0, None, 0)
    other = model.generate(tokens(1, 33, seed=8), past_key_values=cache, **GREEDY)
    cache.reset()
    again = model.generate(tokens(1, 40), past_key_values=cache, **GREEDY)
    assert torch.equal(again, first)
    assert torch.equal(other, model.generate(tokens(1, 33, seed=8), **GREEDY))
    assert addresses(cache) == places


def state(cache: kvfx.StaticCache) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cache.tensors().items()}


def assert_untouched(cache: kvfx.StaticCache, before: dict[str, Tensor]) -> None:
    """All that is held is as it was; what stands in room that is not filled has no meaning."""
    now = cache.tensors()
    assert now.keys() == before.keys()
    for name, tensor in now.items():
        if name.endswith(("keys", "values")):
            there = before[name.rsplit(".", 1)[0] + ".positions"] >= 0
            there = there.expand(-1, tensor.shape[1], -1)[..., None]
            assert torch.equal(tensor.where(there, 0), before[name].where(there, 0))
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("room", "longest", "new", "message"),
    [
        (22, 200, 3, r"layer 0 holds 20 of 22 slots and 3 are to be stored\. Nothing was written\. .* StaticCache\(23\)"),
        (30, 41, 2, r"the cache has seen 40 tokens and 2 are to follow, but it was made for texts of 41\. Nothing was written"),
    ],
    ids=["slots", "text"],
)
def test_no_room_is_an_error_before_anything_is_written(room, longest, new, message):
    model, cache = compiled(HALF), kvfx.StaticCache(room, longest)
    model.compress(tokens(1, 40), past_key_values=cache)
    before = state(cache)
    with pytest.raises(kvfx.PoolExhausted, match="(?s)" + message):
        model(tokens(1, new), past_key_values=cache)
    assert_untouched(cache, before)
    model(tokens(1, 1), past_key_values=cache)  # what fits goes on


def test_a_prompt_that_does_not_fit_leaves_no_trace():
    cache = kvfx.StaticCache(19)
    with pytest.raises(kvfx.PoolExhausted, match=r"layer 0 holds 0 of 19 slots and 20 are to be stored"):
        compiled(HALF).compress(tokens(1, 40), past_key_values=cache)
    assert not cache.layers
    with pytest.raises(kvfx.PoolExhausted, match=r"made for texts of 2048"):  # max_position_embeddings
        compiled(HALF).compress(torch.ones(1, 2049, dtype=torch.long), past_key_values=cache)
    assert not cache.layers


def test_the_number_of_rows_is_fixed_by_the_first_prompt():
    cache = compiled(HALF).compress(tokens(2, 40), past_key_values=kvfx.StaticCache(ROOM))
    cache.reset()
    with pytest.raises(kvfx.CacheMismatch, match="the cache has 2 rows, the new tokens 1"):
        compiled(HALF).compress(tokens(1, 40), past_key_values=cache)


@pytest.mark.parametrize("phase", ["prefill", "compress", "extend", "decode"])
def test_a_forward_that_fails_leaves_the_cache_as_it_was(phase, monkeypatch):
    model, cache = compiled(HALF), kvfx.StaticCache(ROOM, LONGEST)
    model.compress(tokens(1, 40), past_key_values=cache)
    if phase == "prefill":
        cache.reset()
    before = state(cache)

    def fail(*arguments: Any) -> None:
        raise kvfx.InputError("late")

    monkeypatch.setattr(kvfx.runner.Runner, "_check_after", fail)
    step = model.compress if phase in ("prefill", "compress") else model
    with pytest.raises(kvfx.InputError, match="late"):
        step(tokens(1, {"prefill": 20, "compress": 20, "extend": 5, "decode": 1}[phase]), past_key_values=cache)
    if phase == "decode":
        cache.lengths_seen.copy_(before["lengths_seen"])  # which the graph that ran to its end has moved on
        cache.forget_new()
    assert_untouched(cache, before)


def test_the_static_cache_of_transformers_is_filled():
    model, stock = compiled(HALF), StaticCache(llama().config, max_cache_len=ROOM)
    out = model.generate(tokens(1, 40), past_key_values=stock, **GREEDY)
    assert torch.equal(out, model.generate(tokens(1, 40), **GREEDY))
    assert isinstance(stock, kvfx.StaticCache)
    assert isinstance(stock, StaticCache)
    assert stock.layers[0].length.tolist() == [20 + 11]
    assert stock.layers[0].keys.shape == (1, 2, ROOM, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=["greedy", "beams", "drawn"]
)
def test_static_by_name_generates_the_same(more):
    mask = left(40, 0, 6)
    outs = []
    for layout in (None, "static"):
        torch.manual_seed(3)
        options = GREEDY | more | {"attention_mask": mask, "cache_implementation": layout, "return_dict_in_generate": True}
        outs.append(compiled(HALF).generate(tokens(2, 40), **options))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    static = outs[1].past_key_values
    assert static.layout == "static"
    assert static.layers[0].capacity == 20 + 12


def test_a_file_keeps_the_layout(tmp_path):
    model, cache = compiled(HALF), kvfx.StaticCache(ROOM, LONGEST)
    model.compress(tokens(2, 40), left(40, 0, 7), past_key_values=cache)
    cache.save(tmp_path / "doc.kvfx")
    assert (tmp_path / "doc.kvfx").stat().st_size < cache.nbytes  # room is not stored
    loaded = kvfx.load_cache(tmp_path / "doc.kvfx")
    assert (loaded.layout, loaded.capacity, loaded.tokens) == ("static", ROOM, LONGEST)
    for a, b in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.keys, b.keys)
    new, mask = tokens(2, 1), torch.cat([left(40, 0, 7), ones(2, 1)], 1)
    logits = model(new, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(model(new, attention_mask=mask, past_key_values=loaded).logits, logits)


def test_a_stock_model_goes_on_in_place():
    cache = compiled(HALF).compress(tokens(1, 40), past_key_values=kvfx.StaticCache(ROOM))
    dense = cache.to("dense")
    question = tokens(1, 5, seed=3)
    places = addresses(cache)
    for new in (question, question[:, :1]):
        out = llama()(new, past_key_values=cache).logits
        torch.testing.assert_close(out, compiled(HALF)(new, past_key_values=dense).logits)
    assert addresses(cache) == places
    assert cache.ids is None
    out = compiled(HALF)(question, past_key_values=cache).logits
    torch.testing.assert_close(out, compiled(HALF)(question, past_key_values=dense).logits)


def test_a_stock_model_is_refused_where_its_mask_would_be_wrong():
    message = "a stock model makes one mask for all rows and layers.*unequally many slots, or have windows"
    padded = compiled(HALF).compress(tokens(2, 40), left(40, 0, 7), past_key_values=kvfx.StaticCache(ROOM))
    with pytest.raises(kvfx.CacheMismatch, match=message):
        llama()(tokens(2, 1), past_key_values=padded)
    window = kvfx.compile(mixed(), HALF, backend="eager").compress(tokens(1, 40), past_key_values=kvfx.StaticCache(ROOM))
    with pytest.raises(kvfx.CacheMismatch, match=message):
        mixed()(tokens(1, 1), past_key_values=window)
    with pytest.raises(kvfx.CacheMismatch, match=r"filled only by the model that kvfx\.compile returned"):
        llama()(tokens(1, 1), past_key_values=kvfx.StaticCache(ROOM))


@pytest.mark.parametrize(
    ("layout", "room", "error", "message"),
    [
        ("paged", {}, kvfx.InputError, r"unknown layout 'paged'; known: \['dense', 'static', 'ragged'\]"),
        ("static", {}, kvfx.InputError, r"to\('static'\) needs capacity=.* and tokens="),
        ("static", {"capacity": 19, "tokens": 99}, kvfx.PoolExhausted, "layer 0 holds 0 of 19 slots and 20 are to be stored"),
    ],
)
def test_layouts_that_cannot_be_made_are_refused(layout, room, error, message):
    cache = compiled(HALF).compress(tokens(1, 40))
    with pytest.raises(error, match=message):
        cache.to(layout, **room)
    assert cache.to("dense") is cache


@pytest.mark.slow  # compiles two graphs to C++
def test_a_compiled_step_writes_in_place():
    """Nothing of a cache's size is allocated: the step's peak is below one buffer."""
    model = kvfx.compile(fresh_llama(num_hidden_layers=1), HALF)
    cache = model.compress(tokens(1, 40), past_key_values=kvfx.StaticCache(4096, 8192))
    dense = cache.to("dense")
    for index in range(3):
        new = tokens(1, 1, seed=index)
        torch.testing.assert_close(model(new, past_key_values=cache).logits, model(new, past_key_values=dense).logits)
    buffer = cache.layers[0].keys.untyped_storage().nbytes()
    with torch.profiler.profile(profile_memory=True) as profile:
        model(tokens(1, 1, seed=5), past_key_values=cache)
    # Not `profile.events()`, which give what a compiled region has allocated less what it has freed.
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert 0 < largest < buffer
