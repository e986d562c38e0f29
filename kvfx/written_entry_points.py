"""The entry points of the package of a decoder written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from kvfx import hf
from kvfx.entry_points import EntryPoints, asked_for, check_lengths, empty_cache
from kvfx.errors import InputError
from kvfx.lower import lower, lower_program
from kvfx.package import Entry
from kvfx.passes.plan import Plan
from kvfx.written import Calls, Written
from kvfx.written_entry_point import COUNTED, OTHERS, WrittenEntryPoint


def entry_points(
    model: Any,
    policy: Any,
    max_prompt: int,
    max_new_tokens: int,
    batch: int,
    settings: Mapping[str, Any],
    call: Calls | None = None,
) -> EntryPoints:
    """What the entry points of a package are made of; see `export`."""
    given = model, policy, max_prompt, max_new_tokens, batch, settings
    base, *_ = asked_for(model, policy)
    if not hf.is_transformers(base):
        return WrittenEntryPoints.of_call(*given, call)
    if call is not None:
        raise InputError(f"call= says how a decoder written by hand is called; {type(base).__name__} is a transformers model")
    return EntryPoints.of(*given)


@dataclass
class WrittenEntryPoints(EntryPoints):
    """See `EntryPoints`. Rows are never padded.

    There are two more: "first" reads a prompt of one token, of which nothing is evicted, and "second" appends one to that. A past
    of a single token is a case of its own in a trace where its length is no number in a tensor.

    Attributes:
        written: the decoder.
    """

    written: Written

    @classmethod
    def of_call(
        cls,
        model: Any,
        policy: Any,
        max_prompt: int,
        max_new_tokens: int,
        batch: int,
        settings: Mapping[str, Any],
        call: Calls | None,
    ) -> WrittenEntryPoints:
        """See `export`."""
        base, chosen, sketches = asked_for(model, policy)
        check_lengths(base, None, max_prompt, max_new_tokens, batch)
        lower_program(chosen, (None,), sketches)  # which refuses what no program can follow, before anything runs
        written = Written.learn(base, call, batch, max_prompt, max_prompt + max_new_tokens)
        windows = (None,) * written.form.layers
        keep, plan = lower_program(chosen, windows, sketches).keep, lower(chosen, sketches)
        cache = empty_cache(chosen, written.like, windows, max_prompt, max_new_tokens, batch)
        return cls(base, chosen, plan, keep, cache, max_prompt, max_new_tokens, settings, True, written)

    @property
    def kinds(self) -> dict[str, bool]:
        """The entry points by name; no rows of them may be padded."""
        return dict.fromkeys(("prefill", "first", *COUNTED), False)

    def _entry(self, kind: str, masked: bool) -> Entry:
        return replace(super()._entry(kind, masked), counted=kind in COUNTED)

    def _module(self, kind: str, plan: Plan, masked: bool) -> nn.Module:
        most = self.cache.capacity - self.max_new_tokens
        return WrittenEntryPoint(self.written, kind, self.cache, plan, self.keep if kind == "prefill" else None, most)

    def _state(self) -> dict[str, Tensor]:
        others = {f"{OTHERS}.{index}": other.new_zeros(other.shape) for index, other in enumerate(self.written.others)}
        return {**super()._state(), **others}

    def _vocabulary(self) -> int:
        return self.written.vocabulary

    def _stop(self) -> tuple[tuple[int, ...], int]:
        return (), 0
