"""The marker on the new tokens of a tensor that a decoder returns, and the pass that finds what these were made of.

A decoder written by hand returns its past whole: what it was given with new keys and values behind that, or a preallocated tensor
that it has written to. Where the form of its past is known, only the new ones have to be stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvfx.passes.axes import ordered, peel
from kvfx.passes.cache_write import LIBRARY
from kvfx.passes.graph import aten, inputs, is_call, replace, val
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report, Unstored
from kvfx.passes.store_spellings import same, size, whole_cat
from kvfx.passes.unread import drop_unread

LIBRARY.define("new_states(Tensor leaf, int axis, SymInt start, SymInt length, int layer) -> Tensor")


def new_states(leaf: Tensor, axis: int, start: int, length: int, layer: int) -> Tensor:
    """Stand for the new tokens' keys or values in a returned tensor. Shapes only; the passes replace every call.

    Args:
        leaf: what the decoder returned, in its own axes.
        axis: along which tokens stand.
        start: tokens seen before.
        length: new tokens.
        layer: index of the cache layer.

    Returns:
        places `start` to `start + length` of `leaf` along that axis.
    """
    shape = list(leaf.shape)
    shape[axis] = length
    return leaf.new_empty(shape)


torch.library.register_fake("kvfx::new_states", new_states)
NEW = torch.ops.kvfx.new_states.default


def take_new_states(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Replace every `new_states` by the tensor that holds those tokens alone, before it was joined or written to anything.

    Raises:
        Unstored: a returned tensor is neither the new tokens nor what was held with them behind it.
    """
    graph, unknown = module.graph, dict[int, str]()
    marks = graph.find_nodes(op="call_function", target=NEW)
    for mark in marks:
        leaf, axis, start, length, layer = inputs(mark)
        new = _last(mark, leaf, axis, start, length)
        if new is not None:
            replace(mark, new)
            continue
        reason = peel(leaf)[0].meta.get("unknown") or f"`{leaf.name}` {list(val(leaf).shape)} was made in another way"
        unknown[layer] = f"keys or values of {size(length)} tokens behind {size(start)} are wanted, and {reason}"
    if unknown:
        raise Unstored(unknown)
    if marks:
        graph.eliminate_dead_code()
        drop_unread(graph)


def _last(mark: fx.Node, leaf: fx.Node, axis: int, start: Any, length: Any) -> fx.Node | None:
    """The last `length` places of a returned tensor, if it is nothing else or was joined from those and `start` others."""
    if same(start, 0):
        return leaf if same(val(leaf).shape[axis], length) else None
    cat, order = peel(leaf)
    if not is_call(cat, aten.cat.default):
        return None
    tensors, joined = whole_cat(cat)
    if len(tensors) != 2 or joined != order[axis]:
        return None
    if not same(val(tensors[0]).shape[joined], start) or not same(val(tensors[1]).shape[joined], length):
        return None
    with mark.graph.inserting_before(mark):
        return ordered(tensors[1], order)
