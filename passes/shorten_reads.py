"""Let attention read what was written to a preallocated cache, where the model reads all of its places.

The mask hides the places that nothing was written to. That it does is checked when the graph runs, as is that an argument which says
where to write goes on behind the tokens seen: no graph can know it beforehand.
"""

from __future__ import annotations

import sys

import torch
from torch import fx

from kvfx.passes.axes import Order, ordered, peel
from kvfx.passes.graph import aten, call, inputs, is_call, replace, val
from kvfx.passes.plan import Plan
from kvfx.passes.report import Refuse, Report, Site
from kvfx.passes.store_spellings import below, same, taken_apart, writes
from kvfx.passes.stores import FILLED, length_of
from kvfx.passes.windows import WINDOW, Window

HIDDEN = -1e4  # what an additive mask at least takes from the logits of a place that it hides; used by decoders in float16
PLACES = (
    "kvfx: an argument says at which places of its cache the decoder writes, and they are not the next ones behind the tokens seen. "
    "Expected start, start + 1, ..., where start is the number of tokens seen"
)
UNWRITTEN = (
    "kvfx: the mask lets a query see places of the cache that nothing was written to yet. Expected False, or a large negative number, "
    "behind the last token"
)


def shorten_reads(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Give attention what the filled places of a cache hold, and its mask's columns of them; refuse where nothing hides the others."""
    graph = module.graph
    checks: dict[tuple[fx.Node, str], fx.Node] = {}
    windows = {node.meta[WINDOW].source: node.meta[WINDOW] for node in graph.nodes if WINDOW in node.meta}
    for site in report.sites:
        try:
            _shorten(graph, site, checks, windows)
        except Refuse as refuse:
            site.refusal = refuse.reason
    for mark in graph.find_nodes(op="call_function", target=FILLED):
        replace(mark, inputs(mark)[0])


def _shorten(graph: fx.Graph, site: Site, checks: dict[tuple[fx.Node, str], fx.Node], windows: dict[fx.Node, Window]) -> None:
    attention = site.nodes["attention"]
    query, key, value, mask, dropout, is_causal, *rest = inputs(attention)
    _note_window(site, key, value, windows)
    if site.window is not None:
        return
    found = [_filled(node) for node in (key, value)]
    if found[0] is None or found[1] is None:
        for node in (key, value):
            reason = below(peel(node)[0]).meta.get("unknown")
            if reason:
                raise Refuse(reason, node)
        if found != [None, None]:
            raise Refuse(f"of `{key.name}` and `{value.name}` only one is a cache whose places are known to be filled", key)
        for node in (key, value):
            if "spelling" in peel(node)[0].meta:
                site.cache = peel(node)[0].meta["spelling"]
        return
    (mark, order, whole), (value_mark, value_order, value_whole) = found
    for node, axes in ((mark, order), (value_mark, value_order)):
        if axes.index(inputs(node)[2]) != 2:
            if same(val(inputs(node)[1]).shape[inputs(node)[2]], val(node).shape[inputs(node)[2]]):
                return  # filled up, so that nothing is to be left out
            raise Refuse(
                f"`{inputs(node)[0].name}` is filled along axis {inputs(node)[2]}, which is not attention's axis of keys", node
            )
    places, length = val(mark).shape[inputs(mark)[2]], val(inputs(mark)[1]).shape[inputs(mark)[2]]
    if whole != value_whole or not same(length, val(inputs(value_mark)[1]).shape[inputs(value_mark)[2]]):
        raise Refuse(f"`{key.name}` and `{value.name}` are filled to different places", key)
    conditions = [*inputs(mark)[3], *inputs(value_mark)[3]]
    with graph.inserting_before(attention):
        if whole and not (is_causal and same(length, val(query).shape[2])):
            if is_causal or mask is None or not same(val(mask).shape[-1], places):
                raise Refuse(f"no mask hides the places of `{inputs(mark)[0].name}` that nothing was written to", key)
            size = length_of(inputs(mark)[1], inputs(mark)[2])
            key_of_check = mask, str(length)
            if key_of_check not in checks:
                behind = call(graph, aten.slice.Tensor, mask, val(mask).dim() - 1, size, sys.maxsize)
                is_hidden = aten.logical_not.default if val(mask).dtype == torch.bool else aten.lt.Scalar
                hidden = call(graph, is_hidden, behind, *(() if val(mask).dtype == torch.bool else (HIDDEN,)))
                _insist(graph, call(graph, aten.all.default, hidden), UNWRITTEN)
                checks[key_of_check] = call(graph, aten.slice.Tensor, mask, val(mask).dim() - 1, 0, size)
            mask = checks[key_of_check]
        for condition in conditions:
            if (condition, "") not in checks:
                _insist(graph, condition, PLACES)
                checks[condition, ""] = condition
        key, value = ordered(inputs(mark)[1], order), ordered(inputs(value_mark)[1], value_order)
    attention.args = (query, key, value, mask, dropout, is_causal, *rest)
    site.cache = inputs(mark)[1].meta["spelling"]


def _filled(node: fx.Node) -> tuple[fx.Node, Order, bool] | None:
    """The mark on a cache whose filled places `node` reads, how it orders its axes, and whether it reads all places."""
    node, order = peel(node)
    if is_call(node, FILLED):
        return node, order, True
    tensor, parts = taken_apart(node)
    if not is_call(tensor, FILLED) or len(parts) != 1 or parts[0] is None:
        return None
    _, content, axis, _ = inputs(tensor)
    if parts[0].axis != axis or not same(parts[0].start, 0) or not same(parts[0].end, val(content).shape[axis]):
        return None
    return tensor, order, False


def _note_window(site: Site, key: fx.Node, value: fx.Node, windows: dict[fx.Node, Window]) -> None:
    """Say so where attention reads a sliding window that the decoder keeps itself, or all new tokens of which it keeps the last."""
    found = [_window(site, below(peel(node)[0]), windows) for node in (key, value)]
    if found[0] is not None and found[1] is not None and found[0][1:3] == found[1][1:3] and isinstance(found[0].places, int):
        site.window, site.cache = found[0].places, found[0].spelling


def _window(site: Site, tensor: fx.Node, windows: dict[fx.Node, Window]) -> Window | None:
    last = site.nodes["attention"]
    held: Window | None = tensor.meta.get(WINDOW)
    if held is not None and any(writes(user) and user > last for user in tensor.users):
        return None
    return held or windows.get(tensor)


def _insist(graph: fx.Graph, condition: fx.Node, message: str) -> None:
    """Let the graph raise where a condition is false; on a GPU without waiting for it."""
    call(graph, aten._assert_async.msg, condition, message)
