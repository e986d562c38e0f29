"""A call of a decoder written by hand: where among its arguments the new tokens and the past stand."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvfx import tree
from kvfx.cache import Cache
from kvfx.errors import CacheMismatch, InputError
from kvfx.form import BUFFERS
from kvfx.tree import Spec


class Call(NamedTuple):
    """The arguments of a forward without their tensors.

    Attributes:
        spec: the tree of (args, kwargs).
        names: of its arguments, positional ones first.
        pasts: leaves where a cache stands, each with the name of its argument.
        tokens: the leaf that holds the new tokens, [B, S] or [B, S, hidden].
        buffers: names of the module's buffers that the forward writes to.
        counts: leaves that are the number of tokens seen before, such as `start_pos`.
    """

    spec: Spec
    names: tuple[str, ...]
    pasts: tuple[tuple[int, str], ...]
    tokens: int
    buffers: tuple[str, ...]
    counts: tuple[int, ...] = ()

    def behind(self, held: int, leaves: list[Any]) -> Call:
        """This call behind `held` tokens: whatever number among its leaves equals that is taken for it, and may vary."""
        return self._replace(
            buffers=(), counts=tuple(index for index, leaf in enumerate(leaves) if type(leaf) is int and leaf == held)
        )


def take_cache(kwargs: dict[str, Any]) -> tuple[Cache | None, dict[str, Any]]:
    """The cache of a decoder that holds its caches in buffers, which is given as `past=`; and the other keywords."""
    cache = kwargs.get("past")
    if isinstance(cache, Cache) and cache.form is not None and cache.form.places == (BUFFERS,):
        return cache, {name: value for name, value in kwargs.items() if name != "past"}
    return None, kwargs


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], buffers: tuple[str, ...]) -> Call:
    """Where the past and the new tokens stand among the arguments."""
    spec = tree.spec_of((args, kwargs))
    names = (*_positional(module, len(args)), *kwargs)
    pasts, first = [], 0
    for name, argument in zip(names, (*spec.children[0].children, *spec.children[1].children), strict=True):
        pasts += [(leaf, name) for leaf in range(first, first + tree.count(argument)) if isinstance(leaves[leaf], Cache)]
        first += tree.count(argument)
    caches = {id(leaves[leaf]) for leaf, _ in pasts}
    if len(caches) > 1:
        raise CacheMismatch(f"{len(caches)} caches were given; expected one, where the decoder takes its past")
    tokens = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 1), -1)
    if tokens < 0 or leaves[tokens].numel() == 0:
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise InputError(f"the arguments hold no new tokens, expected [B, S] with B, S > 0; tensors given: {shapes or 'none'}")
    return Call(spec, names, tuple(pasts), tokens, buffers)


def _positional(module: nn.Module, count: int) -> list[str]:
    """Names of the first positional arguments of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [name for name, parameter in inspect.signature(module.forward).parameters.items() if parameter.kind in kinds]
    return (known + [f"*{index}" for index in range(len(known), count)])[:count]


def check_place(cache: Cache, call: Call) -> None:
    """Make sure that a cache stands where the decoder keeps its past.

    Raises:
        CacheMismatch: it stands elsewhere.
    """
    given, expected = sorted(name for _, name in call.pasts), sorted(name for name in cache.form.places if name != BUFFERS)
    if not cache.form.places:
        if len(given) > 1:
            raise CacheMismatch(
                f"the cache was given {len(given)} times, as {given}; expected once, where the decoder takes its past"
            )
    elif given != expected:
        where = "in place of " + " and ".join(f"`{name}`" for name in expected) if expected else "as past=cache"
        raise CacheMismatch(
            f"the cache was given as {given or 'no argument'}; expected it {where}, as this decoder keeps its past there"
        )


def refuse_padding(leaves: list[Any], call: Call, held: int) -> None:
    """Padded rows are not supported here; a mask that hides a token of a row is the sign of them."""
    batch, length = leaves[call.tokens].shape[:2]
    for index, leaf in enumerate(leaves):
        if index == call.tokens or not isinstance(leaf, Tensor) or leaf.dtype != torch.bool or leaf.dim() != 2:
            continue
        if tuple(leaf.shape) in ((batch, length), (batch, held + length)) and not bool(leaf.all()):
            raise InputError(
                f"an argument of shape {tuple(leaf.shape)} masks tokens out. Padded rows are not supported for decoders that "
                "are no transformers models; run rows of equal length, or one by one."
            )
