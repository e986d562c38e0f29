"""Every family of the zoo, through the public API, against the reference that knows nothing of kvfx.

All checks of a family share its models and graphs; a check that passed says so in its row of docs/models.md.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvfx
import models_page
import zoo
import zoo_reference
from kvfx.fingerprint import fingerprint
from yardstick import assert_within_rounding
from zoo_family import LENGTH, SHORT, Family

# Dynamo, where it meets the activation function of BLOOM.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:<class 'torch\.autograd\.function\.Function'> should not be instantiated:DeprecationWarning"
)


@pytest.fixture(scope="class")
def family(request) -> Family:
    torch._dynamo.reset()
    return Family(request.param)


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        names = [pytest.param(name, marks=pytest.mark.slow) if zoo.ROWS[name].slow else name for name in metafunc.cls.NAMES]
        metafunc.parametrize("family", names, indirect=True, scope="class")


# -- the reference is what it says -------------------------------------------------------------------------------------------------


def heads(states: Tensor, count: int) -> Tensor:
    return states.unflatten(-1, (count, -1)).transpose(1, 2)


# Where the first layer's key before RoPE comes from, and how it lies there.
KEYS = {
    "llama": ("model.layers.0.self_attn.k_proj", lambda out: heads(out, 2)),
    "qwen3": ("model.layers.0.self_attn.k_norm", lambda out: out.transpose(1, 2)),
    "olmoe": ("model.layers.0.self_attn.k_norm", lambda out: heads(out, 2)),
    "phi3": ("model.layers.0.self_attn.qkv_proj", lambda out: heads(out[..., 64:96], 2)),
    "hunyuan": ("model.layers.0.self_attn.k_proj", lambda out: heads(out, 2)),
    "llama4": ("model.layers.0.self_attn.k_proj", lambda out: heads(out, 2)),
    "gpt2": ("transformer.h.0.attn.c_attn", lambda out: heads(out[..., 64:128], 4)),
    "gpt-j": ("transformer.h.0.attn.k_proj", lambda out: heads(out, 4)),
    "gpt-neox": ("gpt_neox.layers.0.attention.query_key_value", lambda out: heads(out, 4).chunk(3, -1)[1]),
    "bloom": ("transformer.h.0.self_attention.query_key_value", lambda out: heads(out, 4).chunk(3, -1)[1]),
    "gpt-oss": ("model.layers.0.self_attn.k_proj", lambda out: heads(out, 2)),
}


@pytest.mark.parametrize("name", KEYS)
def test_the_reference_finds_the_key_that_the_layer_projects(name):
    row, (path, of) = zoo.ROWS[name], KEYS[name]
    model = zoo.make(row)
    made = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, out: made.append(out))
    reads, _ = zoo_reference.capture(model, zoo.prompt(LENGTH), row.kv_heads)
    hook.remove()
    assert torch.equal(reads[0].pre_key, of(made[0]))


@pytest.mark.parametrize("name", ["llama", "llama, eager", "qwen3", "cohere", "glm4", "gpt2", "gpt-neox", "gpt-j", "falcon"])
def test_the_references_tensors_give_what_attention_gave(name):
    row, future = zoo.ROWS[name], torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def attention(read: zoo_reference.Read, dtype: torch.dtype) -> Tensor:
        query, key, value = (states.to(dtype) for states in (read.query, read.key, read.value))
        key, value = (states.repeat_interleave(row.query_heads // row.kv_heads, 1) for states in (key, value))
        return (query @ key.mT / 4).masked_fill(future, -torch.inf).softmax(-1) @ value

    for read in zoo_reference.capture(zoo.make(row), zoo.prompt(LENGTH), row.kv_heads)[0]:
        assert_within_rounding(read.output, attention(read, torch.float32), attention(read, torch.float64))


# -- what kvfx does ----------------------------------------------------------------------------------------------------------------


def test_chunks_of_attention_begin_behind_the_padding_even_if_rows_keep_equally_many():
    family = Family("llama4")
    model = kvfx.compile(family.model, "knorm | budget=uniform(tokens=12)", backend="eager", on_refuse="error")
    ids = torch.cat([torch.zeros(1, LENGTH - SHORT, dtype=torch.long), family.ids[:, :SHORT]], 1)
    both, mask, token = torch.cat([family.ids, ids]), torch.ones(2, LENGTH, dtype=torch.long), zoo.prompt(1, seed=2)
    mask[1, : LENGTH - SHORT] = 0
    cache = model.compress(both, mask)
    logits = model(token.expand(2, 1).contiguous(), past_key_values=cache.copy()).logits
    for row, length in enumerate((LENGTH, SHORT)):
        family.check_logits(cache, row, length, token, logits[row : row + 1])


# -- at length ---------------------------------------------------------------------------------------------------------------------

POLICIES = {  # with shorter prompts than they are made for
    "snapkv": "snapkv | protect(recent=8)",
    "criticalkv": "criticalkv | protect(recent=8)",
    "lagkv": "lagkv",
    "expected_attention": "expected_attention",
    "keydiff": "keydiff",
    "streaming_llm": "streaming_llm",
    "random": "random",
}
REFUSED = {
    ("hunyuan", "expected_attention"): "is not known to be linear in the query",  # a norm behind RoPE
    ("llama4, full", "expected_attention"): "is not known to be linear in the query",
    ("llama4", "expected_attention"): "is not the positions that the cache stores",  # but a count of its own, which scales queries
}


class Checks:
    def test_the_reference_sees_every_layer_and_changes_nothing(self, family):
        row = family.row
        reads, logits = zoo_reference.capture(family.model, family.ids, row.kv_heads)
        with torch.no_grad():
            assert torch.equal(logits, family.model(family.ids, use_cache=False).logits)
        assert tuple(read.roped for read in reads) == row.roped
        for read in reads:
            assert {tensor.shape for tensor in (read.query, read.pre_query)} == {(1, row.query_heads, LENGTH, 16)}
            assert {tensor.shape for tensor in (read.key, read.value, read.pre_key)} == {(1, row.kv_heads, LENGTH, 16)}
            assert torch.equal(read.pre_key, read.key) == torch.equal(read.pre_query, read.query) == (not read.roped)

    def test_the_reference_continues_as_the_model_if_nothing_is_hidden(self, family):
        row, tokens = family.row, zoo.prompt(3, seed=2)
        none = [torch.zeros(1, row.kv_heads, LENGTH, dtype=torch.bool) if kind == "full" else None for kind in row.layers]
        low, exact = family.continued(family.ids, none, tokens)
        with torch.no_grad():
            plain = family.model(torch.cat([family.ids, tokens], 1), use_cache=False).logits[:, LENGTH:]
        assert_within_rounding(plain, low, exact)

    def test_hidden_slots_may_hold_anything(self, family):
        row, tokens = family.row, zoo.prompt(1, seed=2)
        hidden = [torch.rand(1, row.kv_heads, LENGTH) < 0.5 if kind == "full" else None for kind in row.layers]
        cache = DynamicCache(config=family.model.config)
        with torch.no_grad():
            family.model(family.ids, past_key_values=cache)
            for layer, evicted in zip(cache.layers, hidden, strict=True):
                for states in (layer.keys, layer.values) if evicted is not None else ():
                    states[evicted] = torch.randn_like(states[evicted])
            with zoo_reference.watching(family.model, row.kv_heads, hidden) as watch:
                garbled = family.model(tokens, past_key_values=cache).logits
        assert watch.done == len(row.layers)
        low, exact = family.continued(family.ids, hidden, tokens)
        assert_within_rounding(garbled, low, exact)

    @pytest.mark.sample(2)
    def test_every_attention_is_found_and_every_full_layer_compressed(self, family):
        assert family.sites

    @pytest.mark.sample(2)
    def test_what_scores_read_is_what_attention_read(self, family):
        assert family.taps

    def test_keeping_everything_changes_no_logits(self, family):
        assert family.whole

    @pytest.mark.sample(2)
    def test_what_is_kept_is_the_references_choice(self, family):
        assert family.kept

    def test_decoding_after_an_eviction_by_head_equals_the_reference(self, family):
        assert family.uneven

    @pytest.mark.sample(2)
    def test_rows_of_a_padded_batch_are_as_if_alone(self, family):
        assert family.rows

    @pytest.mark.sample(2)
    def test_several_new_tokens_at_once_are_as_one_by_one(self, family):
        assert family.block

    @pytest.mark.sample(2)
    def test_the_page_of_models_says_what_was_found(self, family):
        row = family.row
        caches = dict.fromkeys(site.cache for site in family.decoding.sites)
        models_page.assert_row(
            family.name, type(family.model).__name__, family.sites, ", ".join(caches), f"{row.kv_heads} of {row.query_heads}",
            " ".join(dict.fromkeys(row.layers)), family.taps, family.kept, family.whole, family.uneven, family.rows, family.block,
        )  # fmt: skip

    def test_a_cache_file_knows_the_key_projections_of_the_model(self, family):
        weights = fingerprint(family.model)["weights"]
        assert {"embedding", "first key projection", "last key projection"} <= weights.keys()

    @pytest.mark.slow
    @pytest.mark.parametrize("policy", POLICIES)
    def test_decoding_equals_the_reference_whatever_the_policy_kept(self, family, policy):
        model, tokens, logits = family.compiled(f"{POLICIES[policy]} | budget=uniform(0.5)"), zoo.prompt(4, seed=2), []
        if (family.name, policy) in REFUSED:
            with pytest.raises(kvfx.SiteRefused, match=REFUSED[family.name, policy]):
                model.compress(family.ids)
            return
        with family.warning():
            cache = model.compress(family.ids)
        work = cache.copy()
        assert all(cache.layers[layer].slots == LENGTH // 2 for layer in family.row.full)
        for index in range(tokens.shape[1]):
            logits.append(model(tokens[:, index : index + 1], past_key_values=work).logits)
        family.check_logits(cache, 0, LENGTH, tokens, torch.cat(logits, 1))

    @pytest.mark.slow
    def test_heads_that_hold_unequally_many_slots_decode_as_the_reference(self, family):
        model, short = family.compiled("-knorm | budget=heads(0.4)"), torch.zeros(1, LENGTH - SHORT, dtype=torch.long)
        ids, mask = torch.cat([family.ids, torch.cat([short, family.ids[:, :SHORT]], 1)]), torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, : LENGTH - SHORT] = 0
        with family.warning():
            cache = model.compress(ids, mask)
        work, tokens, logits = cache.copy(), torch.cat([zoo.prompt(4, seed=2), zoo.prompt(4, seed=3)]), []
        for index in range(4):
            logits.append(model(tokens[:, index : index + 1], past_key_values=work).logits)
        for row, length in enumerate((LENGTH, SHORT)):
            family.check_logits(cache, row, length, tokens[row : row + 1], torch.cat(logits, 1)[row : row + 1])


# Two classes, so that two processes can share the families out.
class TestTheFirstHalfOfTheZoo(Checks):
    NAMES = sorted(zoo.ROWS)[0::2]


class TestTheOtherHalfOfTheZoo(Checks):
    NAMES = sorted(zoo.ROWS)[1::2]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in zoo.ROWS.items() if not row.routed])  # which rounding sends another way
def test_half_precision_decodes_as_the_reference_in_half_precision(name):
    family = Family(name, torch.bfloat16)
    assert family.whole
    assert family.uneven
    assert family.rows
