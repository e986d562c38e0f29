"""What the axes of a tensor inside attention are, through views of it.

Axes are written as a string, one letter per axis: b batch, H query heads (or KV heads that are repeated to them), h KV heads,
g query heads of one KV head, n batch and heads in one, s queries, t keys, d channels, x heads and channels in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvfx.passes.graph import aten, call, inputs, is_call, is_whole_slice, val

SAME = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default)
RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip
PERMUTES = (
    aten.transpose.int, aten.permute.default, aten.mT.default, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int,
    aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist,
)  # fmt: skip
EXPANDS = (aten.expand.default, aten.broadcast_to.default, aten.repeat.default)
# What takes the type of a tensor, and what takes its shape too, but none of its elements.
NEW = (aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default)
LIKE = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.empty_like.default)
# Axes that a view joins, and what they are then.
JOINED = (("bhg", "n"), ("bH", "n"), ("hg", "H"), ("Hd", "x"))


def shape_of(node: fx.Node) -> tuple[str, ...]:
    """The shape as text, because symbols compare by guarding."""
    return tuple(str(size) for size in val(node).shape)


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the elements of `node`; reading a size of it, or making another tensor of its shape or type, does not count."""
    return [user for user in node.users if user.op == "output" or not (is_call(user, *LIKE, *NEW) or is_size(user))]


def is_size(node: fx.Node) -> bool:
    """Whether `node` is a number, such as a size."""
    return isinstance(val(node), (torch.SymInt, int))


def keeps_values(node: Any) -> bool:
    """Whether `node` is a cast that loses nothing."""
    if not is_call(node, *CASTS):
        return False
    before, after = val(inputs(node)[0]).dtype, val(node).dtype
    return before.is_floating_point and torch.promote_types(before, after) == after


def order(node: fx.Node) -> tuple[int, ...]:
    """Which axis of its input each axis of a permuting `node` is, found by permuting a tensor of distinct sizes."""
    probe = torch.empty(*range(2, 2 + val(inputs(node)[0]).dim()), device="meta")
    return tuple(size - 2 for size in node.target(probe, *node.args[1:], **node.kwargs).shape)  # type: ignore[operator]


def before_view(node: fx.Node, axes: str) -> str | None:
    """The axes of the input of `node`, whose own are `axes`; None if it is no view of whole axes.

    An axis g along which all heads read the same is not there in the input of the view that spreads it.
    """
    source = inputs(node)[0]
    after, before = shape_of(node), shape_of(source)
    if is_call(node, *SAME) or is_whole_slice(node):
        return axes
    if is_call(node, *PERMUTES):
        moved = order(node)
        return "".join(axes[moved.index(axis)] for axis in range(len(axes)))
    if is_call(node, aten.repeat_interleave.self_int) and len(inputs(node)) > 2 and len(before) == len(axes):
        return axes.replace("H", "h") if inputs(node)[2] % len(axes) == axes.find("H") else None
    if is_call(node, *EXPANDS):
        return _before_expand(axes, after, before)
    return _before_reshape(axes, after, before) if is_call(node, *RESHAPES) else None


def _before_expand(axes: str, after: tuple[str, ...], before: tuple[str, ...]) -> str | None:
    """Only what is one for all query heads of a key may be spread."""
    if len(before) != len(after):
        return None
    spread = {axis for axis, a, b in zip(axes, after, before, strict=True) if a != b}
    ones = all(b == "1" for a, b in zip(after, before, strict=True) if a != b)
    return axes.replace("H", "h") if "H" in spread and spread <= {"H"} and ones else axes if spread <= {"g"} and ones else None


def _before_reshape(axes: str, after: tuple[str, ...], before: tuple[str, ...]) -> str | None:
    if after == before:
        return axes
    for several, one in JOINED:
        more = len(several) - 1
        start = axes.find(one)
        if start >= 0 and before[:start] == after[:start] and before[start + more + 1 :] == after[start + 1 :]:
            return axes.replace(one, several)
        start = axes.find(several)
        if start >= 0 and after[:start] == before[:start] and after[start + more + 1 :] == before[start + 1 :]:
            return axes.replace(several, one)
    start = axes.find("g")
    if start >= 0 and after[start] == "1" and before == after[:start] + after[start + 1 :]:
        return axes.replace("g", "")
    return None


def brought(graph: fx.Graph, node: fx.Node, axes: str, to: str, heads: int | None) -> fx.Node:
    """`node`, of `axes`, as a tensor of the axes `to`, one of bHsd, bHtd, bHst; by new views, if any are needed.

    Args:
        graph: where views are added, at its insertion point.
        node: the tensor.
        axes: its axes.
        to: what they shall be.
        heads: size of the axis H, to take n or x apart.
    """
    if "n" in axes:
        node, axes = call(graph, aten.unflatten.int, node, axes.index("n"), [-1, heads]), axes.replace("n", "bH")
    if "x" in axes:
        node, axes = call(graph, aten.unflatten.int, node, axes.index("x"), [heads, -1]), axes.replace("x", "Hd")
    if "g" not in axes:
        axes = axes.replace("h", "H")
    several = to if "H" in axes else to.replace("H", "hg")
    moved = [axes.index(axis) for axis in several]
    if moved != sorted(moved):
        node = call(graph, aten.permute.default, node, moved)
    return node if several == to else call(graph, aten.flatten.using_ints, node, to.index("H"), to.index("H") + 1)


def returned(graph: fx.Graph, node: fx.Node, axes: str, kv_heads: Any) -> fx.Node:
    """`node` [B, Hq, S, D] as a tensor of `axes`."""
    now = "bHsd"
    if "g" in axes:
        node, now = call(graph, aten.unflatten.int, node, 1, [kv_heads, -1]), "bhgsd"
    if "n" in axes:
        return call(graph, aten.flatten.using_ints, node, 0, 1)
    moved = [now.index(axis) for axis in axes]
    return node if moved == sorted(moved) else call(graph, aten.permute.default, node, moved)


def mask_on(graph: fx.Graph, mask: fx.Node, axes: str, heads: int, kv_heads: Any) -> fx.Node:
    """`mask`, which broadcasts to logits of `axes`, as one that broadcasts to [B, Hq, S, T]."""
    missing = len(axes) - val(mask).dim()
    if axes == "bHst" or (missing >= len(axes) - 2 and axes.endswith("st")):
        for _ in range(2 - val(mask).dim()):
            mask = call(graph, aten.unsqueeze.default, mask, 0)
        return mask
    for _ in range(missing):
        mask = call(graph, aten.unsqueeze.default, mask, 0)
    sizes = dict(zip(axes, shape_of(mask), strict=True))
    if "n" in axes and sizes["n"] == "1":
        return mask
    if "g" in axes and sizes["h"] == sizes["g"] == "1":
        mask = call(graph, aten.squeeze.dim, mask, axes.index("g"))
        axes = axes.replace("g", "")
    elif "g" in axes:
        whole = {"h": kv_heads, "g": heads // kv_heads}
        mask = call(graph, aten.expand.default, mask, [whole.get(axis, -1) for axis in axes])
    return brought(graph, mask, axes, "bHst", heads)


def is_parameter(node: Any) -> bool:
    """Whether `node` is a view of something that the graph was given, such as a weight, and not computed."""
    while isinstance(node, fx.Node) and (is_call(node, *SAME, *CASTS, *PERMUTES, *RESHAPES, aten.t.default, aten.numpy_T.default)):
        node = inputs(node)[0]
    return isinstance(node, fx.Node) and (node.op == "get_attr" or bool(node.meta.get("is_parameter")))


def is_tensor(node: Any) -> bool:
    """Whether `node` yields one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)
