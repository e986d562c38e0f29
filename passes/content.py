"""What a preallocated cache holds, as the passes know it; and the mark on one that is read whole."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from kvfx.passes.axes import peel
from kvfx.passes.cache_read import READ
from kvfx.passes.cache_write import LIBRARY
from kvfx.passes.graph import aten, call, inputs, is_call
from kvfx.passes.store_spellings import Part, taken_apart

LIBRARY.define("filled(Tensor buffer, Tensor content, int axis, Tensor[] conditions) -> Tensor")
torch.library.register_fake("kvfx::filled", lambda buffer, content, axis, conditions: torch.empty_like(buffer))
COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.to.dtype, aten._to_copy.default)
MADE = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.empty.memory_format, aten.empty_like.default,
        aten.new_empty.default, aten.full.default, aten.full_like.default, aten.new_full.default)  # fmt: skip
FILLED = torch.ops.kvfx.filled.default


class Content(NamedTuple):
    """What the first places of a preallocated tensor hold along one axis.

    Attributes:
        axis: along which tokens stand.
        tensor: what was written to the first places.
        spelling: how.
        conditions: bools [] that have to be true for this to be so.
    """

    axis: int
    tensor: fx.Node
    spelling: str
    conditions: tuple[fx.Node, ...] = ()


def length_of(content: fx.Node, axis: int) -> fx.Node:
    """How many places are filled, made at the insertion point of what outlives `read_slots`: the slots held may be fewer."""
    graph, (past, _) = content.graph, peel(content)
    if is_call(past, operator.getitem) and is_call(past.args[0], READ):
        return call(graph, operator.sub, call(graph, aten.sym_size.int, inputs(inputs(past)[0])[5], 0), 1)
    if content.meta.get("joined"):
        first, *more = (length_of(part, axis) for part in inputs(content)[0])
        for length in more:
            first = call(graph, operator.add, first, length)
        return first
    return call(graph, aten.sym_size.int, content, axis)


def apart(node: fx.Node) -> tuple[fx.Node, list[Part | None]]:
    """As `taken_apart`, below the mark on a tensor whose content is known."""
    tensor, parts = taken_apart(node)
    return (inputs(tensor)[0] if is_call(tensor, FILLED) else tensor), parts
