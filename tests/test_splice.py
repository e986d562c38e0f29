"""Two scores in turn, through whole models: shares of counts, padding, what is kept together, and CriticalKV."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import kvfx
import reference
from graphs import passes_until, traced_step
from kvfx.lower import lower
from kvfx.passes import run
from kvfx.passes.report import Report
from kvfx.policy import Policy
from test_equivalence import decoder, padded

ENDS = "splice(recency, -recency, {share})"  # the newest, then the oldest: what is kept follows from counts alone


@pytest.fixture(scope="module")
def model():
    torch._dynamo.reset()
    return decoder("qwen3", 2, 4, 16, 5, layers=1)


@pytest.fixture(scope="module")
def small():
    return decoder("llama", 2, 1, 8, 0, layers=1)


def kept(model, policy: str, lengths: list[int]) -> list[list[list[int]]]:
    """Positions kept, per row and head."""
    ids, mask = padded(lengths, 0)
    cache = kvfx.compile(model, policy, backend="eager", on_refuse="error").compress(ids, mask)
    return [[[p for p in head if p >= 0] for head in row] for row in cache.layers[0].positions.tolist()]


def newest_then_oldest(length: int, count: int, share: Fraction, sinks: int, recent: int) -> list[int]:
    safe = [p for p in range(length) if p < sinks or p >= length - recent]
    asked = max(1, math.floor(share * count)) if share else 0
    newest = (safe + [p for p in range(length - 1, -1, -1) if p not in safe])[:asked]
    chosen = set(newest) | set(safe)
    rest = [p for p in range(length) if p not in chosen]
    return sorted([*chosen, *rest[: count - len(chosen)]])


@pytest.mark.sample(1)
@pytest.mark.parametrize("share", ["0", "0.3", "1"])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 3)])
def test_the_share_is_of_each_row_s_own_count_and_protected_tokens_take_from_it(small, share, sinks, recent):
    for keep, lengths in (
        ("0.02", [60, 33, 1, 7]),
        ("0.3", [60, 33, 1, 7]),
        ("0.9", [60, 33, 1, 7]),
        ("0.02", [20]),
        ("0.3", [70]),
    ):
        policy = f"{ENDS.format(share=share)} | budget=uniform({keep}) | protect(sinks={sinks}, recent={recent})"
        for length, heads in zip(lengths, kept(small, policy, lengths), strict=True):
            count = reference.count_kept(length, keep, sinks + recent)
            expected = newest_then_oldest(length, count, Fraction(share), sinks, recent)
            assert heads == [expected, expected]


def test_heads_and_chunks_stay_together_in_both_turns(small):
    scores = "splice(-knorm, random(3), 0.5) | align=shared | budget=uniform(0.3)"
    for row in kept(small, scores, [60, 41]):
        assert row[0] == row[1]
    (whole,) = kept(small, f"{ENDS.format(share=0.5)} | unit=chunk(4) | budget=uniform(tokens=16)", [40])
    assert whole == [[*range(8), *range(32, 40)]] * 2
    (cut,) = kept(small, f"{ENDS.format(share=0.5)} | unit=chunk(4) | budget=uniform(tokens=13)", [40])
    assert cut == [[*range(7), *range(32, 34), *range(36, 40)]] * 2


def test_equal_scores_are_computed_once_and_the_share_is_not_baked_into_a_number_of_tokens():
    plan = lower(Policy.parse("criticalkv(window=4):0.5"))
    module = traced_step(decoder("llama", 2, 2, 16, 0), torch.ones(1, 20, dtype=torch.long), keep=9)
    report = Report()
    for apply in passes_until("insert_eviction"):
        apply(module, plan, report)
    targets = [str(node.target) for node in module.graph.nodes]
    assert targets.count("kvfx.window_attention.default") == 2  # one a layer
    assert targets.count("kvfx.splice.default") == 2
    assert {site.score for site in report.sites} == {"window_attention value_projection splice"}
    assert all(site.taps == ("query", "key", "value", "output_weight") for site in report.sites)


@pytest.mark.sample(1)
@pytest.mark.parametrize("padding", [False, True])
def test_every_pass_leaves_a_sound_graph_under_a_splice(padding):
    plan = lower(
        Policy.parse("splice(zscore(knorm) + 0.5*zscore(vproj), vproj, 0.5) | budget=uniform(0.5) | align=shared | unit=chunk(3)")
    )
    valid = torch.ones(2, 9, dtype=torch.bool) if padding else None
    module = traced_step(decoder("llama", 2, 2, 16, 0), torch.ones(2, 9, dtype=torch.long), valid=valid, keep=4)
    report = run(module, plan, check_each=True)
    assert report.coverage == 1.0


@pytest.mark.parametrize("score", ["splice(-knorm, recency, 0.5)", "splice(recency, -knorm, 0.5)"])
def test_a_score_that_is_not_finite_is_an_error_in_either_turn(score):
    torch._dynamo.reset()
    broken = decoder("llama", 2, 2, 16, 0, layers=1)
    with torch.no_grad():
        broken.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(kvfx.InputError, match="are not finite"):
        kvfx.compile(broken, f"{score} | budget=uniform(0.5)", backend="eager").compress(torch.arange(20)[None])


def test_the_projected_value_is_a_score_of_its_own(model):
    ids, _ = padded([60], 0)
    taps, _ = reference.capture(model, ids)
    assert kept(model, "vproj | budget=uniform(0.25)", [60])[0] == reference.best(reference.projected(taps[0]), 15)


# The hook library's two stages, written again from its rules: one row, float arithmetic on the length, no protected tokens.


def kvpress_critical(taps: reference.Taps, removed: float, window: int, kernel: int) -> list[list[int]]:
    query, key = taps.query[0].double(), taps.key[0].double()
    heads, length = key.shape[:2]
    group, older = query.shape[0] // heads, length - window
    scores = torch.zeros(heads, length, dtype=torch.float64)
    for h in range(heads):
        received = torch.zeros(older, dtype=torch.float64)
        for head in range(h * group, (h + 1) * group):
            for asking in range(older, length):
                logits = key[h, : asking + 1] @ query[head, asking] / math.sqrt(key.shape[2])
                received += torch.softmax(logits, 0)[:older] / (window * group)
        for i in range(older):  # neighbours that are not there count as zeros
            scores[h, i] = received[max(0, i - kernel // 2) : i + kernel // 2 + 1].sum() / kernel
    scores[:, older:] = scores[:, :older].max() + 1
    by_output = (scores + 1e-4) * reference.projected(taps)
    first = max(1, int((1 - removed) * length * 0.5))
    for h, positions in enumerate(reference.best(scores, first)):
        by_output[h, positions] = torch.finfo(torch.float64).max
    return reference.best(by_output, max(1, int(length * (1 - removed))))


@pytest.mark.parametrize("removed", [0.1, 0.37, 0.5, 0.7, 0.93])
def test_the_kvpress_variant_follows_its_rules(model, removed):
    for length in (9, 50, 101, 200):
        ids, _ = padded([length], length)
        taps, _ = reference.capture(model, ids)
        keep = 1 - Fraction(str(removed))
        policy = f"criticalkv@kvpress(window=8, kernel=5):{float(keep)}"
        assert kept_alone(model, policy, ids) == kvpress_critical(taps[0], removed, 8, 5), length


def kept_alone(model, policy: str, ids: torch.Tensor) -> list[list[int]]:
    return kvfx.compile(model, policy, backend="eager", on_refuse="error").compress(ids).layers[0].positions[0].tolist()


def test_half_of_the_count_is_the_half_that_kvpress_takes_whatever_the_floats():
    for percent in range(1, 100):
        removed = percent / 100
        budget = Policy.parse(f"criticalkv@kvpress:{100 - percent}%").budget
        for length in range(1, 3000, 7):
            count = budget.count(length, 0)
            assert max(1, count // 2) == max(1, int((1 - removed) * length * 0.5))
