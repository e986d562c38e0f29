"""Sliding windows that a decoder keeps by moving all places along: by `roll`, or by leaving the first ones out of a `cat`.

Such a cache holds the last tokens at any time. No policy touches it; it is recognised so that nobody complains.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from kvfx.passes.graph import aten, inputs, is_call, val
from kvfx.passes.report import Refuse
from kvfx.passes.store_spellings import WHOLE, Store, below, same, size, taken_apart, whole_cat

# Keys of `meta`: the axis and the amount by which a tensor was moved along; the `Window` that a tensor holds.
SHIFTED, WINDOW = "shifted", "window"


class Window(NamedTuple):
    """The last tokens in a tensor, new ones at its end.

    Attributes:
        axis: along which they stand.
        places: how many there are.
        spelling: how the others were moved along.
        source: what the new ones are taken from.
    """

    axis: int
    places: Any
    spelling: str
    source: fx.Node


def note_shift(node: fx.Node) -> bool:
    """Note what `roll` moved, and which `cat` leaves out as many of the first places as it adds; whether it is a `roll`."""
    if is_call(node, aten.roll.default) and len(inputs(node)) == 3 and len(inputs(node)[1]) == 1 == len(inputs(node)[2]):
        shift, axis = inputs(node)[1][0], inputs(node)[2][0] % val(node).dim()
        node.meta[SHIFTED] = axis, size(shift)
        return True
    if is_call(node, aten.cat.default):
        tensors, axis = whole_cat(node)
        if len(tensors) == 2:
            tensor, parts = taken_apart(tensors[0])
            if (
                len(parts) == 1
                and parts[0] is not None
                and parts[0].axis == axis
                and same(parts[0].start, val(tensors[1]).shape[axis])
            ):
                if same(val(tensor).shape[axis], val(node).shape[axis]):
                    node.meta[WINDOW] = Window(axis, val(node).shape[axis], "cat", below(tensors[1]))
    return False


def window_of(node: fx.Node, store: Store) -> Window | None:
    """The window that a write makes of what was moved along.

    Raises:
        Refuse: it was moved by another number of places than are written.
    """
    if SHIFTED not in store.tensor.meta or store.axis == WHOLE:
        return None
    axis, shift = store.tensor.meta[SHIFTED]
    places, length = val(store.tensor).shape[axis], val(store.source).shape[axis]
    at_the_end = same(store.start, -length) or same(store.start, places - length)
    if store.axis != axis or not same(shift, -length) or not at_the_end:
        raise Refuse(
            f"`{node.name}` writes {length} places from {size(store.start)} on along axis {store.axis} of a tensor that was rolled by "
            f"{shift} along {axis}; expected as many, at its end",
            node,
        )
    return Window(axis, places, "roll", below(store.source))
