"""Exported entry points, before they are compiled: they say what the compiled model says, of every family and at every length.

`test_package.py` compiles one package. Here programs run node by node, so that many are affordable.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvfx
import zoo
from decoding import fresh_llama
from kvfx.entry_points import EntryPoints
from kvfx.lower import lower_program
from kvfx.passes import aoti, capture
from kvfx.policy import as_policy
from packages import GREEDY, text, traced
from test_explain import known_every_other

PROMPT, NEW = 60, 24
LENGTHS = (1, 2, 3, 14, 15, 16, 17, 40, PROMPT)  # the windows of the families hold 16
PADDING = ((1, (0, 0, 0)), (2, (0, 1, 1)), (17, (0, 3, 16)), (PROMPT, (1, 0, 40)))
HALF, PYRAMID = "knorm:0.5", "knorm | budget=uniform(tokens=20, shape=pyramid(6))"

FAMILIES = ("llama", "qwen3", "mistral", "mistral, window", "gemma3", "gpt-oss", "gpt2")
SNAPKV = "snapkv(window=8)"  # the preset's protects more tokens than these prompts have
POLICIES = ("compactor", SNAPKV, "knorm", "tova", "streaming_llm")
QUICK = {("gemma3", "knorm")}  # the others are slow

ONLY_WINDOWS = pytest.mark.filterwarnings("ignore:no cache layer of MistralForCausalLM is compressed")


def left(length: int, padding: tuple[int, ...]) -> Tensor:
    """A mask of rows with that much padding on the left."""
    return (torch.arange(length) >= torch.tensor(padding)[:, None]).long()


def pairs(quick: set[tuple[str, str]]) -> list[Any]:
    """Each family with one policy, and each policy with the first family."""
    wanted = dict.fromkeys([*((FAMILIES[0], policy) for policy in POLICIES), *((family, SNAPKV) for family in FAMILIES), *quick])
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in wanted]


def family(name: str) -> Any:
    """Its model, a new one for each test: compiled, a model has room for a limited number of graphs."""
    return zoo.make(zoo.ROWS[name])


def evicts(packaged: Any) -> bool:
    """Whether a layer has less room than all tokens would take."""
    slots = [held.shape[2] for held in packaged.about.state if held.name.endswith("keys")]
    return max(slots) < PROMPT + NEW


def assert_same_row(packaged: Any, compiled: Any, length: int) -> None:
    ids, question = text(length), text(5, seed=2)
    expected = compiled.generate(ids, max_new_tokens=10, **GREEDY)
    assert torch.equal(packaged.generate(ids, max_new_tokens=10, stop=()), expected)
    theirs = compiled.generate(question, past_key_values=compiled.compress(ids), append=True, max_new_tokens=6, **GREEDY)
    assert torch.equal(packaged.ask(packaged.compress(ids), question, max_new_tokens=6, stop=()), theirs)


def assert_same_rows(packaged: Any, compiled: Any, length: int, padding: tuple[int, ...]) -> None:
    ids, question, mask = text(length, rows=3), text(5, seed=2, rows=3), left(length, padding)
    expected = compiled.generate(ids, attention_mask=mask, max_new_tokens=10, **GREEDY)
    assert torch.equal(packaged.generate(ids, mask, max_new_tokens=10, stop=()), expected)
    asked = left(5, (0, 2, 4)) if packaged.about.entries["extend"].masked else None
    theirs = compiled.generate(
        question, past_key_values=compiled.compress(ids, mask), append=True, attention_mask=asked, max_new_tokens=6, **GREEDY
    )
    assert torch.equal(packaged.ask(packaged.compress(ids, mask), question, asked, max_new_tokens=6, stop=()), theirs)


@pytest.mark.slow
@ONLY_WINDOWS
@pytest.mark.parametrize(("name", "policy"), pairs(QUICK))
def test_entry_points_continue_and_answer_as_the_compiled_model_does(name, policy):
    model = family(name)
    packaged, compiled = traced(model, policy, PROMPT, NEW), kvfx.compile(model, policy, backend="eager")
    assert evicts(packaged)
    for length in LENGTHS:
        assert_same_row(packaged, compiled, length)
    assert {kind: entry.shortest for kind, entry in packaged.about.entries.items()} == {"prefill": 2, "extend": 2, "decode": 1}


@pytest.mark.slow
@ONLY_WINDOWS
@pytest.mark.parametrize(("name", "policy"), pairs({("llama", "knorm")}))
def test_padded_rows_say_what_they_say_in_the_compiled_model(name, policy):
    model = family(name)
    packaged, compiled = traced(model, policy, PROMPT, NEW, batch=3), kvfx.compile(model, policy, backend="eager")
    assert evicts(packaged)
    for length, padding in PADDING:
        assert_same_rows(packaged, compiled, length, padding)


@ONLY_WINDOWS
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_says_the_same(name):
    model = family(name).to(torch.bfloat16)
    packaged, compiled = traced(model, HALF, PROMPT, NEW), kvfx.compile(model, HALF, backend="eager")
    for length in LENGTHS[::3]:
        assert_same_row(packaged, compiled, length)


@pytest.mark.slow
def test_a_layer_that_keeps_more_of_shorter_rows_has_room_for_them():
    """As a pyramid of a count does; the rows of a batch then have unequally many slots in unequal layers."""
    model = family("llama")
    keep = lower_program(as_policy(PYRAMID), (None, None)).keep
    assert keep.slots(30, 1) > keep.slots(PROMPT, 1)
    packaged, compiled = traced(model, PYRAMID, PROMPT, NEW, batch=3), kvfx.compile(model, PYRAMID, backend="eager")
    assert_same_rows(packaged, compiled, PROMPT, (0, PROMPT - 30, 20))


def test_a_compiled_model_brings_its_policy_and_its_sketches():
    model = fresh_llama(num_hidden_layers=1)
    sketch = [torch.randn(2, 16, 8)]
    compiled = kvfx.compile(model, "leverage(8) | budget=uniform(0.5)", sketch=sketch, backend="eager")
    packaged = traced(compiled, None, PROMPT, NEW)
    assert packaged.about.policy == str(as_policy("leverage(8) | budget=uniform(0.5)"))
    assert_same_row(packaged, compiled, 40)


@pytest.mark.slow
def test_no_policy_keeps_everything():
    model = fresh_llama(num_hidden_layers=1)
    packaged = traced(model, "none", PROMPT, NEW)
    assert not packaged.about.entries["prefill"].checks
    assert packaged.about.state[1].shape == (1, 2, PROMPT + NEW, 16)
    assert_same_row(packaged, kvfx.compile(model, "none", backend="eager"), 40)


def test_scores_that_are_not_finite_are_refused():
    model = fresh_llama(num_hidden_layers=1)
    packaged = traced(model, HALF, PROMPT, NEW)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.fill_(torch.inf)
    with pytest.raises(kvfx.InputError, match=r"scores of .* are not finite"):
        packaged.compress(text(20))


def test_questions_of_unequal_length_are_refused_where_windows_would_count_padding():
    packaged = traced(family("mistral, window"), "none", PROMPT, NEW, batch=3)
    cache = packaged.compress(text(20, rows=3))
    with pytest.raises(kvfx.InputError, match=r"rows of different lengths, \[5, 3, 1\], after the first turn"):
        packaged.ask(cache, text(5, rows=3), left(5, (0, 2, 4)))


# -- what cannot be exported -------------------------------------------------------------------------------------------------------

DATA = {
    "heads": ("adakv:0.5", "how many slots each of the heads wins follows from the scores"),
    "layers": ("knorm | budget=layers(0.5)", "how many slots each of the layers wins follows from the scores"),
    "kvpress": ("snapkv@kvpress:0.5", r"cannot be exported.*Use the preset without @"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_policy_whose_size_follows_from_data_is_refused_by_name(case, tmp_path):
    policy, message = DATA[case]
    with pytest.raises(kvfx.PolicyError, match=f"(?s){policy.split('@')[0].split(':')[0].split(' ')[0]}.*{message}"):
        kvfx.export(fresh_llama(), tmp_path / "a", policy, max_prompt=PROMPT, max_new_tokens=NEW)
    assert list(tmp_path.iterdir()) == []


class Asks(nn.Module):
    """A layer whose code asks how many tokens there are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) if hidden.shape[1] > 20 else self.inner(hidden) * 2


def asking() -> Any:
    model = fresh_llama(num_hidden_layers=1)
    model.model.layers[0].mlp = Asks(model.model.layers[0].mlp)
    return model


NUMBERS = {"max_prompt": PROMPT, "max_new_tokens": NEW}
WRONG = {
    "no policy": (fresh_llama, None, NUMBERS, kvfx.InputError, r"not made by kvfx\.compile, so it has no policy"),
    "no room": (fresh_llama, HALF, {**NUMBERS, "max_new_tokens": 1}, kvfx.InputError, "max_new_tokens=1.*at least 4"),
    "rows": (fresh_llama, HALF, {**NUMBERS, "batch": 0}, kvfx.InputError, "batch=0.*one row"),
    "too long": (fresh_llama, HALF, {**NUMBERS, "max_prompt": 9999}, kvfx.InputError, "was made for 2048. Ask for less"),
    "tokenizer": (fresh_llama, HALF, {**NUMBERS, "tokenizer": "nowhere"}, kvfx.InputError, r"holds no tokenizer\.json"),
    "by hand": (lambda: nn.Linear(2, 2).eval(), HALF, NUMBERS, kvfx.InputError, r"forward.*does not say what its arguments are"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_package_is_refused_before_anything_is_compiled(case, tmp_path, monkeypatch):
    make, policy, arguments, error, message = WRONG[case]
    monkeypatch.setattr(aoti, "compile_ahead", lambda *_: pytest.fail("compiled"))
    with pytest.raises(error, match=message):
        kvfx.export(make(), tmp_path / "a", policy, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_code_that_asks_for_the_length_is_not_exported_for_some_of_them_only():
    with pytest.raises(kvfx.UnsupportedModel, match="the prefill of LlamaForCausalLM can be traced for 21 to 60 tokens only"):
        EntryPoints.of(asking(), HALF, PROMPT, NEW, 1, {}).programs()


def test_attention_of_whole_rows_needs_no_mask_of_a_prompt_and_one_behind_it():
    """With a mask it computes what nobody reads: twice as much."""
    causal: dict[str, list[bool]] = {}
    for kind, (_, program) in EntryPoints.of(fresh_llama(), HALF, PROMPT, NEW, 1, {}).programs().items():
        calls = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
        given = [node.normalized_arguments(program.graph_module, normalize_to_only_use_kwargs=True).kwargs for node in calls]
        causal[kind] = [each.get("is_causal", False) for each in given]
    assert causal == {"prefill": [True, True], "extend": [False, False], "decode": [False, False]}


def test_a_layer_that_is_not_understood_is_named(tmp_path):
    model = fresh_llama(attention=known_every_other.__name__)
    with pytest.raises(kvfx.SiteRefused, match=r"(?s)not every cache layer of LlamaForCausalLM can be compressed.*layer 1: "):
        kvfx.export(model, tmp_path / "a", HALF, **NUMBERS)


def test_conditions_that_do_not_hold_of_all_lengths_are_told():
    class Small(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids * 2 if ids.shape[1] < 50 else ids

    shapes = ({1: torch.export.Dim.AUTO(min=2, max=100)},)
    program = torch.export.export(Small(), (torch.zeros(1, 30),), dynamic_shapes=shapes)
    assert capture.untrue(program, range(2, 50)) == []
    assert "does not hold of 50" in " ".join(capture.untrue(program, range(2, 101)))


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_export_that_is_interrupted_leaves_nothing_behind(failure, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise failure("stopped")

    monkeypatch.setattr(aoti, "compile_ahead", fail)
    with pytest.raises(failure, match="stopped"):
        kvfx.export(fresh_llama(num_hidden_layers=1), tmp_path / "a", HALF, **NUMBERS)
    assert list(tmp_path.iterdir()) == []
