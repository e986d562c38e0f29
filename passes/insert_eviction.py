"""Keep the best slots: protect, select, compact, and store the result in place of the whole."""

from __future__ import annotations

import operator

import torch
from torch import fx

from kvfx.passes.cache_write import SCORE, layer_of, writes_of
from kvfx.passes.graph import aten, call, inputs, replace_outputs, sort_topologically, val
from kvfx.passes.plan import Plan, Splice
from kvfx.passes.report import Report, Site, Unscored
from kvfx.passes.traced_op import Traces, call_op


def insert_eviction(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Replace every `cache_write`: by the kept slots where the site has a score, else by everything. And `cache_score` by scores.

    Raises:
        Unscored: a `cache_score` stands where a site has none.
    """
    graph, traces = module.graph, report.traces
    scored = {site.nodes["write"]: site for site in report.sites if "score" in site.nodes}
    writes = writes_of(graph)
    unscored = [layer_of(write) for write in writes if write.target is SCORE and write not in scored]
    if unscored:
        reasons = {site.layer: site.refusal for site in report.sites}
        raise Unscored({layer: reasons.get(layer) or "no attention found in this graph reads it" for layer in unscored})
    for write in writes:
        if write not in scored:
            replace_outputs(write, _keep_all(graph, write))
            continue
        site = scored[write]
        with graph.inserting_before(_behind(site.nodes["score"])):
            scores, finite = _protect(graph, traces, site, "score", plan)
            first = scores
            if isinstance(plan.score, Splice):
                first, first_finite = _protect(graph, traces, site, "first", plan)
                finite = call(graph, aten.logical_and.default, finite, first_finite)
            if write.target is SCORE:
                replace_outputs(write, [first, scores, finite])
                continue
            key, value, positions, counts, size, _ = inputs(write)
            count = call(graph, operator.sub, call(graph, aten.sym_size.int, size, 0), 1)
            if isinstance(plan.score, Splice):
                scores = call_op(graph, traces, "splice", first, scores, count, counts, *plan.score.share.as_integer_ratio())
            slots = call_op(graph, traces, "select", scores, count, counts)
            compact = call_op(graph, traces, "compact", key, value, positions, slots, counts is not None)
            kept = [call(graph, operator.getitem, compact, i) for i in range(3)]
        site.nodes["kept"] = kept[0]
        replace_outputs(write, [*kept, finite])
    sort_topologically(graph)


def _protect(graph: fx.Graph, traces: Traces, site: Site, score: str, plan: Plan) -> list[fx.Node]:
    """A score of the site in which padding loses and, unless the choice comes later, protected tokens win; was it finite."""
    ends = (0, 0) if plan.later else (plan.sinks, plan.recent)
    protected = call_op(graph, traces, "protect", site.nodes[score], site.nodes.get("valid"), *ends)
    return [call(graph, operator.getitem, protected, i) for i in range(2)]


def _behind(node: fx.Node) -> fx.Node:
    return node.next


def _keep_all(graph: fx.Graph, write: fx.Node) -> list[fx.Node]:
    key, value, positions = inputs(write)[:3]
    with graph.inserting_before(write):
        batch, heads, length = val(key).shape[0], val(key).shape[1], val(key).shape[2]
        per_head = call(graph, aten.unsqueeze.default, positions, 1)
        sizes = [
            size if isinstance(size, int) else call(graph, aten.sym_size.int, key, axis)
            for axis, size in enumerate((batch, heads, length))
        ]
        finite = call(graph, aten.ones.default, [], dtype=torch.bool, device=val(key).device)
        return [key, value, call(graph, aten.expand.default, per_head, sizes), finite]
