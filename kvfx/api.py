"""The verbs: compile and explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvfx import hf, trial
from kvfx.decoder import CompressedDecoder, DecoderRunner
from kvfx.engine import engine_of
from kvfx.errors import InputError, PolicyError
from kvfx.explanation import Explanation
from kvfx.lower import lower
from kvfx.model import compressed
from kvfx.passes.capture import BACKENDS
from kvfx.passes.lower import IMPLS
from kvfx.policy import Policy, as_policy
from kvfx.pool import Pool


def compile(
    model: nn.Module,
    policy: str | Mapping[str, Any] | Policy = "compactor:0.5",
    *,
    backend: str = "inductor",
    sketch: Sequence[Tensor] | None = None,
    on_refuse: str = "warn",
    impl: str = "auto",
    pool: Pool | None = None,
) -> Any:
    """Return a model whose KV caches keep only what `policy` chooses.

    Args:
        model: a causal decoder, in eval mode: of transformers, also one that is compiled, weight-only quantised, or adapted by
            peft; or any `nn.Module` that takes its past keys and values and returns them grown, or writes to them. It is not
            modified; parameters are shared.
        policy: what to keep; text such as `"compactor:0.5"`, a `Policy`, or its dict form. See docs/policy.md.
        backend: what runs the rewritten graphs: "inductor", "aot_eager" or "eager".
        sketch: per layer a matrix `[Hkv, D, k]` or `[B, Hkv, D, k]` for leverage scores, instead of the drawn ones.
        on_refuse: what to do about an attention site that is not understood: "warn" leaves it whole, "error" raises.
        impl: what scores and moves: "auto" takes Triton kernels on CUDA, and compiled references elsewhere and where a kernel does
            not take a shape, which `explain` shows; "reference" takes no kernel; with "triton" the first call raises
            `KernelUnavailable` if one cannot run.
        pool: memory that all caches that the model makes share, in blocks, with those of other models compiled from the same
            one; by default each has its own.

    Returns:
        A model of the same class with `compress`, and `generate` on compressed caches; for a module that is not of transformers,
        a `CompressedDecoder` with `prefill`. Nothing is compiled before it is called; models compiled from the same `model` share
        their graphs.

    Raises:
        PolicyError: the policy is unknown, malformed or contradicts itself.
        UnsupportedModel: the model is no decoder, is training, or is spread over devices.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; known: {sorted(BACKENDS)}")
    if on_refuse not in ("warn", "error"):
        raise InputError(f"on_refuse is {on_refuse!r}; known: ['error', 'warn']")
    if impl not in IMPLS:
        raise InputError(f"unknown impl {impl!r}; known: {list(IMPLS)}")
    chosen = as_policy(policy)
    base = hf.unwrap(model)
    engine = engine_of(base, backend, impl)
    if not hf.is_transformers(base):
        if pool is not None:
            raise InputError("a pool holds caches in blocks, which only transformers decoders read; leave pool out")
        if sketch is not None:
            raise PolicyError("sketches are taken for transformers decoders only; leave sketch out, and they are drawn")
        return CompressedDecoder(base, chosen, lower(chosen), engine, on_refuse)
    sketches = None if sketch is None else _check_sketch(base, chosen, sketch)
    plan = lower(chosen, sketches)
    return compressed(base, chosen, plan, engine, on_refuse, pool)


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


def explain(model: Any, inputs: Any = None, policy: str | Mapping[str, Any] | Policy | None = None) -> Explanation:
    """Say what a policy does to a model: every attention site, its score, budget and lowering, or why it is left alone.

    Args:
        model: what `compile` returned, or with `policy` any model that `compile` takes; its weights may be on the meta device.
        inputs: token ids, or a mapping with `input_ids`, to trace; of a decoder that is not of transformers its first argument, or
            a tuple or mapping of arguments. The default is a short prompt that is made up. Only their shapes matter: nothing is
            run, but one token where heads compete, and nothing is kept.
        policy: what to keep; the default is the policy of a compiled model.

    Returns:
        What the model's own prefill did if it has run, else what a trace of it says; to print, or `as_dict`. Also where no
        attention was recognised at all.

    Raises:
        InputError: a model that is not compiled was given without a policy.
        UnsupportedModel: the model is no decoder, or cannot be traced as one graph.

    Cost: none for a model that has run; else one trace, whose time grows with the layers.
    """
    runner = getattr(model, "_kvfx", None)
    if policy is None:
        if runner is None:
            raise InputError(
                f"{type(model).__name__} was not made by kvfx.compile, so it has no policy. Pass one: "
                "explain(model, policy='compactor:0.5')"
            )
        runs = [reports[-1] for key, reports in runner.engine.reports.items() if key.phase == "prefill" and key.plan == runner.plan]
        if runs:
            return Explanation(runner.engine.name, runner.policy, runs[-1])
        base, chosen, plan, impl = runner.base, runner.policy, runner.plan, runner.engine.impl
    else:
        base, chosen, impl = hf.unwrap(model), as_policy(policy), "auto"
        plan = lower(chosen)
    if inputs is None:
        inputs = trial.prompt(base, chosen)
    name = type(base).__name__
    if not hf.is_transformers(base):
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
        args = (args,) if isinstance(args, Tensor) else tuple(args)
        report = trial.trace(name, lambda engine: DecoderRunner(base, chosen, plan, engine, "warn").forward(args, kwargs), impl)
        return Explanation(name, chosen, report)
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    report = trial.trace(name, lambda engine: compressed(base, chosen, plan, engine, "warn").compress(ids, mask), impl)
    return Explanation(name, chosen, report)
