"""What a forward does to a cache after its graph has stored new keys and values: the account of tokens, and of empty slots."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kvfx.cache import Cache
from kvfx.cache_layer import CacheLayer
from kvfx.errors import CacheMismatch, InputError
from kvfx.policy import Policy
from kvfx.ragged_layer import RaggedLayer


def took(
    cache: Cache, ids: Tensor | None, valid: Tensor | None, seen: Tensor, length: int, held: Sequence[int], whole: bool = True
) -> None:
    """Account for a forward over `length` new tokens, after its graph stored them in the layers, which held `held` slots.

    `whole` is False where slots stand empty for tokens that were not kept.
    """
    all_held = [layer.take(length, slots, cache.lengths_seen, seen, valid) for layer, slots in zip(cache.layers, held, strict=True)]
    cache.lengths_seen = seen
    note(cache, ids, valid, length, whole and all(all_held))


def note(cache: Cache, ids: Tensor | None, valid: Tensor | None, length: int, whole: bool) -> None:
    """Note what `length` new tokens were; `whole` says that all layers hold all of them."""
    if cache._ids is not None:
        cache._ids = None if ids is None else [*cache._ids, ids]
    if valid is None:
        cache.croppable = cache.croppable + length if whole else 0
        if cache._real is not None:
            cache._real = [*cache._real, cache.all_real(length)]
    else:
        trailing = valid.all(0).flip(0).long().cumprod(0).sum()  # tokens that are real in every row
        cache.croppable = int(trailing) if whole else 0
        cache._real = [*(cache._real or [cache.all_real(cache.get_seq_length() - length)]), valid]


def check_finite(layers: Sequence[CacheLayer], policy: Policy) -> None:
    """One host sync per eviction, so that a ranking by NaN is never used.

    Raises:
        InputError: a score is not finite.
    """
    checked = [layer.finite for layer in layers if layer.finite is not None]
    finite = torch.stack(checked).tolist() if checked else []
    if not all(finite):
        bad = [index for index, fine in enumerate(finite) if not fine]
        raise InputError(
            f"scores of {policy.name} are not finite in layers {bad}: the keys, queries or values there hold inf or nan. "
            "Nothing was stored. Check the weights and the dtype (float16 overflows where bfloat16 does not)."
        )


def push_empty_left(cache: Cache, fixed: Collection[int] = ()) -> None:
    """Move empty slots to the left of each row, and drop those that are empty in all rows; of a window, keep the last slots.

    Args:
        cache: what is edited.
        fixed: layers whose slots have to stay where they are.

    Raises:
        CacheMismatch: a row of a fixed layer has empty slots elsewhere than on the left.
    """
    dense = {index: layer for index, layer in enumerate(cache.layers) if not isinstance(layer, RaggedLayer)}
    there = [layer.positions >= 0 for layer in dense.values()]
    filled = [torch.stack([count.amin(), count.amax()]) for count in (slots.sum(-1) for slots in there)]
    counts = torch.stack(filled).tolist() if dense else []
    cache.has_empty = False
    for (index, layer), slots, (least, most) in zip(dense.items(), there, counts, strict=True):
        width = layer.slots
        if index not in fixed:
            width = most if layer.window is None else min(most, layer.window - 1)
        elif bool((slots[..., 1:] < slots[..., :-1]).any()):
            raise CacheMismatch(
                f"rows have padding between their tokens or on the right, and layer {index} was left alone, so that its slots "
                "cannot be moved. Pad on the left; kvfx.explain(model) says why the layer was left alone."
            )
        order = slots.long().argsort(dim=-1, stable=True)[..., layer.slots - width :]
        layer.arrange(order, ~slots.gather(2, order), cache.lengths_seen)
        cache.has_empty |= least < width
    cache.mark()
