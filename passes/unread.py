"""What falls away once reads of a cache are replaced by what was written: copies of arguments, and writes that nothing reads."""

from __future__ import annotations

from torch import fx

from kvfx.passes.graph import aten, inputs, replace, val
from kvfx.passes.store_spellings import below, writes


def drop_needless_copies(graph: fx.Graph) -> None:
    """Let what reads a copy of an argument read the argument, if nothing writes to the copy."""
    written = {below(inputs(node)[0]) for node in graph.nodes if writes(node)}
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        source: fx.Node = inputs(copy)[0]
        alike = source.op == "placeholder" and str(val(copy).stride()) == str(val(source).stride())
        if alike and not {copy, source} & written and len(copy.args) == 1 and not copy.kwargs:
            replace(copy, source)


def drop_unread(graph: fx.Graph) -> None:
    """Remove writes to tensors that nothing reads but what is written to them."""
    written: dict[fx.Node, list[fx.Node]] = {}
    todo = [graph.output_node()]
    for node in graph.nodes:
        if writes(node):
            written.setdefault(below(inputs(node)[0]), []).append(node)
        if node.op == "call_function" and node.is_impure() and (not writes(node) or below(inputs(node)[0]).op != "call_function"):
            todo.append(node)
    alive: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in alive:
            alive.add(node)
            todo += node.all_input_nodes
            todo += written.get(below(node), [])
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node not in alive:
            graph.erase_node(node)
