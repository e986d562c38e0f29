"""Which tensor a node is, whatever the order of its axes."""

from __future__ import annotations

from torch import Tensor, fx

from kvfx.passes.graph import aten, call, inputs, is_call, is_whole_slice, val

COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
Order = tuple[int, ...]


def peel(node: fx.Node) -> tuple[fx.Node, Order]:
    """What `node` is a reordering of: the tensor below all permutations and copies, and which of its axes stands at each place."""
    value = val(node)
    order: Order = tuple(range(value.dim())) if isinstance(value, Tensor) else ()
    while True:
        if is_call(node, aten.transpose.int):
            first, second = (axis % len(order) for axis in inputs(node)[1:3])
            moved = list(range(len(order)))
            moved[first], moved[second] = second, first
        elif is_call(node, aten.permute.default):
            moved = [axis % len(order) for axis in inputs(node)[1]]
        elif is_call(node, *COPIES) or is_whole_slice(node):
            moved = list(range(len(order)))
        else:
            return node, order
        order = tuple(moved[axis] for axis in order)
        node = inputs(node)[0]


def is_straight(order: Order) -> bool:
    """Whether all axes stand where they stood."""
    return order == tuple(range(len(order)))


def ordered(node: fx.Node, order: Order) -> fx.Node:
    """`node` with its axes in another order, made at the insertion point; `node` itself if nothing moves."""
    return node if is_straight(order) else call(node.graph, aten.permute.default, node, list(order))
