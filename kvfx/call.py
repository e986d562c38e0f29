"""A call of a decoder written by hand: where among its arguments the new tokens and the past stand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfx.cache import Cache
from kvfx.errors import CacheMismatch, InputError
from kvfx.tree import Spec


class Call(NamedTuple):
    """The arguments of a forward without their tensors.

    Attributes:
        spec: the tree of (args, kwargs).
        past: the leaf where the past stands, -1 if there is none.
        tokens: the leaf that holds the new tokens, [B, S] or [B, S, hidden].
    """

    spec: Spec
    past: int
    tokens: int


def call_of(spec: Spec, leaves: list[Any]) -> Call:
    """Where the past and the new tokens stand among the arguments."""
    pasts = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Cache)]
    if len(pasts) > 1:
        raise CacheMismatch(f"{len(pasts)} caches were given; expected one, where the decoder takes its past")
    tokens = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 1), -1)
    if tokens < 0 or leaves[tokens].numel() == 0:
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise InputError(f"the arguments hold no new tokens, expected [B, S] with B, S > 0; tensors given: {shapes or 'none'}")
    return Call(spec, pasts[0] if pasts else -1, tokens)


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
