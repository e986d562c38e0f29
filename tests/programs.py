"""Exported programs for tests: the prefill and the decode step of a decoder, as a user would write their wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache

import kvfx
from kvfx import hf
from kvfx.lower import lower_program
from kvfx.passes.plan import Plan
from kvfx.policy import as_policy
from zoo_plain import Plain

KeysValues = list[tuple[Tensor, Tensor]]
LENGTHS = (2, 3, 5, 24, 77)  # that one program serves; it is exported at another one
EXPORTED_AT = 19


class Prefill(nn.Module):
    """A transformers decoder from ids to logits, keys and values. `windows`: its cache drops what has left a sliding window."""

    def __init__(self, model: nn.Module, windows: bool = False) -> None:
        super().__init__()
        self.model, self.windows = model, windows

    def forward(self, ids: Tensor, position_ids: Tensor) -> tuple[Tensor, KeysValues]:
        cache = DynamicCache(config=self.model.config) if self.windows else DynamicCache()
        takes = inspect.signature(type(self.model).forward).parameters
        options = {"position_ids": position_ids} if "position_ids" in takes else {}
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        return out.logits, [(layer.keys, layer.values) for layer in cache.layers]


class Step(nn.Module):
    """A transformers decoder from new ids and held keys and values to logits and the grown ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position_ids: Tensor, past: KeysValues) -> tuple[Tensor, KeysValues]:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(past):
            cache.update(keys, values, index)
        out = self.model(input_ids=ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return out.logits, [(layer.keys, layer.values) for layer in cache.layers]


class PlainPrefill(nn.Module):
    """A decoder written by hand, from ids to logits and the tensors of its past, in the order of their fields."""

    def __init__(self, model: nn.Module, row: Plain) -> None:
        super().__init__()
        self.model, self.row = model, row

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, past = self.row.run(self.model, ids)
        return logits, tensors(past)


class PlainStep(nn.Module):
    """A decoder written by hand, from new ids and the tensors of its past, in the order of their fields."""

    def __init__(self, model: nn.Module, row: Plain, like: Any) -> None:
        super().__init__()
        self.model, self.row, self.like = model, row, like

    def forward(self, ids: Tensor, held: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits, past = self.row.run(self.model, ids, refilled(self.like, iter(held)))
        return logits, tensors(past)


def refilled(past: Any, parts: Iterator[Tensor]) -> Any:
    """A past of the same form, of other tensors."""
    if isinstance(past, Tensor):
        return next(parts)
    if hasattr(past, "__dataclass_fields__"):
        return replace(past, **{name: refilled(getattr(past, name), parts) for name in past.__dataclass_fields__})
    if isinstance(past, dict):
        return {name: refilled(part, parts) for name, part in past.items()}
    if isinstance(past, (list, tuple)):
        made = [refilled(part, parts) for part in past]
        return type(past)(*made) if hasattr(past, "_fields") else type(past)(made)
    return past


def tensors(past: Any) -> list[Tensor]:
    """The tensors of tuples, lists, dicts and dataclasses."""
    if isinstance(past, Tensor):
        return [past]
    if hasattr(past, "__dataclass_fields__"):
        past = [getattr(past, name) for name in past.__dataclass_fields__]
    parts = past.values() if isinstance(past, dict) else past if isinstance(past, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def at(positions: int, start: int = 0, rows: int = 1) -> Tensor:
    """Positions that count on from `start`, `[rows, positions]`."""
    return torch.arange(start, start + positions).repeat(rows, 1)


def exported(module: nn.Module, *arguments: Any, shapes: tuple[Any, ...]) -> ExportedProgram:
    """The program that the passes take."""
    with torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=shapes).run_decompositions({})


def prefill_of(model: nn.Module, ids: Tensor, windows: bool = False, longest: int | None = None) -> ExportedProgram:
    """The prefill of a transformers decoder: rows too if there are several, and of any length."""
    sizes = {1: Dim.AUTO(max=longest) if longest else Dim.AUTO} | ({0: Dim.AUTO} if ids.shape[0] > 1 else {})
    return exported(Prefill(model, windows).eval(), ids, at(ids.shape[1], rows=ids.shape[0]), shapes=(sizes, sizes))


def step_of(model: Any, past: KeysValues) -> ExportedProgram:
    """One decode step behind a past of any length."""
    slots, first = {2: Dim.AUTO}, past[0][0].shape[2]
    return exported(Step(model).eval(), torch.tensor([[5]]), at(1, first), past, shapes=({}, {}, [(slots, slots)] * len(past)))


def plan_of(policy: str, model: Any = None) -> Plan:
    """The plan for the prefill of a model."""
    return lower_program(as_policy(policy), hf.windows(model) if model is not None else ())


def kept_of(cache: kvfx.Cache, full: KeysValues) -> KeysValues:
    """Of all keys and values, those at the positions that a cache holds; all of a layer with a window."""
    kept = []
    for layer, states in zip(cache.layers, full, strict=True):
        places = layer.positions.long()[..., None]
        kept.append(states if layer.window else tuple(part.gather(2, places.expand(-1, -1, -1, part.shape[3])) for part in states))
    return kept


@torch.no_grad()
def whole(model: Any, ids: Tensor) -> tuple[Tensor, KeysValues]:
    """Logits, and keys and values of every token, as the plain model computes them."""
    return Prefill(model)(ids, at(ids.shape[1], rows=ids.shape[0]))
