"""How a cache is written: a table from each operator to the reader of its arguments. A new spelling is one row.

A reader says which tensor is written to, along which axis, from which place on, and what is written; or it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx

from kvfx.passes.graph import aten, call, inputs, is_call, is_whole_slice, val
from kvfx.passes.report import Refuse

WHOLE = -1  # in place of an axis: the whole tensor is written


class Store(NamedTuple):
    """One write.

    Attributes:
        tensor: what is written to, below all views.
        axis: along which consecutive places are written; WHOLE if all are.
        start: the first of them, a number or a node; None if `index` says it.
        index: a tensor of the places, [n], whose numbers the graph cannot know.
        source: what is written, with the axes of `tensor`.
        spelling: what a report calls it.
    """

    tensor: fx.Node
    axis: int
    start: Any
    index: fx.Node | None
    source: fx.Node
    spelling: str


class Part(NamedTuple):
    """Consecutive places of a tensor along an axis; `end` is None or huge for all up to the last."""

    axis: int
    start: Any
    end: Any


def store_of(node: fx.Node) -> Store | None:
    """What `node` writes, if it is one of the table.

    Raises:
        Refuse: it is, but not in a way that is understood.
    """
    if node.op != "call_function" or node.target not in SPELLINGS:
        return None
    read, spelling = SPELLINGS[node.target]
    store = read(node, spelling)
    if store is not None and val(store.source).dtype != val(store.tensor).dtype:
        dtypes = f"{val(store.source).dtype} to {val(store.tensor).dtype}"
        raise Refuse(
            f"`{node.name}` casts {dtypes} on the write, so that a cache holds other numbers than attention is given", node
        )
    return store


def _by_copy(node: fx.Node, spelling: str) -> Store:
    place, source = inputs(node)[:2]
    tensor, parts = taken_apart(place)
    if str(val(source).shape) != str(val(place).shape):
        raise Refuse(f"`{node.name}` repeats what it writes, {shape(source)}, to fill {shape(place)}", node)
    if not parts:
        return Store(tensor, WHOLE, 0, None, source, "copy")
    if len(parts) > 1 or parts[0] is None:
        raise Refuse(f"`{node.name}` writes to a part of `{tensor.name}` that is not consecutive places along one axis", node)
    return Store(tensor, parts[0].axis, parts[0].start, None, source, "copy" if _is_narrow(place) else spelling)


def _by_index(node: fx.Node, spelling: str) -> Store:
    place, axis, index, source = inputs(node)[:4]
    return _indexed(node, place, axis % val(place).dim(), index, source, spelling)


def _by_indices(node: fx.Node, spelling: str) -> Store:
    place, indices, source = inputs(node)[:3]
    indexed = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(indexed) != 1:
        raise Refuse(f"`{node.name}` writes at indices along axes {[axis for axis, _ in indexed]}, expected one axis", node)
    if len(node.args) > 3 and node.args[3]:
        raise Refuse(f"`{node.name}` adds to what is there, expected that it replaces it", node)
    axis, index = indexed[0]
    expected = [*val(place).shape[:axis], *val(index).shape, *val(place).shape[axis + 1 :]]
    with node.graph.inserting_before(node):
        source = _with_leading_ones(source, expected)
    if str(list(val(source).shape)) != str(expected):
        raise Refuse(f"`{node.name}` repeats what it writes, {shape(source)}, to fill {expected}", node)
    return _indexed(node, place, axis, index, source, spelling)


def _by_scatter(node: fx.Node, spelling: str) -> Store:
    defaults: list[Any] = [None, None, 0, None, None, 1]
    place, source, axis, start, end, step = inputs(node) + defaults[len(node.args) :]
    if step != 1:
        raise Refuse(f"`{node.name}` writes at every {step}th place, expected consecutive ones", node)
    if str(val(source).shape) == str(val(place).shape):
        return Store(bare(place, node), WHOLE, 0, None, source, "copy")
    return Store(bare(place, node), axis % val(place).dim(), 0 if start is None else start, None, source, spelling)


SPELLINGS: dict[Any, tuple[Callable[[fx.Node, str], Store], str]] = {
    aten.copy_.default: (_by_copy, "slice"),
    aten.index_copy_.default: (_by_index, "index_copy"),
    aten.index_copy.default: (_by_index, "index_copy"),
    aten.index_put_.default: (_by_indices, "index_put"),
    aten.index_put.default: (_by_indices, "index_put"),
    aten.slice_scatter.default: (_by_scatter, "slice_scatter"),
}


def _indexed(node: fx.Node, place: fx.Node, axis: int, index: fx.Node, source: fx.Node, spelling: str) -> Store:
    tensor = bare(place, node)
    if val(index).dim() != 1:
        raise Refuse(f"`{node.name}` writes at an index {shape(index)}, expected one axis of consecutive places", node)
    if is_call(index, aten.flip.default):
        raise Refuse(f"`{node.name}` writes at an index in reverse, expected start, start + 1, ...", node)
    counted = _counted(index)
    if counted is not None:
        start, step = counted
        if step != 1:
            raise Refuse(f"`{node.name}` writes at every {step}th place, expected consecutive ones", node)
        return Store(tensor, axis, start, None, source, spelling)
    if not _is_given(index):
        raise Refuse(
            f"`{node.name}` writes at an index that is computed from data, `{index.name}`; expected an argument, or arange", node
        )
    return Store(tensor, axis, None, index, source, spelling)


def _counted(index: fx.Node) -> tuple[Any, Any] | None:
    """Start and step of an index made by arange."""
    index = _as_it_is(index)
    if is_call(index, aten.arange.default):
        return 0, 1
    if is_call(index, aten.arange.start):
        return inputs(index)[0], 1
    if is_call(index, aten.arange.start_step):
        start, _, step = (*inputs(index), 1)[:3]
        return start, step
    if is_call(index, aten.add.Tensor) and not index.kwargs:
        for first, second in (inputs(index), inputs(index)[::-1]):
            number = not isinstance(second, fx.Node) or not isinstance(val(second), Tensor)
            counted = _counted(first) if number and isinstance(first, fx.Node) else None
            if counted is not None and str(counted[0]) == "0":
                return second, counted[1]
    return None


def _is_given(index: fx.Node) -> bool:
    """Whether an index is an argument, or arange from an argument on."""
    index = _as_it_is(index)
    if is_call(index, aten.add.Tensor) and not index.kwargs:
        return all(not isinstance(part, fx.Node) or _counted(part) == (0, 1) or _is_given(part) for part in inputs(index))
    return index.op == "placeholder" and not index.meta.get("is_parameter", False)


# What hands on an index: copies, casts, axes of size one, and what is taken of an argument by place.
HANDED_ON = frozenset(
    {
        aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default,
        aten.to.device, aten.to.dtype_layout, aten.view.default, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim,
        aten.unsqueeze.default, aten.select.int, aten.flatten.using_ints,
    }
)  # fmt: skip


def _as_it_is(index: fx.Node) -> fx.Node:
    while index.op == "call_function" and (index.target in HANDED_ON or is_whole_slice(index)):
        index = inputs(index)[0]
    return index


def _with_leading_ones(source: fx.Node, expected: list[Any]) -> fx.Node:
    """`source` with the axes of size one in front that indexing leaves out."""
    if is_call(source, aten.view.default) and str(list(val(inputs(source)[0]).shape)) == str(expected):
        before: fx.Node = inputs(source)[0]
        return before
    while val(source).dim() < len(expected) and str(expected[len(expected) - val(source).dim() - 1]) == "1":
        source = call(source.graph, aten.unsqueeze.default, source, 0)
    return source


def bare(place: fx.Node, node: fx.Node) -> fx.Node:
    """The tensor that `place` is all of."""
    tensor, parts = taken_apart(place)
    if parts:
        raise Refuse(f"`{node.name}` writes to a part of `{tensor.name}` that is not consecutive places along one axis", node)
    return tensor


def taken_apart(node: fx.Node) -> tuple[fx.Node, list[Part | None]]:
    """The tensor below views, and which parts of it they take; None for a part that is not consecutive places, or other views."""
    parts: list[Part | None] = []
    while (below := viewed(node)) is not None:
        if is_call(node, aten.slice.Tensor):
            defaults: list[Any] = [None, 0, None, None, 1]
            _, axis, start, end, step = inputs(node) + defaults[len(node.args) :]
            if not is_whole_slice(node) and str(val(node).shape) != str(val(below).shape):
                parts.append(Part(axis % val(node).dim(), 0 if start is None else start, end) if step == 1 else None)
        elif is_call(node, aten.narrow.default):
            _, axis, start, _ = inputs(node)
            axis = axis % val(node).dim()
            if str(val(node).shape) != str(val(below).shape):
                parts.append(Part(axis, start, plus(start, val(node).shape[axis])))
        elif not is_call(node, aten.alias.default, aten.detach.default) and not writes(node):
            parts.append(None)
        node = below
    return node, parts


def whole_cat(cat: fx.Node) -> tuple[list[fx.Node], int]:
    """The tensors that `cat` joins, empty ones left out, and along which axis."""
    tensors, axis = (*inputs(cat), 0)[:2]
    axis = axis % val(cat).dim()
    return [tensor for tensor in tensors if val(tensor).dim() > axis and not same(val(tensor).shape[axis], 0)], axis


def _is_narrow(place: fx.Node) -> bool:
    return is_call(place, aten.narrow.default)


def plus(start: Any, length: Any) -> Any:
    """The sum of two sizes, as a number or an expression."""
    return size(start) + length


def size(number: Any) -> Any:
    """A number or an expression."""
    return val(number) if isinstance(number, fx.Node) else number


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or expression."""
    return str(size(a)) == str(size(b))


def shape(node: fx.Node) -> list[Any]:
    """The shape of what `node` yields, to print."""
    return list(val(node).shape)


def below(node: fx.Node) -> fx.Node:
    """What `node` is a view of."""
    while (inner := viewed(node)) is not None:
        node = inner
    return node


def viewed(node: fx.Node) -> fx.Node | None:
    """What `node` is a view of, or has written to; None if it is neither."""
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not isinstance(val(node), Tensor):
        return None
    first = next(iter(node.target._schema.arguments), None)
    return node.args[0] if first is not None and first.alias_info is not None and isinstance(node.args[0], fx.Node) else None


def writes(node: fx.Node) -> bool:
    """Whether `node` writes to its first argument."""
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    first = node.target._schema.arguments[0]
    return first.alias_info is not None and bool(first.alias_info.is_write)
