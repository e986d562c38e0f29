"""Attention spelled `scaled_dot_product_attention`.

Accepts   keys and values with one head per KV head (`enable_gqa`), or repeated to the query heads in any way; causal by flag or by
          mask; any mask that broadcasts to [B, Hq, S, T]; any scale, also on queries or keys.
Refuses   operands without batch and head axes, dropout, heads that do not divide, batches that do not agree.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvfx.passes.attention.operand import Place, brought_place, check, key_and_value, places, query_of
from kvfx.passes.attention.waist import site_at
from kvfx.passes.graph import arguments, aten, replace, val
from kvfx.passes.match import Match, Op, Var
from kvfx.passes.report import Refuse, Site
from kvfx.passes.rule import Rule

SDPA = aten.scaled_dot_product_attention.default
PATTERN = Op(SDPA, Var("query"), Var("key"), Var("value"), name="attention")


def guard(match: Match) -> None:
    """Axes, head counts and options are those of a decoder's self-attention at inference."""
    operands(match)


def operands(match: Match) -> tuple[Place, Place, Place]:
    """Query, key and value, below scales and what repeats heads.

    Raises:
        Refuse: they are not those of a decoder's self-attention at inference.
    """
    node = match["attention"]
    for name in ("query", "key", "value"):
        if val(match[name]).dim() != 4:
            raise Refuse(f"{name} has {val(match[name]).dim()} axes, expected [B, H, S, D]", node)
    if (dropout := arguments(node)["dropout_p"]) != 0.0:
        raise Refuse(f"dropout {dropout} inside attention", node)
    query = query_of(places(match["query"], "bHsd"))
    key, value = key_and_value(places(match["key"], "bHtd"), places(match["value"], "bHtd"), val(query.node).dtype)
    check(query, key, value, val(match["query"]).shape[1], node)
    return query, key, value


def waist_site(graph: fx.Graph, match: Match, mask: Any, rule: str) -> Site:
    """The waist op in front of the match, on keys and values that are not repeated."""
    node = match["attention"]
    options = arguments(node)
    query, key, value = operands(match)
    scale, factor = options["scale"], query.factor * key.factor
    if factor != 1.0:
        scale = factor * (val(match["query"]).shape[3] ** -0.5 if scale is None else scale)
    repeated = str(key.heads) != str(val(match["key"]).shape[1])
    with graph.inserting_before(node):
        tensors = [brought_place(graph, place, val(match["query"]).shape[1]) for place in (query, key, value)]
        arguments_ = (*tensors, mask, 0.0, options["is_causal"], scale, None, None)
        return site_at(graph, arguments_, rule, "repeated keys" if repeated else "grouped keys")


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op in place of the call."""
    node = match["attention"]
    site = waist_site(graph, match, arguments(node)["attn_mask"], RULE.name)
    replace(node, site.nodes["attention"])
    return site


RULE = Rule("sdpa", (SDPA,), PATTERN, guard, rewrite)
