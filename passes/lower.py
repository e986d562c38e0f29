"""Lower every `kvfx` op to plain ATen: the op's own reference, which Inductor fuses and compiles.

An op whose row names a Triton kernel will lower to that on CUDA; no row does yet, so CUDA gets the reference too.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvfx.kernels import OPS
from kvfx.passes import capture
from kvfx.passes.graph import inline, kind, replace, replace_outputs, val
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report


def lower(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Inline references. Layers of equal shapes share one trace of each op."""
    traced: dict[Any, fx.Graph] = {}
    for node in list(module.graph.nodes):
        name = _kvfx_op(node)
        if name is None:
            continue
        inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
        key = (name, tuple(kind(arg) for arg in node.args))
        if key not in traced:
            traced[key] = _trace(OPS[name].reference, node.args, inputs)
        result = inline(module.graph, traced[key], inputs, before=node)
        if isinstance(result, (tuple, list)):
            replace_outputs(node, result)
        else:
            replace(node, result)
    for site in report.sites:
        site.lowering = "reference"


def _kvfx_op(node: fx.Node) -> str | None:
    target = str(node.target)
    if node.op != "call_function" or not target.startswith("kvfx."):
        return None
    name = target.split(".")[1]
    return name if name in OPS else None


def _trace(reference: Any, args: Any, inputs: list[fx.Node]) -> fx.Graph:
    def body(*tensors: Any) -> Any:
        values = iter(tensors)
        return reference(*(next(values) if isinstance(arg, fx.Node) else arg for arg in args))

    graph = capture.trace(body, *(val(node) for node in inputs)).graph
    for node in graph.find_nodes(op="get_attr"):
        raise AssertionError(f"{reference.__name__} makes a tensor constant ({node.target}); build it from ops instead")
    return graph
