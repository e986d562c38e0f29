"""The passes: from a traced decoder to one whose caches keep only what a Plan's score chose.

They know FX graphs of pre-dispatch ATen, the Plan, and the names of kernel ops; policies, models and engines stand above them.
Each pass is a function `(module, plan, report) -> None`. Every attention becomes one waist op, `kvfx::attention`, so that no pass
but the first sees a spelling, and none sees a policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import fx
from torch.export import ExportedProgram

from kvfx.passes import capture
from kvfx.passes.attach_cache import attach_cache
from kvfx.passes.attach_leaves import attach_leaves
from kvfx.passes.exported import commit, name_caches, open_program, read_lengths, write_results
from kvfx.passes.find_attention import find_attention
from kvfx.passes.insert_eviction import insert_eviction
from kvfx.passes.insert_scores import insert_scores
from kvfx.passes.lower import lower
from kvfx.passes.new_states import take_new_states
from kvfx.passes.plan import Plan
from kvfx.passes.read_slots import read_slots
from kvfx.passes.report import Report
from kvfx.passes.shorten_reads import shorten_reads
from kvfx.passes.stores import forward_stores
from kvfx.passes.verify import verify
from kvfx.passes.where import locate

Pass = Callable[[fx.GraphModule, Plan, Report], None]

PIPELINE: tuple[Pass, ...] = (
    forward_stores,  # before all: what was written to a part of a tensor is then plain to see where it is read
    find_attention,  # everything else starts from sites
    shorten_reads,  # before caches: keys are then the new ones, not all places of a buffer
    take_new_states,  # before caches: what is stored of a returned past is then what attention reads
    attach_leaves,  # before caches: makes a write of each returned tensor that is a layer's keys or values
    attach_cache,  # before scores: a site that writes no cache needs none
    read_slots,  # from here on lengths are physical
    insert_scores,  # before eviction: a score reads the whole prompt
    insert_eviction,  # rewires the cache, after which the full keys and values die early
    lower,  # last: from here on there is plain ATen only
)

# Of exported programs: a prefill, and what only gets its attention lowered.
PREFILL_PROGRAM: tuple[Pass, ...] = (
    forward_stores,
    find_attention,
    shorten_reads,
    write_results,  # before caches: makes a write of each result that is a layer's keys or values
    attach_cache,
    insert_scores,
    insert_eviction,
    lower,
    read_lengths,  # after all: nothing outside a program says how much to keep
)
OTHER_PROGRAM: tuple[Pass, ...] = (find_attention, name_caches, lower)


def run(
    module: fx.GraphModule | ExportedProgram, plan: Plan, *, check_each: bool = False, marked: bool = False, ask_small: bool = False
) -> Report:
    """Rewrite `module` in place as `plan` says.

    An exported program that is run with a score is a prefill: a forward without a past, of rows without padding, whose positions
    count from 0. Each of its results that is the keys or the values that an attention reads is replaced by what `plan.keep` keeps
    of it; results keep their number, order and axes. A plan without a score only lowers attention, which is what a decode step
    needs. What comes out is an ordinary program, and `report.narrowed` says where it takes fewer lengths than it did.

    A program that was traced with a cache of kvfx is rewritten as any graph: markers in it say what is stored, and how much of it.

    Args:
        module: a graph of pre-dispatch ATen, see `capture.to_aten`; or an exported program, decomposed by `run_decompositions({})`
            unless it is marked. It is left as it was if a pass raises.
        plan: what to score and protect.
        check_each: verify after every pass, not only at the end.
        marked: whether an exported program was traced with a cache of kvfx.
        ask_small: whether ops in an exported program may ask about sizes, see `capture.editing`. The default is that they may where
            nothing else works.

    Returns:
        What was found, done and refused.

    Raises:
        ValueError: an exported program is not decomposed, or `plan` does not say how much a prefill keeps.
    """
    if isinstance(module, ExportedProgram):
        try:
            return _run_exported(module, plan, check_each, marked, ask_small)
        except capture.NeedsSizes:
            return _run_exported(module, plan, check_each, marked, ask_small=True)
    report = Report()
    _apply(PIPELINE, module, plan, report, check_each)
    return report


def _run_exported(program: ExportedProgram, plan: Plan, check_each: bool, marked: bool, ask_small: bool = False) -> Report:
    passes = PIPELINE if marked else OTHER_PROGRAM if plan.score is None else PREFILL_PROGRAM
    if passes is PREFILL_PROGRAM and plan.keep is None:
        raise ValueError("a plan for an exported prefill says how much is kept: Plan(..., keep=Keep(1, 2)); this one does not")
    report = Report()
    with capture.editing(program, ask_small) as narrowed:
        copied = open_program(program, functional=not marked)
        _apply(passes, copied, plan, report, check_each)
        if not ask_small:
            capture.check_sizes(copied, program.graph_module)
        commit(program, copied)
    report.narrowed = tuple(narrowed)
    return report


def _apply(passes: tuple[Pass, ...], module: fx.GraphModule, plan: Plan, report: Report, check_each: bool) -> None:
    for apply in passes:
        start = time.perf_counter()
        apply(module, plan, report)
        locate(module, report)
        report.seconds[apply.__name__] = time.perf_counter() - start
        if check_each:
            verify(module, plan, report, after=apply.__name__)
    verify(module, plan, report)
    report.forget_nodes()
    module.recompile()
