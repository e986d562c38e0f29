"""Planted faults: each breaks one thing in the passes or an op, and the equivalence check must notice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import test_static
import test_windows
from kvfx import passes
from kvfx.kernels import OPS
from kvfx.passes.graph import aten, call
from test_equivalence import check

CASE = {
    "family": "qwen3", "layers": 1, "kv_heads": 2, "group": 2, "head_dim": 64, "seed": 11, "policy": "compactor", "keep": "0.5",
    "lengths": [300, 120], "dtype": torch.float32,
}  # fmt: skip

# The passes have the names of their files, and hide them.
attach_cache, insert_eviction, insert_scores = (
    sys.modules[f"kvfx.passes.{name}"] for name in ("attach_cache", "insert_eviction", "insert_scores")
)

Fault = Callable[[pytest.MonkeyPatch], None]


def change_op(name: str, change: Callable) -> Fault:
    """Lower op `name` to `change(reference, *args)`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        row = OPS[name]
        reference = lambda *args: change(row.reference, *args)  # noqa: E731
        reference.__name__ = name
        patch.setitem(OPS, name, SimpleNamespace(reference=reference, triton=None))

    return plant


def change_taps(change: Callable) -> Fault:
    """Let `change(nodes)` swap what a score reads at a site."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        tap = attach_cache._tap

        def tapped(site, *rest):
            tap(site, *rest)
            change(site.nodes)

        patch.setattr(attach_cache, "_tap", tapped)

    return plant


def mix_heads(reference, query, *rest):
    kv_heads = rest[0].shape[1]
    return reference(query.unflatten(1, (-1, kv_heads)).transpose(1, 2).flatten(1, 2), *rest)


def keep_one_fewer(patch: pytest.MonkeyPatch) -> None:
    module = insert_eviction
    patch.setattr(module, "call", lambda graph, target, *args: call(graph, target, *((args[0], 2) if args[1:] == (1,) else args)))


def shift_padding(patch: pytest.MonkeyPatch) -> None:
    def valid(self):
        write = self.site.nodes["write"]
        return call(self.graph, aten.gt.Scalar, write.args[2], 0) if write.args[3] is not None else None

    patch.setattr(insert_scores._Builder, "valid", valid)


def forget_the_mask(patch: pytest.MonkeyPatch) -> None:
    change_op("attention", lambda f, q, k, v, mask, *rest: f(q, k, v, None, *rest))(patch)


def wrong_layer_sketch(patch: pytest.MonkeyPatch) -> None:
    draw = insert_scores.draw_sketch
    patch.setattr(insert_scores, "draw_sketch", lambda seed, layer, *rest: draw(seed, layer + 1, *rest))


def evict_before_reading(patch: pytest.MonkeyPatch) -> None:
    """The score reads keys of which the second half was blanked: a pass that evicts too early."""
    change_op("chunk_attention", lambda f, q, k, *rest: f(q, k * (torch.arange(k.shape[2]) < k.shape[2] // 2)[:, None], *rest))(
        patch
    )


FAULTS: dict[str, Fault] = {
    "the roped key is tapped as the key before rope": change_taps(lambda nodes: nodes.update(pre_key=nodes["key"])),
    "keys are tapped as values": change_taps(lambda nodes: nodes.update(value=nodes["key"])),
    "query heads are grouped the wrong way round": change_op("chunk_attention", mix_heads),
    "positions are off by one": change_op("compact", lambda f, k, v, p, s, padded: f(k, v, (p - 1).clamp(min=-1), s, padded)),
    "values come from the neighbouring slot": change_op("compact", lambda f, k, v, p, s, padded: f(k, v.roll(1, 2), p, s, padded)),
    "the worst are kept": change_op("select", lambda f, scores, *rest: f(torch.where(scores.isinf(), scores, -scores), *rest)),
    "nothing is protected": change_op("protect", lambda f, scores, valid, sinks, recent: f(scores, valid, 0, 0)),
    "statistics run over padding": change_op("zscore", lambda f, scores, valid, sinks, recent: f(scores, None, sinks, recent)),
    "one slot too few is kept": keep_one_fewer,
    "the padding mask is shifted by one": shift_padding,
    "the attention mask is lost": forget_the_mask,
    "each layer uses the next layer's sketch": wrong_layer_sketch,
    "the score reads what is already evicted": evict_before_reading,
}

# What only a score by expected attention reads.
EXPECTED = {**CASE, "policy": "expected_attention", "keep": "0.3"}
EXPECTED_FAULTS: dict[str, Fault] = {
    "the roped query is tapped as the query before rope": change_taps(lambda nodes: nodes.update(pre_query=nodes["query"])),
    "later queries are not rotated": change_taps(lambda nodes: nodes.pop("rotation_512")),
    "later queries are rotated backwards": change_op("expected_attention", lambda f, q, k, r, *rest: f(q, k, r.mT, *rest)),
    "sinks take part": change_op("expected_attention", lambda f, q, k, r, v, valid, sinks, *rest: f(q, k, r, v, valid, 0, *rest)),
}


# What only a step behind an eviction reads, in a model with a window.
SLOT_FAULTS: dict[str, Fault] = {
    "slots get the column before theirs": change_op(
        "slot_mask", lambda f, mask, keys, new, prefix, start, seen, *rest: f(mask, keys, new, prefix, start, seen + 1, *rest)
    ),
    "everything is visible": change_op("slot_mask", lambda f, *rest: f(*rest) | True),
    "new tokens come first": change_op("slot_mask", lambda f, *rest: f(*rest).roll(1, 3)),
}


# The same, where slots have fixed places.
STATIC_FAULTS: dict[str, Fault] = {
    "slots get the column before theirs": change_op("column_mask", lambda f, mask, columns, heads: f(mask, columns - 1, heads)),
    "room that is not filled is visible": change_op("column_mask", lambda f, *rest: f(*rest) | True),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", [CASE, EXPECTED], ids=["compactor", "expected attention"])
def test_the_check_passes_without_a_fault(case):
    check(case)


@pytest.mark.sample(1)
@pytest.mark.parametrize("fault", EXPECTED_FAULTS)
def test_a_planted_fault_of_expected_attention_is_caught(fault, monkeypatch):
    EXPECTED_FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check(EXPECTED)


@contextmanager
def caught_by_new_models() -> Iterator[None]:
    """Expect a failure of models that were compiled with the fault, and that nobody sees afterwards."""
    test_windows.forget_models()
    try:
        with pytest.raises(AssertionError):
            yield
    finally:
        test_windows.forget_models()


@pytest.mark.sample(1)
@pytest.mark.parametrize("fault", SLOT_FAULTS)
def test_a_planted_fault_behind_an_eviction_is_caught(fault, monkeypatch):
    SLOT_FAULTS[fault](monkeypatch)
    with caught_by_new_models():
        test_windows.test_decoding_after_an_eviction_hides_what_was_evicted_and_nothing_else()


@pytest.mark.slow
@pytest.mark.parametrize("fault", STATIC_FAULTS)
def test_a_planted_fault_in_a_static_cache_is_caught(fault, monkeypatch):
    STATIC_FAULTS[fault](monkeypatch)
    with caught_by_new_models():
        test_static.check_windows(steps=2)


@pytest.mark.sample(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check(CASE)


def test_the_pipeline_under_test_is_the_one_that_ships():
    assert [apply.__name__ for apply in passes.PIPELINE] == [
        "forward_stores", "find_attention", "shorten_reads", "take_new_states", "attach_leaves", "attach_cache", "read_slots",
        "insert_scores", "insert_eviction", "lower",
    ]  # fmt: skip
