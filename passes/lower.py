"""Lower every `kvfx` op to plain ATen: the op's own reference, which Inductor fuses and compiles.

An op whose row names a Triton kernel will lower to that on CUDA; no row does yet, so CUDA gets the reference too.
"""

from __future__ import annotations

from torch import fx

from kvfx.kernels import OPS
from kvfx.passes.graph import inline, replace, replace_outputs
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report
from kvfx.passes.traced_op import trace_of


def lower(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Inline references. Layers of equal shapes share one trace of each op, mostly that by which a pass put it there."""
    for node in list(module.graph.nodes):
        name = _kvfx_op(node)
        if name is None:
            continue
        inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
        result = inline(module.graph, trace_of(report.traces, name, node.args), inputs, before=node)
        if result is None:  # it writes to its arguments
            module.graph.erase_node(node)
        elif isinstance(result, (tuple, list)):
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
