"""Kernel ops in a graph: each is traced once, which says what it yields and is what `lower` inlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvfx.kernels import OPS
from kvfx.passes import capture
from kvfx.passes.graph import val

Traces = dict[Any, fx.Graph]


def call_op(graph: fx.Graph, traces: Traces, name: str, *args: Any) -> fx.Node:
    """Add `kvfx::name(*args)` at the insertion point, with its fake value, which calls on arguments of the same kind share."""
    node = graph.create_node("call_function", getattr(torch.ops.kvfx, name).default, args, name=name)
    node.meta["val"] = fx.map_arg(trace_of(traces, name, args).output_node().args[0], val)
    return node


def trace_of(traces: Traces, name: str, args: Sequence[Any]) -> fx.Graph:
    """The op's reference as ATen, for arguments like these; the nodes among them are its placeholders."""
    key = (name, tuple(_kind(arg) for arg in args))
    if key not in traces:
        traces[key] = _trace(OPS[name].reference, args)
    return traces[key]


def _kind(arg: Any) -> Any:
    """What decides the trace of an op: shapes, strides and types of tensors, the values of everything else."""
    if not isinstance(arg, fx.Node):
        return arg
    value = val(arg)
    if isinstance(value, Tensor):
        return (str(value.dtype), str(tuple(value.shape)), str(value.stride()), str(value.device))
    return str(value)


def _trace(reference: Any, args: Sequence[Any]) -> fx.Graph:
    def body(*tensors: Any) -> Any:
        values = iter(tensors)
        return reference(*(next(values) if isinstance(arg, fx.Node) else arg for arg in args))

    graph = capture.trace(body, *(val(arg) for arg in args if isinstance(arg, fx.Node))).graph
    for node in graph.find_nodes(op="get_attr"):
        raise AssertionError(f"{reference.__name__} makes a tensor constant ({node.target}); build it from ops instead")
    return graph
