"""Engine: the compiled steps of one model. All compressed models made from it share them.

A step is one forward over new tokens against the slots held. What a step evicts is in its graph; how much is an input. So all keeps
of a policy share one prefill graph, and all policies that store dense caches share one decode graph.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from kvfx import hf, passes
from kvfx.errors import KernelUnavailable, KvfxError, SiteRefused, UnsupportedModel
from kvfx.passes import capture
from kvfx.passes.plan import Plan
from kvfx.passes.report import LayersFail, NoKernel, Report
from kvfx.slot_cache import SlotCache

STORE_ALL = Plan(score=None)


def step(
    model: nn.Module,
    slots: SlotCache,
    seen: Tensor,
    valid: Tensor | None,
    tokens: dict[str, Tensor],
    options: dict[str, Any],
    takes_positions: bool,
) -> tuple[Any, Tensor]:
    """One forward, as it is traced.

    Args:
        model: a transformers decoder.
        slots: the cache as the model shall see it.
        seen: real tokens seen per row, [B] int64.
        valid: which new tokens are real, [B, S] bool, or None if all are.
        tokens: `input_ids` [B, S] or `inputs_embeds` [B, S, hidden].
        options: further arguments of the model.
        takes_positions: whether the model has an argument `position_ids`.

    Returns:
        The model's output, and the real tokens seen after it.
    """
    length = next(iter(tokens.values())).shape[1]
    slots.seen, slots.valid = seen, valid
    if valid is None:
        position_ids = seen[:, None] + torch.arange(length, device=seen.device)
        slots.positions = position_ids.int()
        seen_after = seen + length
    else:
        index = seen[:, None] + valid.long().cumsum(-1) - 1
        position_ids = index.where(valid, 0)
        slots.positions = index.where(valid, -1).int()
        seen_after = seen + valid.sum(-1)
    mask = slots.token_mask(seen, valid, length)
    if takes_positions:
        options = {**options, "position_ids": position_ids}
    out = model(attention_mask=mask, past_key_values=slots, use_cache=True, **tokens, **options)
    slots.end(seen_after)
    return out, seen_after


class StepKey(NamedTuple):
    """What decides which compiled function runs a step; each has the few graphs that its lengths need.

    Attributes:
        phase: "prefill", "extend" or "decode".
        plan: what is evicted.
        on_refuse: what to do about sites that are not understood.
        uneven: what makes rows or layers differ: counts, valid, empty, layers, whole, asked; and "static" or "ragged", the layout.
    """

    phase: str
    plan: Plan
    on_refuse: str
    uneven: tuple[str, ...]


class Engine:
    """The compiled steps of one model on one backend. It does not keep the model alive.

    Attributes:
        reports: what the passes did to each graph, by the key of its step.
        whole: cache layers that are kept whole, because no attention is understood that reads them.
        counts_columns: whether a graph behind a cache has a bias per head, see `passes.report.Report`.
        counts_tokens: whether the model is always shown a mask behind a static cache: without one it counts the tokens seen.
    """

    def __init__(self, name: str, backend: str, impl: str = "auto") -> None:
        self.name = name
        self.backend = backend
        self.impl = impl
        self.reports: dict[StepKey, list[Report]] = {}
        self.whole: frozenset[int] = frozenset()
        self.counts_columns = False
        self.counts_tokens = False
        self._ran: set[StepKey] = set()
        self._like: list[tuple[Tensor, Tensor]] | None = None
        self._steps: dict[StepKey, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def slots_like(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of one token in each layer of the cache, for their shapes and types."""
        if self._like is None:
            self._like = hf.one_token(model)
        return self._like

    def has_run(self, phase: str, uneven: str) -> bool:
        """Whether such a step has come to its end before."""
        return any(key.phase == phase and uneven in key.uneven for key in self._ran)

    def run(self, model: nn.Module, phase: str, plan: Plan, on_refuse: str, slots: SlotCache, *inputs: Any) -> tuple[Any, Tensor]:
        """Run one step; compile it if its like has not run before.

        Args:
            model: the plain model; its parameters are used where they are.
            phase: "prefill", "extend" or "decode"; only keeps their graphs apart.
            plan: what the step evicts.
            on_refuse: "warn" or "error".
            slots: the cache as the model shall see it.
            inputs: the further arguments of `step`.

        Raises:
            Stranded: layers that evicted are read by what is not understood.
            Unscored: scores are asked of layers that are read by what is not understood.
        """
        if plan.score is None:
            on_refuse = "warn"  # nothing is evicted, so nothing can be refused
        uneven = {
            "counts": slots.counts is not None,
            "valid": inputs[1] is not None,
            "empty": slots.empty,
            "layers": len(slots.sizes or ()) > 1,
            "whole": bool(slots.whole),
            "asked": bool(slots.asked),
            "static": slots.layout == "static",
            "ragged": slots.layout == "ragged",
        }
        key = StepKey(phase, plan, on_refuse, tuple(name for name, there in uneven.items() if there))
        return self.run_step(key, step, model, slots, *inputs)

    def run_step(self, key: StepKey, step: Callable[..., Any], *arguments: Any) -> Any:
        """Run `step(*arguments)`, rewritten as `key` says; compile it if its like has not run before."""
        with self._lock:
            if key not in self._steps:
                self._steps[key] = capture.compile_with(step, self._rewrite(key), self.backend)
        try:
            with torch.no_grad():
                out = self._steps[key](*arguments)
        except capture.CompileError as error:
            raise _unwrap(error, self.name) from error
        self._ran.add(key)
        return out

    def _rewrite(self, key: StepKey) -> Callable[[fx.GraphModule], None]:

        def rewrite(module: fx.GraphModule) -> None:
            report = passes.run(module, replace(key.plan, impl=self.impl))
            if key.plan.score is not None:
                judge(report, self.name, key.on_refuse)
            self.reports.setdefault(key, []).append(report)
            self.whole |= frozenset(report.whole)
            self.counts_columns |= report.counts_columns

        return rewrite


def judge(report: Report, model: str, on_refuse: str) -> None:
    """Complain about what was left alone."""
    if not report.sites:
        found = ", ".join(f"{n} x {op}" for op, n in sorted(report.leftovers.items())) or "no attention-like op at all"
        refused = "".join(f"\n  {reason}" for reason in report.reasons())
        raise UnsupportedModel(
            f"no attention was recognised in {model}. Found instead: {found}.{refused}\n"
            "Expected values weighed by a softmax of queries times keys; try attn_implementation='sdpa'."
        )
    if not report.layers and any(site.window for site in report.sites):
        windows = sorted({site.window for site in report.sites if site.window})
        warnings.warn(
            f"no cache layer of {model} is compressed: all hold sliding windows, of {windows} tokens, which no policy touches",
            stacklevel=2,
        )
    if not report.reasons():
        return
    text = (
        f"{len(report.compressed)} of {report.layers} cache layers of {model} are compressed; the others are kept whole:\n  "
        + "\n  ".join(report.reasons())
    )
    if on_refuse == "error":
        raise SiteRefused(text + "\nPass on_refuse='warn' to go on with what is understood.")
    warnings.warn(text, stacklevel=2)


def refused(name: str, stranded: LayersFail) -> SiteRefused:
    """Why what follows a layer that evicted cannot be computed."""
    return SiteRefused(
        f"slots were evicted from the cache of {name}, or have fixed places in it, but what reads the cache is not understood, so "
        f"that the next tokens cannot be computed:\n  {stranded}\nCompress with another policy, or with none, into a kvfx.Cache."
    )


def _unwrap(error: BaseException, model: str) -> BaseException:
    """The error of ours inside one of Dynamo's, or what Dynamo could not trace."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (KvfxError, LayersFail)):
            return inner
        if isinstance(inner, NoKernel):
            return KernelUnavailable(f"{model}: {inner}")
        inner = getattr(inner, "inner_exception", None) or inner.__cause__ or inner.__context__
    if capture.is_graph_break(error):
        return UnsupportedModel(f"{model} cannot be traced as one graph, so nothing was compressed: {str(error).splitlines()[0]}")
    return error


_ENGINES: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], Engine]] = weakref.WeakKeyDictionary()
_ENGINES_LOCK = threading.Lock()


def engine_of(model: nn.Module, backend: str, impl: str = "auto") -> Engine:
    """The engine that all compressed models of `model` share, on one backend and one implementation of kernel ops."""
    with _ENGINES_LOCK:
        engines = _ENGINES.setdefault(model, {})
        return engines.setdefault((backend, impl), Engine(type(model).__name__, backend, impl))
