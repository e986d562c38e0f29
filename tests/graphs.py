"""Graphs for tests: traced steps of a model, and how to print them for people."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from kvfx.cache import CacheLayer
from kvfx.engine import step
from kvfx.passes import PIPELINE, capture
from kvfx.passes.cache_write import size_of
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report
from kvfx.slot_cache import SlotCache


def traced_step(model, ids: Tensor, valid: Tensor | None = None, keep: int | None = None, past: int = 0) -> fx.GraphModule:
    """The graph of one step, before any pass: a prefill, or a forward behind `past` slots."""
    caught: list[fx.GraphModule] = []
    run = capture.compile_with(step, caught.append, "eager")
    batch, device = ids.shape[0], ids.device
    layers = [CacheLayer() for _ in range(model.config.num_hidden_layers)]
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    for layer in layers if past else ():
        layer.store(torch.randn(batch, heads, past, dim), torch.randn(batch, heads, past, dim))
        layer.prefix = torch.arange(past, dtype=torch.int32).expand(batch, heads, -1).contiguous()
        for tensor in (layer.keys, layer.values, layer.prefix):
            capture.mark_dynamic(tensor, 2)
    size = None if keep is None else size_of(keep, device)
    length = size_of(past, device) if past else None
    counts = None if valid is None or keep is None else [torch.full((batch,), keep)]
    for tensor in (ids, valid):
        if tensor is not None:
            capture.mark_dynamic(tensor, 1)
    for carrier in (size, length):
        if carrier is not None:
            capture.mark_dynamic(carrier, 0)
    seen, start = torch.full((batch,), past), torch.full((batch,), past)
    slots = SlotCache(layers, None if size is None else [size], counts, length, start)
    try:
        with torch.no_grad():
            run(model, slots, seen, valid, {"input_ids": ids}, {}, True)
    except RuntimeError:
        # A marker that no pass has replaced cannot run; the graph is what was wanted.
        if not caught:
            raise
    return caught[0]


def passes_until(last: str) -> list[Callable[[fx.GraphModule, Plan, Report], None]]:
    """The passes in order, up to the one of that name."""
    names = [apply.__name__ for apply in PIPELINE]
    return list(PIPELINE[: names.index(last) + 1])


def computed(module: fx.GraphModule, nodes: list[fx.Node], **inputs: object) -> tuple[Tensor, ...]:
    """What `nodes` hold when the step behind the graph is given `inputs`: model, tokens, seen and valid, by the names in `step`."""
    output = module.graph.output_node()
    output.args = (tuple(nodes),)
    module.graph.eliminate_dead_code()
    module.recompile()
    places = module.graph.find_nodes(op="placeholder")
    # A placeholder's source is how Dynamo reads it from the step's arguments: L['model']...
    return module(*(eval(place.meta["source"], {"L": inputs}) if place.users else None for place in places))


def readable(module: fx.GraphModule) -> str:
    """One line per node: name, what is called, on what."""
    lines = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name} = input {node.meta.get('source', '')}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        else:
            arguments = [repr(arg) if isinstance(arg, str) else str(arg) for arg in node.args]
            arguments += [f"{name}={value}" for name, value in node.kwargs.items()]
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            target = str(node.target) if "OpOverload" in type(node.target).__name__ else target
            lines.append(f"{node.name} = {target}({', '.join(arguments)})")
    return "\n".join(lines) + "\n"
