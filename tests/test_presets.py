"""Every preset keeps what its definition says, through a whole model: several rows, padding, grouped heads, two layers."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import pytest
import torch

import kvfx
import reference
from kvfx.budget import Budget
from kvfx.kernels.leverage import draw_sketch
from kvfx.params import Word
from kvfx.policy import Policy
from kvfx.ragged_layer import RaggedLayer
from presets_by_definition import (
    DEFINITIONS,
    HEADS,
    HEADS_PRESSES,
    PRESSES,
    Heads,
    among_heads,
    compactor_engine,
    heads_press,
    kv_compress,
    pyramid_press,
    quota,
)
from schedule_by_definition import protected, schedule
from test_equivalence import decoder, padded, row_taps

KEEP = {"0.25": 0.25, "0.5": 0.5, "0.8": 0.8}


def assert_kept(score: torch.Tensor, count: int, positions: torch.Tensor) -> None:
    """Per head, `positions` hold the `count` best; scores closer than 1e-5 may stand for each other."""
    kept = [[p for p in head if p >= 0] for head in positions.tolist()]
    for head, (ours, theirs) in enumerate(zip(kept, reference.best(score, count), strict=True)):
        assert len(ours) == count
        lost, won = reference.swapped(score[head], theirs, ours)
        for a, b in zip(sorted(lost), sorted(won), strict=True):
            assert a - b <= 1e-5 * max(abs(a), abs(b)), (head, a, b)


MODEL = decoder("qwen3", 2, 3, 16, seed=3)  # one for all tests, whose lengths and keeps then share their graphs
LLAMA = decoder("llama", 3, 2, 16, seed=3)  # the same, where heads compete


@functools.cache
def captured(*lengths: int, model=MODEL):
    """Ids, their mask, and what each layer's attention reads."""
    ids, mask = padded(list(lengths), 3)
    return ids, mask, reference.capture(model, ids, mask)[0]


def compress(policy: str, ids: torch.Tensor, mask: torch.Tensor | None = None, model=MODEL) -> kvfx.Cache:
    return kvfx.compile(model, policy, backend="eager", on_refuse="error").compress(ids, mask)


@pytest.mark.sample(2)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("preset", sorted(set(DEFINITIONS) - {"pyramidkv(window=16)"}))
@pytest.mark.parametrize("lengths", [[90, 41, 7], [1, 2]], ids=str)
def test_presets_keep_what_they_are_defined_to(preset, keep, lengths):
    definition, sinks, recent = DEFINITIONS[preset]
    ids, mask, taps = captured(*lengths)
    cache = compress(f"{preset}:{keep}", ids, mask)
    for layer in range(2):
        for row, length in enumerate(lengths):
            score = reference.protected(definition(row_taps(taps[layer], row, length)), sinks, recent)
            assert_kept(score, reference.count_kept(length, keep, sinks + recent), cache.layers[layer].positions[row])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "lengths", [[3], [90, 41], *(pytest.param(n, marks=pytest.mark.slow) for n in ([17], [64, 64], [90]))], ids=str
)
def test_a_pyramid_keeps_the_best_of_each_layer(lengths):
    definition, sinks, recent = DEFINITIONS["pyramidkv(window=16)"]
    ids, mask, taps = captured(*lengths)
    cache = compress("pyramidkv(window=16):0.5", ids, mask)
    for row, length in enumerate(lengths):
        counts = [int((layer.positions[row, 0] >= 0).sum()) for layer in cache.layers]
        assert sum(counts) == 2 * reference.count_kept(length, "0.5", recent)
        assert counts[0] > counts[1] or length <= 17
        for layer, count in enumerate(counts):
            score = reference.protected(definition(row_taps(taps[layer], row, length)), sinks, recent)
            assert_kept(score, count, cache.layers[layer].positions[row])


@pytest.mark.parametrize("chunk", [pytest.param(8, marks=pytest.mark.slow), 30, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lengths", [[90, 41, 7]], ids=str)
def test_per_chunk_gives_every_chunk_its_share(chunk, lengths):
    ids, mask, _ = captured(*lengths)
    order = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(row)) for row in range(len(lengths))])
    ids = (order[:, : ids.shape[1]] + 1).masked_fill(ids == 0, 0)  # no token twice, whose equal norms would tie
    taps, _ = reference.capture(MODEL, ids, mask)
    policy = f"knorm | budget=uniform(0.4, per=chunk({chunk})) | protect(sinks=2, recent=3)"
    cache = compress(policy, ids, mask)
    for layer in range(2):
        for row, length in enumerate(lengths):
            score = reference.protected(reference.knorm(row_taps(taps[layer], row, length)), 2, 3)
            score = reference.protected(quota(score, chunk), 2, 3)
            count = reference.count_kept(length, "0.4", 5)
            positions = cache.layers[layer].positions[row]
            assert_kept(score, count, positions)
            for head in positions.tolist():
                whole = [sum(start <= p < start + chunk for p in head) for start in range(chunk, length - chunk - 3, chunk)]
                assert not whole or max(whole) - min(whole) <= 1  # chunks without protected tokens


@pytest.mark.sample(3)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("preset", PRESSES)
@pytest.mark.parametrize("length", [pytest.param(65, marks=pytest.mark.slow), 200, pytest.param(333, marks=pytest.mark.slow)])
def test_kvpress_presets_follow_its_rules(preset, keep, length):
    ids, _, taps = captured(length)
    cache = compress(f"{preset}:{keep}", ids)
    for layer in range(2):
        score = PRESSES[preset](taps[layer], KEEP[keep])
        count = max(1, int(length * KEEP[keep]))
        if preset == "pyramidkv@kvpress":
            count = pyramid_press(length, KEEP[keep], layer, 2)
        if preset == "chunkkv@kvpress":
            chunks = max(1, int(-(-length // 20) * KEEP[keep]))
            if chunks < 5:
                continue  # fewer than the window holds: a tie there
            count = int(score[0].sum())
        assert_kept(score, count, cache.layers[layer].positions[0])


def assert_heads_keep(expected: list[list[int]], layer: RaggedLayer, row: int) -> None:
    """Exactly these tokens of each head: among random scores are no ties, and none as close as rounding."""
    assert [[p for p in head if p >= 0] for head in layer.positions[row].tolist()] == expected
    assert layer.lengths[row].tolist() == [len(head) for head in expected]


@pytest.mark.parametrize("lengths", [[200, 120, 7], pytest.param([333], marks=pytest.mark.slow)], ids=str)
def test_all_heads_of_all_layers_compete_for_blocks(lengths):
    ids, mask, taps = captured(*lengths, model=LLAMA)
    for keep in KEEP:
        cache = compress(f"kv_compress:{keep}", ids, mask, LLAMA)
        for row, length in enumerate(lengths):
            raw = torch.cat([kv_compress(row_taps(each, row, length)) for each in taps])
            heads = [list(zip(head.tolist(), range(length), strict=True)) for head in protected(raw, 4, 8)]
            granted = -(-len(heads) * reference.count_kept(length, keep, 12) // 16)
            gone = schedule(heads, [0] * len(heads), len(heads) * -(-length // 16) - granted, 16)
            for number, lost in enumerate(gone):
                layer, head = divmod(number, len(heads) // len(taps))
                ours = {place for place in cache.layers[layer].positions[row, head].tolist() if place >= 0}
                theirs = set(range(length)) - lost
                assert len(ours) == len(theirs)
                for a, b in zip(
                    *(sorted(raw[number, list(only)].tolist()) for only in (ours - theirs, theirs - ours)), strict=True
                ):
                    assert b - a <= 1e-5 * b  # tokens whose largest neighbours are the same but for one head's


@pytest.mark.sample(1)
@pytest.mark.parametrize("preset", [*HEADS, "compactor@engine"])
@pytest.mark.parametrize("lengths", [[200, 120, 7], pytest.param([333], marks=pytest.mark.slow)], ids=str)
def test_heads_compete_as_their_presets_are_defined_to(preset, lengths):
    ids, mask, taps = captured(*lengths, model=LLAMA)
    for keep in KEEP:
        cache, differ = compress(f"{preset}:{keep}", ids, mask, LLAMA), False
        for index, layer in enumerate(cache.layers):
            sketch = draw_sketch(42, index, 3, 16, 48)
            engine = Heads(functools.partial(compactor_engine, sketch=sketch), None, 16, 64)
            first, then, sinks, recent, floor, share = HEADS.get(preset, engine)
            for row, length in enumerate(lengths):
                one = row_taps(taps[index], row, length)
                scores = [None if score is None else reference.protected(score(one), sinks, recent) for score in (first, then)]
                expected = among_heads(*scores, reference.count_kept(length, keep, sinks + recent), floor, share)
                assert_heads_keep(expected, layer, row)
                differ |= len({len(head) for head in expected}) > 1
        assert differ or keep == "0.25"  # where the protected tokens may be all that there is room for


@pytest.mark.sample(1)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("preset", HEADS_PRESSES)
@pytest.mark.parametrize("length", [pytest.param(65, marks=pytest.mark.slow), 200, pytest.param(333, marks=pytest.mark.slow)])
def test_heads_compete_as_in_kvpress(preset, keep, length):
    ids, _, taps = captured(length, model=LLAMA)
    cache, count = compress(f"{preset}:{keep}", ids, model=LLAMA), int(length * KEEP[keep])
    for layer, one in zip(cache.layers, taps, strict=True):
        first, then = (None if score is None else score(one) for score in HEADS_PRESSES[preset])
        if count < 64:  # a tie in the window, which kvpress leaves open
            expected = among_heads(first, then, count, Fraction(1, 5), Fraction(1, 2))
        else:
            expected = heads_press(first, then, KEEP[keep])
        assert_heads_keep(expected, layer, 0)


@pytest.mark.parametrize("beta", [1, 2, 20])
@pytest.mark.parametrize("layers", [1, 2, 7, 32])
@pytest.mark.parametrize(("length", "protected"), [(1, 0), (5, 3), (100, 0), (1000, 64), (4096, 8)])
def test_a_pyramid_falls_and_keeps_the_total(beta, layers, length, protected):
    for keep in (0.05, 0.3, 0.5, 0.9, 1):
        for least in (0, 16):
            budget = Budget(keep, shape=Word("pyramid", beta), least=least)
            counts, flat = budget.counts(length, protected, layers), budget.count(length, protected)
            assert sum(counts) == layers * flat
            assert counts == sorted(counts, reverse=True)
            assert min(flat, max(2, least, protected)) <= counts[-1] <= counts[0] <= length
            steps = [a - b for a, b in itertools.pairwise(counts)]
            assert not steps or max(steps) - min(steps) <= 2
    assert Policy.parse("pyramidkv").counts(1000, 4) == [914, 638, 362, 86]


@pytest.mark.slow
def test_decoding_over_a_pyramid_equals_the_reference(tmp_path):
    ids, mask, _ = captured(64, 64)
    model = kvfx.compile(MODEL, "pyramidkv(window=16):0.5", backend="eager", on_refuse="error")
    cache = model.compress(ids, mask)
    question = torch.tensor([[5, 9, 2], [7, 7, 30]])
    answers = model.generate(question, past_key_values=cache.copy(), append=True, max_new_tokens=5, do_sample=False)
    cache.save(tmp_path / "pyramid.kvfx")
    loaded = kvfx.load_cache(tmp_path / "pyramid.kvfx")
    again = model.generate(question, past_key_values=loaded, append=True, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, answers)
    logits = torch.cat([model(token[:, None], past_key_values=cache).logits for token in answers.unbind(1)], 1)
    for row in range(2):
        hidden = []
        for layer in cache.layers:
            seen = torch.zeros(1, 2, 64, dtype=torch.bool)
            held = layer.positions[row, :, : layer.slots - answers.shape[1]]
            hidden.append(~seen.scatter(-1, held[None].long(), True))
        exact = reference.continue_with(MODEL, ids[row : row + 1], hidden, answers[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], exact)
        assert torch.equal(exact[0, 2:-1].argmax(-1), answers[row, 3:])
