"""The cache as a thing of its own: against a Python list, as a tree, as a copy, and from two threads."""

from __future__ import annotations

import copy
import tempfile
import threading
from pathlib import Path

import optree
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch.utils import _pytree as pytree

import kvfx
from decoding import GREEDY, compiled, fresh_llama, ones, tokens
from examples import examples

HALF = "knorm:0.5"
GUARDED = "-knorm | budget=uniform(0.5) | protect(sinks=1, recent=2)"  # in blocks of 6 tokens and more
PADDING = 0
BLOCKS = st.tuples(st.integers(6, 9), st.integers(0, 2**16), st.booleans())


def block(rows: int, length: int, seed: int, pad: bool) -> tuple[Tensor, Tensor]:
    """Random ids and a mask with up to half of each row padded, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = tokens(rows, length, seed), ones(rows, length)
    if pad:
        holes = torch.rand(rows, length, generator=generator).argsort(-1)[:, : length // 3]
        mask.scatter_(1, holes, torch.randint(0, 2, holes.shape, generator=generator))
    return ids.where(mask.bool(), torch.tensor(PADDING)), mask


class AgainstAList(RuleBasedStateMachine):
    """Per row the tokens seen (None for padding), per layer and head the positions kept."""

    def __init__(self):
        super().__init__()
        self.cache = kvfx.Cache()
        self.seen: list[list[int | None]] = []
        self.kept: list[list[list[list[int]]]] = []  # layer, row, head
        self.appended = 0  # tokens that crop may take back
        self.others: list[tuple[kvfx.Cache, dict[str, Tensor]]] = []

    def real(self, row: int) -> int:
        return sum(token is not None for token in self.seen[row])

    def saw(self, ids: Tensor, mask: Tensor) -> None:
        for row, (its, real) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
            self.seen[row] += [token if there else None for token, there in zip(its, real, strict=True)]

    def mask(self, new: Tensor) -> Tensor:
        past = torch.tensor([[token is not None for token in row] for row in self.seen]).long().view(len(self.seen), -1)
        return torch.cat([past, new], 1)

    def feed(self, policy: str, evict: bool, what: tuple[int, int, bool]) -> None:
        rows = len(self.seen)
        ids, mask = block(rows, *what)
        before = [self.real(row) for row in range(rows)]
        model = compiled(policy)
        full = self.mask(mask)
        if evict:
            model.compress(ids, full, self.cache)
        else:
            model(ids, attention_mask=full, past_key_values=self.cache)
        self.saw(ids, mask)
        chosen = policy if evict else "none"
        whole = True
        for layer, heads in zip(self.cache.layers, self.kept, strict=True):
            for row in range(rows):
                new = set(range(before[row], self.real(row)))
                budget = len(new) if chosen == "none" else min(len(new), max(1, 3 if chosen == GUARDED else 1, len(new) // 2))
                whole &= budget == len(new)
                for head in range(2):
                    held = [p for p in layer.positions[row, head].tolist() if p >= before[row]]
                    assert len(held) == budget
                    assert set(held) <= new
                    if chosen == GUARDED:
                        assert {min(new), *sorted(new)[-2:]} <= set(held)
                    heads[row][head] += held
        if not whole:
            self.appended = 0
        elif bool(mask.all()):
            self.appended += ids.shape[1]
        else:
            self.appended = int(mask.all(0).flip(0).long().cumprod(0).sum())

    @initialize(rows=st.integers(2, 3), policy=st.sampled_from(["none", GUARDED]), what=BLOCKS)
    def prefill(self, rows, policy, what):
        self.seen = [[] for _ in range(rows)]
        self.kept = [[[[], []] for _ in range(rows)] for _ in range(2)]
        self.feed(policy, True, what)

    @rule(what=BLOCKS)
    def compress_more(self, what):
        self.feed(GUARDED, True, what)

    @rule(what=BLOCKS)
    def append(self, what):
        self.feed(GUARDED, False, what)

    @rule(seed=st.integers(0, 2**16))
    def decode(self, seed):
        ids = tokens(len(self.seen), 1, seed)
        compiled()(ids, past_key_values=self.cache)
        for row, token in enumerate(ids[:, 0].tolist()):
            for heads in self.kept:
                for positions in heads[row]:
                    positions.append(self.real(row))
            self.seen[row].append(token)
        self.appended += 1

    @rule(count=st.integers(1, 4))
    def crop(self, count):
        if count > self.appended:
            with pytest.raises(kvfx.CacheMismatch, match=f"cannot crop {count} tokens: {self.appended} came after"):
                self.cache.crop(-count)
        elif count < len(self.seen[0]):
            self.cache.crop(-count)
            self.appended -= count
            for row in range(len(self.seen)):
                del self.seen[row][-count:]
                for heads in self.kept:
                    heads[row] = [[p for p in positions if p < self.real(row)] for positions in heads[row]]

    @rule()
    def go_on_with_a_copy(self):
        self.others.append((self.cache, {name: tensor.clone() for name, tensor in self.cache.tensors().items()}))
        self.cache = self.cache.copy()

    def take_rows(self, indices: list[int]) -> None:
        self.seen = [list(self.seen[index]) for index in indices]
        self.kept = [[copy.deepcopy(heads[index]) for index in indices] for heads in self.kept]

    @rule(data=st.data())
    def reorder(self, data):
        rows = len(self.seen)
        indices = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        self.cache.reorder_cache(torch.tensor(indices))
        self.take_rows(indices)

    @precondition(lambda self: len(self.seen) == 2)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.take_rows([0, 0, 1, 1])

    @precondition(lambda self: len(self.seen) > 2)
    @rule(data=st.data())
    def select(self, data):
        indices = data.draw(st.lists(st.integers(0, len(self.seen) - 1), min_size=2, max_size=3, unique=True))
        self.cache.batch_select_indices(torch.tensor(indices))
        self.take_rows(indices)

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(str(Path(folder) / "a.kvfx"))
            self.cache = kvfx.load_cache(str(Path(folder) / "a.kvfx"))

    @invariant()
    def lengths_agree(self):
        assert self.cache.get_seq_length() == (len(self.seen[0]) if self.seen else 0)
        if self.seen:
            assert self.cache.lengths_seen.tolist() == [self.real(row) for row in range(len(self.seen))]
            assert self.cache.batch_size == len(self.seen)
            assert self.cache.croppable == self.appended

    @invariant()
    def tokens_agree(self):
        if self.seen:
            expected = [[PADDING if token is None else token for token in row] for row in self.seen]
            assert self.cache.ids.tolist() == expected
            real = [[token is not None for token in row] for row in self.seen]
            assert (self.cache.real.tolist() if self.cache.real is not None else [[True] * len(row) for row in real]) == real

    @invariant()
    def slots_agree(self):
        for layer, heads in zip(self.cache.layers, self.kept, strict=True):
            assert layer.positions.dtype == torch.int32
            assert layer.keys.shape[:3] == layer.values.shape[:3] == layer.positions.shape
            for row, positions in enumerate(heads):
                for head, expected in enumerate(positions):
                    empty = layer.slots - len(expected)
                    assert layer.positions[row, head].tolist() == [-1] * empty + sorted(expected)
                    assert not layer.keys[row, head, :empty].any()
                    assert not layer.values[row, head, :empty].any()
                    assert layer.keys[row, head, empty:].any(-1).all()
                    assert self.cache.has_empty or empty == 0

    @invariant()
    def bytes_are_those_of_the_storages(self):
        held = [self.cache.lengths_seen, *(self.cache._ids or []), *(self.cache._real or [])]
        for layer in self.cache.layers:
            held += [layer.keys, layer.values, layer.prefix, layer.next_position]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t is not None}
        assert self.cache.nbytes == sum(sizes.values())

    @invariant()
    def copies_left_behind_do_not_change(self):
        for cache, before in self.others:
            now = cache.tensors()
            assert now.keys() == before.keys()
            assert all(torch.equal(now[name], before[name]) for name in now)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(
    max_examples=examples(15), stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)


def padded_cache() -> kvfx.Cache:
    ids, mask = block(2, 9, 5, True)
    return compiled(HALF).compress(ids, mask)


CACHES = {"empty": kvfx.Cache, "padded": padded_cache, "one row": lambda: compiled(HALF).compress(tokens(1, 9))}


def assert_equal(one: kvfx.Cache, two: kvfx.Cache) -> None:
    a, b = one.tensors(), two.tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (one.policy, one.croppable, one.owner) == (two.policy, two.croppable, two.owner)
    assert one.get_seq_length() == two.get_seq_length()


TREES = {
    "torch": (pytree.tree_flatten, pytree.tree_unflatten, pytree.tree_map),
    "optree": (optree.tree_flatten, lambda leaves, tree: optree.tree_unflatten(tree, leaves), optree.tree_map),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("library", TREES)
def test_a_cache_is_a_tree_of_its_tensors(library, kind):
    flatten, unflatten, _ = TREES[library]
    cache = CACHES[kind]()
    leaves, tree = flatten({"past": cache})
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert len(leaves) == len(cache.tensors())
    assert_equal(unflatten(leaves, tree)["past"], cache)
    assert flatten({"past": cache.copy()})[1] == tree


@pytest.mark.parametrize("library", TREES)
def test_a_cache_mapped_as_a_tree_goes_on(library):
    cache = CACHES["one row"]()
    mapped = TREES[library][2](torch.clone, cache)
    assert isinstance(mapped, kvfx.Cache)
    new = torch.tensor([[4]])
    assert torch.equal(compiled(HALF)(new, past_key_values=mapped).logits, compiled(HALF)(new, past_key_values=cache).logits)
    shapes = TREES[library][2](lambda tensor: tensor.dim(), cache)
    assert shapes.layers[0].keys == 4


def test_a_deep_copy_shares_nothing_but_the_model():
    cache = CACHES["one row"]()
    twin = copy.deepcopy(cache)
    assert_equal(twin, cache)
    assert twin.owner is cache.owner
    assert twin.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()
    cheap = cache.copy()
    assert cheap.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()


def test_layers_show_keys_values_and_positions():
    cache = compiled(HALF).compress(tokens(1, 9))
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (1, 2, 4, 16)
        assert layer.positions.shape == (1, 2, 4)
    compiled(HALF)(tokens(1, 3), past_key_values=cache)
    assert cache.layers[1].positions[0, 1, 4:].tolist() == [9, 10, 11]
    assert cache.to("dense") is cache
    with pytest.raises(kvfx.InputError, match=r"unknown layout 'paged'; known: \['dense', 'static', 'ragged'\]"):
        cache.to("paged")
    cache.reset()
    assert (len(cache), cache.get_seq_length(), cache.nbytes, cache.batch_size) == (0, 0, 0, -1)


def test_two_threads_with_two_caches_give_what_each_gives_alone():
    base = fresh_llama(num_hidden_layers=1)
    model = kvfx.compile(base, HALF, backend="eager")  # nothing compiled yet
    contexts = [tokens(1, 20, seed) for seed in range(2)]
    found: list[list[Tensor]] = [[], []]

    def ask(index: int) -> None:
        for _ in range(3):
            found[index].append(model.generate(contexts[index], **GREEDY))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, context in enumerate(contexts):
        expected = kvfx.compile(base, HALF, backend="eager").generate(context, **GREEDY)
        assert [torch.equal(out, expected) for out in found[index]] == [True] * 3
