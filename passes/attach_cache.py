"""Link each attention to the write of its keys and values into a cache, and find the tensors that a score will read."""

from __future__ import annotations

import operator

from torch import fx

from kvfx.passes.axes import Order, is_straight, ordered, peel
from kvfx.passes.cache_ragged import READ_RAGGED, READ_RECEIVED
from kvfx.passes.cache_read import READ, WINDOW
from kvfx.passes.cache_static import READ_STATIC
from kvfx.passes.cache_write import layer_of, writes_of
from kvfx.passes.graph import aten, inputs, is_call, replace_outputs
from kvfx.passes.output_weight import output_weight
from kvfx.passes.plan import Plan
from kvfx.passes.pre_rope import before_rope
from kvfx.passes.report import Refusal, Refuse, Report, Site
from kvfx.passes.rotation import FutureRotation

Key = tuple[fx.Node, Order]  # a tensor, whatever the order of its axes


def attach_cache(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Fill in each site's cache spelling and layer; where it evicts, its `cache_write` and the taps of the plan."""
    rotations = [FutureRotation(future) for future in plan.futures]
    windows = _take_out_windows(module.graph)
    writes = writes_of(module.graph)
    by_key = {peel(inputs(write)[0]): write for write in writes}
    taken: dict[fx.Node, Site] = {}
    for site in report.sites:
        if site.refusal:
            continue
        try:
            _attach(site, by_key, windows, taken)
            if "write" in site.nodes:
                _tap(site, plan, rotations)
        except Refuse as refuse:
            site.refusal = site.refusal or refuse.reason
    report.layers = len(writes)
    report.whole = tuple(layer_of(write) for write in writes if write not in taken or taken[write].refusal)
    for write in writes:
        if write not in taken:
            reason = f"cache layer {layer_of(write)} stores keys that no attention found in this graph reads"
            report.refusals.append(Refusal("attach_cache", reason, write.name))


def _take_out_windows(graph: fx.Graph) -> dict[Key, tuple[int, int]]:
    """Layer and window of the keys that `window_write` marks, whose markers have then done their work."""
    windows = {}
    for mark in graph.find_nodes(op="call_function", target=WINDOW):
        key, value, layer, window = inputs(mark)
        windows[peel(key)] = layer, window
        replace_outputs(mark, [key, value])
    return windows


def _attach(site: Site, writes: dict[Key, fx.Node], windows: dict[Key, tuple[int, int]], taken: dict[fx.Node, Site]) -> None:
    """The keys that attention reads are new ones, or those of `cache_read` with new ones behind them."""
    attention = site.nodes["attention"]
    key, value = inputs(attention)[1:3]
    new_key, new_value = peel(key), peel(value)
    if site.window is not None:  # which the decoder keeps itself
        return
    spelling = site.cache
    site.cache = spelling or "new"
    if is_call(new_key[0], aten.cat.default) and is_call(new_value[0], aten.cat.default):
        read, fresh_key = _halves(*new_key, 0)
        values_read, fresh_value = _halves(*new_value, 1)
        if read is not values_read:
            raise Refuse(f"the keys and values that attention reads come from different layers: `{read}`, `{values_read}`", key)
        site.cache, site.layer = spelling or "cat", inputs(read)[6]
        with attention.graph.inserting_before(attention):
            site.nodes |= {"read": read, "key": ordered(*fresh_key), "value": ordered(*fresh_value)}
        new_key, new_value = peel(site.nodes["key"]), peel(site.nodes["value"])
    elif _is_marked(new_key, 0):
        read = inputs(new_key[0])[0]
        if not _is_marked(new_value, 1) or inputs(new_value[0])[0] is not read:
            raise Refuse(f"the values `{new_value[0].name}` that attention reads are not those of the cache's keys", value)
        site.cache, site.layer = "static" if is_call(read, READ_STATIC) else "ragged", inputs(read)[6]
        site.nodes["read"] = read
        if inputs(read)[3] is None:
            return
        site.nodes |= {"key": inputs(read)[3], "value": inputs(read)[4]}
        new_key, new_value = peel(site.nodes["key"]), peel(site.nodes["value"])
    if new_key in windows:
        site.layer, site.window = windows[new_key]
        return
    write = writes.get(new_key)
    if write is None:
        if "read" not in site.nodes and not any(user.op == "output" for user in key.users):
            raise Refuse(f"the keys `{key.name}` that attention reads are not what a cache stores", key)
        return
    if peel(inputs(write)[1]) != new_value:
        raise Refuse(f"the values `{new_value[0].name}` that attention reads are not what the cache stores", value)
    site.layer = layer_of(write)
    if write in taken:
        site.cache = f"shared with {taken[write].name}"
        return
    taken[write] = site
    site.nodes |= {"write": write, "key": inputs(write)[0], "value": inputs(write)[1]}


def _is_marked(key: Key, output: int) -> bool:
    """Whether a tensor is that output of a `static_read` or a `ragged_read`, its axes in order."""
    node, order = key
    return (
        is_call(node, operator.getitem)
        and inputs(node)[1] == output
        and is_call(inputs(node)[0], READ_STATIC, READ_RAGGED, READ_RECEIVED)
        and is_straight(order)
    )


def _halves(cat: fx.Node, order: Order, output: int) -> tuple[fx.Node, Key]:
    """The `cache_read` and the new tensor, not peeled, that `cat`, its axes in `order`, joins along the axis of tokens."""
    tensors, axis = (*inputs(cat), 0)[:2]
    if len(tensors) != 2 or order.index(axis % len(order)) != 2:
        raise Refuse(f"`{cat.name}` joins {len(tensors)} tensors along axis {axis}, expected past and new tokens", cat)
    past, past_order = peel(tensors[0])
    if not is_call(past, operator.getitem) or not is_call(past.args[0], READ) or inputs(past)[1] != output:
        raise Refuse(f"keys or values are joined to `{past.name}`, which is not what the cache holds of them", cat)
    if not is_straight(tuple(past_order[axis] for axis in order)):
        raise Refuse(f"`{cat.name}` joins the slots held in another order of axes than [B, Hkv, T, D]", cat)
    return inputs(past)[0], (tensors[1], order)


def _tap(site: Site, plan: Plan, rotations: list[FutureRotation]) -> None:
    """Record the tensors that the plan's score reads here."""
    nodes = site.nodes
    for tap, roped in (("pre_query", "query"), ("pre_key", "key")):
        if tap in plan.taps:
            nodes[tap] = before_rope(nodes[roped])
    if "output_weight" in plan.taps:
        nodes["output_weight"] = output_weight(nodes["attention"])
    for rotation in rotations:
        made = rotation.of(nodes["query"], inputs(nodes["write"])[2], before=nodes["attention"])
        if made is not None:
            nodes[f"rotation_{rotation.future}"] = made
    site.taps = plan.taps
