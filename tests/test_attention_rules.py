"""The attention rules: each spelling becomes the waist op on the model's own tensors, and what only resembles one is left alone."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphs import computed, readable
from kvfx.passes import capture
from kvfx.passes.attention import ATTENTION_RULES
from kvfx.passes.find_attention import find_attention
from kvfx.passes.graph import aten, is_call, val
from kvfx.passes.lower import lower
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report
from kvfx.passes.verify import verify
from yardstick import assert_within_rounding

B, HKV, G, S, T, D = 2, 2, 3, 5, 7, 8
HQ = HKV * G
SCALE = D**-0.5
Spelling = Callable[..., Tensor]


def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key, value, an additive causal mask with padding, a bias per head, and sinks."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, bias, sinks = (
        torch.randn(shape, generator=generator) for shape in ((B, HQ, S, D), (B, HKV, T, D), (B, HKV, T, D), (HQ, 1, T), (HQ,))
    )
    visible = torch.ones(S, T, dtype=torch.bool).tril(T - S).repeat(B, 1, 1, 1)
    visible[0, ..., :2] = False
    mask = torch.zeros(B, 1, S, T).masked_fill(~visible, torch.finfo(dtype).min)
    return query.to(dtype), key.to(dtype), value.to(dtype), mask.to(dtype), bias.to(dtype), sinks.to(dtype)


def rep(x: Tensor) -> Tensor:
    """Keys or values for every query head, as transformers spells it."""
    batch, heads, length, dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, G, length, dim).reshape(batch, heads * G, length, dim)


def probabilities(logits: Tensor, like: Tensor) -> Tensor:
    return F.dropout(F.softmax(logits, dim=-1, dtype=torch.float32 if like.dtype != torch.float64 else None).to(like.dtype), 0.0)


def hidden(mask: Tensor) -> Tensor:
    return mask < -1


# -- spellings ---------------------------------------------------------------------------------------------------------------------


def llama(q, k, v, mask, bias, sinks):
    return probabilities(q @ rep(k).transpose(2, 3) * SCALE + mask, q) @ rep(v)


def no_mask(q, k, v, mask, bias, sinks):
    return torch.softmax(torch.matmul(q, rep(k).mT) / math.sqrt(D), -1) @ rep(v)


def cast_up(q, k, v, mask, bias, sinks):
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ rep(k).to(wide).transpose(-1, -2) / torch.sqrt(torch.tensor(float(D), dtype=wide))
    return torch.softmax(logits + mask, -1).to(v.dtype) @ rep(v)


def scale_after_mask(q, k, v, mask, bias, sinks):
    return torch.softmax((q @ rep(k).mT + mask) / math.sqrt(D), -1) @ rep(v)


def scale_on_query(q, k, v, mask, bias, sinks):
    return torch.softmax((q * SCALE) @ rep(k).mT + mask, -1) @ rep(v)


def scale_on_both(q, k, v, mask, bias, sinks):
    return torch.softmax((q * D**-0.25) @ (rep(k) / D**0.25).mT + mask, -1) @ rep(v)


def filled(q, k, v, mask, bias, sinks):
    return (q @ rep(k).mT * SCALE).masked_fill(hidden(mask), -torch.inf).softmax(-1) @ rep(v)


def floored(q, k, v, mask, bias, sinks):
    return torch.max(q @ rep(k).mT * SCALE + mask, torch.tensor(torch.finfo(q.dtype).min)).softmax(-1) @ rep(v)


def scale_on_projection(q, k, v, mask, bias, sinks):
    q = (q.transpose(1, 2).flatten(2) * SCALE).view(q.shape[0], -1, HQ, D).transpose(1, 2)
    return torch.softmax(q @ rep(k).mT + mask, -1) @ rep(v)


def sdpa_scale_on_projection(q, k, v, mask, bias, sinks):
    q = (q.transpose(1, 2).flatten(2) * SCALE).view(q.shape[0], -1, HQ, D).transpose(1, 2)
    return F.scaled_dot_product_attention(q, rep(k), rep(v), attn_mask=mask, scale=1.0)


def filled_in_place(q, k, v, mask, bias, sinks):
    return (q @ rep(k).mT).mul_(SCALE).masked_fill_(hidden(mask), -1e9).softmax(-1) @ rep(v)


def where_and_added(q, k, v, mask, bias, sinks):
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    logits = torch.where(causal, q @ rep(k).mT * SCALE, torch.finfo(q.dtype).min)
    return torch.softmax(logits + mask, -1) @ rep(v)


def interleaved(q, k, v, mask, bias, sinks):
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    return torch.softmax(q @ k.mT * SCALE + mask, -1) @ v


def hidden_by_a_mask_like_the_logits(q, k, v, mask, bias, sinks):
    logits = q @ rep(k).mT * SCALE
    causal = logits.new_ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2])
    return torch.where(causal == 0, torch.full_like(logits, -torch.inf), logits).softmax(-1) @ rep(v)


def one_key_head(q, k, v, mask, bias, sinks):
    return torch.softmax(q @ k[:, :1].mT * SCALE + mask, -1) @ v[:, :1]


def one_key_head_expanded(q, k, v, mask, bias, sinks):
    k, v = (x[:, :1].expand(x.shape[0], HQ, x.shape[2], D) for x in (k, v))
    return torch.softmax(q @ k.mT * SCALE + mask, -1) @ v


def grouped_axis(q, k, v, mask, bias, sinks):
    q5 = q.view(q.shape[0], HKV, G, q.shape[2], D)
    logits = q5 @ k.unsqueeze(2).mT * SCALE + mask[:, :, None]
    return (torch.softmax(logits, -1) @ v.unsqueeze(2)).flatten(1, 2)


def batched(q, k, v, mask, bias, sinks):
    q3, k3, v3 = (x.reshape(-1, x.shape[2], D) for x in (q, rep(k), rep(v)))
    logits = torch.bmm(q3, k3.transpose(1, 2)).view(q.shape[0], HQ, q.shape[2], -1) * SCALE + mask
    weights = torch.softmax(logits, -1).view(-1, q.shape[2], k.shape[2])
    return torch.bmm(weights, v3).view(q.shape[0], HQ, -1, D).transpose(1, 2)


def falcon_alibi(q, k, v, mask, bias, sinks):
    logits = q @ rep(k).mT + bias
    logits *= SCALE
    return torch.softmax(logits + mask, -1) @ rep(v)


def mpt(q, k, v, mask, bias, sinks):
    logits = (q @ rep(k).mT * SCALE + bias).masked_fill(hidden(mask), torch.finfo(q.dtype).min)
    return probabilities(logits, q) @ rep(v)


def bloom(q, k, v, mask, bias, sinks):
    q3, k3, v3 = (x.reshape(-1, x.shape[2], D) for x in (q, rep(k), rep(v)))
    logits = bias.repeat(q.shape[0], 1, 1).baddbmm(batch1=q3, batch2=k3.mT, beta=0.5, alpha=SCALE)
    weights = probabilities(logits.view(q.shape[0], HQ, q.shape[2], -1) + mask, q)
    out = torch.bmm(weights.view(q.shape[0] * HQ, q.shape[2], -1), v3).view(q.shape[0], HQ, -1, D)
    return out.permute(0, 2, 1, 3).reshape(q.shape[0], -1, HQ * D)


def gemma2(q, k, v, mask, bias, sinks):
    return probabilities(torch.tanh(q @ rep(k).mT * SCALE / 2.0) * 2.0 + mask, q) @ rep(v)


def narrowed_by_multiplying(q, k, v, mask, bias, sinks):
    return torch.softmax(2.0 * torch.tanh(q @ rep(k).mT * SCALE * 0.5), -1) @ rep(v)


def gpt_oss(q, k, v, mask, bias, sinks):
    logits = q @ rep(k).mT * SCALE + mask
    logits = torch.cat([logits, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], -1)
    weights = F.softmax(logits - logits.max(dim=-1, keepdim=True).values, dim=-1, dtype=logits.dtype)
    return F.dropout(weights[..., :-1], 0.0).to(v.dtype) @ rep(v)


def einsum_grouped(q, k, v, mask, bias, sinks):
    q, k, v = q.view(q.shape[0], HKV, G, -1, D).permute(0, 3, 1, 2, 4), k.transpose(1, 2), v.transpose(1, 2)
    logits = torch.einsum("bqkgd,bskd->bkgqs", q, k) / math.sqrt(D) + mask[:, :, None]
    return torch.einsum("bkgqs,bskd->bqkgd", logits.softmax(-1), v).flatten(2)


def einsum_by_head(q, k, v, mask, bias, sinks):
    logits = torch.einsum("nhid, nhjd -> nhij", q, rep(k)) * SCALE + bias
    return torch.einsum("nhjd,nhij->nihd", rep(v), (logits + mask).softmax(-1))


def einsum_then_matmul(q, k, v, mask, bias, sinks):
    return torch.softmax(torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), rep(k).transpose(1, 2)) * SCALE, -1) @ rep(v)


def sdpa_interleaved(q, k, v, mask, bias, sinks):
    return F.scaled_dot_product_attention(q * 0.5, *(x.repeat_interleave(G, 1) for x in (k, v)), attn_mask=mask, scale=0.3)


def sdpa_one_key_head(q, k, v, mask, bias, sinks):
    k, v = (x[:, :1].expand(x.shape[0], HQ, x.shape[2], D) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask + bias)


def flash_for_cpu(q, k, v, mask, bias, sinks):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, rep(k).contiguous(), rep(v).contiguous(), attn_mask=mask, scale=0.3)[0]


def math_kernel(q, k, v, mask, bias, sinks):
    return torch.ops.aten._scaled_dot_product_attention_math(q, rep(k), rep(v), mask)[0]


SPELLINGS: dict[Spelling, tuple[str, float | None]] = {
    llama: ("eager", SCALE),
    no_mask: ("eager", SCALE),
    cast_up: ("eager", SCALE),
    scale_after_mask: ("eager", SCALE),
    scale_on_query: ("eager", SCALE),
    scale_on_both: ("eager", SCALE),
    filled: ("eager", SCALE),
    filled_in_place: ("eager", SCALE),
    floored: ("eager", SCALE),
    scale_on_projection: ("eager", SCALE),
    sdpa_scale_on_projection: ("sdpa", SCALE),
    where_and_added: ("eager", SCALE),
    interleaved: ("eager", SCALE),
    hidden_by_a_mask_like_the_logits: ("eager", SCALE),
    one_key_head: ("eager", SCALE),
    one_key_head_expanded: ("eager", SCALE),
    grouped_axis: ("eager", SCALE),
    batched: ("eager", SCALE),
    falcon_alibi: ("alibi", SCALE),
    mpt: ("alibi", SCALE),
    bloom: ("alibi", SCALE),
    gemma2: ("softcap", SCALE),
    narrowed_by_multiplying: ("softcap", SCALE),
    gpt_oss: ("sinks", SCALE),
    einsum_grouped: ("einsum", SCALE),
    einsum_by_head: ("einsum", SCALE),
    einsum_then_matmul: ("einsum", SCALE),
    sdpa_interleaved: ("sdpa", 0.15),
    sdpa_one_key_head: ("sdpa", None),
    flash_for_cpu: ("flash", 0.3),
    math_kernel: ("flash", None),
}


def rewritten(spelling: Spelling, args: tuple[Tensor, ...], is_dynamic: bool) -> tuple[Report, fx.GraphModule, Tensor]:
    """`spelling` compiled with its attention found and lowered again: what was found, the graph, and what it computes."""
    report, caught = Report(), []

    def rewrite(module: fx.GraphModule) -> None:
        find_attention(module, Plan(None), report)
        verify(module, Plan(None), report, after="find_attention")
        for site in report.sites:
            site.nodes["arguments"] = site.nodes["attention"].args
        lower(module, Plan(None), report)
        caught.append(module)

    if is_dynamic:
        for tensor, axis in ((args[0], 2), (args[1], 2), (args[2], 2), (args[3], 2), (args[3], 3), (args[4], 2)):
            capture.mark_dynamic(tensor, axis)
    with torch.no_grad():
        out = capture.compile_with(spelling, rewrite, "eager")(*args)
    verify(caught[0], Plan(None), report)
    return report, caught[0], out


@pytest.mark.sample(10)
@pytest.mark.parametrize(
    ("is_dynamic", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=["dynamic", "static bfloat16"]
)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_every_spelling_becomes_the_waist_on_the_models_own_tensors(spelling, is_dynamic, dtype):
    rule, scale = SPELLINGS[spelling]
    args = tensors(dtype)
    report, module, out = rewritten(spelling, args, is_dynamic)
    assert report.refusals == []
    assert [site.rule for site in report.sites] == [rule]
    low, exact = spelling(*args), spelling(*(arg.double() for arg in args))
    assert_within_rounding(out, low, exact)

    (site,) = report.sites
    assert (site.heads, site.kv_heads, site.head_dim) == (HQ, 1 if "one_key_head" in spelling.__name__ else HKV, D)
    found = site.nodes["arguments"][6]
    assert found == (pytest.approx(scale) if scale is not None else None)
    nodes = [site.nodes[name] for name in ("query", "key", "value")]
    query, key, value = computed(module, nodes, **dict(zip(["q", "k", "v", "mask", "bias", "sinks"], args, strict=True)))
    assert torch.equal(query, args[0])
    assert torch.equal(key, args[1][:, : site.kv_heads])
    assert torch.equal(value, args[2][:, : site.kv_heads])


def test_keys_grown_as_the_model_stores_them_are_found_below_one_permutation():
    def decode(q, k, v, past_key, past_value):
        k, v = torch.cat([past_key, k], 1), torch.cat([past_value, v], 1)
        weights = torch.softmax(torch.einsum("bqkgd,bskd->bkgqs", q, k) * SCALE, -1)
        return torch.einsum("bkgqs,bskd->bqkgd", weights, v), k, v

    new, past = (torch.randn(B, length, HKV, D) for length in (1, T))
    module = make_fx(decode, pre_dispatch=True, tracing_mode="fake")(
        torch.randn(B, 1, HKV, G, D), new, new.clone(), past, past.clone()
    )
    (site,) = found(module).sites
    assert (site.heads, site.kv_heads) == (HQ, HKV)
    for name in ("key", "value"):
        assert is_call(site.nodes[name], aten.permute.default)
        assert is_call(site.nodes[name].args[0], aten.cat.default)


def test_nothing_of_the_spelling_is_left_behind():
    _, module, _ = rewritten(filled_in_place, tensors(torch.float32), True)
    left = {str(node.target) for node in module.graph.nodes}
    assert not left & {"aten.mul_.Tensor", "aten.masked_fill_.Scalar", "aten.matmul.default", "aten.softmax.int"}


def test_two_layers_under_one_mask_share_what_is_made_of_it():
    def layers(q, k, v, mask, bias, sinks):
        once = (q @ rep(k).mT * SCALE).masked_fill(hidden(mask), -1e9).softmax(-1) @ rep(v)
        masks = hidden(mask)
        for _ in range(2):
            once = (once @ rep(k).mT * SCALE).masked_fill(masks, -1e9).softmax(-1) @ rep(v)
        return once

    module = make_fx(layers, pre_dispatch=True, tracing_mode="symbolic")(*tensors(torch.float32))
    report = found(module)
    assert [site.nodes["attention"].args[3] for site in report.sites[1:]] == [report.sites[1].nodes["attention"].args[3]] * 2


# -- near-misses -------------------------------------------------------------------------------------------------------------------


def found(module: fx.GraphModule) -> Report:
    report = Report()
    find_attention(module, Plan(None), report)
    return report


def eager(q, k, v, before=lambda logits: logits, after=lambda weights: weights, dim=-1):
    return after(torch.softmax(before(q @ rep(k).mT), dim)) @ rep(v)


def both(q, k, v):
    weights = torch.softmax(q @ rep(k).mT, -1)
    return weights @ rep(v), weights


def joined(q, k, v, sinks, cut=slice(None, -1), dim=-1):
    return torch.softmax(torch.cat([q @ rep(k).mT, sinks], dim), -1)[..., cut] @ rep(v)


def capped(q, k, v, by=30.0, cap=30.0, before=lambda logits: logits, after=lambda logits: logits):
    return torch.softmax(after(torch.tanh(before(q @ rep(k).mT) / by) * cap), -1) @ rep(v)


def square(q, k, v, then):
    """With as many queries as keys."""
    return then(q[:, :, :4], k[:, :, :4], v[:, :, :4])


def einsums(q, k, v, first, second="bhqk,bhkd->bhqd"):
    return torch.einsum(second, torch.einsum(first, q, k).softmax(-1), v)


NEAR_MISSES: dict[str, tuple[str, Callable[..., object], str]] = {
    "scores over queries": (
        "eager", lambda q, k, v: square(q, k, v, functools.partial(eager, dim=2)),
        "softmax over axis 2 of [2, 6, 4, 4], expected the axis of keys",
    ),
    "probabilities are read": ("eager", both, "`softmax` inside attention is also read by `output`"),
    "a scale per head": (
        "eager", lambda q, k, v: eager(q, k, v, lambda logits: logits * (q.sum((0, 2, 3))[:, None, None])),
        "the scale `unsqueeze_2` of shape [6, 1, 1] is not a number known when the graph is made",
    ),
    "a fill that hides nothing": (
        "eager", lambda q, k, v: eager(q, k, v, lambda logits: logits.masked_fill(logits.new_ones(5, 7).bool(), -5.0)),
        "`masked_fill` fills hidden logits with -5.0, expected a number of at most -10000",
    ),
    "dropout": (
        "eager", lambda q, k, v: eager(q, k, v, after=lambda weights: F.dropout(weights, 0.25)), "dropout 0.25 inside attention",
    ),
    "no head axis": (
        "eager", lambda q, k, v: torch.softmax(q[:, 0] @ k[:, 0].mT, -1) @ v[:, 0], "query has 3 axes, expected [B, H, S, D]",
    ),
    "one batch of keys": ("eager", lambda q, k, v: eager(q, k[:1], v[:1]), "batches of 2, 1 and 1"),
    "values of another type": (
        "eager", lambda q, k, v: torch.softmax((q @ rep(k).mT).bfloat16(), -1) @ rep(v).bfloat16(),
        "query, key and value of types float32, float32, bfloat16, expected one type",
    ),
    "two numbers for one cap": (
        "softcap", functools.partial(capped, cap=50.0), "tanh of logits / 30 is multiplied by 50, expected one number",
    ),
    "a mask below the cap": (
        "softcap", functools.partial(capped, before=lambda logits: logits + logits.new_zeros(5, 7)),
        "`add` puts a mask or a bias on logits that are capped afterwards",
    ),
    "a scale above the cap": (
        "softcap", functools.partial(capped, after=lambda logits: logits * 0.5), "`mul_1` scales logits that were capped before",
    ),
    "two sinks": (
        "sinks", lambda q, k, v: joined(q, k, v, q[..., :2], slice(None, -2)), "`slice_1` is not one more column of the logits",
    ),
    "a sink per query": (
        "sinks", lambda q, k, v: joined(q, k, v, q[..., :1]), "sinks `slice_1` of shape [2, 6, 5, 1], expected one per query head",
    ),
    "the first column is cut off": (
        "sinks", lambda q, k, v: joined(q, k, v, q[:1, :, :1, :1].expand(2, 6, 5, 1), slice(1, None)),
        "`slice_4` cuts off something else than the column of the sinks",
    ),
    "a bias per head under dropout": (
        "alibi", lambda q, k, v: eager(q, k, v, lambda x: x + q.new_ones(6, 1, 7), lambda weights: F.dropout(weights, 0.1)),
        "dropout 0.1 inside attention",
    ),
    "a bias per head and a scale that is an input": (
        "alibi", lambda q, k, v: eager(q, k, v, lambda x: (x + q.new_ones(6, 1, 7)) * q.sum()),
        "the scale `sum_1` of shape [] is not a number known when the graph is made",
    ),
    "batch and heads in another order": (
        "einsum", lambda q, k, v: einsums(q, rep(k).transpose(0, 1), rep(v), "bhqd,hbkd->bhqk"),
        "einsum `bhqd,hbkd->bhqk` does not tell which of `b` and `h` is the batch",
    ),
    "queries and group in an odd order": (
        "einsum", lambda q, k, v: einsums(q.unflatten(1, (HKV, G)), k, v, "bkgqd,bksd->bqkgs", "bqkgs,bksd->bqkgd"),
        "einsum `bkgqd,bksd->bqkgs` does not tell which of `q` and `g` counts queries",
    ),
    "values summed over queries too": (
        "einsum", lambda q, k, v: einsums(q, rep(k), rep(v), "bhqd,bhkd->bhqk", "bhqk,bhkd->bhd"),
        "einsum `bhqk,bhkd->bhd` does not sum values over the axis of keys alone",
    ),
    "the log-sum-exp is read": (
        "flash", lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, rep(k), rep(v)),
        "`getitem_1` reads more than the output of aten._scaled_dot_product_flash_attention_for_cpu.default",
    ),
    "flash with dropout": (
        "flash", lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, rep(k), rep(v), None, 0.5)[0],
        "dropout 0.5 inside attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_near_miss_is_left_alone_with_its_exact_reason(case):
    rule, function, reason = NEAR_MISSES[case]
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*tensors(torch.float32)[:3])
    module.graph.eliminate_dead_code()
    before = readable(module)
    report = found(module)
    assert [(refusal.rule, refusal.reason) for refusal in report.refusals] == [(rule, reason)]
    assert report.sites == []
    assert readable(module) == before


def router(x, gate, experts):
    weights = torch.softmax(F.linear(x, gate), -1)
    return torch.einsum("bse,esd->bsd", weights, experts), torch.softmax(x @ gate.T, -1) @ experts[:, 0]


def test_the_softmax_of_a_router_is_no_attention_and_no_near_miss():
    module = make_fx(router, pre_dispatch=True)(torch.randn(2, 5, 8), torch.nn.Parameter(torch.randn(3, 8)), torch.randn(3, 5, 8))
    for node in module.graph.find_nodes(op="placeholder")[1:]:
        node.meta["is_parameter"] = True
    before = readable(module)
    report = found(module)
    assert (report.sites, report.refusals) == ([], [])
    assert readable(module) == before


def test_an_attention_that_no_rule_describes_is_reported_with_the_nearest():
    def clamped(q, k, v):
        return torch.softmax((q @ rep(k).mT * SCALE).clamp(-50, 50), -1) @ rep(v)

    module = make_fx(clamped, pre_dispatch=True)(*tensors(torch.float32)[:3])
    (refusal,) = found(module).refusals
    assert refusal.nearest == "rule eager fitted 2 ops, then `clamp` (aten.clamp.default) instead of aten.matmul or aten.bmm"
    assert str(refusal) == f"matmul_1 (eager): multiplies values by probabilities, but no rule fits; nearest: {refusal.nearest}"


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_kernels_of_other_devices_are_found_by_their_schema(kernel):
    """On fake tensors: nothing of them can run here."""
    op = getattr(aten, f"_scaled_dot_product_{kernel}_attention").default
    graph = fx.Graph()
    with FakeTensorMode():
        fakes = [torch.empty(B, HQ, S, D, device="cuda", dtype=torch.float16) for _ in range(3)]
    inputs = [graph.placeholder(name) for name in ("query", "key", "value")]
    for node, fake in zip(inputs, fakes, strict=True):
        node.meta["val"] = fake
    bias = () if kernel == "flash" else (None, False)
    results = graph.call_function(op, (*inputs, *bias, 0.0, True), {"scale": 0.5})
    out = graph.call_function(operator.getitem, (results, 0))
    out.meta["val"] = fakes[0]
    results.meta["val"] = (fakes[0],)
    graph.output(out)
    module = fx.GraphModule({}, graph)
    (site,) = found(module).sites
    assert site.rule == "flash"
    assert site.nodes["attention"].args == (*inputs, None, 0.0, True, 0.5, None, None)
    assert is_call(graph.output_node().args[0], torch.ops.kvfx.attention.default)
    assert val(site.nodes["attention"]).shape == (B, HQ, S, D)


def test_sdpa_decomposed_to_math_is_one_site_only():
    """What `scaled_dot_product_attention` itself is made of is never looked into."""
    with sdpa_kernel(SDPBackend.MATH):
        attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        module = make_fx(attend, pre_dispatch=True, tracing_mode="fake")(*(torch.randn(B, HQ, S, D) for _ in range(3)))
    assert [site.rule for site in found(module).sites] == ["sdpa"]


@pytest.mark.parametrize("rule", ATTENTION_RULES, ids=lambda rule: rule.name)
def test_a_rule_says_where_its_pattern_stands(rule):
    module, line = rule.source.split(":")
    assert inspect.getsource(sys.modules[module]).splitlines()[int(line) - 1].startswith("PATTERN = ")
