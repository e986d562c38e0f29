"""Exported programs: what a prefill returns of its keys and values, what stays as it was, and that the result is a program."""

from __future__ import annotations

import copy
import functools
import io
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim, ExportedProgram

import kvfx
import models_page
import zoo
import zoo_plain
from kvfx import passes
from kvfx.budget import FLAT, Budget
from kvfx.errors import PolicyError
from kvfx.lower import lower, lower_program
from kvfx.params import Word
from kvfx.passes.plan import Keep, Plan
from kvfx.passes.report import Report
from kvfx.policy import as_policy
from kvfx.presets import PRESETS
from programs import (
    EXPORTED_AT,
    LENGTHS,
    KeysValues,
    PlainPrefill,
    PlainStep,
    Prefill,
    Step,
    at,
    exported,
    kept_of,
    plan_of,
    prefill_of,
    step_of,
    tensors,
    whole,
)
from yardstick import assert_within_rounding

FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt-oss", "gpt2")
SIMPLE = ("mistral", "qwen3", "gpt2")  # whose decode steps are as Llama's or simpler
QUICK = ("compactor", "snapkv", "expected_attention")  # of the presets; a slow run has all
STORE_ALL = Plan(None)
# Dynamo, where it meets the activation function of BLOOM.
BLOOM = r"ignore:<class 'torch\.autograd\.function\.Function'> should not be instantiated:DeprecationWarning"


@pytest.fixture(autouse=True)
def no_grad():
    """Programs are for inference."""
    with torch.no_grad():
        yield


@functools.cache
def pristine(name: str) -> ExportedProgram:
    """The prefill of a family's model, as it was exported."""
    return prefill_of(twins(name)[0], zoo.prompt(EXPORTED_AT), longest=90)


def fresh(name: str) -> ExportedProgram:
    """A copy of it, to be rewritten."""
    return copy.deepcopy(pristine(name))


@functools.cache
def twins(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A family's model, and the same in float64."""
    model = zoo.make(zoo.ROWS[name]).to(dtype)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    return model, exact


def assert_prefills_as(program: ExportedProgram, model: Any, exact: Any, policy: str, ids: Tensor) -> KeysValues:
    """Assert that the program returns the plain model's logits, and of its keys and values what the compiled model keeps."""
    cache = kvfx.compile(model, policy, backend="eager", on_refuse="error").compress(ids)
    logits, kept = program.module()(ids, at(ids.shape[1], rows=ids.shape[0]))
    (low, low_full), (best, best_full) = whole(model, ids), whole(exact, ids)
    assert_within_rounding(logits, low, best)
    for ours, *theirs in zip(kept, kept_of(cache, low_full), kept_of(cache, best_full), strict=True):
        for part in range(2):
            assert_within_rounding(ours[part], theirs[0][part], theirs[1][part])
    return kept


def assert_compressed(report: Report, name: str) -> None:
    """Assert that all layers of a family that see everything are compressed, the others whole, for every length."""
    kinds = zoo.ROWS[name].layers
    assert [site.layer for site in report.sites] == list(range(len(kinds)))
    assert [site.window is not None for site in report.sites] == [kind != "full" for kind in kinds]
    assert [bool(site.score) for site in report.sites] == [kind == "full" for kind in kinds]
    assert not report.reasons()
    assert not report.narrowed


def assert_keeps_the_best(program: ExportedProgram, name: str, lengths: tuple[int, ...]) -> None:
    """Assert that a program returns the plain model's logits, and half of its keys and values: those of the smallest keys."""
    run, (model, exact) = program.module(), twins(name)
    for length in lengths:
        ids = zoo.prompt(length)
        logits, kept = run(ids, at(length))
        (low_logits, low), (best_logits, best) = whole(model, ids), whole(exact, ids)
        assert_within_rounding(logits, low_logits, best_logits)
        for kind, ours, *theirs in zip(zoo.ROWS[name].layers, kept, low, best, strict=True):
            places = smallest(theirs[0][0], max(1, length // 2) if kind == "full" else length)
            for part in range(2):
                assert_within_rounding(ours[part], *(gathered(states[part], places) for states in theirs))


def smallest(keys: Tensor, count: int) -> Tensor:
    """Places of the smallest keys of each head, ascending, `[B, Hkv, count]`."""
    return keys.float().norm(dim=-1).topk(count, largest=False).indices.sort().values


def gathered(states: Tensor, places: Tensor) -> Tensor:
    """The states at those places."""
    return states.gather(2, places[..., None].expand(-1, -1, -1, states.shape[3]))


def ranges_of(program: ExportedProgram) -> set[tuple[int, float]]:
    """The smallest and largest values of the program's symbols."""
    return {(int(bounds.lower), float(bounds.upper)) for bounds in program.range_constraints.values()}


def text_of(program: ExportedProgram) -> tuple[str, ...]:
    """All that a program says of itself."""
    return str(program.graph), str(program.graph_signature), str(program.range_constraints), str(sorted(program.constants))


# -- prefill and decode ------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_one_prefill_program_keeps_the_best_at_every_length(name):
    program = fresh(name)
    report = passes.run(program, plan_of("knorm:0.5", twins(name)[0]), check_each=True)
    assert_compressed(report, name)
    assert_keeps_the_best(program, name, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(zoo.ROWS))
@pytest.mark.filterwarnings(BLOOM)
def test_the_page_of_models_says_whose_programs_are_rewritten(name):
    program = fresh(name)
    normed = name == "llama4, full"  # whose keys are all of one norm; keydiff would be as good, but has ties for two tokens
    policy = "streaming_llm:0.5" if normed else "knorm:0.5"
    report = passes.run(program, plan_of(policy, twins(name)[0]))
    assert_compressed(report, name)
    if normed:
        kept = program.module()(zoo.prompt(40), at(40))[1]
        for ours, full in zip(kept[0], whole(twins(name)[0], zoo.prompt(40))[1][0], strict=True):
            assert torch.equal(ours, torch.cat([full[:, :, :4], full[:, :, -16:]], 2))
    else:
        assert_keeps_the_best(program, name, (2, 40))
    models_page.assert_exported(name, "yes" if zoo.ROWS[name].full else "nothing to evict")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", *(pytest.param(n, marks=pytest.mark.slow) for n in SIMPLE)])
def test_a_decode_program_answers_as_before_with_keys_unexpanded(name):
    model, exact = twins(name)
    prompt, token = zoo.prompt(EXPORTED_AT), zoo.prompt(1, seed=2)
    past = whole(model, prompt)[1]
    program = step_of(model, past)
    report = passes.run(program, STORE_ALL)
    assert [site.cache for site in report.sites] == ["cat"] * len(past)
    assert not report.reasons()
    logits, grown = program.module()(token, at(1, EXPORTED_AT), past)
    low = whole(model, torch.cat([prompt, token], 1))[0][:, -1:]
    assert_within_rounding(logits, low, whole(exact, torch.cat([prompt, token], 1))[0][:, -1:])
    for (keys, values), held in zip(grown, past, strict=True):
        assert torch.equal(keys[:, :, :-1], held[0])
        assert torch.equal(values[:, :, :-1], held[1])


def test_a_decode_program_goes_on_from_the_slots_of_a_prefill_program_as_kvfx_does():
    model, exact = twins("llama")
    ids, policy = zoo.prompt(40), "knorm:0.5"
    prefill, compressed = fresh("llama"), kvfx.compile(model, policy, backend="eager")
    passes.run(prefill, plan_of(policy, model))
    held, cache = prefill.module()(ids, at(40))[1], compressed.compress(ids)
    low, best = (kept_of(cache, whole(every, ids)[1]) for every in (model, exact))
    program = step_of(model, held)
    passes.run(program, STORE_ALL)
    step = program.module()
    for index in range(2):
        token, place = zoo.prompt(1, seed=index + 2), at(1, 40 + index)
        logits, held = step(token, place, held)
        (low_logits, low), (best_logits, best) = Step(model)(token, place, low), Step(exact)(token, place, best)
        for ours in (logits, compressed(token, past_key_values=cache).logits):
            assert_within_rounding(ours, low_logits, best_logits)


def test_rows_may_vary_too_and_bfloat16_keeps_what_it_keeps():
    model, exact = twins("mistral", torch.bfloat16)
    ids = torch.cat([zoo.prompt(40, seed=seed) for seed in range(3)])
    program = prefill_of(model, ids[:2, :EXPORTED_AT].contiguous())
    assert not passes.run(program, plan_of("knorm:0.5", model)).narrowed
    run = program.module()
    for rows, length in ((3, 40), (2, 3)):
        logits, ours = run(ids[:rows, :length], at(length, rows=rows))
        (low_logits, low), (best_logits, best) = whole(model, ids[:rows, :length]), whole(exact, ids[:rows, :length])
        assert_within_rounding(logits, low_logits, best_logits)
        places = smallest(low[0][0], length // 2)
        for part in range(2):
            assert_within_rounding(ours[0][part], gathered(low[0][part], places), gathered(best[0][part], places))


QUICK_DECODERS = ("einsum", "shared")  # other axes, and keys that two layers read


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_DECODERS else pytest.param(name, marks=pytest.mark.slow)
        for name in zoo_plain.PLAIN
        if name != "gpt-fast"  # whose caches are buffers: see below
    ],
)
def test_decoders_by_hand_keep_their_axes_as_the_page_of_models_says(name):
    row, model, policy = zoo_plain.PLAIN[name], zoo_plain.make(name), as_policy("knorm | budget=uniform(0.5, shape=pyramid(4))")
    exact, sizes = copy.deepcopy(model).double(), {0: Dim.AUTO, 1: Dim.AUTO}
    ids = torch.stack(
        [torch.randperm(zoo_plain.VOCABULARY)[:40] for _ in range(2)]
    )  # none twice, whose keys would be equally large
    program = exported(PlainPrefill(model, row).eval(), ids[:, :EXPORTED_AT].contiguous(), shapes=(sizes,))
    assert not passes.run(program, lower_program(policy, windows=(None, None))).reasons()
    run, order = program.module(), (0, 2, 1, 3) if name == "einsum" else (0, 1, 2, 3)
    for length in (2, 40):
        logits, past = run(ids[:, :length])
        (low_logits, low), (best_logits, best) = (row.run(every, ids[:, :length]) for every in (model, exact))
        assert_within_rounding(logits, low_logits, best_logits)
        parts = zip(past, tensors(low), tensors(best), strict=True)
        states = [[part.permute(order) for part in triple] for triple in parts if triple[0].dim() == 4]
        counts, room = policy.counts(length, 2), 96 if name == "preallocated" else None
        if room:
            states = [states[index] for index in (0, 2, 1, 3)]  # which has all keys in front of all values
        assert [ours.shape[2] for ours, *_ in states] == [room or count for count in counts for _ in range(2)]
        for index, (ours, *theirs) in enumerate(states):
            count = counts[index // 2]
            places = smallest(states[index - index % 2][1][:, :, :length], count)
            assert_within_rounding(ours[:, :, :count], *(gathered(part, places) for part in theirs))
    models_page.assert_exported(f"{name}, by hand", "yes")


@pytest.mark.parametrize("name", [
    name if name in QUICK_DECODERS else pytest.param(name, marks=pytest.mark.slow)
    for name in zoo_plain.PLAIN if name != "gpt-fast"
])  # fmt: skip
@torch.no_grad()
def test_a_decode_program_of_a_decoder_by_hand_answers_as_before(name):
    row, model = zoo_plain.PLAIN[name], zoo_plain.make(name)
    exact, ids = copy.deepcopy(model).double(), zoo_plain_ids(EXPORTED_AT + 1)
    prompt, token = ids[:, :-1], ids[:, -1:].contiguous()
    past = row.run(model, prompt)[1]
    held = tensors(past)
    program = exported(PlainStep(model, row, past).eval(), token, held, shapes=({}, [{}] * len(held)))
    report = passes.run(program, STORE_ALL)
    assert len(report.sites) == len(row.layer_of_site)
    assert not report.reasons()
    logits, _ = program.module()(token, held)
    (low, _), (best, _) = (row.run(every, ids) for every in (model, exact))
    assert_within_rounding(logits, low[:, -1:], best[:, -1:])


def zoo_plain_ids(length: int) -> Tensor:
    return torch.randint(3, zoo_plain.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.sample(1)
@pytest.mark.parametrize("preset", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, preset in PRESETS.items() if "@" not in name and "uniform" in preset.policy
])  # fmt: skip
def test_no_dense_preset_narrows_the_lengths_of_a_program(preset):
    model, exact = twins("mistral")
    program = fresh("mistral")
    policy = f"{preset}:0.5"
    assert not passes.run(program, plan_of(policy, model)).narrowed
    assert ranges_of(program) == {(2, 90)}
    for length in (2, 90):
        assert_prefills_as(program, model, exact, policy, zoo.prompt(length))


def test_a_score_that_needs_more_tokens_narrows_the_lengths_and_says_so():
    model, _ = twins("mistral")
    program = prefill_of(model, zoo.prompt(EXPORTED_AT), longest=90)
    score = lower(as_policy("snapkv@kvpress(window=8)")).score
    report = passes.run(program, Plan(score, keep=Keep(1, 2)))
    assert len(report.narrowed) == 1
    assert "before" in report.narrowed[0]
    assert ranges_of(program) == {(10, 90)}  # more than a window of 8, and one query before it would be a special case
    with pytest.raises(AssertionError, match=">= 10"):
        program.module()(zoo.prompt(9), at(9))
    assert program.module()(zoo.prompt(10), at(10))[1][0][0].shape[2] == 5


# -- the result is a program -------------------------------------------------------------------------------------------------------


def test_a_rewritten_program_is_saved_loaded_and_decomposed_again():
    model, _ = twins("mistral")
    program, plan = fresh("mistral"), plan_of("leverage(8) | budget=uniform(0.5)", model)
    inputs = program.graph_signature.user_inputs
    passes.run(program, plan)
    program.validate()
    assert program.graph_signature.user_inputs == inputs
    assert sum("sketch" in name for name in program.constants) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    want = tensors(program.module()(zoo.prompt(40), at(40)))
    for other in (loaded, loaded.run_decompositions({})):
        got = tensors(other.module()(zoo.prompt(40), at(40)))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def test_a_program_of_one_length_is_rewritten_too():
    model, exact = twins("mistral")
    ids = zoo.prompt(EXPORTED_AT)
    program = exported(Prefill(model).eval(), ids, at(EXPORTED_AT), shapes=({}, {}))
    passes.run(program, plan_of("knorm:0.5", model))
    assert_prefills_as(program, model, exact, "knorm:0.5", ids)


# -- what is left alone, and what is refused ---------------------------------------------------------------------------------------


def test_a_layer_whose_cache_drops_what_left_its_window_stays_whole():
    model, _ = twins("gemma3")
    program = prefill_of(model, zoo.prompt(24), windows=True)
    before = program.module()(zoo.prompt(40), at(40))[1]
    report = passes.run(program, plan_of("knorm:0.5", model))
    assert [(site.layer, site.window, bool(site.score)) for site in report.sites] == [(0, zoo.WINDOW, False), (1, None, True)]
    assert not report.reasons()
    after = program.module()(zoo.prompt(40), at(40))[1]
    assert [keys.shape[2] for keys, _ in after] == [zoo.WINDOW - 1, 20]
    assert torch.equal(after[0][0], before[0][0])


def test_a_prefill_plan_leaves_a_program_with_a_past_alone_and_says_why():
    model, _ = twins("mistral")
    past = whole(model, zoo.prompt(EXPORTED_AT))[1]
    program = step_of(model, past)
    want = tensors(program.module()(zoo.prompt(1), at(1, EXPORTED_AT), past))
    report = passes.run(program, plan_of("knorm:0.5", model))
    assert not report.compressed
    assert "keys are of" in report.sites[0].refusal
    assert "a prefill has no past" in report.sites[0].refusal
    got = tensors(program.module()(zoo.prompt(1), at(1, EXPORTED_AT), past))
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in want]


def test_layers_are_left_whole_if_it_is_not_known_which_hold_windows():
    model, _ = twins("gemma3")
    program = fresh("gemma3")
    report = passes.run(program, replace(plan_of("knorm:0.5", model), windows=(zoo.WINDOW, None, None)))
    assert not report.compressed
    assert all("over 2 cache layers was found, the model has 3" in site.refusal for site in report.sites)


def test_a_program_that_is_not_decomposed_is_refused():
    model, _ = twins("mistral")
    with torch.no_grad():
        program = torch.export.export(Prefill(model).eval(), (zoo.prompt(EXPORTED_AT), at(EXPORTED_AT)))
    before = text_of(program)
    with pytest.raises(ValueError, match=r"Run them on program\.run_decompositions\(\{\}\)"):
        passes.run(program, plan_of("knorm:0.5", model))
    assert text_of(program) == before


def test_a_plan_that_does_not_say_how_much_is_kept_is_refused():
    program = fresh("mistral")
    with pytest.raises(ValueError, match="says how much is kept"):
        passes.run(program, lower(as_policy("knorm:0.5")))


@pytest.mark.parametrize("broken", ["insert_eviction", "lower", "validate"])
def test_a_program_is_as_it_was_if_a_pass_fails(broken, monkeypatch):
    model, _ = twins("mistral")
    program, plan = fresh("mistral"), plan_of("leverage(8) | budget=uniform(0.5)", model)
    before, want = text_of(program), tensors(program.module()(zoo.prompt(40), at(40)))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        if broken == "validate":
            patch.setattr(ExportedProgram, "validate", fail)
        else:
            replaced = tuple(fail if apply.__name__ == broken else apply for apply in passes.PREFILL_PROGRAM)
            fail.__name__ = broken
            patch.setattr(passes, "PREFILL_PROGRAM", replaced)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            passes.run(program, plan)
    assert text_of(program) == before
    program.validate()
    assert all(torch.equal(*pair) for pair in zip(tensors(program.module()(zoo.prompt(40), at(40))), want, strict=True))
    assert passes.run(program, plan).compressed


# -- the plan ----------------------------------------------------------------------------------------------------------------------


@given(
    length=st.integers(1, 3000),
    protected=st.integers(0, 70),
    layers=st.integers(1, 9),
    pyramid=st.sampled_from([0, 1, 2, 20]),
    least=st.sampled_from([0, 64]),
    amount=st.one_of(st.integers(70, 2000), st.fractions(Fraction(1, 1000), 1, max_denominator=1000)),
)
def test_a_plan_keeps_as_many_as_the_budget_says(length, protected, layers, pyramid, least, amount):
    shape = Word("pyramid", pyramid) if pyramid else FLAT
    amounts = {"tokens": amount} if isinstance(amount, int) else {"keep": amount}
    budget = Budget(shape=shape, least=least if pyramid else 0, **amounts)
    keep = Keep(
        *(budget.keep or Fraction(1)).as_integer_ratio(), tokens=budget.tokens or 0, least=protected, pyramid=pyramid,
        last=budget.least, layers=layers,
    )  # fmt: skip
    assert [keep.slots(length, layer) for layer in range(layers)] == budget.counts(length, protected, layers)


def test_only_the_plan_of_a_program_knows_how_much_is_kept():
    half, third = as_policy("compactor:0.5"), as_policy("compactor:0.3")
    assert lower(half) == lower(third)
    assert lower_program(half) != lower_program(third)
    assert lower_program(half).keep == Keep(1, 2, least=12)
    assert lower_program(as_policy("none")) == STORE_ALL


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("compactor@kvpress:0.5", "over all rows of a batch at once"),
        ("knorm@kvpress:0.5", "round=kvpress counts in floats"),
        ("knorm | budget=uniform(0.5, shape=pyramid(20))", "Pass windows"),
    ],
)
def test_what_no_program_can_do_is_refused_by_name(policy, reason):
    with pytest.raises(PolicyError, match=reason):
        lower_program(as_policy(policy))


# -- preallocated caches -----------------------------------------------------------------------------------------------------------


class StaticBlock(zoo_plain.Block):
    """Writes its keys and values to places that an argument says, and reads all places behind a mask."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, places: Tensor, spelling: str) -> Tensor:
        heads = (zoo_plain.HEADS, zoo_plain.KV_HEADS, zoo_plain.KV_HEADS)
        parts = zip((self.q, self.k, self.v), heads, strict=True)
        query, key, value = (zoo_plain.heads_first(part(self.norm_1(x)), count) for part, count in parts)
        for cache, new in ((keys, key), (values, value)):
            if spelling == "index_copy":
                cache.index_copy_(2, places, new)
            elif spelling == "index_put":
                cache[:, :, places] = new
            else:
                cache[:, :, : new.shape[2]] = new
        seen = torch.arange(ROOM) <= places[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)
        return self.feed(x + self.out(out.transpose(1, 2).flatten(2)))


class Static(zoo_plain.Decoder):
    """Its caches are buffers, or arguments that it writes to."""

    block = StaticBlock

    def __init__(self, spelling: str, owns: bool) -> None:
        super().__init__()
        self.spelling, self.owns = spelling, owns
        for name in CACHES if owns else ():
            self.register_buffer(name, rest())

    def forward(self, ids: Tensor, places: Tensor, *caches: Tensor) -> Tensor:
        held = [self.k0, self.v0, self.k1, self.v1] if self.owns else caches
        x = self.embed(ids)
        for index, block in enumerate(self.blocks):
            x = block(x, *held[2 * index : 2 * index + 2], places, self.spelling)
        return self.head(self.norm(x))


ROOM, CACHES = 48, ("k0", "v0", "k1", "v1")


def rest() -> Tensor:
    """A cache whose places all hold 9."""
    return torch.full((1, zoo_plain.KV_HEADS, ROOM, zoo_plain.DIM), 9.0)


@pytest.mark.parametrize(
    ("spelling", "owns"),
    [
        pytest.param(
            spelling, owns, marks=() if (spelling == "index_copy") is owns and spelling != "index_put" else pytest.mark.slow
        )
        for spelling in ("index_copy", "index_put", "slice")
        for owns in (False, True)
    ],
)
def test_what_is_kept_takes_the_first_places_of_a_preallocated_cache(spelling, owns):
    model, ids = Static(spelling, owns).eval(), torch.randperm(zoo_plain.VOCABULARY)[None, :33]
    caches = () if owns else tuple(rest() for _ in range(4))
    length, fixed = Dim.AUTO(max=ROOM), () if owns else ((None,) * 4,)
    arguments = ids[:, :EXPORTED_AT].contiguous(), torch.arange(EXPORTED_AT), *caches
    program = exported(model, *arguments, shapes=({1: length}, {0: length}, *fixed))
    written = [(spec.kind, spec.target) for spec in program.graph_signature.output_specs]
    report = passes.run(program, lower_program(as_policy("knorm:0.5")))
    assert [(site.cache, bool(site.score)) for site in report.sites] == [(spelling.replace("slice", "slice_scatter"), True)] * 2
    assert [(spec.kind, spec.target) for spec in program.graph_signature.output_specs] == written
    assert not report.narrowed
    run = program.module()
    for count in (2, 33):
        plain, exact = Static(spelling, False).eval(), Static(spelling, False).eval().double()
        for twin in (plain, exact):
            twin.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name[1:] not in ("0", "1")})
        given = () if owns else tuple(rest() for _ in range(4))
        low, best = tuple(rest() for _ in range(4)), tuple(rest().double() for _ in range(4))
        logits = run(ids[:, :count], torch.arange(count), *given)
        assert_within_rounding(
            logits, *(twin(ids[:, :count], torch.arange(count), *full) for twin, full in ((plain, low), (exact, best)))
        )
        held = [run.get_buffer(name) for name in CACHES] if owns else given
        for index, (ours, *theirs) in enumerate(zip(held, low, best, strict=True)):
            places = smallest(low[index - index % 2][:, :, :count], count // 2)
            assert_within_rounding(ours[:, :, : count // 2], *(gathered(states, places) for states in theirs))
            assert bool((ours[:, :, count // 2 :] == 9).all())
            ours.fill_(9)


def test_a_prefill_program_raises_if_it_is_told_other_places_than_the_first():
    model, ids = Static("index_copy", False).eval(), torch.arange(10)[None]
    program = exported(model, ids, torch.arange(10), *(rest() for _ in range(4)), shapes=({}, {}, (None,) * 4))
    passes.run(program, lower_program(as_policy("knorm:0.5")))
    with pytest.raises(RuntimeError, match=r"^kvfx: "):
        program.module()(ids, torch.arange(1, 11), *(rest() for _ in range(4)))
