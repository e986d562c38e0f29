"""The weight behind attention: found where it says what becomes of a head's value, refused with a reason where it does not."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

import kvfx
from decoding import fresh_llama, tokens
from kvfx.passes import capture
from kvfx.passes.find_attention import find_attention
from kvfx.passes.graph import arguments, aten, call, is_call, val
from kvfx.passes.output_weight import output_weight
from kvfx.passes.plan import Plan
from kvfx.passes.report import Refuse, Report
from test_equivalence import decoder
from test_models import Int8Linear

IDS = tokens(2, 9)
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa",
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 6, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "llama": lambda: decoder("llama", 2, 3, 16, 0),
    "qwen3, heads wider than the model": lambda: decoder("qwen3", 2, 4, 32, 0),
    "phi3, query, key and value in one": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=2)),
    "gpt_neox, with a bias": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "gpt2, weights as [in, out]": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, attn_implementation="sdpa")),
}


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def by_heads(module: fx.GraphModule) -> None:
    """Replace every output projection by the sum of what the slices of its weight make of the heads."""
    report = Report()
    find_attention(module, Plan(None), report)
    assert len(report.sites) == 2
    graph = module.graph
    for site in report.sites:
        attention = site.nodes["attention"]
        weight = output_weight(attention)
        projection = attention
        while not is_call(projection, aten.linear.default, aten.addmm.default):
            (projection,) = projection.users
        given = arguments(projection)
        with graph.inserting_before(projection):
            slices = call(graph, aten.unflatten.int, weight, 1, [site.heads, -1])
            parts = [bias for bias in (given.get("bias"), given["self"] if "mat2" in given else None) if bias is not None]
            for head in range(site.heads):
                result = call(graph, aten.select.int, attention, 1, head)
                part = call(graph, aten.t.default, call(graph, aten.select.int, slices, 1, head))
                product = call(graph, aten.matmul.default, result, part)
                parts.append(call(graph, aten.reshape.default, product, val(projection).shape))
            out = functools.reduce(lambda a, b: call(graph, aten.add.Tensor, a, b), parts)
        projection.replace_all_uses_with(out)
    module.recompile()


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_the_slices_make_of_the_heads_adds_up_to_the_projection(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()  # so that only another sum would differ
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases are zeros and norms ones
    torch.testing.assert_close(capture.compile_with(logits, by_heads, "eager")(model, IDS), model(IDS).logits)


# Of q, k, v [2, 4, 5, 8] and w [32, 32]: what follows attention, and why that is refused.


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def beside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(2, 5, 32)


def low_rank(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, w[:4]), w[:, :4])


NEAR_MISSES = {
    "a gate": (
        lambda o, w: F.linear(beside(o) * beside(o).sigmoid(), w),
        r"is read by `\w+`, `\w+`, expected one output projection",
    ),
    "a gate of something else": (
        lambda o, w: F.linear(beside(o) * w.sigmoid()[0], w),
        r"`mul\w*` \(aten.mul.Tensor\) reads the output",
    ),
    "a norm": (lambda o, w: F.linear(F.layer_norm(beside(o), (32,)), w), r"`layer_norm\w*` \(aten.layer_norm.default\) reads"),
    "a norm of each head": (lambda o, w: F.linear(beside(F.rms_norm(o, (8,))), w), r"`\w+` \(aten.rms_norm.default\) reads"),
    "an adapter": (lambda o, w: low_rank(beside(o), w), r"is read by `linear`, `linear_1`, expected one output projection"),
    "a rotation": (lambda o, w: F.linear((beside(o) @ w).view(10, 32), w), "is projected twice, by `matmul` and `linear`"),
    "heads not moved": (lambda o, w: F.linear(o.reshape(2, 5, 32), w), r"`reshape` \(aten.reshape.default\) reads the output"),
    "channels before heads": (lambda o, w: F.linear(o.permute(0, 2, 3, 1).reshape(2, 5, 32), w), r"`permute` \(aten.permute"),
    "tokens moved on": (lambda o, w: F.linear(beside(o).transpose(0, 1), w), r"`transpose_1` \(aten.transpose.int\) reads"),
    "half of the tokens": (lambda o, w: F.linear(beside(o)[:, ::2], w), r"`slice_1` \(aten.slice.Tensor\) reads the output"),
    "one projection for all heads": (
        lambda o, w: F.linear(o.transpose(1, 2), w[:, :8].clone()),
        "does not project all 4 heads of 8",
    ),
    "each head alone": (lambda o, w: o @ w[:8, :8], r"does not project all 4 heads of 8 channels side by side"),
    "a quantised weight": (
        lambda o, w: F.linear(beside(o), w.to(torch.int8) * 0.5),
        "weight `mul` is computed, expected a parameter",
    ),
    "a scaled product": (
        lambda o, w: torch.addmm(w[0], beside(o).view(-1, 32), w, alpha=2),
        "`addmm` is no plain projection of the output of attention",
    ),
    "a weight made by attention": (lambda o, w: F.linear(w, beside(o)[0].contiguous()), r"`select\w*` \(aten.select.int\) reads"),
    "nothing": (lambda o, w: o, r"`output` reads the output of attention"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_is_no_plain_projection_is_refused_with_its_reason(case):
    after, reason = NEAR_MISSES[case]
    inputs = (*(torch.randn(2, 4, 5, 8) for _ in range(3)), torch.randn(32, 32))
    module = make_fx(lambda q, k, v, w: after(attend(q, k, v), w), pre_dispatch=True, tracing_mode="fake")(*inputs)
    report = Report()
    find_attention(module, Plan(None), report)
    with pytest.raises(Refuse, match=reason):
        output_weight(report.sites[0].nodes["attention"])


# Whole models.

CRITICAL = "criticalkv(window=4):0.5"


class Gate(nn.Module):
    """Channels scaled by a parameter, before the projection."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.gate = linear, nn.Parameter(torch.rand(linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.gate)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (Gate, r"layer 1 \(sdpa\): `mul\w*` \(aten.mul.Tensor\) reads the output of attention"),
        (Int8Linear, r"layer 1 \(sdpa\): the output projection's weight `mul\w*` is computed"),
    ],
)
def test_a_layer_whose_projection_is_not_understood_is_left_whole_and_the_others_are_not(wrap, reason):
    torch._dynamo.reset()
    model = fresh_llama()
    attention = model.model.layers[1].self_attn
    attention.o_proj = wrap(attention.o_proj)
    compiled = kvfx.compile(model, CRITICAL, backend="eager")
    with pytest.warns(UserWarning, match=reason):
        cache = compiled.compress(tokens(1, 20))
    assert [layer.slots for layer in cache.layers] == [10, 20]
    plain = kvfx.compile(model, "snapkv(window=4):0.5", backend="eager", on_refuse="error").compress(tokens(1, 20))
    assert [layer.slots for layer in plain.layers] == [10, 10]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
def test_an_adapter_of_the_projection_is_refused_until_it_is_merged():
    import peft

    torch._dynamo.reset()
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(fresh_llama(), config).eval()
    with pytest.raises(kvfx.SiteRefused, match=r"layer 0 \(sdpa\): the output of attention is read by `linear_3`, "):
        kvfx.compile(adapted, CRITICAL, backend="eager", on_refuse="error").compress(tokens(1, 20))
    merged = copy.deepcopy(adapted).merge_and_unload()
    cache = kvfx.compile(merged, CRITICAL, backend="eager", on_refuse="error").compress(tokens(1, 20))
    assert [layer.slots for layer in cache.layers] == [10, 10]
