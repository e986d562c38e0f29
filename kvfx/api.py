"""The verbs: compile and explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvfx import hf
from kvfx.engine import Engine, engine_of
from kvfx.errors import InputError, PolicyError
from kvfx.explain import Explanation
from kvfx.lower import lower
from kvfx.model import compressed
from kvfx.passes.capture import BACKENDS
from kvfx.policy import Policy, as_policy


def compile(
    model: nn.Module,
    policy: str | Mapping[str, Any] | Policy = "compactor:0.5",
    *,
    backend: str = "inductor",
    sketch: Sequence[Tensor] | None = None,
    on_refuse: str = "warn",
) -> Any:
    """Return a model whose KV caches keep only what `policy` chooses.

    Args:
        model: a causal decoder of transformers, in eval mode; also one that is compiled, weight-only quantised, or adapted by
            peft. It is not modified; parameters are shared.
        policy: what to keep; text such as `"compactor:0.5"`, a `Policy`, or its dict form. See docs/policy.md.
        backend: what runs the rewritten graphs: "inductor", "aot_eager" or "eager".
        sketch: per layer a matrix `[Hkv, D, k]` or `[B, Hkv, D, k]` for leverage scores, instead of the drawn ones.
        on_refuse: what to do about an attention site that is not understood: "warn" leaves it whole, "error" raises.

    Returns:
        A model of the same class with `compress`, and `generate` on compressed caches. Nothing is compiled before it is called;
        models compiled from the same `model` share their graphs.

    Raises:
        PolicyError: the policy is unknown, malformed or contradicts itself.
        UnsupportedModel: the model is no decoder, is training, or is spread over devices.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; known: {sorted(BACKENDS)}")
    if on_refuse not in ("warn", "error"):
        raise InputError(f"on_refuse is {on_refuse!r}; known: ['error', 'warn']")
    chosen = as_policy(policy)
    base = hf.unwrap(model)
    sketches = None if sketch is None else _check_sketch(base, chosen, sketch)
    plan = lower(chosen, sketches)
    return compressed(base, chosen, plan, engine_of(base, backend), on_refuse)


def _check_sketch(model: Any, policy: Policy, sketch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    layers = len(hf.windows(model))
    if len(sketch) != layers:
        raise PolicyError(f"sketch has {len(sketch)} matrices, {type(model).__name__} has {layers} layers; expected one for each")
    for index, matrix in enumerate(sketch):
        if matrix.dim() not in (3, 4) or not matrix.is_floating_point() or not bool(torch.isfinite(matrix).all()):
            raise PolicyError(
                f"sketch[{index}] is {tuple(matrix.shape)} {matrix.dtype}, expected finite floats [Hkv, D, k] or [B, Hkv, D, k]"
            )
        heads, dim = hf.kv_shape(model)
        if matrix.shape[-3] != heads or matrix.shape[-2] != dim:
            raise PolicyError(
                f"sketch[{index}] is {tuple(matrix.shape)}, but {type(model).__name__} has {heads} KV heads of {dim} channels; "
                "expected [Hkv, D, k] or [B, Hkv, D, k]"
            )
    if not any(call.sketch is not None for call in lower(policy).calls()):
        raise PolicyError(f"a sketch was given, but {policy.name} has no leverage score that would use it")
    return tuple(matrix.detach().float() for matrix in sketch)


def explain(model: Any, inputs: Any = None) -> Explanation:
    """Say what was found in a compressed model: every attention site, its score, budget and lowering, or why it was refused.

    Args:
        model: what `compile` returned.
        inputs: token ids, or a mapping with `input_ids`, for a model that has not run yet: they are traced, not kept.

    Raises:
        InputError: the model has not run and no inputs were given, or it is no compressed model.
    """
    runner = getattr(model, "_kvfx", None)
    if runner is None:
        raise InputError(f"{type(model).__name__} was not made by kvfx.compile; explain has nothing to tell")
    engine: Engine = runner.engine
    reports = [reports[-1] for key, reports in engine.reports.items() if key.phase == "prefill" and key.plan == runner.plan]
    if not reports:
        if inputs is None:
            raise InputError("the model has not run yet; pass inputs (token ids) to explain, or call it first")
        ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
        mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
        trial = compressed(runner.base, runner.policy, runner.plan, Engine(engine.name, "eager"), runner.on_refuse)
        trial.compress(ids, mask)
        reports = [reports[-1] for reports in trial._kvfx.engine.reports.values()]
    return Explanation(engine.name, runner.policy, reports[-1])
