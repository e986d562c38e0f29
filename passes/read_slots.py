"""Put the slots held in place of what stands for them: into attention's keys and values, and their columns into its mask."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from kvfx.passes.attention.logits import is_head_bias
from kvfx.passes.axes import peel
from kvfx.passes.cache_ragged import READ_RAGGED, READ_RECEIVED
from kvfx.passes.cache_read import READ
from kvfx.passes.cache_static import READ_STATIC
from kvfx.passes.graph import aten, call, inputs, is_call, replace, replace_outputs, val
from kvfx.passes.plan import Plan
from kvfx.passes.report import Refuse, Report, Site, Stranded
from kvfx.passes.traced_op import Traces, call_op

LAYER = 6  # which argument of each marker it is


def read_slots(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Let each attention read slots where the model was traced with all tokens seen.

    Raises:
        Stranded: something else reads the keys or values of a layer that has evicted.
    """
    stranded: dict[int, str] = {}
    for site in report.sites:
        if "read" not in site.nodes:
            continue
        try:
            # Before its columns are taken for each head.
            mask = inputs(site.nodes["attention"])[3]
            report.counts_columns |= is_head_bias(mask)
            if mask is not None:
                site.nodes["mask"] = mask
            SWAPS[site.nodes["read"].target](site, report.traces)
        except Refuse as refuse:
            site.refusal = refuse.reason
    for read in [node for node in module.graph.nodes if is_call(node, *SWAPS)]:
        _erase_unused(read)
        if read._erased:
            continue
        layer = inputs(read)[LAYER]
        if read.target is READ and inputs(read)[-1]:
            replace_outputs(read, inputs(read)[:2])
            continue
        reasons = [site.refusal for site in report.sites if site.refusal and site.layer == layer]
        readers = ", ".join(f"`{user.name}`" for output in read.users for user in output.users)
        stranded[layer] = (
            "; ".join(reasons or report.reasons()) or f"{readers} reads its keys or values, which is no known attention"
        )
    if stranded:
        raise Stranded(stranded)


def _swap(site: Site, traces: Traces) -> None:
    nodes, attention = site.nodes, site.nodes["attention"]
    query, key, _, mask, _, is_causal = inputs(attention)[:6]
    keys, values, prefix, start, seen, size, _, empty, whole = inputs(nodes["read"])
    _refuse_flag(is_causal, attention)
    graph, heads = attention.graph, val(query).shape[1]
    with graph.inserting_before(attention):
        columns = _four_axes(mask) if mask is not None else None
        if not whole and (empty or columns is not None):
            if columns is not None and str(val(columns).shape[3]) not in (str(val(key).shape[2]), "1"):
                raise Refuse(f"the mask `{mask.name}` has {val(columns).shape[3]} columns for {val(key).shape[2]} keys", mask)
            given = (columns, keys, nodes["key"], prefix, start, seen, size, empty, heads)
            columns = call_op(graph, traces, "slot_mask", *given)
        read = [_joined(past, new, attention) for past, new in ((keys, nodes["key"]), (values, nodes["value"]))]
        arguments = [query, *read, columns, *inputs(attention)[4:]]
        swapped = call_op(graph, traces, "attention", *arguments)
    replace(attention, swapped)
    nodes["attention"] = swapped


def _swap_static(site: Site, traces: Traces) -> None:
    nodes, attention = site.nodes, site.nodes["attention"]
    query, _, _, mask, _, is_causal = inputs(attention)[:6]
    keys, values, columns, key, value, tokens, _ = inputs(nodes["read"])
    _refuse_flag(is_causal, attention)
    graph = attention.graph
    if key is not None:
        # Where they are read, because what is written in place behind that shall not be seen.
        with graph.inserting_before(nodes["read"]):
            keys, values = (call(graph, aten.cat.default, pair, 2) for pair in ([keys, key], [values, value]))
    with graph.inserting_before(attention):
        mask = _over(tokens, mask)
        taken = call_op(graph, traces, "column_mask", mask, columns, val(query).shape[1])
        swapped = call_op(graph, traces, "attention", query, keys, values, taken, *inputs(attention)[4:])
    replace(attention, swapped)
    nodes["attention"] = swapped


def _swap_ragged(site: Site, traces: Traces) -> None:
    nodes, attention = site.nodes, site.nodes["attention"]
    query, _, _, mask, dropout, is_causal, *rest = inputs(attention)
    *pool, key, value, tokens, _, table, lengths, work, shift, chunk = inputs(nodes["read"])[:12]
    asked = inputs(nodes["read"])[12:]
    _refuse_flag(is_causal, attention)
    if dropout:
        raise Refuse(f"attention drops weights out ({dropout}), which no kernel over blocks does", attention)
    graph = attention.graph
    with graph.inserting_before(attention):
        mask = _over(tokens, mask)
        given = (query, key, value, mask, *pool, table, lengths)
        if asked and val(query).shape[2] == 1:
            both = call_op(graph, traces, "ragged_probabilities", *given, *work, shift, chunk, asked[1], *rest)
            swapped, held, new = (call(graph, operator.getitem, both, index) for index in range(3))
            received = [held, call(graph, aten.unsqueeze.default, new, 2)]
        else:
            swapped = call_op(graph, traces, "ragged_attention", *given, *work, shift, chunk, *rest)
            if asked:
                both = call_op(graph, traces, "ragged_received", *given, *work[:2], asked[0], shift, chunk, *asked[1:], *rest)
                received = [call(graph, operator.getitem, both, index) for index in range(2)]
    replace(attention, swapped)
    nodes["attention"] = swapped
    if asked:
        for user in [user for user in nodes["read"].users if inputs(user)[1] > 1]:
            user.replace_all_uses_with(received[inputs(user)[1] - 2])
            graph.erase_node(user)


SWAPS: dict[Any, Callable[[Site, Traces], None]] = {READ: _swap, READ_STATIC: _swap_static}
SWAPS |= dict.fromkeys((READ_RAGGED, READ_RECEIVED), _swap_ragged)


def _refuse_flag(is_causal: bool, attention: fx.Node) -> None:
    if is_causal:
        raise Refuse("attention over a cache is causal by flag, which counts keys from the first one", attention)


def _over(tokens: Any, mask: fx.Node | None) -> fx.Node | None:
    """A mask over `tokens` tokens, or one column for all of them, with four axes."""
    if mask is None:
        return None
    mask = _four_axes(mask)
    given, expected = val(mask).shape[3], val(tokens) if isinstance(tokens, fx.Node) else tokens
    if str(given) not in (str(expected), "1"):
        raise Refuse(f"the mask `{mask.name}` has {given} columns for {expected} tokens", mask)
    return mask


def _erase_unused(node: fx.Node) -> None:
    """Erase `node` if nothing is computed from it. Only that: taps that no score reads yet have no users either."""
    for user in list(node.users):
        if user.op == "call_function":
            _erase_unused(user)
    if not node.users and not node.is_impure():  # a write in place has no users and is read all the same
        node.graph.erase_node(node)


def _joined(past: fx.Node, new: fx.Node, attention: fx.Node) -> fx.Node:
    """Slots and new ones behind them, as the cache joins them if it does."""
    for user in past.users:
        if is_call(user, aten.cat.default) and user < attention and _joins(user, past, new):
            return user
    return call(attention.graph, aten.cat.default, [past, new], 2)


def _joins(cat: fx.Node, past: fx.Node, new: fx.Node) -> bool:
    tensors, axis = (*inputs(cat), 0)[:2]
    return axis == 2 and len(tensors) == 2 and tensors[0] is past and peel(tensors[1]) == peel(new)


def _four_axes(mask: Any) -> fx.Node:
    value: Tensor = val(mask)
    for _ in range(4 - value.dim()):
        mask = call(mask.graph, aten.unsqueeze.default, mask, 0)
    return mask
