"""Link each attention to the write of its keys and values into a cache, and find the tensors that a score will read."""

from __future__ import annotations

from torch import fx

from kvfx.passes.cache_write import WRITE
from kvfx.passes.graph import aten, inputs, is_call
from kvfx.passes.output_weight import output_weight
from kvfx.passes.plan import Plan
from kvfx.passes.pre_rope import before_rope
from kvfx.passes.report import Refusal, Refuse, Report, Site
from kvfx.passes.rotation import FutureRotation


def attach_cache(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Fill in each site's cache spelling and layer; where it evicts, its `cache_write` and the taps of the plan."""
    rotations = [FutureRotation(future) for future in plan.futures]
    for site in report.sites:
        try:
            _attach(site)
            if "write" in site.nodes:
                _tap(site, plan, rotations)
        except Refuse as refuse:
            site.refusal = refuse.reason
    taken = {site.nodes["write"] for site in report.sites if "write" in site.nodes}
    writes = module.graph.find_nodes(op="call_function", target=WRITE)
    report.layers = len(writes)
    for write in writes:
        if write not in taken:
            reason = f"cache layer {write.args[5]} stores keys that no attention found in this graph reads"
            report.refusals.append(Refusal("attach_cache", reason, write.name))


def _attach(site: Site) -> None:
    """The keys that attention reads are new ones, or a growing cache with new ones behind it."""
    key, value = site.nodes["key"], site.nodes["value"]
    if is_call(key, aten.cat.default) and is_call(value, aten.cat.default):
        past_key, new_key = _halves(key)
        _, new_value = _halves(value)
        if past_key.op != "placeholder":
            raise Refuse(f"keys are joined to `{past_key.name}`, which is no input of the graph", key)
        site.cache = "cat"
    else:
        new_key, new_value = key, value
        site.cache = "new"
    write = next((user for user in new_key.users if is_call(user, WRITE) and user.args[0] is new_key), None)
    if write is None:
        if site.cache == "new" and not any(user.op == "output" for user in key.users):
            raise Refuse(f"the keys `{key.name}` that attention reads are not what a cache stores", key)
        return
    if write.args[1] is not new_value:
        raise Refuse(f"the values `{new_value.name}` that attention reads are not what the cache stores", value)
    site.layer = inputs(write)[5]
    site.nodes |= {"write": write, "key": new_key, "value": new_value}


def _halves(cat: fx.Node) -> tuple[fx.Node, fx.Node]:
    tensors, axis = (*inputs(cat), 0)[:2]
    if len(tensors) != 2 or axis not in (2, -2):
        raise Refuse(f"`{cat.name}` joins {len(tensors)} tensors along axis {axis}, expected past and new along axis 2", cat)
    return tensors[0], tensors[1]


def _tap(site: Site, plan: Plan, rotations: list[FutureRotation]) -> None:
    """Record the tensors that the plan's score reads here."""
    nodes = site.nodes
    for tap, roped in (("pre_query", "query"), ("pre_key", "key")):
        if tap in plan.taps:
            nodes[tap] = before_rope(nodes[roped])
    if "output_weight" in plan.taps:
        nodes["output_weight"] = output_weight(nodes["attention"])
    for rotation in rotations:
        made = rotation.of(nodes["query"], inputs(nodes["write"])[2], before=nodes["attention"])
        if made is not None:
            nodes[f"rotation_{rotation.future}"] = made
    site.taps = plan.taps
