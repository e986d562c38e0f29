"""Caches that are there before any token: with room for many, written by slice assignment and read up to the last; or empty.

What such a read returns is what was held with what was written behind it, and in these words the other passes understand it.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor, fx

from kvfx.passes.axes import peel
from kvfx.passes.cache_leaf import MARK
from kvfx.passes.cache_read import READ
from kvfx.passes.graph import aten, call, inputs, is_call, is_whole_slice, replace, val
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report

COPY = aten.copy_.default


class Content(NamedTuple):
    """What the first places of a preallocated tensor hold along one axis."""

    axis: int
    tensor: fx.Node


def forward_stores(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Replace reads of what slice assignments wrote by what they wrote; take out copies of arguments that nothing writes to.

    A past that grows may begin empty: what is joined to nothing is itself.
    """
    graph = module.graph
    contents: dict[fx.Node, Content] = {}
    for node in list(graph.nodes):
        if is_call(node, aten.cat.default):
            _join_no_empty(node)
        elif is_call(node, COPY):
            _store(graph, node, contents)
        elif _writes(node):
            _forget(contents, _below(inputs(node)[0]))
        elif is_call(node, aten.slice.Tensor):
            tensor, part = _part(node)
            content = contents.get(tensor)
            if content and part and part[:2] == (content.axis, 0) and _same(part[2], val(content.tensor).shape[content.axis]):
                replace(node, content.tensor)
        elif is_call(node, MARK) and inputs(node)[0] in contents:
            leaf = inputs(node)[0]
            axis, tensor = contents[leaf]
            if isinstance(val(leaf).shape[axis], int):
                node.meta |= {"leaf": leaf, "capacity": val(leaf).shape[axis]}
                node.update_arg(0, tensor)
    if graph.find_nodes(op="call_function", target=MARK):
        _drop_needless_copies(graph)


def _join_no_empty(cat: fx.Node) -> None:
    tensors, axis = (*inputs(cat), 0)[:2]
    # An empty tensor of one axis joins tensors of any.
    full = [tensor for tensor in tensors if str(val(tensor).shape[axis if val(tensor).dim() > 1 else 0]) != "0"]
    if len(full) == 1 < len(tensors) and val(full[0]).dtype == val(cat).dtype:
        replace(cat, full[0])


def _store(graph: fx.Graph, copy: fx.Node, contents: dict[fx.Node, Content]) -> None:
    """Note what `copy` writes, or that nothing is known any more of the tensor it writes to."""
    place, source = inputs(copy)[:2]
    tensor, part = _part(place)
    known = contents.get(tensor) or _held(tensor)
    _forget(contents, _below(place))
    if part is None or str(val(source).shape) != str(val(place).shape) or val(source).dtype != val(place).dtype:
        return
    axis, start, _ = part
    if _same(start, 0):
        contents[tensor] = Content(axis, source)
    elif known and known.axis == axis and _same(start, val(known.tensor).shape[axis]):
        with graph.inserting_before(copy):
            contents[tensor] = Content(axis, call(graph, aten.cat.default, [known.tensor, source], axis))


def _forget(contents: dict[fx.Node, Content], written: fx.Node) -> None:
    """Nothing is known any more of a tensor that is written to, nor of those that were filled from it."""
    for tensor, content in list(contents.items()):
        if written in (_below(tensor), _below(content.tensor)):
            del contents[tensor]


def _held(tensor: fx.Node) -> Content | None:
    """What a tensor that was filled up from the slots held begins with."""
    if not is_call(tensor, aten.cat.default):
        return None
    tensors, axis = (*inputs(tensor), 0)[:2]
    past, _ = peel(tensors[0])
    held = is_call(past, operator.getitem) and is_call(past.args[0], READ)
    return Content(axis % val(tensor).dim(), tensors[0]) if held else None


def _part(node: Any) -> tuple[fx.Node, tuple[int, Any, Any] | None]:
    """The tensor below all slices, and the one part of it that they leave: axis, start and end."""
    parts = []
    while is_call(node, aten.slice.Tensor):
        defaults: list[Any] = [None, 0, None, None, 1]
        below, axis, start, end, step = inputs(node) + defaults[len(node.args) :]
        if not is_whole_slice(node) and str(val(node).shape) != str(val(below).shape):
            parts.append((axis % val(node).dim(), 0 if start is None else start, end, step))
        node = below
    if len(parts) != 1 or parts[0][3] != 1:
        return node, None
    return node, parts[0][:3]


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or expression."""
    a, b = (val(size) if isinstance(size, fx.Node) else size for size in (a, b))
    return str(a) == str(b)


def _below(node: fx.Node) -> fx.Node:
    """What `node` is a view of."""
    while (inner := _viewed(node)) is not None:
        node = inner
    return node


def _viewed(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not isinstance(val(node), Tensor):
        return None
    first = next(iter(node.target._schema.arguments), None)
    return node.args[0] if first is not None and first.alias_info is not None and isinstance(node.args[0], fx.Node) else None


def _drop_needless_copies(graph: fx.Graph) -> None:
    """Let what reads a copy of an argument read the argument, if nothing writes to the copy."""
    written = {_below(inputs(node)[0]) for node in graph.nodes if _writes(node)}
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        source: fx.Node = inputs(copy)[0]
        alike = source.op == "placeholder" and str(val(copy).stride()) == str(val(source).stride())
        if alike and not {copy, source} & written and len(copy.args) == 1 and not copy.kwargs:
            replace(copy, source)


def _writes(node: fx.Node) -> bool:
    """Whether `node` writes to its first argument."""
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    first = node.target._schema.arguments[0]
    return first.alias_info is not None and bool(first.alias_info.is_write)


def drop_unread(graph: fx.Graph) -> None:
    """Remove writes to tensors that nothing reads."""
    for copy in reversed(graph.find_nodes(op="call_function", target=COPY)):
        tensor = _below(inputs(copy)[0])
        if tensor.op != "placeholder" and _only_written(tensor):
            graph.erase_node(copy)
            graph.eliminate_dead_code()


def _only_written(tensor: fx.Node) -> bool:
    """Whether all uses of a tensor and its views are writes whose results nothing reads."""
    for user in tensor.users:
        if is_call(user, COPY):
            if user.args[0] is not tensor or user.users:
                return False
        elif _viewed(user) is not tensor or not _only_written(user):
            return False
    return True
