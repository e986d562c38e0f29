"""How many graphs are compiled: a promise, because each costs seconds."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import kvfx
from kvfx.engine import engine_of
from kvfx.passes import capture
from kvfx.presets import PRESETS
from test_equivalence import decoder

LENGTHS = (70, 1, 2, 3, 12, 13, 255, 256, 257, 300, 511, 512, 513, 700)


def graphs(model, backend: str = "eager") -> Counter[str]:
    """Compiled graphs by phase, and whether their rows are padded."""
    counts: Counter[str] = Counter()
    for (phase, plan, _, uneven), reports in engine_of(model, backend).reports.items():
        counts[f"{phase} {plan.score is not None and plan.taps} {'padded' if uneven else 'whole'}"] += len(reports)
    return counts


@pytest.fixture
def model():
    torch._dynamo.reset()
    return decoder("llama", 2, 2, 16, 0, layers=1)


def test_all_lengths_and_keeps_share_two_prefill_graphs_and_two_decode_graphs(model):
    for keep in ("1", "0.5", "0.1"):
        compiled = kvfx.compile(model, f"compactor:{keep}", backend="eager")
        for length in LENGTHS:
            ids = torch.ones(1, length, dtype=torch.long)
            cache = compiled.compress(ids)
            for _ in range(2):
                compiled(ids[:, :1], past_key_values=cache)
    counts = graphs(model)
    assert counts["prefill ('query', 'key', 'value', 'pre_key') whole"] == 2
    assert counts["decode False whole"] == 2
    assert sum(counts.values()) == 4


def test_two_scores_in_turn_share_their_graphs_between_keeps_too(model):
    for keep in ("1", "0.5", "0.1"):
        for length in (1, 2, 70, 300, 700):
            kvfx.compile(model, f"criticalkv(window=4):{keep}", backend="eager").compress(torch.ones(1, length, dtype=torch.long))
    assert graphs(model) == {"prefill ('query', 'key', 'value', 'output_weight') whole": 2}


@pytest.mark.sample(1)
@pytest.mark.parametrize("policy", ["knorm:0.5", "compactor:0.5"])
def test_padded_batches_of_all_sizes_share_one_prefill_graph_and_one_decode_graph(policy, model):
    compiled = kvfx.compile(model, policy, backend="eager")
    for rows, length in zip(itertools.cycle((2, 5, 3)), LENGTHS[2:], strict=False):
        ids = torch.ones(rows, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        cache = compiled.compress(ids, mask)
        compiled(ids[:, :1], past_key_values=cache)
    counts = graphs(model)
    assert sum(number for name, number in counts.items() if name.startswith("prefill")) == 1
    assert counts["decode False padded"] == 1
    assert counts["decode False whole"] <= 2  # where both rows keep equally many, no slot is empty
    assert sum(counts.values()) <= 4


@pytest.mark.slow
def test_forty_policies_and_keeps_live_in_one_process(model):
    ids = torch.arange(60)[None]
    texts = [f"{name}:{keep}" for name in ("knorm", "compactor", "random", "compactor(seed=1)") for keep in
             ("1", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.25", "0.2")]  # fmt: skip
    sizes = set()
    for text in texts:
        compiled = kvfx.compile(model, text, backend="eager")
        cache = compiled.compress(ids)
        compiled(ids[:, :1], past_key_values=cache)
        sizes.add((text, cache.layers[0].slots))
    assert len(sizes) == 40
    assert sum(graphs(model).values()) == 4 + 1  # one prefill for each score, one decode for all


def test_models_compiled_from_one_model_share_their_graphs_and_others_do_not(model):
    ids = torch.arange(20)[None]
    for _ in range(2):
        kvfx.compile(model, "knorm:0.5", backend="eager").compress(ids)
    assert sum(graphs(model).values()) == 1
    other = decoder("llama", 2, 2, 16, 1, layers=1)
    kvfx.compile(other, "knorm:0.5", backend="eager").compress(ids)
    assert sum(graphs(model).values()) == 1
    assert sum(graphs(other).values()) == 1


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"none", "compactor"}))
def test_inductor_keeps_what_the_eager_backend_keeps_under_every_preset(model, preset):
    ids = torch.randint(0, 97, (1, 600), generator=torch.Generator().manual_seed(0))
    ours, theirs = (kvfx.compile(model, f"{preset}:0.3", backend=backend).compress(ids) for backend in ("inductor", "eager"))
    assert torch.equal(ours.layers[0].positions, theirs.layers[0].positions)


@pytest.mark.inductor
def test_inductor_keeps_what_the_eager_backend_keeps(model):
    ids = torch.randint(0, 97, (1, 600), generator=torch.Generator().manual_seed(0))
    caches, logits = {}, {}
    for backend in ("eager", "inductor"):
        compiled = kvfx.compile(model, "compactor:0.3", backend=backend)
        caches[backend] = compiled.compress(ids)
        logits[backend] = compiled(ids[:, :1], past_key_values=caches[backend]).logits
    for ours, theirs in zip(caches["inductor"].layers, caches["eager"].layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys)
    torch.testing.assert_close(logits["inductor"], logits["eager"])


def test_a_step_may_have_more_variants_than_dynamo_allows_by_itself():
    """Rows, windows that are full or not, and single slots each make a difference, and differences multiply."""
    built = []
    step = capture.compile_with(lambda x, name: x + len(name), lambda graph: built.append(graph), "eager")
    for length in range(12):
        assert step(torch.ones(1), "n" * length) == 1 + length
    assert len(built) == 12
