"""What a forward does to a cache after its graph has stored new keys and values: the account of tokens, and of empty slots."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kvfx.cache import Cache
from kvfx.errors import CacheMismatch


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


def push_empty_left(cache: Cache, fixed: Collection[int] = ()) -> None:
    """Move empty slots to the left of each row, and drop those that are empty in all rows; of a window, keep the last slots.

    Args:
        cache: what is edited.
        fixed: layers whose slots have to stay where they are.

    Raises:
        CacheMismatch: a row of a fixed layer has empty slots elsewhere than on the left.
    """
    there = [layer.positions[:, 0] >= 0 for layer in cache.layers]
    filled = torch.stack([slots.sum(-1) for slots in there]).tolist()
    cache.has_empty = False
    for index, (layer, slots, counts) in enumerate(zip(cache.layers, there, filled, strict=True)):
        width = layer.slots
        if index not in fixed:
            width = max(counts) if layer.window is None else min(max(counts), layer.window - 1)
        elif bool((slots[:, 1:] < slots[:, :-1]).any()):
            raise CacheMismatch(
                f"rows have padding between their tokens or on the right, and layer {index} was left alone, so that its slots "
                "cannot be moved. Pad on the left; kvfx.explain(model) says why the layer was left alone."
            )
        order = slots.long().argsort(dim=-1, stable=True)[:, layer.slots - width :]
        layer.arrange(order, ~slots.gather(1, order), cache.lengths_seen)
        cache.has_empty |= min(counts) < width
    cache.mark()
