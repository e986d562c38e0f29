"""FX helpers: the dozen questions and edits that the passes share."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from kvfx.passes import capture

aten = torch.ops.aten

# Ops that move or relabel elements and compute nothing.
VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.expand.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.to.dtype,
        aten._to_copy.default,
        operator.getitem,
    }
)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_whole_slice(node: Any) -> bool:
    """Whether `node` slices off nothing, as indexing with `[:]` leaves behind."""
    if not is_call(node, aten.slice.Tensor):
        return False
    _, _, start, end, step = (list(node.args) + [0, None, None, 1][len(node.args) - 1 :])[:5]
    return start in (0, None) and (end is None or (isinstance(end, int) and end >= sys.maxsize)) and step == 1


def val(node: fx.Node) -> Any:
    """What `node` yields, as a fake tensor, a symbol or a tuple of them."""
    return node.meta["val"]


def inputs(node: fx.Node) -> list[Any]:
    """Positional arguments, as the schema of the called op makes them: nodes, numbers, lists or None."""
    return list(node.args)


def schema_of(target: Any) -> Any:
    """The schema of an ATen or kvfx op."""
    return target._schema


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by name, defaults filled in."""
    schema = schema_of(node.target)
    named = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    named |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return named | dict(node.kwargs)


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Add `target(*args, **kwargs)` at the insertion point, with its fake value."""
    name = getattr(target, "_opname", target.__name__)
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), val)
    with capture.fake_mode_of((fake_args, fake_kwargs)):
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def constant(module: fx.GraphModule, name: str, tensor: torch.Tensor, like: torch.Tensor) -> fx.Node:
    """Read buffer `name`, holding `tensor` on the device of the fake `like`, at the insertion point."""
    if not hasattr(module, name):
        module.register_buffer(name, tensor.to(like.device), persistent=False)
    node = module.graph.get_attr(name)
    with capture.fake_mode_of([like]):
        node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=like.device)
    return node


def inline(graph: fx.Graph, body: fx.Graph, args: Sequence[Any], before: fx.Node) -> Any:
    """Copy `body` in front of `before` with `args` for its placeholders; what it returns."""
    placeholders = body.find_nodes(op="placeholder")
    with graph.inserting_before(before):
        return graph.graph_copy(body, dict(zip(placeholders, args, strict=True)))


def replace_outputs(node: fx.Node, outputs: Sequence[Any]) -> None:
    """Replace a node with several outputs by one value each, and erase it."""
    for user in list(node.users):
        user.replace_all_uses_with(outputs[inputs(user)[1]])
        user.graph.erase_node(user)
    node.graph.erase_node(node)


def replace(node: fx.Node, other: fx.Node) -> None:
    """Let `other` stand in for `node`, and erase it. `other` was written where `node` was."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in node.meta:
            other.meta.setdefault(key, node.meta[key])
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def sort_topologically(graph: fx.Graph) -> None:
    """Move each node behind its inputs, and no further than needed."""
    placed: set[fx.Node] = set()
    for node in list(graph.nodes):
        _place(node, placed)


def _place(node: fx.Node, placed: set[fx.Node]) -> None:
    stack = [node]
    while stack:
        top = stack[-1]
        if top in placed:
            stack.pop()
        elif late := [source for source in top.all_input_nodes if source not in placed]:
            stack.extend(late)
        else:
            if top is not node:
                node.prepend(top)
            placed.add(stack.pop())


def slice_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that `nodes` are computed from, themselves included."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen
