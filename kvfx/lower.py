"""From a policy to the Plan that the passes read.

The fraction kept is not part of a Plan, so policies that differ in it alone share their graphs. (`blend=removed` is the
exception: it weighs a score by that fraction.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from kvfx import algebra
from kvfx.errors import PolicyError
from kvfx.passes import plan
from kvfx.passes.plan import Keep, Plan
from kvfx.policy import PREFILL, Policy

OPS = {"+": "add", "-": "sub", "*": "mul"}


def lower(policy: Policy, sketches: Sequence[Tensor] | None = None) -> Plan:
    """Return the Plan of a policy.

    Args:
        policy: what to keep.
        sketches: per layer, a matrix `[Hkv, D, size]` or `[B, Hkv, D, size]` in place of the one drawn from the seed.
    """
    if policy.score is None or policy.budget is None:
        return Plan(None)
    among_heads: dict[str, Any] = {}
    if policy.budget.pool == "heads":
        among_heads = {"floor": policy.budget.floor, "least": policy.budget.sure}
    lowered = Plan(
        _expr(policy.score, policy.budget.keep),
        policy.protect.sinks,
        policy.protect.recent,
        shared=policy.align == "shared",
        chunk=policy.unit.arg or 0,
        per=policy.budget.per.arg or 0,
        later=policy.budget.pool == "blocks",
        **among_heads,
    )
    if sketches is None:
        return lowered
    sizes = {call.sketch.size for call in lowered.calls() if call.sketch}
    if {sketch.shape[-1] for sketch in sketches} != sizes:
        shapes = ", ".join(sorted({str(list(sketch.shape)) for sketch in sketches}))
        raise PolicyError(
            f"sketches of shape {shapes or 'none'} do not fit {policy.name}, whose sketches have "
            f"{' and '.join(map(str, sorted(sizes))) or 'no'} columns. Give one [Hkv, D, size] per layer, or none."
        )
    return replace(lowered, sketches=tuple(sketches), sketch_digest=sketch_digest(sketches))


def lower_step(policy: Policy) -> Plan:
    """Return the Plan of a step that evicts nothing: of one token, or a block of them, behind a prompt."""
    power, _ = policy.received or (0, 0)
    return Plan(None, received=power if policy.when != PREFILL else 0)


def lower_program(policy: Policy, windows: Sequence[int | None] = (), sketches: Sequence[Tensor] | None = None) -> Plan:
    """Return the Plan of a policy for an exported prefill, in which nothing but the Plan says how much is kept.

    Args:
        policy: what to keep.
        windows: of each cache layer the tokens that its sliding window sees, or None, as `hf.windows` lists them. Layers with
            windows are left whole. If none are given, all layers are taken to see everything.
        sketches: see `lower`.

    Raises:
        PolicyError: the policy cannot be part of a program; the message says why.
    """
    plan = lower(policy, sketches)
    if policy.score is None or policy.budget is None:
        return plan
    budget = policy.budget
    if budget.pool != "uniform":
        competing = "heads" if budget.pool == "blocks" else budget.pool
        raise PolicyError(
            f"{policy.name} cannot be exported: how many slots each of the {competing} wins follows from the scores, and a "
            "program has to know it before. Write budget=uniform(...)."
        )
    if policy.batch_coupled:
        raise PolicyError(f"{policy.name} cannot be exported: {policy.batch_coupled}. Use the preset without @.")
    if budget.rounding == "kvpress":
        raise PolicyError(
            f"{policy.name} cannot be exported: round=kvpress counts in floats, which would fix the length of the prompt. Write "
            "round=floor, or use the preset without @."
        )
    if policy.least_tokens > 1:
        raise PolicyError(
            f"{policy.name} cannot be exported: it scores prompts of at least {policy.least_tokens} tokens, and a program does not "
            "check that. Use the preset without @."
        )
    if budget.shape.arg and not windows:
        raise PolicyError(
            f"shape={budget.shape} shares a budget out over the layers of a model, and their number is not given. Pass windows, "
            "one entry for each layer of the cache: hf.windows(model)."
        )
    share = budget.keep or Fraction(1)
    keep = Keep(
        share.numerator,
        share.denominator,
        tokens=budget.tokens or 0,
        least=policy.protect.total,
        pyramid=budget.shape.arg or 0,
        last=budget.least,
        layers=max(len(windows), 1),
    )
    return replace(plan, keep=keep, windows=tuple(windows))


def sketch_digest(sketches: Sequence[Tensor]) -> str:
    """Return the sha256 over shapes, dtypes and bytes, which stands for the sketches in cache keys and comparisons."""
    digest = hashlib.sha256()
    for sketch in sketches:
        digest.update(f"{list(sketch.shape)} {sketch.dtype};".encode())
        digest.update(sketch.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _expr(score: algebra.Score, keep: Fraction | None) -> plan.Expr:
    match score:
        case algebra.Number(value):
            return plan.Scalar(value)
        case algebra.Atom(_, values):
            return _combine("*", plan.Scalar(float(score.row.sign)), score.row.lower(dict(values), keep))
        case algebra.ZScore(of):
            return plan.ZScore(_expr(of, keep))
        case algebra.Splice(first, then, share):
            return plan.Splice(_expr(first, keep), _expr(then, keep), share)
        case algebra.Combine(op, left, right):
            return _combine(op, _expr(left, keep), _expr(right, keep))


def _combine(op: str, left: plan.Expr, right: plan.Expr) -> plan.Expr:
    """Combine two expressions, fold constants and put a product's factor first, so that `-knorm` is one op call."""
    match op, left, right:
        case _, plan.Scalar(a), plan.Scalar(b):
            return plan.Scalar({"+": a + b, "-": a - b, "*": a * b}[op])
        case "*", plan.Scalar(1), _:
            return right
        case "*", plan.Scalar(a), plan.Combine("mul", plan.Scalar(b), of):
            return _combine("*", plan.Scalar(a * b), of)
        case "*", _, plan.Scalar():
            return _combine("*", right, left)
    return plan.Combine(OPS[op], left, right)
