"""Trace a model for its report and run nothing; also a model of which there is only the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn

from kvfx import passes
from kvfx.engine import STORE_ALL, Engine, StepKey
from kvfx.errors import InputError, KvfxError, UnsupportedModel
from kvfx.passes import capture
from kvfx.passes.report import Report
from kvfx.policy import Policy
from kvfx.runner import Runner

LENGTH = 32  # tokens of a prompt that is made up; lengths are symbols in the trace, so any would do that is not special
# What is said of a model made by `outline`.
OUTLINE = "Traced from config.json on the meta device; no weights were read. Quantised layers and adapters are not in it."


class _Traced(KvfxError):
    """The graph was traced and rewritten; nothing more is wanted of it."""


class _Trial(Engine):
    """An engine that stops where the others hand the rewritten graph to a backend. What is left alone is not judged."""

    def _rewrite(self, key: StepKey) -> Callable[[fx.GraphModule], None]:
        def rewrite(module: fx.GraphModule) -> None:
            report = passes.run(module, replace(key.plan, impl=self.impl))  # which may fail, and then another step is tried
            self.reports.setdefault(key, []).append(report)
            raise _Traced

        return rewrite

    def slots_like(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        """As of any engine. Without weights a model may fail that can be traced none the less: experts are other ops in a trace."""
        try:
            return super().slots_like(model)
        except RuntimeError:
            runner = Runner(model, Policy.parse("none"), STORE_ALL, Engine(self.name, "eager"), "warn")
            cache = runner.forward({"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device)}).past_key_values
            return [(layer.keys, layer.values) for layer in cache.layers]


def trace(name: str, prefill: Callable[[Engine], object], impl: str = "auto") -> Report:
    """The report on a prefill, which is traced and not run.

    Args:
        name: of the model, for messages.
        prefill: runs one prefill on the engine it is given.
        impl: which form of kernel ops is wanted.

    Raises:
        UnsupportedModel: the model cannot be traced.
    """
    engine = _Trial(name, "eager", impl)
    try:
        prefill(engine)
    except _Traced:
        pass  # as it should be
    except capture.CompileError as error:
        raise UnsupportedModel(f"{name} cannot be traced: {str(error).strip().splitlines()[0]}") from error
    (reports,) = engine.reports.values()
    return reports[-1]


def prompt(model: nn.Module, policy: Policy) -> Tensor:
    """Token ids to trace a prefill of `model` with, [1, S]."""
    device = next(model.parameters()).device
    return torch.zeros(1, max(LENGTH, policy.least_tokens), dtype=torch.long, device=device)


def outline(folder: Path, attention: str | None = None) -> Any:
    """The model that a checkpoint's config describes, on the meta device: shapes, no weights.

    Args:
        folder: holds a `config.json` of transformers.
        attention: the attention implementation of transformers, such as "sdpa" or "eager"; without it, the model's default.

    Raises:
        InputError: there is no config, or transformers cannot make a causal decoder of it.
        UnsupportedModel: it is an encoder-decoder.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; expected the folder of a transformers checkpoint, or one with its config")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.is_encoder_decoder:
            raise UnsupportedModel(f"{folder} is an encoder-decoder ({config.model_type}); expected a causal decoder")
        chosen = {} if attention is None else {"attn_implementation": attention}
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, **chosen).eval()
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot make a causal decoder of the config in {folder}: {error}") from error
