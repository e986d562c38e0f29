"""Tell which of a decoder's returned tensors are keys and values of which attention, and mark their storing as caches mark it.

A decoder written by hand keeps its past as it likes: in any tree, with its axes in any order, under any name. What makes a returned
tensor a layer's keys is that attention reads the same numbers; that is what is looked for here.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from kvfx.passes.axes import Order, ordered, peel
from kvfx.passes.cache_leaf import MARK, Role, shape_of
from kvfx.passes.cache_read import READ
from kvfx.passes.cache_write import WRITE
from kvfx.passes.graph import aten, call, inputs, is_call, replace_outputs, val
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report, Site
from kvfx.passes.stores import drop_unread
from kvfx.passes.windows import WINDOW

Mark = tuple[fx.Node, Order]  # and the order in which it sees the axes of what it marks


def attach_leaves(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Replace every `cache_leaf`: by a `cache_write` or the grown slots where the tensor is keys or values of a site."""
    graph = module.graph
    marks: dict[fx.Node, list[Mark]] = {}
    for mark in graph.find_nodes(op="call_function", target=MARK):
        tensor, order = peel(inputs(mark)[0])
        marks.setdefault(tensor, []).append((mark, order))
    if not marks:
        return
    layer, has_past = 0, bool(graph.find_nodes(op="call_function", target=READ))
    for site in report.sites:
        if site.refusal or site.window is not None:
            continue
        keys, values = (peel(node)[0] for node in inputs(site.nodes["attention"])[1:3])
        # Of sites that read the same keys, the first makes the choice; keys that are the values too are none of these forms.
        if keys not in marks or values not in marks or keys is values or has_past != (_past(keys) is not None):
            continue
        held, new = val(inputs(site.nodes["attention"])[1]).shape[2], val(inputs(marks[keys][0][0])[1]).shape[1]
        if not has_past and str(held) != str(new):
            site.refusal = f"the keys `{keys.name}` are of {held} tokens, where {new} new ones were given"
            continue
        _attach(graph, site, marks.pop(keys), marks.pop(values), layer)
        layer += 1
    for mark, _ in (mark for rest in marks.values() for mark in rest):
        with graph.inserting_before(mark):
            nothing = call(graph, aten.empty.memory_format, [0], device=val(inputs(mark)[0]).device)
            replace_outputs(mark, [nothing] * 3 + [_role(graph, Role("window" if WINDOW in mark.meta else "other"))])
    graph.eliminate_dead_code()
    drop_unread(graph)


def _attach(graph: fx.Graph, site: Site, key_marks: list[Mark], value_marks: list[Mark], layer: int) -> None:
    """Replace the marks on the keys and values that a site reads."""
    key, value = inputs(site.nodes["attention"])[1:3]
    past = _past(key)
    last = max(mark for mark, _ in key_marks + value_marks)
    positions, sizes = inputs(last)[1:]
    with graph.inserting_before(last if past is None else site.nodes["attention"]):
        nothing = call(graph, aten.empty.memory_format, [0], device=val(key).device)
        if past is not None:
            layer = inputs(past)[6]
            kept, rest = [_grown(graph, past, node, output) for output, node in enumerate((key, value))], [nothing, nothing]
        elif sizes:
            write = call(graph, WRITE, key, value, positions, None, sizes[min(layer, len(sizes) - 1)], layer)
            outputs = [call(graph, operator.getitem, write, index) for index in range(4)]
            kept, rest = outputs[:2], outputs[2:]
        else:
            # A copy, because a view would keep all of what it is part of alive.
            kept = [call(graph, aten.clone.default, node, memory_format=torch.contiguous_format) for node in (key, value)]
            rest = [nothing, nothing]
    for kind, node, stored, marks in (("key", key, kept[0], key_marks), ("value", value, kept[1], value_marks)):
        order = peel(node)[1]
        for mark, leaf_order in marks:
            role = Role(kind, layer, mark.meta.get("capacity", 0), tuple(order.index(axis) for axis in leaf_order))
            leaf = mark.meta.get("leaf", inputs(mark)[0])
            with graph.inserting_before(mark):
                replace_outputs(mark, [stored, *rest, _role(graph, role)])
            graph.output_node().replace_input_with(leaf, stored)


def _past(key: fx.Node) -> fx.Node | None:
    """The `cache_read` whose keys stand in front of the new ones, if there are any."""
    cat, _ = peel(key)
    if not is_call(cat, aten.cat.default):
        return None
    past, _ = peel(inputs(cat)[0][0])
    if not is_call(past, operator.getitem) or not is_call(past.args[0], READ):
        return None
    read: fx.Node = inputs(past)[0]
    return read


def _grown(graph: fx.Graph, read: fx.Node, joined: fx.Node, output: int) -> fx.Node:
    """The slots held with the new ones of `joined` behind them."""
    cat, order = peel(joined)
    return call(graph, aten.cat.default, [inputs(read)[output], ordered(inputs(cat)[0][-1], order)], 2)


def _role(graph: fx.Graph, role: Role) -> fx.Node:
    return call(graph, aten.empty.memory_format, shape_of(role), device=torch.device("cpu"))
