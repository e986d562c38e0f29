"""The passes one by one: what is matched, what is refused and why, what the graph looks like afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache

from graphs import passes_until, readable, traced_step
from kvfx.lower import lower as plan_of
from kvfx.passes import capture, run
from kvfx.passes.attach_cache import attach_cache
from kvfx.passes.find_attention import find_attention
from kvfx.passes.graph import aten, is_call, sort_topologically, val
from kvfx.passes.match import Const, OneOf, Op, Through, Var, first
from kvfx.passes.plan import Plan
from kvfx.passes.pre_rope import before_rope
from kvfx.passes.report import Refuse, Report
from kvfx.passes.verify import verify
from kvfx.policy import Policy
from test_equivalence import decoder

GOLDEN = Path(__file__).parent / "golden"
KNORM, COMPACTOR = (plan_of(Policy.parse(text)) for text in ("knorm:0.5", "compactor:0.5"))


def graph_of(function, *args) -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(*args)


def found(module: fx.GraphModule) -> Report:
    report = Report()
    find_attention(module, Plan(None), report)
    return report


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


# -- the matcher -------------------------------------------------------------------------------------------------------------------


def last(module: fx.GraphModule) -> fx.Node:
    return module.graph.output_node().args[0]


def test_a_variable_stands_for_the_same_node_everywhere():
    square = Op(aten.mul.Tensor, Var("x"), Var("x"))
    assert first(square, last(graph_of(lambda a, b: a * a, randn(2), randn(2)))) is not None
    assert first(square, last(graph_of(lambda a, b: a * b, randn(2), randn(2)))) is None


def test_one_of_tags_the_alternative_it_took():
    scaled = OneOf(mul=Op(aten.mul.Tensor, Var("x"), Const("by")), div=Op(aten.div.Tensor, Var("x"), Const("by")))
    match = first(scaled, last(graph_of(lambda a: a / 8, randn(2))))
    assert match.tags == {"div"}
    assert match["by"] == 8


def test_one_of_tries_the_next_alternative_when_the_whole_does_not_match():
    pattern = Op(aten.add.Tensor, OneOf(any=Var("x"), mul=Op(aten.mul.Tensor, Var("x"), Const("by"))), Var("x"))
    match = first(pattern, last(graph_of(lambda a: a * 2 + a, randn(2))))
    assert match.tags == {"mul"}


def test_through_binds_what_is_below_everything_skipped():
    pattern = Through(lambda node: is_call(node, aten.clone.default), Var("x"))
    assert first(pattern, last(graph_of(lambda a: a.clone().clone(), randn(2))))["x"].op == "placeholder"


def test_a_number_with_a_value_refuses_other_numbers():
    pattern = Op(aten.mul.Tensor, Var("x"), Const("by", 2))
    assert first(pattern, last(graph_of(lambda a: a * 3, randn(2)))) is None


# -- finding attention -------------------------------------------------------------------------------------------------------------


def test_grouped_keys_are_found_in_a_torch_compile_graph():
    module = traced_step(decoder("llama", 2, 2, 16, 0), torch.ones(1, 9, dtype=torch.long), keep=4)
    sites = found(module).sites
    assert [(site.rule, site.heads, site.kv_heads, site.head_dim) for site in sites] == [("sdpa", 4, 2, 16)] * 2
    assert [val(site.nodes["key"]).shape[1] for site in sites] == [2, 2]


def test_repeated_keys_are_found_below_the_repetition_where_a_mask_is_given():
    valid = torch.ones(2, 9, dtype=torch.bool)
    module = traced_step(decoder("llama", 2, 2, 16, 0), torch.ones(2, 9, dtype=torch.long), valid=valid, keep=4)
    report = found(module)
    assert [site.spelling for site in report.sites] == ["repeated keys"] * 2
    assert [val(site.nodes["key"]).shape[1] for site in report.sites] == [2, 2]
    assert not module.graph.find_nodes(op="call_function", target=aten.expand.default, sort=False) or all(
        val(node).dim() < 5 for node in module.graph.find_nodes(op="call_function", target=aten.expand.default)
    )


class Prefill(torch.nn.Module):
    """A prefill as torch.export sees it: the cache is made inside and its tensors are returned."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        cache = DynamicCache(config=self.model.config)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return out.logits, [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # inside torch.export
def test_the_exported_form_with_its_mask_and_repeated_keys_is_found():
    model = decoder("llama", 2, 2, 16, 0)
    ids = torch.ones(1, 12, dtype=torch.long)
    program = torch.export.export(Prefill(model), (ids,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    module = program.run_decompositions({}).module()
    report = found(module)
    assert [(site.spelling, site.heads, site.kv_heads) for site in report.sites] == [("repeated keys", 4, 2)] * 2
    assert all(site.nodes["attention"].args[3] is not None for site in report.sites)


def test_the_waist_op_computes_what_the_spelling_did():
    query, key, value = randn(2, 6, 5, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)

    def repeated(q, k, v):
        k, v = (x[:, :, None].expand(2, 2, 3, 5, 8).reshape(2, 6, 5, 8) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    module = graph_of(repeated, query, key, value)
    found(module)
    module.recompile()
    torch.testing.assert_close(module(query, key, value), repeated(query, key, value))


NEAR_MISSES = {
    "no head axis": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]),
        "query has 3 axes, expected [B, H, S, D]",
    ),
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25), "dropout 0.25 inside attention"),
    "one batch of keys for all": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]),
        "batches of {B}, 1 and 1",
    ),
    "fewer values than keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v[:, :2], enable_gqa=True),
        "4 query heads on 4 key and 2 value heads",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_near_miss_is_left_alone_with_its_reason(case):
    function, reason = NEAR_MISSES[case]
    module = make_fx(function, pre_dispatch=True)(*(randn(2, 4, 5, 8) for _ in range(3)))
    before = readable(module)
    report = found(module)
    assert [refusal.reason for refusal in report.refusals] == [reason.format(B=2)]
    assert report.sites == []
    assert readable(module) == before


def test_a_graph_without_attention_says_what_it_has_instead():
    report = found(graph_of(lambda q, k, v: q @ torch.softmax(k.mT @ v, -1), *(randn(2, 4, 5, 8) for _ in range(3))))
    assert report.sites == []
    assert report.leftovers == {"aten.matmul.default": 2, "aten.softmax.int": 1}


# -- caches and taps ---------------------------------------------------------------------------------------------------------------


def attached(module: fx.GraphModule, plan: Plan = COMPACTOR) -> Report:
    report = Report()
    find_attention(module, plan, report)
    attach_cache(module, plan, report)
    return report


def test_new_keys_and_growing_caches_are_told_apart():
    model, ids = decoder("llama", 2, 2, 16, 0), torch.ones(1, 9, dtype=torch.long)
    assert {site.cache for site in attached(traced_step(model, ids, keep=4)).sites} == {"new"}
    assert {site.cache for site in attached(traced_step(model, ids, keep=4, past=7)).sites} == {"cat"}
    assert [site.layer for site in attached(traced_step(model, ids, keep=4, past=7)).sites] == [0, 1]


def test_attention_over_keys_that_no_cache_stores_is_refused():
    module = graph_of(lambda q, k, v: F.scaled_dot_product_attention(q, k + 1, v), *(randn(2, 4, 5, 8) for _ in range(3)))
    assert [site.refusal for site in attached(module).sites] == ["the keys `add` that attention reads are not what a cache stores"]


def test_keys_joined_to_something_else_than_the_cache_are_refused():
    def attend(q, k, v, past):
        return F.scaled_dot_product_attention(q, torch.cat([past * 2, k], 2), torch.cat([past, v], 2))

    module = graph_of(attend, *(randn(2, 4, 5, 8) for _ in range(4)))
    assert [site.refusal for site in attached(module).sites] == [
        "keys or values are joined to `mul`, which is not what the cache holds of them"
    ]


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_key_before_rope_is_the_one_that_rope_reads(family):
    module = traced_step(decoder(family, 2, 2, 16, 0), torch.ones(1, 9, dtype=torch.long), keep=4)
    for site in attached(module).sites:
        pre = site.nodes["pre_key"]
        assert val(pre).shape == val(site.nodes["key"]).shape
        assert pre is not site.nodes["key"]
        assert is_call(pre, aten.transpose.int)  # after projection and norm, heads in front, before any rotation


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spelling: str) -> torch.Tensor:
    if spelling == "halves":
        a, b = x.chunk(2, -1)
        return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)
    if spelling == "pairs":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    rotated, passed = x[..., :4], x[..., 4:]
    return torch.cat([rotate(rotated, cos[..., :2], sin[..., :2], "halves"), passed], -1)


@pytest.mark.parametrize("spelling", ["halves", "pairs", "part of the head"])
def test_the_key_before_rope_is_found_in_every_spelling(spelling):
    def keys(ids, weight, projection, positions):
        x = F.linear(F.embedding(ids, weight), projection).view(*ids.shape, 2, 8).transpose(1, 2)
        angle = positions[:, None, :, None] * torch.arange(1, 5)
        return x, rotate(x, angle.cos(), angle.sin(), spelling)

    ids = torch.ones(2, 5, dtype=torch.long)
    module = graph_of(keys, ids, randn(9, 16), randn(16, 16), torch.arange(5)[None].expand(2, 5).contiguous())
    before, roped = module.graph.output_node().args[0]
    assert before_rope(roped) is before


def test_the_key_before_rope_stands_as_the_roped_one_where_rope_saw_its_axes_in_another_order():
    def keys(ids, weight, projection, positions):
        x = F.linear(F.embedding(ids, weight), projection).view(*ids.shape, 2, 8)
        angle = positions[:, :, None, None] * torch.arange(1, 5)
        turned = torch.view_as_complex(x.unflatten(3, (4, 2))) * torch.polar(torch.ones_like(angle).float(), angle.float())
        return x, torch.view_as_real(turned).flatten(3).transpose(1, 2)

    ids = torch.ones(2, 5, dtype=torch.long)
    module = graph_of(keys, ids, randn(9, 16), randn(16, 16), torch.arange(5)[None].expand(2, 5).contiguous())
    before, roped = module.graph.output_node().args[0]
    found = before_rope(roped)
    assert is_call(found, aten.permute.default)
    assert found.args == (before, [0, 2, 1, 3])


def test_a_key_without_rope_is_its_own_key_before_rope():
    def keys(ids, weight, projection):
        return F.linear(F.embedding(ids, weight), projection)

    module = graph_of(keys, torch.ones(2, 5, dtype=torch.long), randn(9, 16), randn(16, 16))
    assert before_rope(last(module)) is last(module)


def test_a_key_whose_parts_come_from_two_tensors_is_refused():
    def keys(ids, weight, positions):
        a, b = F.embedding(ids, weight), F.embedding(ids + 1, weight)
        return a * positions.cos()[..., None] + b * positions.sin()[..., None]

    module = graph_of(keys, torch.ones(2, 5, dtype=torch.long), randn(9, 16), torch.arange(5)[None].expand(2, 5).contiguous())
    with pytest.raises(Refuse, match="does not lead back to one tensor"):
        before_rope(last(module))


# -- the whole pipeline ------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("plan", [KNORM, COMPACTOR], ids=["knorm", "compactor"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded rows"])
def test_every_pass_leaves_a_sound_graph(plan, padded):
    valid = torch.ones(2, 9, dtype=torch.bool) if padded else None
    module = traced_step(decoder("qwen3", 2, 2, 16, 0), torch.ones(2, 9, dtype=torch.long), valid=valid, keep=4)
    report = run(module, plan, check_each=True)
    assert report.coverage == 1.0
    assert report.reasons() == []


@pytest.mark.parametrize("padded", [False, True])
def test_a_score_over_all_queries_takes_the_log_sum_exp_of_the_attention(padded):
    valid = torch.ones(2, 9, dtype=torch.bool) if padded else None
    module = traced_step(decoder("qwen3", 2, 2, 16, 0), torch.ones(2, 9, dtype=torch.long), valid=valid, keep=4)
    run(module, plan_of(Policy.parse("h2o_prefill:0.5")), check_each=True)
    calls = [node.target for node in module.graph.nodes]
    # In each of two layers. Under a mask the attention keeps its own spelling, and the score asks twice.
    assert calls.count(aten._scaled_dot_product_flash_attention_for_cpu.default) == 4
    assert calls.count(aten.scaled_dot_product_attention.default) == (2 if padded else 0)


def test_an_op_that_reads_two_results_of_one_shape_is_traced_with_both():
    """Layers share traces, so different nodes may hold the same fake."""
    fake = val(graph_of(lambda a: a + 1, randn(2, 3)).graph.output_node().args[0])
    first, second = capture.trace(lambda a, b: a - b, fake, fake).graph.find_nodes(op="placeholder")
    assert first.users == second.users
    assert len(first.users) == 1


def test_a_score_with_a_scale_of_its_own_does_not_take_the_log_sum_exp_of_the_attention():
    module = traced_step(decoder("qwen3", 2, 2, 16, 0), torch.ones(1, 9, dtype=torch.long), keep=4)
    policy = "attn(q=all, mask=causal, over=count, heads=mean, v=none, pool=none, scale=0.7) | budget=uniform(0.5)"
    run(module, plan_of(Policy.parse(policy)), check_each=True)
    calls = [node.target for node in module.graph.nodes]
    assert calls.count(aten._scaled_dot_product_flash_attention_for_cpu.default) == 4  # the score's own two, in each layer
    assert calls.count(aten.scaled_dot_product_attention.default) == 2


def test_a_plan_without_a_score_only_undoes_what_finding_did():
    model, ids = decoder("llama", 2, 2, 16, 0), torch.arange(9)[None]
    report = run(traced_step(model, ids), Plan(None), check_each=True)
    assert len(report.sites) == 2
    assert report.compressed == []


def test_verify_names_a_node_without_a_value():
    module = traced_step(decoder("llama", 2, 2, 16, 0), torch.ones(1, 9, dtype=torch.long))
    next(iter(module.graph.find_nodes(op="call_function", target=aten.linear.default))).meta.pop("val")
    with pytest.raises(AssertionError, match=r"linear has no meta\['val'\]"):
        verify(module, Plan(None), Report())


def test_verify_names_a_marker_that_was_left_behind():
    module = traced_step(decoder("llama", 2, 2, 16, 0), torch.ones(1, 9, dtype=torch.long), keep=4)
    with pytest.raises(AssertionError, match="cache_write still stands"):
        verify(module, KNORM, Report())


def test_sorting_moves_nodes_behind_their_inputs():
    module = graph_of(lambda a: (a + 1) * 2, randn(2))
    add, mul = (module.graph.find_nodes(op="call_function", target=t)[0] for t in (aten.add.Tensor, aten.mul.Tensor))
    mul.append(add)
    with pytest.raises(RuntimeError):
        module.graph.lint()
    sort_topologically(module.graph)
    module.graph.lint()


GOLDENS = {
    "prefill_compactor": ({"keep": 4}, COMPACTOR, "insert_eviction"),
    "prefill_knorm_padded": ({"keep": 4, "valid": torch.ones(2, 9, dtype=torch.bool)}, KNORM, "insert_eviction"),
    "prefill_knorm_lowered": ({"keep": 4}, KNORM, "lower"),
    "decode": ({"past": 6}, Plan(None), "lower"),
}


WRITTEN_WITH = ("2.13", "5.23")


@pytest.mark.skipif(
    not (torch.__version__.startswith(WRITTEN_WITH[0]) and transformers.__version__.startswith(WRITTEN_WITH[1])),
    reason="other versions of torch and transformers trace the same model to other ops; these graphs were written with "
    + " and ".join(WRITTEN_WITH),
)
@pytest.mark.parametrize("name", GOLDENS)
def test_the_graph_reads_as_committed(name):
    options, plan, last = GOLDENS[name]
    length = 1 if "past" in options else 9
    rows = 2 if "valid" in options else 1
    model = decoder("llama", 2, 2, 16, 0, layers=1)
    module = traced_step(model, torch.ones(rows, length, dtype=torch.long), **options)
    report = Report()
    for apply in passes_until(last):
        apply(module, plan, report)
    text, path = readable(module), GOLDEN / f"{name}.txt"
    if os.environ.get("KVFX_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
