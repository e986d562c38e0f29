"""Layers that compete for slots: who wins how many, what stays, and everything that a cache of unequal layers goes through."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

import kvfx
import reference
from kvfx import layers_step
from kvfx.errors import InputError, PolicyError, PoolExhausted, SiteRefused
from kvfx.lower import lower_program
from kvfx.policy import Policy
from test_equivalence import VOCABULARY, decoder, padded, row_taps
from yardstick import assert_within_rounding

MODEL = decoder("llama", 2, 2, 16, 4, layers=4)  # one for most tests, whose lengths and keeps share its graphs
POLICY = "knorm | budget=layers({}) | protect(sinks=1, recent=2)"


def prompts(lengths: list[int], seed: int) -> tuple[Tensor, Tensor | None]:
    """As `padded`, but no token stands twice in a row: in the first layer the norms of its keys would be equal."""
    mask = padded(lengths, seed)[1]
    order = torch.rand(len(lengths), VOCABULARY - 1, generator=torch.Generator().manual_seed(seed)).argsort(-1) + 1
    ids = order[:, torch.arange(max(lengths)) % (VOCABULARY - 1)]
    return ids if mask is None else ids * mask, mask


def compiled(policy: str, model=MODEL, backend: str = "eager"):
    return kvfx.compile(model, policy, backend=backend, on_refuse="error")


def kept(cache: kvfx.Cache, row: int) -> list[list[list[int]]]:
    """Positions by layer and head."""
    return [[[p for p in head if p >= 0] for head in layer.positions[row].tolist()] for layer in cache.layers]


def numbers(cache: kvfx.Cache, row: int) -> list[int]:
    layers = kept(cache, row)
    assert all(len({len(head) for head in layer}) == 1 for layer in layers)
    return [len(layer[0]) for layer in layers]


def assert_shared(scores: list[Tensor], cache: kvfx.Cache, row: int, total: int, sure: int, most: int | None = None, noise=0.0):
    """One row holds the best ranks of all layers, and each head of a layer its best tokens; close scores may change places."""
    won, length = numbers(cache, row), scores[0].shape[1]
    assert sum(won) == total
    for layer, (score, count) in enumerate(zip(scores, won, strict=True)):
        assert min(sure, length) <= count <= min(length, most or length)
        for head, (ours, theirs) in enumerate(zip(kept(cache, row)[layer], reference.best(score, count), strict=True)):
            lost, gained = reference.swapped(score[head], theirs, ours)
            assert all(a - b <= 1e-5 * max(abs(a), abs(b), 1.0) + noise for a, b in zip(sorted(lost), sorted(gained), strict=True))
    curves = [score.sort(-1, descending=True).values.mean(0).tolist() for score in scores]
    lowest = min((curve[n - 1] for curve, n in zip(curves, won, strict=True) if n > min(sure, length)), default=torch.inf)
    best = max((curve[n] for curve, n in zip(curves, won, strict=True) if n < min(length, most or length)), default=-torch.inf)
    assert best - lowest <= 1e-5 * max(abs(best), abs(lowest), 1.0) + noise if best > lowest else True


@st.composite
def cases(draw) -> dict:
    return {
        "family": draw(st.sampled_from(["llama", "qwen3"])),
        "layers": draw(st.integers(1, 4)),
        "kv_heads": draw(st.sampled_from([1, 2, 3])),
        "group": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 1000)),
        "score": draw(st.sampled_from(["knorm", "snapkv(window=4)"])),
        "keep": draw(st.sampled_from(["0.1", "0.3", "0.5", "0.9", "1"])),
        "floor": draw(st.sampled_from(["0", "0.2", "1"])),
        "min": draw(st.sampled_from([2, 5])),
        "max": draw(st.sampled_from(["none", 20])),
        "lengths": draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)),
    }


SCORES = {
    "knorm": (reference.knorm, 0, 0),
    "snapkv(window=4)": (lambda taps: reference.snapkv(taps, 4, 5), 0, 4),
}


def check(case: dict) -> None:
    model = decoder(case["family"], case["kv_heads"], case["group"], 16, case["seed"], case["layers"])
    ids, mask = prompts(case["lengths"], case["seed"])
    score_of, sinks, recent = SCORES[case["score"]]
    budget = f"layers({case['keep']}, floor={case['floor']}, min={case['min']}, max={case['max']})"
    policy = compiled(f"{case['score']} | budget={budget}", model)
    cache = policy.compress(ids, mask)
    exact_model = copy.deepcopy(model).double()
    taps, exact = (reference.capture(each, ids, mask)[0] for each in (model, exact_model))
    most = None if case["max"] == "none" else case["max"]
    tokens = torch.randint(1, VOCABULARY, (len(ids), 4), generator=torch.Generator().manual_seed(1))
    hidden = []
    for row, length in enumerate(case["lengths"]):
        scores = [reference.protected(score_of(row_taps(layer, row, length)), sinks, recent) for layer in taps]
        fine = [reference.protected(score_of(row_taps(layer, row, length)), sinks, recent) for layer in exact]
        noise = max(8 * float((a - b).nan_to_num().abs().max()) for a, b in zip(scores, fine, strict=True))
        flat = min(length, max(2, reference.count_kept(length, case["keep"], recent)), most or length)
        sure = max(recent, min(flat, max(case["min"], int(float(case["floor"]) * flat))))
        assert_shared(scores, cache, row, flat * case["layers"], sure, most, noise)
        seen = torch.zeros(case["layers"], case["kv_heads"], length, dtype=torch.bool)
        for layer, heads in enumerate(kept(cache, row)):
            for head, positions in enumerate(heads):
                seen[layer, head, positions] = True
        hidden.append([~layer[None] for layer in seen])
    # Two tokens at once, then one by one: layers of different lengths are read by blocks too.
    logits = [policy(part, past_key_values=cache).logits for part in (tokens[:, :2], tokens[:, 2:3], tokens[:, 3:])]
    for row, length in enumerate(case["lengths"]):
        given = ids[row : row + 1, -length:], hidden[row], tokens[row : row + 1]
        exact_logits, low = reference.continue_with(exact_model, *given), reference.continue_with(model, *given)
        error = (torch.cat(logits, 1)[row : row + 1].double() - exact_logits).abs().max()
        allowed = (low.double() - exact_logits).abs().max() + torch.finfo(torch.float32).eps * exact_logits.abs().max()
        assert error <= 4 * allowed, (case, row, float(error), float(allowed))


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases())
def test_layers_keep_and_read_what_the_eager_reference_says(case):
    torch._dynamo.reset()
    check(case)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_layers_keep_and_read_what_the_eager_reference_says_at_length(case):
    torch._dynamo.reset()
    check(case)


def test_layers_really_differ_and_the_total_is_that_of_a_flat_budget():
    model = compiled(POLICY.format(0.4))
    cache, flat = model.compress(prompts([50], 2)[0]), compiled("knorm:0.4").compress(prompts([50], 2)[0])
    assert len(set(numbers(cache, 0))) > 1
    assert sum(numbers(cache, 0)) == sum(numbers(flat, 0)) == 80
    assert abs(cache.nbytes - flat.nbytes) < flat.nbytes / 10


@pytest.mark.parametrize("keep", [pytest.param(None, marks=pytest.mark.slow), [0.2, 0.9, 1.0]], ids=str)
def test_a_row_keeps_what_it_keeps_alone(keep):
    lengths, model = [40, 1, 17], compiled(POLICY.format(0.4))
    ids, mask = prompts(lengths, 7)
    together = model.compress(ids, mask, keep=keep)
    for row, length in enumerate(lengths):
        alone = model.compress(ids[row : row + 1, -length:], keep=None if keep is None else keep[row])
        assert kept(alone, 0) == kept(together, row)
    answers = model.generate(torch.ones(3, 2, dtype=torch.long), past_key_values=together, append=True, max_new_tokens=4)
    for row, length in enumerate(lengths):
        alone = model.compress(ids[row : row + 1, -length:], keep=None if keep is None else keep[row])
        asked = model.generate(torch.ones(1, 2, dtype=torch.long), past_key_values=alone, append=True, max_new_tokens=4)
        assert torch.equal(asked[0], answers[row])


def test_keeping_all_gives_the_logits_of_the_model():
    ids, mask = prompts([30, 12], 3)
    model, positions = compiled(POLICY.format(1.0)), (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model.compress(ids, mask)
    assert [numbers(cache, row) for row in range(2)] == [[30] * 4, [12] * 4]
    next_ids = torch.tensor([[4], [5]])
    ours = model(next_ids, past_key_values=cache).logits
    given = torch.cat([ids, next_ids], 1), torch.cat([mask, mask[:, :1] | 1], 1), torch.cat([positions, mask.sum(1, True)], 1)
    with torch.no_grad():
        low, exact = (each(*given).logits[:, -1] for each in (MODEL, copy.deepcopy(MODEL).double()))
    assert_within_rounding(ours[:, 0], low, exact)


def test_a_splice_chooses_numbers_by_its_first_score_and_tokens_in_two_turns():
    spliced = compiled(POLICY.format(0.4).replace("knorm", "splice(-knorm, random(3), 0.5)"))
    ids = prompts([50], 2)[0]
    cache, plain = spliced.compress(ids), compiled(POLICY.format(0.4).replace("knorm", "(-knorm)")).compress(ids)
    assert numbers(cache, 0) == numbers(plain, 0)
    scores = [reference.protected(reference.knorm(taps), 1, 2) for taps in reference.capture(MODEL, ids)[0]]
    for score, heads, n in zip(scores, kept(cache, 0), numbers(cache, 0), strict=True):
        for head, best in zip(heads, reference.best(score, n // 2), strict=True):
            assert set(best) <= set(head)


@pytest.mark.slow
def test_later_turns_append_and_a_new_part_is_shared_out_by_itself():
    model, (ids, mask) = compiled(POLICY.format(0.5)), prompts([24, 15], 5)
    cache = model.compress(ids, mask)
    before = [kept(cache, row) for row in range(2)]
    model(prompts([7, 7], 6)[0], past_key_values=cache)
    more = prompts([20, 20], 8)[0]
    grown = model.compress(more, past_key_values=cache)
    assert grown is cache
    for row, length in enumerate([24, 15]):
        now = kept(cache, row)
        assert sum(numbers(cache, row)) == 4 * (length // 2 + 7 + 10)
        for layer, first in zip(now, before[row], strict=True):
            for head, old in zip(layer, first, strict=True):
                assert head[: len(old) + 7] == [*old, *range(length, length + 7)]
                assert all(p >= length + 7 for p in head[len(old) + 7 :])
                assert {length + 7, length + 25, length + 26} <= set(head)


def test_files_copies_beams_and_threads_of_rows_go_on_alike(tmp_path):
    model, (ids, mask) = compiled(POLICY.format(0.4)), prompts([33, 21], 9)
    cache, question = model.compress(ids, mask), torch.tensor([[5, 9], [7, 7]])
    cache.save(tmp_path / "layers.kvfx")
    loaded = kvfx.load_cache(tmp_path / "layers.kvfx")
    greedy = {"append": True, "max_new_tokens": 4, "do_sample": False}
    answers = model.generate(question, past_key_values=cache.copy(), **greedy)
    assert torch.equal(model.generate(question, past_key_values=loaded, **greedy), answers)
    beams = model.generate(question, past_key_values=cache.copy(), num_beams=3, **greedy)
    assert torch.equal(model.generate(question, past_key_values=cache, num_beams=3, **greedy), beams)
    swapped = cache.copy()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(model.generate(question.flip(0), past_key_values=swapped, **greedy), answers.flip(0))


def test_a_prefill_of_any_length_and_keep_is_one_graph_and_decoding_one_or_two():
    model = decoder("llama", 2, 2, 16, 4, layers=3)
    torch._dynamo.reset()
    policy = compiled(POLICY.format(0.5), model)
    for seed, (length, keep) in enumerate([(20, 0.5), (33, 0.3), (64, 0.9), (7, 0.1), (90, 0.2)]):
        cache = policy.compress(prompts([length], seed)[0], keep=keep)
        for token in range(3):
            policy(torch.tensor([[token]]), past_key_values=cache)
    builds = {phase: sum(len(r) for key, r in policy._kvfx.engine.reports.items() if key.phase == phase) for phase in PHASES}
    assert builds["prefill"] <= 2
    assert builds["decode"] <= 2
    policy.compress(torch.tensor([[3]]))
    again = {phase: sum(len(r) for key, r in policy._kvfx.engine.reports.items() if key.phase == phase) for phase in PHASES}
    assert again["prefill"] <= builds["prefill"] + 1


PHASES = ("prefill", "decode")


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[24, 24], [24, 15]], ids=str)
def test_a_static_cache_holds_and_reads_the_same(lengths):
    (ids, mask), more, next_ids = prompts(lengths, 5), prompts([10, 10], 6)[0], torch.tensor([[3], [4]])
    model, exact_model = compiled(POLICY.format(0.5)), copy.deepcopy(MODEL).double()
    static, grown, addresses = kvfx.StaticCache(40, 80), model.compress(ids, mask), set()
    for _ in range(2):
        static.reset()
        model.compress(ids, mask, past_key_values=static)
        ours = model(next_ids, past_key_values=static).logits
        model.compress(more, past_key_values=static)
        addresses.add(tuple(tensor.data_ptr() for layer in static.layers for tensor in layer.state().values()))
    assert len(addresses) == 1
    for row, length in enumerate(lengths):
        seen = [torch.zeros(1, 2, length, dtype=torch.bool).scatter(-1, torch.tensor([heads]), True) for heads in kept(grown, row)]
        given = ids[row : row + 1, -length:], [~layer for layer in seen], next_ids[row : row + 1]
        low, exact = (reference.continue_with(each, *given) for each in (MODEL, exact_model))
        assert_within_rounding(ours[row : row + 1], low, exact)
    model(next_ids, past_key_values=grown)
    model.compress(more, past_key_values=grown)
    assert [kept(static.to("dense"), row) for row in range(2)] == [kept(grown, row) for row in range(2)]


@pytest.mark.slow
def test_a_static_cache_without_room_is_left_as_it_was():
    model, ids = compiled(POLICY.format(0.5)), prompts([40], 5)[0]
    static = kvfx.StaticCache(21, 200)
    with pytest.raises(PoolExhausted, match="of 21 slots"):
        model.compress(ids, past_key_values=static)
    assert static.is_empty
    model.compress(ids[:, :20], past_key_values=static)
    before = {name: tensor.clone() for name, tensor in static.tensors().items()}
    with pytest.raises(PoolExhausted, match="of 21 slots"):
        model.compress(ids, past_key_values=static)
    assert all(torch.equal(tensor, before[name]) for name, tensor in static.tensors().items())
    assert len(model.generate(ids, cache_implementation="static", max_new_tokens=3)[0]) == 43


@pytest.mark.slow
def test_the_whole_keys_and_values_of_a_layer_are_gone_before_the_next_is_cut(monkeypatch):
    cut, whole = layers_step._cut, []

    def watched(layer, *rest):
        assert [ref() for ref in whole] == [None] * len(whole)
        whole.extend(weakref.ref(tensor) for tensor in (layer.keys, layer.values, *layer.scores))
        cut(layer, *rest)

    monkeypatch.setattr(layers_step, "_cut", watched)
    model = compiled(POLICY.format(0.5))
    cache = model.compress(prompts([30, 12], 5)[0])
    model.compress(prompts([20, 20], 6)[0], past_key_values=cache)
    assert len(whole) == 2 * 4 * 4
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)
    )


def test_scores_that_are_not_finite_leave_the_cache_as_it_was():
    model = copy.deepcopy(MODEL)
    policy = compiled(POLICY.format(0.5), model)
    cache = policy.compress(prompts([20], 5)[0])
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    model.model.layers[2].self_attn.k_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"not finite in layers \[2, 3\]"):
        policy.compress(prompts([20], 6)[0], past_key_values=cache)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.tensors().items())


def test_programs_and_decoders_by_hand_are_refused_by_name():
    with pytest.raises(PolicyError, match="cannot be exported: how many slots each of the layers wins"):
        lower_program(Policy.parse("knorm | budget=layers(0.5)"))
    with pytest.raises(PolicyError, match="layers that compete leave slots of unequal lengths"):
        kvfx.compile(torch.nn.Linear(2, 2).eval(), "knorm | budget=layers(0.5)", backend="eager")


def test_explain_says_that_layers_compete_and_when_the_cut_follows():
    explained = kvfx.explain(MODEL, policy="knorm | budget=layers(0.5, floor=0.2)")
    text = " ".join(str(explained).split())
    assert "the layers compete, and each is sure of 0.2 of that and of 2 slots. The cut follows after the last layer" in text
    assert explained.as_dict()["competition"] in text
    assert kvfx.explain(MODEL, policy="knorm").competition() == ""


def test_a_layer_that_is_not_understood_stays_whole_and_the_others_share():
    model = decoder("llama", 2, 2, 16, 4, layers=3)
    attention = model.model.layers[1].self_attn
    attention.forward = strange(attention, attention.forward)
    policy = kvfx.compile(model, POLICY.format(0.5), backend="eager")
    with pytest.warns(UserWarning, match="2 of 3 cache layers"):
        cache = policy.compress(prompts([30], 2)[0])
    won = numbers(cache, 0)
    assert won[1] == 30
    assert won[0] + won[2] == 30
    with pytest.raises(SiteRefused, match="2 of 3"):
        kvfx.compile(model, POLICY.format(0.5), backend="eager", on_refuse="error").compress(prompts([30], 2)[0])


def strange(attention, forward):
    """Attention of a kind that no rule knows, over keys that the cache stores."""

    def run(hidden_states, position_embeddings=None, past_key_values=None, **kwargs):
        heads = attention.k_proj(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        keys, _ = past_key_values.update(heads, heads, attention.layer_idx)
        return hidden_states * keys.amax((1, 2)).mean(-1)[:, None, None].tanh(), None

    return run


@pytest.mark.slow
def test_sliding_windows_take_no_part():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "initializer_range": 0.15}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, attn_implementation="eager")).eval()
    policy, (ids, mask) = compiled(POLICY.format(0.5), model), prompts([30, 21], 2)
    cache = policy.compress(ids, mask)
    for row, length in enumerate([30, 21]):
        won = [len(layer[0]) for layer in kept(cache, row)]
        assert won[::2] == [7, 7]
        assert won[1] + won[3] == 2 * (length // 2)
        alone = policy.compress(ids[row : row + 1, -length:])
        assert kept(alone, 0) == kept(cache, row)
