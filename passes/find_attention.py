"""Find every attention, whatever its spelling, and rewrite it to the waist op `kvfx::attention`."""

from __future__ import annotations

from collections import Counter

from torch import fx

from kvfx.passes.attention import ATTENTION_RULES
from kvfx.passes.match import first
from kvfx.passes.plan import Plan
from kvfx.passes.report import Refusal, Refuse, Report

# What a reader wants to know about a graph in which no attention was found.
TELLING = ("softmax", "matmul", "bmm", "einsum", "scan", "conv1d", "attention")


def find_attention(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Apply the attention rules to every node they may start at; number the sites in graph order."""
    graph = module.graph
    for node in list(graph.nodes):
        for rule in ATTENTION_RULES:
            if node.op != "call_function" or node.target not in rule.anchors:
                continue
            match = first(rule.pattern, node)
            if match is None:
                continue
            try:
                rule.guard(match)
            except Refuse as refuse:
                report.refusals.append(Refusal(rule.name, refuse.reason, node.name, rule.source))
                continue
            site = rule.rewrite(graph, match)
            site.index = len(report.sites)
            report.sites.append(site)
            break
    graph.eliminate_dead_code()
    if not report.sites:
        counts = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
        report.leftovers = {op: n for op, n in counts.items() if any(word in op for word in TELLING)}
