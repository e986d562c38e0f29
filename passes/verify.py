"""What must hold of a graph between passes, as a table: name, predicate, what a violation means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from kvfx.passes import capture
from kvfx.passes.cache_write import writes_of
from kvfx.passes.graph import schema_of
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report


def _without_value(module: fx.GraphModule, plan: Plan, report: Report) -> Iterator[str]:
    for node in module.graph.nodes:
        if node.op in ("call_function", "placeholder", "get_attr") and "val" not in node.meta and not _is_assertion(node):
            yield f"{node.name} has no meta['val']"


def _is_assertion(node: fx.Node) -> bool:
    """Whether `node` calls an op that returns nothing."""
    return hasattr(node.target, "_schema") and not schema_of(node.target).returns


def _wrong_type(module: fx.GraphModule, plan: Plan, report: Report) -> Iterator[str]:
    for site in report.sites:
        for name in ("score", "first"):
            node = site.nodes.get(name)
            if node is not None and not node._erased and node.meta["val"].dtype != torch.float32:
                yield f"{site.name}: {name} is {node.meta['val'].dtype}, expected float32"


def _unattached(module: fx.GraphModule, plan: Plan, report: Report) -> Iterator[str]:
    for site in report.sites:
        if plan.score is not None and "write" in site.nodes and not site.refusal and not site.taps:
            yield f"{site.name} evicts, but no tensor is tapped for its score"


def _left_behind(module: fx.GraphModule, plan: Plan, report: Report) -> Iterator[str]:
    for node in writes_of(module.graph):
        yield f"{node.name} still stands; nothing decided what it keeps"


def _not_lowered(module: fx.GraphModule, plan: Plan, report: Report) -> Iterator[str]:
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and name.startswith("kvfx.") and not name.endswith("_triton.default"):
            yield f"{node.name} is still {node.target}"


def _early_death(module: fx.GraphModule, plan: Plan, report: Report) -> Iterator[str]:
    if report.compressed and not capture.frees_memory_early():
        yield "torch._inductor.config.reorder_for_peak_memory is off: a layer's full cache would outlive its layer"


Check = Callable[[fx.GraphModule, Plan, Report], Iterator[str]]

ALWAYS: tuple[Check, ...] = (_without_value, _wrong_type)
AFTER: dict[str, tuple[Check, ...]] = {
    "attach_cache": (_unattached,),
    "insert_eviction": (_left_behind,),
    "lower": (_left_behind, _not_lowered, _early_death),
}


def verify(module: fx.GraphModule, plan: Plan, report: Report, after: str = "lower") -> None:
    """Check the graph.

    Raises:
        AssertionError: an invariant is broken; a bug of the pass `after`, not of the user.
    """
    module.graph.lint()
    broken = [line for check in (*ALWAYS, *AFTER.get(after, ())) for line in check(module, plan, report)]
    if broken:
        raise AssertionError(f"graph is broken after {after}:\n  " + "\n  ".join(broken))
