"""Packages of decoders without transformers code: they say what the compiled decoder says; what makes none is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvfx
from decoding import fresh_llama
from kvfx.passes import aoti
from packages import QUICK, text, traced
from test_stores import Medley, Rolling
from zoo_plain import PLAIN, VOCABULARY, Flat, NanoGPT, Preallocated, make

PROMPT, NEW = 60, 24
LENGTHS = (1, 2, 3, 17, PROMPT)
HALF, SNAPKV = "knorm:0.5", "snapkv(window=8)"  # the preset's window is longer than some of these prompts
POLICIES = ("compactor", SNAPKV, "knorm", "tova", "streaming_llm")


def ids_of(length: int, seed: int = 1, rows: int = 1) -> Tensor:
    return text(length, seed, rows) % VOCABULARY


def places(ids: Tensor, past: Any, seen: Any) -> dict[str, Tensor]:
    """How gpt-fast is called."""
    return {"idx": ids, "input_pos": torch.arange(seen, seen + ids.shape[1])}


def call_of(name: str) -> Any:
    return places if name == "gpt-fast" else None


def fresh(name: str, rows: int = 1) -> Any:
    model = make(name)
    if name == "gpt-fast":
        model.setup(rows)
    return model


@torch.no_grad()
def said(name: str, model: Any, parts: list[Tensor], new: int) -> Tensor:
    """What a decoder, compiled or not, continues greedily when it was fed `parts` in turn."""
    run, past, out = PLAIN[name].run, None, list[Tensor]()
    for part in parts:
        logits, past = run(model, part, past)
    while True:
        out.append(logits[:, -1:].argmax(-1))
        if len(out) == new:
            return torch.cat(out, 1)
        logits, past = run(model, out[-1], past)


def assert_same(name: str, packaged: Any, model: Any, length: int, rows: int = 1) -> None:
    ids, question = ids_of(length, rows=rows), ids_of(5, seed=2, rows=rows)
    assert torch.equal(packaged.generate(ids, max_new_tokens=10)[:, length:], said(name, model, [ids], 10))
    asked = packaged.ask(packaged.compress(ids), question, max_new_tokens=6)[:, 5:]
    assert torch.equal(asked, said(name, model, [ids, question], 6))


CASES = [
    *((name, policy, rows, torch.float32) for name in ("nanoGPT", "preallocated") for policy in POLICIES for rows in (1, 3)),
    *((name, HALF, 3, torch.float32) for name in PLAIN),
    *((name, HALF, 1, torch.bfloat16) for name in ("nanoGPT", "preallocated")),
    *((name, SNAPKV, 3, torch.bfloat16) for name in ("nanoGPT", "preallocated")),
]  # fmt: skip
FAST = [("nanoGPT", HALF, 3, torch.float32), ("preallocated", HALF, 1, torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "policy", "rows", "dtype"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_a_package_continues_and_answers_as_the_compiled_decoder_does(name, policy, rows, dtype):
    is_fast = (name, policy, rows, dtype) in FAST
    model = fresh(name, rows).to(dtype)
    if is_fast:
        model.blocks = model.blocks[:1]
    packaged = traced(model, policy, PROMPT, NEW, rows, call_of(name))
    compiled = kvfx.compile(model, policy, backend="eager", on_refuse="error")
    for length in (17,) if is_fast else LENGTHS:
        assert_same(name, packaged, compiled, length, rows)
    slots = [held.shape[2] for held in packaged.about.state if held.name.endswith("keys")]
    assert max(slots) < PROMPT + NEW


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_a_package_that_keeps_everything_says_what_the_decoder_says(name):
    model = fresh(name)
    packaged = traced(model, "knorm:1.0", PROMPT, NEW, 1, call_of(name))
    for length in LENGTHS:
        assert_same(name, packaged, model, length)


def test_a_conversation_goes_on_behind_any_number_of_tokens():
    """Also behind one, which a program of its own reads."""
    model = fresh("nanoGPT")
    model.blocks = model.blocks[:1]
    packaged = traced(model, "none", PROMPT, NEW)
    for first in (1, 2, 4):
        parts = [ids_of(first), ids_of(1, seed=2), ids_of(3, seed=3), ids_of(2, seed=4)]
        cache = packaged.compress(parts[0])
        for count, part in enumerate(parts[1:], 2):
            answer = packaged.generate(part, cache=cache, max_new_tokens=1)[:, -1:]
            assert torch.equal(answer, said("nanoGPT", model, parts[:count], 1))
        assert (cache.seen, cache.room) == (first + 6, NEW - 6)


@pytest.fixture(scope="module")
def pair() -> Any:
    """A package for two rows."""
    model = fresh("nanoGPT")
    model.blocks = model.blocks[:1]
    return traced(model, HALF, PROMPT, NEW, 2)


def test_where_shapes_count_tokens_programs_take_their_number(pair):
    entries = pair.about.entries
    assert {kind: (entry.shortest, entry.longest, entry.masked, entry.counted) for kind, entry in entries.items()} == {
        "prefill": (2, PROMPT, False, False), "first": (1, 1, False, False), "extend": (2, NEW, False, True),
        "decode": (1, 1, False, True), "second": (1, 1, False, True),
    }  # fmt: skip
    assert (pair.about.vocabulary, pair.about.stop) == (VOCABULARY, ())


def test_padding_is_refused_where_a_decoder_takes_no_mask(pair):
    ids, mask = ids_of(6, rows=2), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with pytest.raises(kvfx.InputError, match=r"rows of different lengths, \[6, 4\], of a decoder that takes no mask"):
        pair.compress(ids, mask)
    with pytest.raises(kvfx.InputError, match=r"rows of different lengths, \[6, 4\], after the first turn"):
        pair.ask(pair.compress(ids), ids, mask)
    assert pair.generate(ids, torch.ones_like(ids), max_new_tokens=2).shape == (2, 8)


def spelt(model: Any) -> Any:
    """How a decoder is called that writes to caches that are arguments."""

    def call(ids: Tensor, past: Any, seen: Any) -> dict[str, Any]:
        given = {"idx": ids, "pos": torch.arange(seen, seen + ids.shape[1]), "start": seen}
        return {**given, "k_caches": model.caches(1), "v_caches": model.caches(1)}

    return call


@pytest.mark.slow
def test_caches_that_are_arguments_may_be_written_in_any_known_way():
    torch.manual_seed(0)
    model = Medley().eval()
    packaged = traced(model, "knorm:1.0", PROMPT, NEW, 1, spelt(model))
    for length in LENGTHS:
        part, start, out = ids_of(length), 0, list[Tensor]()
        caches = model.caches(1), model.caches(1)
        for _ in range(8):
            with torch.no_grad():
                logits = model(part, torch.arange(start, start + part.shape[1]), *caches, start)
            start += part.shape[1]
            out.append(part := logits[:, -1:].argmax(-1))
        assert torch.equal(packaged.generate(ids_of(length), max_new_tokens=8)[:, length:], torch.cat(out, 1))


# -- compiled ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["nanoGPT", "gpt-fast"])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A decoder and its package, by name."""
    name, model = request.param, fresh(request.param)
    path = tmp_path_factory.mktemp("packages") / "a"
    kvfx.export(model, path, HALF, max_prompt=PROMPT, max_new_tokens=NEW, settings=QUICK, call=call_of(name))
    return name, model, path


@pytest.mark.slow
@pytest.mark.inductor
def test_what_is_compiled_ahead_says_the_same(exported):
    name, model, path = exported
    packaged, compiled = kvfx.load(path), kvfx.compile(model, HALF, backend="eager")
    for length in LENGTHS:
        assert_same(name, packaged, compiled, length)
    used = {weight for entry in packaged.about.entries.values() for weight in entry.weights.values()}
    assert [weight for weight in used if weight.endswith("_cache")] == []  # its own, which are not read


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake, which builds the example")
def test_c_plus_plus_says_the_same_tokens(exported, tmp_path):
    _, _, path = exported
    packaged = kvfx.load(path)
    source = Path(__file__).parents[1] / "examples" / "cpp"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", source, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release", prefix], check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    for length in LENGTHS:
        ids = ids_of(length)
        given = " ".join(map(str, ids[0].tolist()))
        done = subprocess.run([tmp_path / "kvfx_run", path, str(NEW)], input=given, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(token) for token in packaged.generate(ids, max_new_tokens=NEW)[0, length:].tolist()]


# -- what cannot be exported -------------------------------------------------------------------------------------------------------


class Counting(NanoGPT):
    """Its past holds what no package can follow."""

    def forward(self, idx: Tensor, past: Any = None) -> Any:
        logits, kept = super().forward(idx, None if past is None else past["layers"])
        return logits, {"layers": kept, "twice": 2 * idx.shape[1] + (0 if past is None else past["twice"])}


class Logging(NanoGPT):
    """Its past holds a tensor that grows and is not read by attention."""

    def forward(self, idx: Tensor, past: Any = None) -> Any:
        logits, kept = super().forward(idx, None if past is None else past["layers"])
        return logits, {"layers": kept, "ids": idx if past is None else torch.cat([past["ids"], idx], 1)}


class Asking(NanoGPT):
    """It asks how many tokens were seen."""

    def forward(self, idx: Tensor, past: Any = None) -> Any:
        logits, kept = super().forward(idx, past)
        return logits * (2 if past is not None and past[0][0].shape[2] > 30 else 1), kept


class Bare(NanoGPT):
    """Its output holds no logits."""

    def forward(self, idx: Tensor, past: Any = None) -> Any:
        logits, kept = super().forward(idx, past)
        return {"out": logits, "past": kept}


class Steady(nn.Module):
    """No decoder at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def rolling() -> Any:
    """Its first layer keeps a window of its own."""
    return Rolling().eval()


NUMBERS = {"max_prompt": PROMPT, "max_new_tokens": NEW}
WRONG = {
    "arguments": (lambda: fresh("gpt-fast"), HALF, {}, kvfx.InputError, r"GptFast\.forward\(idx.*call=lambda ids, past, seen"),
    "fails": (Flat, HALF, {"call": lambda ids, past, seen: {"tokens": ids + 99}}, kvfx.UnsupportedModel, "Flat fails on token ids"),
    "no logits": (Bare, HALF, {}, kvfx.UnsupportedModel, r"Bare returns a NoneType where its logits.*\[B, S, vocabulary\]"),
    "no past": (Steady, HALF, {}, kvfx.InputError, r"Steady\.forward\(x.*Expected token ids and the past"),
    "room": (Preallocated, HALF, {"max_prompt": 80}, kvfx.InputError, "have room for 96 tokens, and texts of 104 are to be served"),
    "counts": (Counting, HALF, {}, kvfx.UnsupportedModel, "the past of Counting holds, beside keys and values, .* in its prefill"),
    "grows": (Logging, HALF, {}, kvfx.UnsupportedModel, r"holds, beside keys and values, a tensor \[1, .* whatever the length"),
    "asks": (Asking, HALF, {}, kvfx.UnsupportedModel, "the extend of Asking can be traced for 2 to 24 behind 31 to 83 tokens only"),
    "windows": (rolling, HALF, {"call": lambda *given: spelt(rolling())(*given)}, kvfx.SiteRefused, "that are sliding windows or"),
    "heads": (NanoGPT, "adakv:0.5", {}, kvfx.PolicyError, "how many slots each of the heads wins"),
    "call": (fresh_llama, HALF, {"call": places}, kvfx.InputError, "LlamaForCausalLM is a transformers model"),
    "no policy": (NanoGPT, None, {}, kvfx.InputError, "NanoGPT was not made by kvfx.compile, so it has no policy"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_package_is_refused_before_anything_is_compiled(case, tmp_path, monkeypatch):
    build, policy, arguments, error, message = WRONG[case]
    monkeypatch.setattr(aoti, "compile_ahead", lambda *_: pytest.fail("compiled"))
    with pytest.raises(error, match=f"(?s){message}"):
        kvfx.export(build().eval(), tmp_path / "a", policy, **{**NUMBERS, **arguments})
    assert list(tmp_path.iterdir()) == []
