"""Lower every `kvfx` op: on CUDA to its Triton kernel, if it has one, else to plain ATen: the op's own reference.

Both are what Inductor compiles and fuses with what stands around them: it sees into a Triton operator, and so does AOTInductor.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from kvfx.kernels import OPS, KernelOp
from kvfx.passes.graph import inline, replace, replace_outputs, val
from kvfx.passes.plan import Plan
from kvfx.passes.report import NoKernel, Report, Site
from kvfx.passes.traced_op import trace_of

IMPLS = ("auto", "reference", "triton")


def lower(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Choose a form for each op, as `plan.impl` says.

    Layers of equal shapes share one trace of each reference, mostly that by which a pass put it there.

    Raises:
        NoKernel: `plan.impl` is "triton", and a kernel cannot run.
    """
    for node in list(module.graph.nodes):
        name = _kvfx_op(node)
        if name is None:
            continue
        row = OPS[name]
        reason = None if row.triton is None else _why_not(row, node, plan.impl)
        if row.triton is not None:
            report.lowered[name] = f"reference: {reason}" if reason else report.lowered.get(name, "triton")
        if row.triton is not None and reason is None:
            node.target = row.kernel
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
        site.lowering = _summary(site, report.lowered)


def _why_not(row: KernelOp, node: fx.Node, impl: str) -> str | None:
    """Why an op that has a kernel is not lowered to it; None if it is."""
    if impl == "reference":
        return "asked for"
    arguments: list[Any] = [val(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
    device = next(arg.device for arg in arguments if isinstance(arg, Tensor))
    if impl == "auto" and device.type != "cuda":
        return f"tensors are on {device.type}"
    reason = row.unavailable(device) or row.refusal(*arguments)
    if reason and impl == "triton":
        shapes = ", ".join(str(list(arg.shape)) for arg in arguments if isinstance(arg, Tensor))
        raise NoKernel(
            f"impl='triton', but the kernel of {row.name} cannot run on tensors {shapes} of {device}: {reason}. "
            "With impl='auto' the reference takes its place."
        )
    return reason


def _summary(site: Site, lowered: dict[str, str]) -> str:
    """What runs the ops of a site."""
    ops = [*site.score.split(), *(op for op in ("select", "select_heads", "compact", "compact_into", "pack") if op in lowered)]
    plain = [op for op in ops if lowered.get(op) != "triton"]
    if not site.score or len(plain) == len(ops):
        return "reference"
    return "triton" if not plain else f"triton, but {', '.join(plain)} reference"


def _kvfx_op(node: fx.Node) -> str | None:
    target = str(node.target)
    if node.op != "call_function" or not target.startswith("kvfx."):
        return None
    name = target.split(".")[1]
    return name if name in OPS else None
