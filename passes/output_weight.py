"""Find the weight of the output projection by walking down from attention.

Between the two, heads may move beside each other and nothing else may happen: [B, H, S, D] -> [B, S, H, D] -> [B, S, H*D]. Behind a
gate, a norm or a second reader, such as the branch of an adapter, no slice of one weight says what becomes of a head's value.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvfx.passes.graph import arguments, aten, call, inputs, is_call, is_whole_slice, val
from kvfx.passes.report import Refuse

# How a projection calls what it projects and its weight, and whether that is [in, out], as in transformers' Conv1D.
PROJECTIONS: dict[Any, tuple[str, str, bool]] = {
    aten.linear.default: ("input", "weight", False),
    aten.addmm.default: ("mat1", "mat2", True),
    aten.mm.default: ("self", "mat2", True),
    aten.matmul.default: ("self", "other", True),
}
# Views, copies and casts that leave all elements in their order.
SAME_ORDER = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default,
    aten.squeeze.dim, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.to.dtype,
    aten._to_copy.default,
)  # fmt: skip


def output_weight(attention: fx.Node) -> fx.Node:
    """The weight [hidden, H*D] that projects the output of `attention`, [B, H, S, D]. A bias is left out: it knows no value.

    Raises:
        Refuse: something else than one projection of all heads side by side reads the output.
    """
    node, moved = attention, False
    while not is_call(reader := _only_reader(node), *PROJECTIONS):
        if not moved and _moves_heads(reader):
            moved = True
        elif not _keeps_order(reader) or not (moved or _shape(reader) == _shape(attention)):
            what = f" ({reader.target})" if reader.op == "call_function" else ""
            raise Refuse(f"`{reader.name}`{what} reads the output of attention, expected its heads side by side, projected", reader)
        node = reader
    _, heads, _, width = val(attention).shape
    if not moved or val(node).shape[-1] != heads * width:
        raise Refuse(f"`{reader.name}` does not project all {heads} heads of {width} channels side by side", reader)
    _refuse_second(reader, reader)
    return _weight(reader, node)


def _keeps_order(node: fx.Node) -> bool:
    """Whether all elements still follow each other as in the input of `node`."""
    return is_call(node, *SAME_ORDER) or is_whole_slice(node)


def _refuse_second(projection: fx.Node, node: fx.Node) -> None:
    """A rotation or the first half of a low-rank projection is not what the output of the layer is made of."""
    for reader in node.users:
        if is_call(reader, *PROJECTIONS):
            raise Refuse(f"the output of attention is projected twice, by `{projection.name}` and `{reader.name}`", reader)
        if _keeps_order(reader):
            _refuse_second(projection, reader)


def _only_reader(node: fx.Node) -> fx.Node:
    readers = list(node.users)
    if len(readers) != 1:
        names = ", ".join(f"`{reader.name}`" for reader in readers) or "nothing"
        raise Refuse(f"the output of attention is read by {names}, expected one output projection", node)
    return readers[0]


def _moves_heads(node: fx.Node) -> bool:
    """Whether `node` makes [B, S, H, D] of [B, H, S, D]."""
    if is_call(node, aten.transpose.int):
        return {axis % 4 for axis in inputs(node)[1:]} == {1, 2}
    return is_call(node, aten.permute.default) and [axis % 4 for axis in inputs(node)[1]] == [0, 2, 1, 3]


def _shape(node: fx.Node) -> str:
    """The shape as text, because symbols compare by guarding."""
    return str(tuple(val(node).shape))


def _weight(projection: fx.Node, data: fx.Node) -> fx.Node:
    """The weight of `projection` as [out, in]."""
    given = arguments(projection)
    name, weight_name, is_in_out = PROJECTIONS[projection.target]
    weight = given[weight_name]
    if given[name] is not data or given.get("alpha", 1) != 1:
        raise Refuse(f"`{projection.name}` is no plain projection of the output of attention", projection)
    if weight.op not in ("placeholder", "get_attr") or val(weight).dim() != 2:
        raise Refuse(f"the output projection's weight `{weight.name}` is computed, expected a parameter", projection)
    if not is_in_out:
        return weight
    with weight.graph.inserting_after(weight):
        return call(weight.graph, aten.t.default, weight)
