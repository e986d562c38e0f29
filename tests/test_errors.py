"""Bad input: each has its error, which says what happened, what was expected and what to do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, BertConfig, BertModel, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kvfx
from decoding import compiled, fresh_llama, llama, ones, tokens

CONTEXT = tokens(1, 20)
HALF = "knorm:0.5"

POLICIES = {
    "unknown name": ("knrom:0.5", r"unknown .*'knrom'.*Did you mean 'knorm'\? Known: .*compactor.*knorm.*random"),
    "unknown argument": ("compactor(siz=3)", r"unknown argument of the preset compactor: 'siz'.*Known: .*size"),
    "unknown axis": ("knorm | budgte=uniform(0.5)", r"unknown axis 'budgte'.*Known: .*budget"),
    "keep of nothing": ("knorm:0", r"keep=0 is outside \(0, 1\]"),
    "keep of more than all": ("knorm:1.5", r"keep=1\.5 is outside \(0, 1\]: a budget is the fraction kept"),
    "static conflict": (
        "compactor | budget=uniform(tokens=4)",
        r"tokens=4 is less than the 12 tokens of protect\(sinks=8, recent=4\).*Raise the one or lower the other",
    ),
    "planned": ("knorm:0.5 | pos=rerotate", r"planned but not built yet"),
    "no policy": (3, r"3 is not a policy: expected text such as 'compactor:0\.5'"),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_wrong_policy_is_refused_at_compile(case):
    policy, message = POLICIES[case]
    with pytest.raises(kvfx.PolicyError, match="(?s)" + message):
        kvfx.compile(llama(), policy, backend="eager")


def training() -> nn.Module:
    return fresh_llama().train()


MODELS = {
    "an encoder": (
        lambda: BertModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval(),
        r"BertModel is no causal decoder: it cannot generate, so there is no KV cache.*AutoModelForCausalLM",
    ),
    "no model": (lambda: len, r"builtin_function_or_method is no model\. Expected a causal decoder such as AutoModelForCausalLM"),
    "training": (training, r"LlamaForCausalLM is in training mode; compression is for inference\. Call model\.eval\(\) first"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_compressed_is_refused_at_compile(case):
    make, message = MODELS[case]
    with pytest.raises(kvfx.UnsupportedModel, match=message):
        kvfx.compile(make(), HALF, backend="eager")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "indcutor"}, r"unknown backend 'indcutor'; known: \['aot_eager', 'eager', 'inductor'\]"),
        ({"on_refuse": "ignore"}, r"on_refuse is 'ignore'; known: \['error', 'warn'\]"),
    ],
    ids=["backend", "on_refuse"],
)
def test_an_unknown_option_is_refused_at_compile(options, message):
    with pytest.raises(kvfx.InputError, match=message):
        kvfx.compile(llama(), HALF, **options)


GOOD = torch.randn(2, 16, 48)
SKETCHES = {
    "too few": ([GOOD], "compactor", r"sketch has 1 matrices, LlamaForCausalLM has 2 layers; expected one for each"),
    "not finite": ([GOOD, GOOD * math.nan], "compactor", r"sketch\[1\] is \(2, 16, 48\) torch\.float32, expected finite floats"),
    "integers": ([GOOD, GOOD.int()], "compactor", r"sketch\[1\] is \(2, 16, 48\) torch\.int32, expected finite floats"),
    "one axis": ([GOOD[0, 0], GOOD], "compactor", r"sketch\[0\] is \(48,\)"),
    "other heads": ([torch.randn(3, 16, 48)] * 2, "compactor", r"sketch\[0\] is \(3, 16, 48\).*2 KV heads of 16 channels"),
    "other width": ([GOOD[..., :7]] * 2, "compactor", r"do not fit compactor.*have 48 columns"),
    "not used": ([GOOD, GOOD], "knorm", r"a sketch was given, but knorm.* has no leverage score that would use it"),
}


@pytest.mark.parametrize("case", SKETCHES)
def test_a_bad_sketch_is_refused_at_compile(case):
    sketch, policy, message = SKETCHES[case]
    with pytest.raises(kvfx.PolicyError, match="(?s)" + message):
        kvfx.compile(llama(), policy, backend="eager", sketch=sketch)


@pytest.mark.parametrize(("policy", "least"), [("snapkv@kvpress:0.5", 65), ("compactor@kvpress:0.5", 14)])
def test_a_prompt_too_short_for_the_library_that_is_followed_is_refused(policy, least):
    with pytest.raises(kvfx.InputError, match=rf"{policy} scores prompts of at least {least} tokens.*; got 10\."):
        kvfx.compile(llama(), policy, backend="eager").compress(tokens(1, 10))


def test_keys_that_are_not_finite_name_their_layer_and_store_nothing():
    base, cache = fresh_llama(), kvfx.Cache()
    model = kvfx.compile(base, HALF, backend="eager")
    for value in (math.inf, math.nan):
        with torch.no_grad():
            base.model.layers[1].self_attn.k_proj.weight[0, 0] = value
        message = r"(?s)scores of knorm:0\.5 are not finite in layers \[1\].*Nothing was stored.*dtype"
        with pytest.raises(kvfx.InputError, match=message):
            model.compress(CONTEXT, past_key_values=cache)
        assert not cache.layers
        assert cache.get_seq_length() == 0


def without_softmax(module, query, key, value, attention_mask, scaling=None, **kwargs):
    weights = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling).relu()
    return (weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("without_softmax", without_softmax)
AttentionMaskInterface.register("without_softmax", sdpa_mask)


def test_a_model_without_a_known_attention_says_what_was_found_instead():
    base = fresh_llama()
    base.set_attn_implementation("without_softmax")
    model = kvfx.compile(base, HALF, backend="eager")
    with pytest.raises(
        kvfx.UnsupportedModel,
        match=r"(?s)no attention was recognised in LlamaForCausalLM\. Found instead: .*matmul.*attn_implementation='sdpa'",
    ):
        model.compress(CONTEXT)


def test_a_model_that_goes_into_training_later_is_refused():
    base = fresh_llama()
    model = kvfx.compile(base, HALF, backend="eager")
    with pytest.raises(
        kvfx.UnsupportedModel, match=r"a compressed model is for inference; train the model that was given to kvfx\.compile"
    ):
        model.train()
    base.train()
    for options in ({}, {"use_cache": False}):
        with pytest.raises(kvfx.UnsupportedModel, match=r"the model is in training mode; call model\.eval\(\) first"):
            model(CONTEXT, **options)


def test_a_cache_of_another_model_is_refused():
    cache = compiled(HALF).compress(CONTEXT)
    other = kvfx.compile(copy.deepcopy(llama()), HALF, backend="eager")
    with pytest.raises(
        kvfx.CacheMismatch, match=r"made by another model than this LlamaForCausalLM.*Compress the context again with this one"
    ):
        other.generate(torch.cat([CONTEXT, CONTEXT], 1), past_key_values=cache)


@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (5,)], ids=str)
def test_an_empty_prompt_is_refused(shape):
    ids = torch.ones(shape, dtype=torch.long)
    for run in (compiled(HALF), compiled(HALF).compress, compiled(HALF).generate):
        with pytest.raises(kvfx.InputError, match=r"the prompt is .*expected \[B, S\]"):
            run(ids)
    with pytest.raises(kvfx.InputError, match="generate needs input ids"):
        compiled(HALF).generate()


def test_a_row_of_padding_alone_is_refused():
    mask = ones(3, 20)
    mask[1] = 0
    with pytest.raises(kvfx.InputError, match="row 1 of the batch is all padding; leave it out"):
        compiled(HALF).compress(tokens(3, 20), mask)


@pytest.mark.parametrize("make", [DynamicCache, lambda: ((1, 2),)], ids=["DynamicCache", "tuple"])
def test_a_foreign_cache_is_refused(make):
    cache = make()
    message = (
        rf"past_key_values is a {type(cache).__name__}, whose slots say nothing.*Expected a kvfx\.Cache: leave past_key_values out"
    )
    with pytest.raises(kvfx.CacheMismatch, match="(?s)" + message):
        compiled(HALF)(CONTEXT, past_key_values=cache)
    with pytest.raises(kvfx.CacheMismatch, match="(?s)" + message):
        compiled(HALF).generate(CONTEXT, past_key_values=cache)


def test_a_policy_that_couples_rows_takes_one_row_without_padding():
    model, mask = compiled("compactor@kvpress:0.5"), ones(1, 20)
    with pytest.raises(kvfx.InputError, match=r"compactor@kvpress.* needs one row without padding, got 2 rows: ."):
        model.compress(tokens(2, 20))
    mask[0, 0] = 0
    with pytest.raises(kvfx.InputError, match=r"compactor@kvpress.* needs one row without padding, got .*padding"):
        model.compress(CONTEXT, mask)


def test_layers_that_do_not_fit_together_are_refused():
    keys = torch.zeros(1, 2, 3, 4)
    place = torch.arange(3)
    cases = [
        ([], 5, None, "no layers were given"),
        (
            [(keys, keys[:, :1], place)],
            5,
            None,
            r"layer 0: keys \(1, 2, 3, 4\) and values \(1, 1, 3, 4\), expected \[B, Hkv, T, D\]",
        ),
        ([(keys, keys, place), (keys[:, :, :0], keys[:, :, :0], place[:0])], 5, None, "layer 1 holds no slot"),
        ([(keys, keys, place)], 2, None, "layer 0 holds 3 slots of only 2 tokens seen"),
        ([(keys, keys, place[:2])], 5, None, r"layer 0: positions \(2,\), expected \(1, 2, 3\) or \(3,\)"),
        ([(keys, keys, place.flip(0))], 5, None, r"layer 0: positions must ascend within 0\.\.4"),
        ([(keys, keys, place + 3)], 5, None, r"layer 0: positions must ascend within 0\.\.4"),
        ([(keys, keys, place)], 5, torch.ones(1, 3), r"ids are \(1, 3\), expected \(1, 5\): all tokens seen"),
        ([(torch.cat([keys, keys]),) * 2 + (place,)], torch.tensor([5, 6]), None, "rows saw different numbers of tokens"),
    ]
    for layers, seen, ids, message in cases:
        with pytest.raises(kvfx.CacheMismatch, match=message):
            kvfx.Cache.from_layers(layers, seen, ids)
