"""Recover the query or key before RoPE by dataflow, not by template.

RoPE multiplies token data by something that depends on the position alone. Walking up from the roped tensor, everything that still
descends from such a product is roped; the unroped token data that enter there are the tensor before RoPE, whole or in pieces
(halves, pairs, a rotated part beside a passed-through one). The pieces of one tensor lead back to it through views.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from kvfx.passes.axes import Order, ordered, peel
from kvfx.passes.graph import VIEWS, aten, inputs, is_call, slice_of, val
from kvfx.passes.report import Refuse

MULTIPLY = (aten.mul.Tensor, aten.einsum.default)
CASTS = frozenset({aten.to.dtype, aten._to_copy.default})
PAIRS = frozenset({aten.view_as_complex.default, aten.view_as_real.default})  # channels in pairs, which RoPE turns as one number
PIECES = VIEWS | PAIRS | {aten.neg.default, aten.cat.default, aten.stack.default, aten.copy.default}


@dataclass(frozen=True)
class Rope:
    """What RoPE does to one query or key.

    Attributes:
        before: the tensor before RoPE, with its axes as RoPE sees them.
        order: which of its axes stand where in the roped tensor.
        inside: the nodes that lead from its pieces to the roped tensor, that last, in graph order.
        entries: the pieces that they read.
        factors: what they read that depends on positions alone.
    """

    before: fx.Node
    order: Order
    inside: tuple[fx.Node, ...]
    entries: frozenset[fx.Node]
    factors: frozenset[fx.Node]


def before_rope(tensor: fx.Node) -> fx.Node:
    """The node that holds the query or key `tensor` before RoPE, with the same shape; `tensor` itself in a model without RoPE.

    Raises:
        Refuse: see `rope_of`.
    """
    rope = rope_of(tensor)
    if rope is None:
        return tensor
    with tensor.graph.inserting_after(rope.before):
        return ordered(rope.before, rope.order)


def rope_of(tensor: fx.Node) -> Rope | None:
    """The RoPE of the query or key `tensor`; None in a model without RoPE.

    Raises:
        Refuse: the pieces that RoPE reads do not lead back to one tensor of the same shape.
    """
    ancestors = slice_of([tensor])
    token = _token_data(tensor.graph, ancestors)
    position = _position_data(tensor.graph, ancestors - token)
    roped = _roped(tensor.graph, ancestors & token, position)
    if tensor not in roped:
        return None
    inside = _down_to(tensor, roped)
    read = {source for node in inside for source in node.all_input_nodes}
    entries = frozenset((read & token) - roped)
    nodes = tuple(node for node in tensor.graph.nodes if node in inside)
    before, order = _whole(entries, tensor)
    return Rope(before, order, nodes, entries, frozenset(read & position))


def _token_data(graph: fx.Graph, ancestors: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose value depends on the tokens: whatever descends from an embedding or from given embeddings."""
    token: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in ancestors:
            continue
        starts = is_call(node, aten.embedding.default) or "inputs_embeds" in node.meta.get("source", "")
        if starts or (_is_tensor(node) and any(source in token for source in node.all_input_nodes)):
            token.add(node)
    return token


def _position_data(graph: fx.Graph, others: set[fx.Node]) -> set[fx.Node]:
    """Nodes that know where a token stands: what descends from a range or from an integer input."""
    position: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in others or not _is_tensor(node):
            continue
        is_index = node.op == "placeholder" and not val(node).is_floating_point()
        is_range = is_call(node, aten.arange.default, aten.arange.start, aten.arange.start_step)
        if is_index or is_range or any(source in position for source in node.all_input_nodes):
            position.add(node)
    return position


def _roped(graph: fx.Graph, token: set[fx.Node], position: set[fx.Node]) -> set[fx.Node]:
    """Token data that were multiplied by position data, since the last time they were mixed over the channels."""
    roped: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in token or _projects(node):
            continue
        product = is_call(node, *MULTIPLY) and any(source in position for source in node.all_input_nodes)
        if product or any(source in roped for source in node.all_input_nodes):
            roped.add(node)
    return roped


def _projects(node: fx.Node) -> bool:
    """Whether `node` makes new token data, so that what was done to its input no longer shows."""
    return is_call(
        node, aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
        aten.embedding.default, aten.layer_norm.default,
    )  # fmt: skip


def _down_to(tensor: fx.Node, roped: set[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [tensor]
    while todo:
        node = todo.pop()
        if node in roped and node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen


def _whole(entries: frozenset[fx.Node], tensor: fx.Node) -> tuple[fx.Node, Order]:
    """The nearest tensor of the roped one's shape that all entries are pieces of; or of its shape before its axes moved."""
    chains = [_chain(entry) for entry in sorted(entries, key=lambda node: node.name)]
    for roped, order in ((tensor, tuple(range(val(tensor).dim()))), _peel(tensor)):
        for candidate in chains[0] if chains else ():
            if _shape(candidate) == _shape(roped) and all(candidate in chain for chain in chains):
                return candidate, order
    names = ", ".join(f"`{chain[0].name}`" for chain in chains)
    reason = f"{names or 'nothing'} does not lead back to one tensor of shape {_shape(tensor)}"
    raise Refuse(f"`{tensor.name}` before RoPE was not found: {reason}", tensor)


def _peel(node: fx.Node) -> tuple[fx.Node, Order]:
    """What `node` is a reordering of, whatever its type, and which of its axes stands at each place."""
    node, order = peel(node)
    while is_call(node, *CASTS):
        node, moved = peel(inputs(node)[0])
        order = tuple(moved[axis] for axis in order)
    return node, order


def _chain(node: fx.Node) -> list[fx.Node]:
    """`node` and what it is a piece of, nearest first. Joined pieces continue with what all of them are pieces of."""
    if not is_call(node, *PIECES):
        return [node]
    chains = [_chain(source) for source in node.all_input_nodes if _is_tensor(source)]
    return [node, *(step for step in chains[0] if all(step in chain for chain in chains))]


def _shape(node: fx.Node) -> str | None:
    """The shape as text, because symbols compare by guarding; None for a tuple of tensors."""
    return str(tuple(val(node).shape)) if isinstance(val(node), Tensor) else None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))
