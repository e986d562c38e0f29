"""Put the plan's score beside each site that evicts, as kernel ops on the site's own tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvfx.kernels.leverage import draw_sketch
from kvfx.passes.attention.logits import is_head_bias
from kvfx.passes.graph import aten, call, constant, inputs, is_call, replace, schema_of, val
from kvfx.passes.plan import Combine, Expr, OpCall, Plan, Scalar, Sketch, Splice, ZScore
from kvfx.passes.report import Report, Site
from kvfx.passes.traced_op import Traces, call_op

ARITHMETIC = {"add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor}


def insert_scores(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Compute each evicting site's score [B, Hkv, S], fp32, right after its attention; of a splice, both scores."""
    for site in report.sites:
        if "write" not in site.nodes or site.refusal:
            continue
        with module.graph.inserting_after(site.nodes["attention"]):
            # Nodes are added in front of a placeholder node, so that they stand in the order in which they are made.
            end = module.graph.call_function(torch.ops.kvfx.attention.default)
        with module.graph.inserting_before(end):
            builder = _Builder(module, site, plan, report.traces)
            if (valid := builder.valid()) is not None:
                site.nodes["valid"] = valid
            match plan.score:
                case Splice(first, then):
                    site.nodes |= {"first": builder.together(first), "score": builder.together(then)}
                case score:
                    site.nodes["score"] = builder.together(score)
        module.graph.erase_node(end)
        together = {"chunk_mean": plan.chunk, "chunk_rank": plan.per, "splice": isinstance(plan.score, Splice)}
        ops = [op.op for op in plan.calls()] + [op for op, there in together.items() if there]
        site.score = " ".join(dict.fromkeys(ops))


class _Builder:
    def __init__(self, module: fx.GraphModule, site: Site, plan: Plan, traces: Traces) -> None:
        self.module, self.graph, self.site, self.plan, self.traces = module, module.graph, site, plan, traces
        self.attention = _of_attention(site.nodes["attention"])
        self.built: dict[Expr | None, Any] = {}

    def valid(self) -> fx.Node | None:
        """Which tokens are real, [B, S], or None if all are: padding shows as position -1."""
        write = self.site.nodes["write"]
        return call(self.graph, aten.ge.Scalar, write.args[2], 0) if write.args[3] is not None else None

    def build(self, expr: Expr | None) -> Any:
        """The node of an expression, or its number; equal expressions share one."""
        if expr not in self.built:
            self.built[expr] = self.make(expr)
        return self.built[expr]

    def make(self, expr: Expr | None) -> Any:
        match expr:
            case Scalar(value):
                return value
            case ZScore(of):
                scored = self.build(of)
                return self.op("zscore", scored, self.site.nodes.get("valid"), self.plan.sinks, self.plan.recent)
            case Combine(op, left, right):
                a, b = self.build(left), self.build(right)
                if not isinstance(a, fx.Node):
                    # ATen takes the tensor first: number - x is -x + number.
                    a, b = (self.build(Combine("mul", right, Scalar(-1.0))), a) if op == "sub" else (b, a)
                    op = "add" if op == "sub" else op
                return call(self.graph, ARITHMETIC[op], a, b)
            case OpCall():
                return self.call(expr)
        raise AssertionError(f"no such score expression: {expr!r}")

    def together(self, expr: Expr | None) -> fx.Node:
        """The score, made equal where the plan keeps or drops together: heads of a layer, tokens of a chunk, ranks of chunks."""
        score = self.build(expr)
        if self.plan.shared:
            mean = call(self.graph, aten.mean.dim, score, [1], True)
            score = call(self.graph, aten.expand.default, mean, [-1, self.site.kv_heads, -1])
        if self.plan.chunk:
            valid = self.site.nodes.get("valid")
            score = self.op("chunk_mean", score, valid, self.plan.chunk, self.plan.sinks, self.plan.recent)
        if self.plan.per:
            score = self.op("chunk_rank", score, self.site.nodes.get("valid"), self.plan.per, self.plan.sinks, self.plan.recent)
        return score

    def call(self, expr: OpCall) -> fx.Node:
        """Arguments by the op's schema: taps in order, then by name; a scale that is not given is the model's."""
        schema = schema_of(getattr(torch.ops.kvfx, expr.op).default)
        given: dict[str, Any] = {"scale": self.attention[6], "valid": self.site.nodes.get("valid"), "layer": self.site.layer}
        given |= dict(expr.options)
        if given["scale"] == self.attention[6] and any(argument.name == "scale" for argument in schema.arguments):
            self.site.unseen = self.unseen()
        if any(argument.name == "lse" for argument in schema.arguments) and given["scale"] == self.attention[6]:
            given["lse"] = self.log_sum_exp()  # which is of the model's own scale
        if expr.sketch is not None:
            given["sketch"] = self.sketch(expr.sketch)
        names = [argument.name for argument in schema.arguments]
        tensors = self.site.nodes | {"rotation": self.site.nodes.get(f"rotation_{expr.future}")}
        given |= dict(zip(names, (tensors[tap] for tap in expr.taps), strict=False))
        return self.op(expr.op, *(given.get(name) for name in names))

    def unseen(self) -> tuple[str, ...]:
        """What attention does to its logits besides scaling and masking them."""
        mask, softcap, sinks = self.site.nodes.get("mask", self.attention[3]), *self.attention[7:9]
        changes = {"soft cap": softcap is not None, "sinks": sinks is not None, "bias per head": is_head_bias(mask)}
        return tuple(name for name, there in changes.items() if there)

    def log_sum_exp(self) -> fx.Node | None:
        """That of the site's attention, [B, Hq, S] fp32; None where its kernel does not give one."""
        nodes = self.site.nodes
        if "lse" not in nodes and _gives_lse(nodes["attention"], nodes["key"]):
            query, key, value, _, _, _, scale, *_ = self.attention
            with self.graph.inserting_before(nodes["attention"]):
                both = self.op("attention_lse", query, key, value, scale)
                out, nodes["lse"] = (call(self.graph, operator.getitem, both, index) for index in range(2))
            replace(nodes["attention"], out)
            nodes["attention"] = out
        return nodes.get("lse")

    def sketch(self, sketch: Sketch) -> fx.Node:
        layer, key = self.site.layer, self.site.nodes["key"]
        heads, dim = self.site.kv_heads, self.site.head_dim
        assert layer is not None
        if self.plan.sketches is not None:
            tensor = self.plan.sketches[layer]
        else:
            tensor = draw_sketch(sketch.seed, layer, heads, dim, sketch.size)
        return constant(self.module, f"sketch_{layer}_{sketch.size}_{sketch.seed}", tensor, val(key))

    def op(self, name: str, *args: Any) -> fx.Node:
        return call_op(self.graph, self.traces, name, *args)


def _of_attention(node: fx.Node) -> list[Any]:
    """The arguments of `attention`, also where it reads blocks besides the new tokens."""
    given = inputs(node)
    return [*given[:4], 0.0, False, *given[-3:]] if is_call(node, torch.ops.kvfx.ragged_attention.default) else given


def _gives_lse(attention: fx.Node, new_key: fx.Node) -> bool:
    """Whether a CPU's flash attention computes it: causal by flag, over the new tokens alone."""
    query, key, value, mask, _, is_causal, _, softcap, sinks = _of_attention(attention)
    tensors = [val(node) for node in (query, key, value)]
    alike = len({tensor.shape[3] for tensor in tensors}) == 1 and all(tensor.stride(3) == 1 for tensor in tensors)
    plain = mask is None and softcap is None and sinks is None
    return key is new_key and plain and is_causal and alike and val(query).device.type == "cpu"
