"""Put `kvfx::attention` in place of a matched attention that was read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvfx.passes.attention.axes import NEW, mask_on, returned
from kvfx.passes.attention.operand import brought_place
from kvfx.passes.attention.reading import Bias, Reading
from kvfx.passes.graph import aten, call, is_call, val
from kvfx.passes.match import Match
from kvfx.passes.report import Site


def put_waist(graph: fx.Graph, match: Match, read: Reading, rule: str, spelling: str, sinks: fx.Node | None = None) -> Site:
    """Replace the match, and erase what only it used.

    Args:
        graph: the graph.
        match: what is replaced; its last node is named `attention`.
        read: its meaning.
        rule: name of the rule that found it.
        spelling: what reports say of it.
        sinks: [Hq], more logits.
    """
    node = match["attention"]
    with graph.inserting_before(node):
        query, key, value = (brought_place(graph, place, read.heads) for place in (read.query, read.key, read.value))
        heads, kv_heads = val(query).shape[1], val(key).shape[1]
        mask = _mask(graph, read, heads, kv_heads, val(query).dtype)
        site = site_at(graph, (query, key, value, mask, 0.0, False, read.scale, read.softcap, sinks), rule, spelling)
        new = site.nodes["attention"]
        result = returned(graph, new, read.out, kv_heads)
        if any(is_call(user, aten.view.default) for user in node.users):
            result = call(graph, aten.contiguous.default, result)  # as the product was that they view
    node.replace_all_uses_with(result)
    for covered in (node, *sorted(match.nodes, reverse=True)):
        for user in list(covered.users):
            if is_call(user, *NEW) and val(match["query"]).dtype == val(covered).dtype:
                user.replace_input_with(covered, match["query"])
        # In-place ops and dropout are no dead code to FX.
        if not covered._erased and not covered.users:
            graph.erase_node(covered)
    return site


def site_at(graph: fx.Graph, arguments: tuple[Any, ...], rule: str, spelling: str) -> Site:
    """The waist op on `arguments`, and its site."""
    query, key, value = arguments[:3]
    new = call(graph, torch.ops.kvfx.attention.default, *arguments)
    return Site(
        rule=rule,
        index=-1,
        heads=val(query).shape[1],
        kv_heads=val(key).shape[1],
        head_dim=val(query).shape[3],
        spelling=spelling,
        nodes={"attention": new, "query": query, "key": key, "value": value},
    )


def _mask(graph: fx.Graph, read: Reading, heads: Any, kv_heads: Any, dtype: torch.dtype) -> fx.Node | None:
    """All biases as one additive mask, in the order in which the model applies them."""
    mask: fx.Node | None = None
    for bias in read.biases:
        node = None if bias.node is None else mask_on(graph, bias.node, bias.axes, heads, kv_heads)
        mask = _combined(graph, mask, bias, node)
    if mask is None or val(mask).dtype in (dtype, torch.float32):
        return mask
    return once(graph, aten.to.dtype, mask, dtype)


def _combined(graph: fx.Graph, mask: fx.Node | None, bias: Bias, node: fx.Node | None) -> fx.Node | None:
    if node is None:
        return None if mask is None else once(graph, aten.mul.Tensor, mask, bias.by)
    if bias.kind in ("add", "subtract"):
        if bias.kind == "subtract":
            return once(graph, aten.neg.default, node) if mask is None else once(graph, aten.sub.Tensor, mask, node)
        return node if mask is None else once(graph, aten.add.Tensor, mask, node)
    if mask is None:
        values = (bias.by, 0.0) if bias.kind == "fill" else (0.0, bias.by)
        filled = once(graph, aten.where.Scalar, node, *values)
        dtype = val(bias.at).dtype
        return filled if val(filled).dtype == dtype else once(graph, aten.to.dtype, filled, dtype)
    if bias.kind == "fill":
        return once(graph, aten.where.ScalarSelf, node, bias.by, mask)
    return once(graph, aten.where.ScalarOther, node, mask, bias.by)


def once(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """`target(*args)`, taken from another layer that made the same."""
    first = next(arg for arg in args if isinstance(arg, fx.Node))
    for user in first.users:
        if user.target is target and user.args == args and not user.kwargs and "waist" in user.meta:
            return user
    node = call(graph, target, *args)
    node.meta["waist"] = True
    return node
