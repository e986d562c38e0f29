"""The passes: from a traced decoder to one whose caches keep only what a Plan's score chose.

They know FX graphs of pre-dispatch ATen, the Plan, and the names of kernel ops; policies, models and engines stand above them.
Each pass is a function `(module, plan, report) -> None`. Every attention becomes one waist op, `kvfx::attention`, so that no pass
but the first sees a spelling, and none sees a policy.
"""

from __future__ import annotations

import time

from torch import fx

from kvfx.passes.attach_cache import attach_cache
from kvfx.passes.attach_leaves import attach_leaves
from kvfx.passes.find_attention import find_attention
from kvfx.passes.insert_eviction import insert_eviction
from kvfx.passes.insert_scores import insert_scores
from kvfx.passes.lower import lower
from kvfx.passes.plan import Plan
from kvfx.passes.read_slots import read_slots
from kvfx.passes.report import Report
from kvfx.passes.shorten_reads import shorten_reads
from kvfx.passes.stores import forward_stores
from kvfx.passes.verify import verify
from kvfx.passes.where import locate

PIPELINE = (
    forward_stores,  # before all: what was written to a part of a tensor is then plain to see where it is read
    find_attention,  # everything else starts from sites
    shorten_reads,  # before caches: keys are then the new ones, not all places of a buffer
    attach_leaves,  # before caches: makes a write of each returned tensor that is a layer's keys or values
    attach_cache,  # before scores: a site that writes no cache needs none
    read_slots,  # from here on lengths are physical
    insert_scores,  # before eviction: a score reads the whole prompt
    insert_eviction,  # rewires the cache, after which the full keys and values die early
    lower,  # last: from here on there is plain ATen only
)


def run(module: fx.GraphModule, plan: Plan, *, check_each: bool = False) -> Report:
    """Rewrite `module` in place as `plan` says.

    Args:
        module: a graph of pre-dispatch ATen, see `capture.to_aten`.
        plan: what to score and protect.
        check_each: verify after every pass, not only at the end.

    Returns:
        What was found, done and refused.
    """
    report = Report()
    for apply in PIPELINE:
        start = time.perf_counter()
        apply(module, plan, report)
        locate(module, report)
        report.seconds[apply.__name__] = time.perf_counter() - start
        if check_each:
            verify(module, plan, report, after=apply.__name__)
    verify(module, plan, report)
    report.forget_nodes()
    module.recompile()
    return report
