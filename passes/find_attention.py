"""Find every attention, whatever its spelling, and rewrite it to the waist op `kvfx::attention`."""

from __future__ import annotations

from collections import Counter

from torch import fx

from kvfx.passes.attention import ATTENTION_RULES
from kvfx.passes.attention.logits import resembles_attention
from kvfx.passes.match import first, nearest
from kvfx.passes.plan import Plan
from kvfx.passes.report import Refusal, Refuse, Report, Site

# What a reader wants to know about a graph in which no attention was found.
TELLING = ("softmax", "matmul", "bmm", "einsum", "scan", "conv1d", "attention")


def find_attention(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Apply the attention rules to every node they may start at; number the sites in graph order."""
    graph = module.graph
    for node in list(graph.nodes):
        found = _apply_rules(graph, node) if node.op == "call_function" else None
        if isinstance(found, Site):
            found.index = len(report.sites)
            report.sites.append(found)
        elif found is not None:
            report.refusals.append(found)
    graph.eliminate_dead_code()
    if not report.sites:
        counts = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
        report.leftovers = {op: n for op, n in counts.items() if any(word in op for word in TELLING)}


def _apply_rules(graph: fx.Graph, node: fx.Node) -> Site | Refusal | None:
    """What the first rule made of `node` that fits; or why it is refused, by the first rule whose pattern fits."""
    rules = [rule for rule in ATTENTION_RULES if node.target in rule.anchors]
    refusal: Refusal | None = None
    for rule in rules:
        match = first(rule.pattern, node)
        if match is None:
            continue
        try:
            rule.guard(match)
        except Refuse as refuse:
            refusal = refusal or Refusal(rule.name, refuse.reason, node.name, rule.source)
            continue
        return rule.rewrite(graph, match)
    if refusal is None and rules and resembles_attention(node):
        misses = [(nearest(rule.pattern, node), rule) for rule in rules]
        miss, rule = max(misses, key=lambda pair: pair[0].ops)
        reason = "multiplies values by probabilities, but no rule fits"
        refusal = Refusal(rule.name, reason, node.name, rule.source, f"rule {rule.name} {miss}")
    return refusal
