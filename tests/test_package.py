"""Packages: what is compiled ahead says what the model says, in a process without transformers and in one without Python."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import kvfx
import zoo
from decoding import fresh_llama
from examples import examples
from kvfx import package
from kvfx.demo import notes
from kvfx.package import PROGRAMS, WEIGHTS
from packages import GREEDY, QUICK, text

pytestmark = pytest.mark.inductor

POLICY, PROMPT, NEW = "knorm:0.5", 48, 24
# Another process, as a server would run it.
SCRIPT = """
import json, sys
import torch
import kvfx
model = kvfx.load(sys.argv[1])
for ids in json.loads(sys.argv[2]):
    print(json.dumps(model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids):].tolist()))
print(json.dumps(list(sys.modules)))
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return fresh_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package that these tests share, because to compile one takes a minute."""
    path = tmp_path_factory.mktemp("packages") / "llama"
    made = kvfx.export(model, path, POLICY, max_prompt=PROMPT, max_new_tokens=NEW, tokenizer=notes.MODEL, settings=QUICK)
    assert made == path
    return path


@pytest.fixture(scope="module")
def packaged(folder: Path) -> Any:
    return kvfx.load(folder)


@pytest.fixture(scope="module")
def compiled(model: Any) -> Any:
    return kvfx.compile(model, POLICY, backend="eager")


@settings(deadline=None, max_examples=examples(25))
@given(st.integers(1, PROMPT), st.integers(1, NEW + 1))
def test_a_package_continues_any_prompt_as_the_compiled_model_does(packaged, compiled, length, new):
    ids = text(length)
    expected = compiled.generate(ids, max_new_tokens=new, **GREEDY)
    assert torch.equal(packaged.generate(ids, max_new_tokens=new), expected)


@settings(deadline=None, max_examples=examples(12))
@given(st.integers(1, PROMPT), st.integers(1, NEW - 4))
def test_a_document_is_compressed_once_and_asked_many_times(packaged, compiled, length, asked):
    document, question = text(length), text(asked, seed=2)
    cache = packaged.compress(document)
    before = [tensor.clone() for tensor in cache.tensors]
    expected = compiled.generate(question, past_key_values=compiled.compress(document), append=True, max_new_tokens=5, **GREEDY)
    for _ in range(2):
        assert torch.equal(packaged.ask(cache, question, max_new_tokens=5), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors, strict=True))


def test_a_conversation_goes_on_in_one_cache_whose_tensors_stay_where_they_are(packaged, compiled):
    cache, theirs = packaged.compress(text(30)), compiled.compress(text(30))
    places = [tensor.data_ptr() for tensor in cache.tensors]
    for turn in range(3):
        said = text(3, seed=turn)
        expected = compiled.generate(said, past_key_values=theirs, append=True, max_new_tokens=4, **GREEDY)
        assert torch.equal(packaged.generate(said, cache=cache, max_new_tokens=4), expected)
    assert [tensor.data_ptr() for tensor in cache.tensors] == places
    assert (cache.seen, cache.room) == (30 + 3 * 6, NEW - 3 * 6)


def test_another_process_needs_neither_transformers_nor_the_compiler(folder, compiled):
    prompts = [text(length)[0].tolist() for length in (1, 2, 17, PROMPT)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, folder, json.dumps(prompts)], capture_output=True, text=True, check=True
    )
    *said, modules = map(json.loads, done.stdout.splitlines())
    assert said == [compiled.generate(torch.tensor([ids]), max_new_tokens=12, **GREEDY)[0, len(ids) :].tolist() for ids in prompts]
    assert {"transformers", "torch._dynamo", "torch._inductor", "triton"} & set(modules) == set()


def test_tokens_come_one_by_one_and_stop_where_they_are_told(packaged):
    ids = text(20)
    whole = packaged.generate(ids, max_new_tokens=10)[:, 20:]
    assert torch.equal(torch.stack(list(packaged.stream(ids, max_new_tokens=10)), 1), whole)
    stop = int(whole[0, 4])
    first = whole[0].tolist().index(stop)
    assert torch.equal(packaged.generate(ids, max_new_tokens=10, stop=[stop])[:, 20:], whole[:, : first + 1])


def test_threads_share_a_package_each_with_a_cache_of_its_own(packaged):
    prompts = [text(length) for length in (5, 17, 30, PROMPT)]
    expected = [packaged.generate(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as threads:
        said = list(threads.map(packaged.generate, prompts))
    assert all(torch.equal(a, b) for a, b in zip(said, expected, strict=True))


def test_tokens_are_drawn_as_the_seed_says(packaged):
    drawn = [packaged.generate(text(20), temperature=2.0, top_k=20, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_cache_holds_what_is_kept_and_room_for_what_follows(packaged, model):
    config = model.config
    slots = PROMPT // 2 + NEW
    states = 2 * config.num_key_value_heads * slots * config.head_dim * 4
    counts = 8 * 2 + config.num_key_value_heads * slots * 4  # of lengths and positions
    assert packaged.compress(text(PROMPT)).nbytes == states + counts


# -- what is inside ----------------------------------------------------------------------------------------------------------------


def sources(folder: Path, entry: str) -> dict[str, str]:
    """The C++ that an entry point was compiled from: what calls, and what is called."""
    with zipfile.ZipFile(folder / PROGRAMS) as archive:
        names = [name for name in archive.namelist() if f"/{entry}/" in name and name.endswith(".cpp")]
        return {"wrapper" if "wrapper" in name else "kernel": archive.read(name).decode() for name in names}


@pytest.mark.parametrize("entry", ["prefill", "extend", "decode"])
def test_all_that_runs_is_plain_c_plus_plus(folder, entry):
    code = "".join(sources(folder, entry).values())
    assert "aoti_torch_cpu_" in code
    assert re.findall(r"\bkvfx\b", code) == []


def test_a_step_copies_no_cache(folder, packaged):
    wrapper = sources(folder, "decode")["wrapper"]
    arrays = {
        name: [int(size.rstrip("L")) for size in sizes.split(",")]
        for name, sizes in re.findall(r"(int_array_\d+)\[\] = \{(.*?)\}", wrapper)
    }
    made = [math.prod(arrays[name]) for name in re.findall(r"aoti_torch_empty_strided\(\d+, (int_array_\d+)", wrapper)]
    keys = next(math.prod(held.shape) for held in packaged.about.state if held.name == "layers.0.keys")
    assert made
    assert max(made) < keys


def test_each_weight_is_stored_once(folder, packaged, model):
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    used = {name for entry in packaged.about.entries.values() for name in entry.weights.values()}
    assert used == stored.keys()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters <= sum(stored.values()) <= parameters + 1000  # frequencies of RoPE
    with zipfile.ZipFile(folder / PROGRAMS) as archive:
        assert all("weight" not in name for name in archive.namelist())


def test_a_description_names_model_policy_versions_and_files(folder, packaged):
    about = json.loads((folder / "kvfx.json").read_text())
    assert (about["model"], about["batch"], about["max_prompt"], about["max_new_tokens"]) == ("LlamaForCausalLM", 1, PROMPT, NEW)
    assert kvfx.Policy.parse(about["policy"]) == kvfx.Policy.parse(POLICY)
    assert about["versions"] == {"kvfx": kvfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    assert set(about["files"]) == {file.name for file in folder.iterdir()} - {"kvfx.json"}
    assert about["fingerprint"]["weights"]
    assert {name: (entry.shortest, entry.longest) for name, entry in packaged.about.entries.items()} == {
        "prefill": (2, PROMPT), "extend": (2, NEW), "decode": (1, 1),
    }  # fmt: skip


# -- what is wrong is refused ------------------------------------------------------------------------------------------------------

IDS = torch.full((1, 5), 7)
WRONG = {
    "too long": (lambda p: p.compress(text(PROMPT + 1)), kvfx.InputError, rf"has {PROMPT + 1} tokens.* takes 1 to {PROMPT}\."),
    "empty": (lambda p: p.compress(IDS[:, :0]), kvfx.InputError, r"ids are \(1, 0\) torch.int64, expected \[1, S\] integers"),
    "floats": (lambda p: p.compress(IDS.float()), kvfx.InputError, r"float32, expected \[1, S\] integers"),
    "rows": (lambda p: p.generate(IDS.expand(2, -1)), kvfx.InputError, r"ids are \(2, 5\) torch.int64, expected \[1, S\]"),
    "vocabulary": (lambda p: p.generate(IDS + 57), kvfx.InputError, r"ids hold 64 to 64, expected 0 to 63"),
    "mask": (lambda p: p.compress(IDS, torch.ones(1, 4)), kvfx.InputError, r"attention_mask is \(1, 4\), expected \(1, 5\)"),
    "padding": (lambda p: p.compress(IDS, (IDS > 7).long()), kvfx.InputError, "a row of nothing else. Pad on the left"),
    "room": (lambda p: p.generate(IDS, max_new_tokens=NEW + 2), kvfx.PoolExhausted, rf"room for 1 to {NEW + 1}\. Nothing was"),
    "none": (lambda p: p.generate(IDS, max_new_tokens=0), kvfx.PoolExhausted, "max_new_tokens=0"),
    "question": (lambda p: p.ask(p.compress(IDS), text(NEW + 1)), kvfx.PoolExhausted, "there is room for 1 to 0"),
    "top_k": (lambda p: p.generate(IDS, top_k=3), kvfx.InputError, "temperature=0 draws none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_program_would_take_in_silence_is_refused(packaged, case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(packaged)


def test_two_that_go_on_in_one_cache_do_not_fill_more_than_there_is(packaged):
    cache = packaged.compress(IDS)
    one, other = (packaged.stream(IDS, cache=cache, max_new_tokens=NEW - 10) for _ in range(2))
    list(one)
    with pytest.raises(kvfx.PoolExhausted, match="the cache has room for 0 tokens, and 1 are to follow"):
        list(other)


def test_padding_of_the_only_row_is_left_out(packaged):
    padded, mask = torch.cat([IDS, text(20)], 1), (torch.arange(25) >= 5).long()[None]
    expected = packaged.generate(text(20), max_new_tokens=6)
    assert torch.equal(packaged.generate(padded, mask, max_new_tokens=6)[:, 5:], expected)


def edited(change: Any) -> Any:
    """A way to damage a package: by a change of its description, which is sealed again."""

    def damage(folder: Path) -> None:
        about = package.read(folder)
        (folder / "kvfx.json").write_text(replace(about, **change(about)).text())

    return damage


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def flipped(name: str) -> Any:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


DAMAGE = {
    "nothing": (shutil.rmtree, r"its kvfx\.json no such file or directory\. Expected a folder that kvfx\.export wrote"),
    "no description": (without("kvfx.json"), r"its kvfx\.json no such file"),
    "no weights": (without(WEIGHTS), r"weights\.safetensors is missing"),
    "no programs": (without(PROGRAMS), r"programs\.pt2 is missing"),
    "weights": (flipped(WEIGHTS), r"weights\.safetensors does not match its checksum"),
    "programs": (flipped(PROGRAMS), r"programs\.pt2 does not match its checksum"),
    "description": (flipped("kvfx.json"), r"kvfx\.json (does not match its checksum|cannot be read)"),
    "foreign": (lambda folder: (folder / "kvfx.json").write_text("{}"), r"damaged or no kvfx package: kvfx\.json cannot be read"),
    "newer": (edited(lambda about: {"format": "2.0"}), r"has format 2\.0, this version reads 1\.1\. Update kvfx or export again"),
    "minor": (edited(lambda about: {"state": (*about.state, {"name": "a", "shape": [], "later": 1})}), "fields that this version"),
    "torch": (edited(lambda about: {"versions": {"torch": "2.1.0"}}), r"compiled for torch 2\.1\.0, and this is"),
    "system": (edited(lambda about: {"machine": {**about.machine, "system": "Plan 9"}}), "compiled for Plan 9, and this is"),
    "processor": (edited(lambda about: {"machine": {**about.machine, "vectors": "AVX9"}}), "for processors with AVX9"),
    "device": (edited(lambda about: {"device": "xpu"}), "compiled for xpu, and there is none here"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_foreign_package_is_refused_and_says_why(folder, tmp_path, case):
    damage, message = DAMAGE[case]
    damage(shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(kvfx.ArtifactError, match=message):
        kvfx.load(tmp_path / "copy")


def test_a_cache_of_another_package_is_refused(packaged):
    cache = packaged.compress(IDS)
    cache.files = {**cache.files, WEIGHTS: "of others"}
    with pytest.raises(kvfx.CacheMismatch, match="made by another package"):
        packaged.ask(cache, IDS)


def test_nothing_is_written_over(model, folder):
    before = (folder / "kvfx.json").read_bytes()
    with pytest.raises(kvfx.ArtifactError, match=r"exists\. Remove it"):
        kvfx.export(model, folder, POLICY, max_prompt=PROMPT, max_new_tokens=NEW)
    assert (folder / "kvfx.json").read_bytes() == before


# -- every family ------------------------------------------------------------------------------------------------------------------

FAMILIES = [
    ("llama", "compactor", 1, torch.bfloat16), ("qwen3", "compactor", 1, torch.float32), ("mistral", "tova", 3, torch.float32),
    ("gemma3", "compactor", 3, torch.float32), ("gpt-oss", "snapkv(window=8)", 1, torch.float32),
    ("gpt2", "streaming_llm", 3, torch.bfloat16),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policy", "rows", "dtype"), FAMILIES)
def test_a_package_of_every_family_continues_as_the_model_compiled_by_inductor_does(name, policy, rows, dtype, tmp_path):
    model = zoo.make(zoo.ROWS[name]).to(dtype)
    compiled = kvfx.compile(model, policy)
    kvfx.export(model, tmp_path / "a", policy, max_prompt=PROMPT, max_new_tokens=NEW, batch=rows, settings=QUICK)
    packaged = kvfx.load(tmp_path / "a")
    for length in (1, 2, 15, 17, PROMPT):
        ids = text(length, rows=rows)
        mask = (torch.arange(length) >= torch.tensor([0, length // 3, length // 2])[:rows, None]).long()
        expected = compiled.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
        assert torch.equal(packaged.generate(ids, mask, max_new_tokens=12), expected)
        theirs = compiled.generate(
            text(5, 2, rows), past_key_values=compiled.compress(ids, mask), append=True, max_new_tokens=6, **GREEDY
        )
        assert torch.equal(packaged.ask(packaged.compress(ids, mask), text(5, 2, rows), max_new_tokens=6), theirs)


# -- without Python ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake, which builds the example")
def test_c_plus_plus_says_the_same_tokens(folder, packaged, tmp_path):
    source = Path(__file__).parents[1] / "examples" / "cpp"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", source, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release", prefix], check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    for length in (1, 2, 17, PROMPT):
        ids = text(length)
        done = run_example(tmp_path, folder, NEW, ids)
        assert done.stdout.split() == [str(token) for token in packaged.generate(ids, max_new_tokens=NEW)[0, length:].tolist()]
        assert re.search(r"[\d.]+ tokens/s; the cache is of (\d+) bytes", done.stderr)[1] == str(packaged.compress(ids).nbytes)
    assert "prefill takes 2 to 48 tokens, got 49" in run_example(tmp_path, folder, NEW, text(PROMPT + 1)).stderr
    assert "generates 1 to 25 tokens" in run_example(tmp_path, folder, NEW + 2, text(5)).stderr
    linked = subprocess.run(["ldd", tmp_path / "kvfx_run"], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in linked
    assert re.findall(r"lib\w*python\S*\.so", linked) == []


def run_example(built: Path, folder: Path, new: int, ids: Tensor) -> Any:
    given = " ".join(map(str, ids[0].tolist()))
    return subprocess.run([built / "kvfx_run", folder, str(new)], input=given, capture_output=True, text=True)
