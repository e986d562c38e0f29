"""Cache files: read as they were written, or refused."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvfx
from decoding import GREEDY, compiled, fresh_llama, llama, ones, tokens
from kvfx import cache_file

CONTEXT, QUESTION = tokens(1, 20), tokens(1, 5, seed=2)
FULL = torch.cat([CONTEXT, QUESTION], 1)
HALF = "knorm:0.5"


def hand_made(dtype: torch.dtype = torch.float32) -> kvfx.Cache:
    layers = [(torch.randn(1, 1, 2, 4).to(dtype), torch.randn(1, 1, 2, 4).to(dtype), torch.tensor([0, 2])) for _ in range(2)]
    return kvfx.Cache.from_layers(layers, 3, torch.tensor([[5, 6, 7]]), policy=HALF)


def padded() -> kvfx.Cache:
    mask = ones(2, 20)
    mask[1, :6] = 0
    return compiled(HALF).compress(tokens(2, 20), mask)


def grown() -> kvfx.Cache:
    cache = compiled(HALF).compress(CONTEXT)
    compiled(HALF)(QUESTION, past_key_values=cache)
    return cache


CACHES = {
    "compressed": lambda: compiled(HALF).compress(CONTEXT),
    "whole": lambda: compiled("none").compress(CONTEXT),
    "padded": padded,
    "grown": grown,
    "bfloat16": lambda: hand_made(torch.bfloat16),
    "by hand": hand_made,
}


def assert_equal(one: kvfx.Cache, two: kvfx.Cache) -> None:
    a, b = one.tensors(), two.tensors()
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    assert (one.policy, one.croppable, one.get_seq_length()) == (two.policy, two.croppable, two.get_seq_length())
    assert [layer.evicted for layer in one.layers] == [layer.evicted for layer in two.layers]


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_is_read_as_it_was_saved(kind, tmp_path):
    cache = CACHES[kind]()
    cache.save(tmp_path / "a.kvfx")
    loaded = kvfx.load_cache(tmp_path / "a.kvfx")
    assert_equal(loaded, cache)
    assert loaded.fingerprint == cache.fingerprint
    assert (cache.fingerprint is None) == (cache.owner is None)


def test_generation_goes_on_after_loading_as_without_saving(tmp_path):
    model, cache = compiled(HALF), compiled(HALF).compress(CONTEXT)
    cache.save(str(tmp_path / "a.kvfx"))
    expected = model.generate(FULL, past_key_values=cache, **GREEDY)
    loaded = kvfx.load_cache(str(tmp_path / "a.kvfx"), device="cpu")
    assert torch.equal(model.generate(FULL, past_key_values=loaded.copy(), **GREEDY), expected)
    with pytest.raises(kvfx.CacheMismatch, match="another context: row 0 differs first at index 0"):
        model.generate(QUESTION, past_key_values=loaded)
    with pytest.raises(kvfx.CacheMismatch, match="cannot crop 1 tokens"):
        loaded.crop(-1)


def test_a_file_holds_no_more_than_its_cache(tmp_path):
    cache = compiled("none").compress(CONTEXT)
    cache.crop(-15)  # a view of what was held
    cache.save(tmp_path / "a.kvfx")
    assert (tmp_path / "a.kvfx").stat().st_size < 12_000
    assert kvfx.load_cache(tmp_path / "a.kvfx").layers[0].slots == 5


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "a.kvfx"
    torch.manual_seed(0)
    hand_made().save(path)
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_noticed(small, tmp_path, data):
    place, change = data.draw(st.integers(0, len(small) - 1)), data.draw(st.integers(1, 255))
    spoilt = bytearray(small)
    spoilt[place] ^= change
    (tmp_path / "a.kvfx").write_bytes(spoilt)
    with pytest.raises(kvfx.ArtifactError, match=r"a\.kvfx"):
        kvfx.load_cache(tmp_path / "a.kvfx")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_noticed(small, tmp_path, share):
    (tmp_path / "a.kvfx").write_bytes(small[: int(len(small) * share)])
    with pytest.raises(kvfx.ArtifactError, match=r"a\.kvfx is damaged or no kvfx cache: .* Save it again"):
        kvfx.load_cache(tmp_path / "a.kvfx")


def test_trailing_bytes_are_noticed(small, tmp_path):
    (tmp_path / "a.kvfx").write_bytes(small + b"\0")
    with pytest.raises(kvfx.ArtifactError, match="damaged"):
        kvfx.load_cache(tmp_path / "a.kvfx")


def test_what_is_no_cache_file_is_refused(tmp_path):
    path = tmp_path / "a.kvfx"
    for wrong in (b"", b"hello", pickle.dumps({"a": 1}), b"\xff" * 100):
        path.write_bytes(wrong)
        with pytest.raises(kvfx.ArtifactError, match="damaged or no kvfx cache: its header cannot be read"):
            kvfx.load_cache(path)
    path.write_bytes(cache_file.write_tensors({"a": torch.zeros(2)}))
    with pytest.raises(kvfx.ArtifactError, match="damaged or no kvfx cache: its header cannot be read"):
        kvfx.load_cache(path)
    with pytest.raises(kvfx.ArtifactError, match=r"cannot read the cache file .*none\.kvfx: No such file"):
        kvfx.load_cache(tmp_path / "none.kvfx")
    with pytest.raises(kvfx.ArtifactError, match=r"cannot read the cache file .*: Is a directory"):
        kvfx.load_cache(tmp_path)


@pytest.mark.parametrize(("version", "readable"), [("1.7", True), ("2.0", False)])
def test_only_a_known_major_format_is_read(version, readable, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file, "FORMAT", version)
    hand_made().save(tmp_path / "a.kvfx")
    monkeypatch.undo()
    if readable:
        assert kvfx.load_cache(tmp_path / "a.kvfx").layers[0].slots == 2
    else:
        with pytest.raises(kvfx.ArtifactError, match=r"has format 2\.0, this version reads 1\.0\. Update kvfx or compress again"):
            kvfx.load_cache(tmp_path / "a.kvfx")


def test_the_file_is_plain_safetensors_with_the_policy_and_what_the_context_was(small):
    length = struct.unpack("<Q", small[:8])[0]
    header = json.loads(small[8 : 8 + length])
    about = json.loads(header["__metadata__"]["kvfx"])
    assert (about["format"], about["layout"], about["policy"]) == ("1.0", "dense", HALF)
    assert about["layers"] == [{"kind": "full", "evicted": 1, "window": None}] * 2
    assert about["store"] == {"dtype": "float32", "scales": None}
    assert header["ids"]["shape"] == [1, 3]
    assert set(about["sha256"]) == set(header) - {"__metadata__"}
    assert "pickle" not in Path(cache_file.__file__).read_text()


def test_a_failing_write_leaves_the_old_file_and_nothing_else(small, tmp_path, monkeypatch):
    path = tmp_path / "a.kvfx"
    path.write_bytes(small)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for place in ("fsync", "replace"):
        monkeypatch.setattr(cache_file.os, place, full_disk)
        with pytest.raises(kvfx.ArtifactError, match=r"cannot write the cache file .*: No space left on device.*untouched"):
            hand_made().save(path)
        monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["a.kvfx"]
    assert path.read_bytes() == small
    with pytest.raises(kvfx.ArtifactError, match=r"cannot write the cache file .*: No such file or directory"):
        hand_made().save(tmp_path / "nowhere" / "a.kvfx")


def test_an_empty_cache_is_not_saved(tmp_path):
    with pytest.raises(kvfx.ArtifactError, match=r"nothing to save.*Fill it by model\.compress"):
        kvfx.Cache().save(tmp_path / "a.kvfx")


def other_config():
    return fresh_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})


def other_weights():
    model = copy.deepcopy(llama())
    with torch.no_grad():
        model.model.layers[-1].self_attn.k_proj.weight[0, 0] += 1
    return model


def other_adapters():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(llama()), config)


DIFFERENT = {
    "config": (other_config, r"config\.rope_parameters: .*500.* here, .*10000.* in the cache"),
    "weights": (other_weights, r"weights of the last key projection differ$"),
    "adapters": (other_adapters, r"active adapters: \['default'\] here, \[\] in the cache"),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
@pytest.mark.parametrize("what", DIFFERENT)
def test_a_cache_of_another_model_is_refused_and_says_what_differs(what, tmp_path):
    make, message = DIFFERENT[what]
    compiled(HALF).compress(CONTEXT).save(tmp_path / "a.kvfx")
    loaded = kvfx.load_cache(tmp_path / "a.kvfx")
    other = kvfx.compile(make(), HALF, backend="eager")
    with pytest.raises(kvfx.CacheMismatch, match=r"(?s)this cache was made by another model:\n.*" + message):
        other.generate(FULL, past_key_values=loaded)


def test_a_cache_fits_another_copy_of_its_model(tmp_path):
    compiled(HALF).compress(CONTEXT).save(tmp_path / "a.kvfx")
    llama().save_pretrained(tmp_path / "model")
    again = kvfx.compile(type(llama()).from_pretrained(tmp_path / "model"), HALF, backend="eager")
    out = again(torch.tensor([[5]]), past_key_values=kvfx.load_cache(tmp_path / "a.kvfx"))
    expected = compiled(HALF)(torch.tensor([[5]]), past_key_values=compiled(HALF).compress(CONTEXT))
    assert torch.equal(out.logits, expected.logits)
