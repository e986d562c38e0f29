"""Attention spelled `scaled_dot_product_attention`.

Accepts   keys and values with one head per KV head (`enable_gqa`), or repeated to the query heads by unsqueeze, expand, reshape;
          causal by flag or by mask; any mask that broadcasts to [B, Hq, S, T]; any scale.
Refuses   operands without batch and head axes, dropout, heads that do not divide, batches that do not agree, keys and values
          repeated differently.
"""

from __future__ import annotations

import torch
from torch import fx

from kvfx.passes.graph import arguments, aten, call, is_call, is_whole_slice, replace, val
from kvfx.passes.match import Const, Match, OneOf, Op, Through, Var
from kvfx.passes.report import Refuse, Site
from kvfx.passes.rule import Rule

SDPA = aten.scaled_dot_product_attention.default
RESHAPE = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def _is_copy(node: fx.Node) -> bool:
    return is_call(node, aten.clone.default, aten.contiguous.default)


def _per_kv_head(name: str) -> OneOf:
    """`name` as [B, Hkv, T, D], below the repetition to query heads if there is one."""
    unsqueezed = Op(aten.unsqueeze.default, Through(is_whole_slice, Var(name)), Const("axis", 2))
    expanded = Op(aten.expand.default, Through(is_whole_slice, unsqueezed))
    return OneOf(**{f"{name}_repeated": Op(RESHAPE, Through(_is_copy, expanded)), f"{name}_plain": Var(name)})


PATTERN = Op(SDPA, Var("query"), _per_kv_head("key"), _per_kv_head("value"), name="attention")


def guard(match: Match) -> None:
    """Axes, head counts and options are those of a decoder's self-attention at inference."""
    node = match["attention"]
    options = arguments(node)
    query, key, value = (val(match[name]) for name in ("query", "key", "value"))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise Refuse(f"{name} has {tensor.dim()} axes, expected [B, H, S, D]", node)
    if ("key_repeated" in match.tags) != ("value_repeated" in match.tags):
        raise Refuse("keys and values repeated differently", node)
    if options["dropout_p"] != 0.0:
        raise Refuse(f"dropout {options['dropout_p']} inside attention", node)
    if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise Refuse(f"{query.shape[1]} query heads on {key.shape[1]} key and {value.shape[1]} value heads", node)
    if query.shape[0] != key.shape[0] or query.shape[0] != value.shape[0]:
        raise Refuse(f"batches of {query.shape[0]}, {key.shape[0]} and {value.shape[0]}", node)


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op in place of the call, on keys and values that are not repeated."""
    node = match["attention"]
    options = arguments(node)
    query, key, value = match["query"], match["key"], match["value"]
    with graph.inserting_before(node):
        new = call(
            graph,
            torch.ops.kvfx.attention.default,
            *(query, key, value, options["attn_mask"], 0.0, options["is_causal"], options["scale"]),
        )
    replace(node, new)
    return Site(
        rule=RULE.name,
        index=-1,
        heads=val(query).shape[1],
        kv_heads=val(key).shape[1],
        head_dim=val(query).shape[3],
        spelling="repeated keys" if "key_repeated" in match.tags else "grouped keys",
        nodes={"attention": new, "query": query, "key": key, "value": value},
    )


RULE = Rule("sdpa", (SDPA,), PATTERN, guard, rewrite)
