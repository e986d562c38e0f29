"""Rows of several ragged caches in one, as sequences join a batch that is under way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvfx.errors import CacheMismatch
from kvfx.extents import Extents
from kvfx.passes.capture import mark_dynamic
from kvfx.ragged_cache import RaggedCache
from kvfx.ragged_layer import RaggedLayer


def join(caches: Sequence[RaggedCache]) -> RaggedCache:
    """A cache with the rows of all, one after the other; shorter texts count as padded on the left.

    Nothing is copied: blocks are shared with the caches given until somebody writes to them. Drop those, and each row is alone.

    Raises:
        CacheMismatch: there is none, they lie in different pools, or were not made alike; or some layer is not in blocks.
    """
    first = _check(caches)
    if len(caches) == 1:
        return first.copy()
    made = RaggedCache(first.limit, None if first.pool else first.block_size, first.pool)
    made._inherit(first)
    tokens = max(cache.get_seq_length() for cache in caches)
    made.lengths_seen = torch.cat([cache.lengths_seen for cache in caches])
    mark_dynamic(made.lengths_seen, 0)
    made.since = max(cache.since for cache in caches)
    even = all(cache.get_seq_length() == tokens for cache in caches)
    made.croppable = min(cache.croppable for cache in caches) if even else 0
    ids = [cache.ids for cache in caches]
    made._ids = (
        None if any(each is None for each in ids) else [torch.cat([_padded(each, tokens) for each in ids if each is not None])]
    )
    if not even or any(cache.real is not None for cache in caches):
        real = [cache.all_real(cache.get_seq_length()) if cache.real is None else cache.real for cache in caches]
        made._real = [torch.cat([_padded(each, tokens) for each in real])]
    made.extents = [_joined(group) for group in zip(*(cache.extents for cache in caches), strict=True)]
    group = {id(extents): joined for extents, joined in zip(first.extents, made.extents, strict=True)}
    for layer in first.ragged.values():
        other = RaggedLayer(group[id(layer.extents)], layer.index)
        other.tokens = tokens
        made.layers.append(other)
    return made


def _check(caches: Sequence[RaggedCache]) -> RaggedCache:
    if not caches or any(cache.is_empty or not isinstance(cache, RaggedCache) for cache in caches):
        raise CacheMismatch("expected ragged caches that hold something: model.compress(ids) fills one")
    first = caches[0]
    for number, cache in enumerate(caches):
        dense = [index for index, layer in enumerate(cache.layers) if not isinstance(layer, RaggedLayer)]
        if dense:
            raise CacheMismatch(f"cache {number} keeps layers {dense} dense, whose rows of unequal length cannot be joined")
        if [id(each.pool) for each in cache.extents] != [id(each.pool) for each in first.extents]:
            raise CacheMismatch(
                f"cache {number} has blocks of another pool than cache 0. Fill them from one: "
                "kvfx.compile(model, policy, pool=kvfx.Pool(...))"
            )
        if (cache.policy, [each.metric is None for each in cache.extents]) != (
            first.policy, [each.metric is None for each in first.extents],
        ):  # fmt: skip
            raise CacheMismatch(
                f"cache {number} was filled under {cache.policy}, cache 0 under {first.policy}. Join those of one policy"
            )
    return first


def _joined(group: Sequence[Extents]) -> Extents:
    """Extents of the rows of all, which share their blocks."""
    width = max(each.table.shape[3] for each in group)
    tables = [np.pad(each.table, ((0, 0), (0, 0), (0, 0), (0, width - each.table.shape[3]))) for each in group]
    lengths = np.concatenate([each.lengths for each in group], 1)
    made = Extents(group[0].pool, *lengths.shape)
    made.take_over(lengths, np.concatenate(tables, 1))
    metrics = [each.metric for each in group if each.metric is not None]
    if metrics:
        tokens = max(1, int(lengths.max()))
        made.metric = type(metrics[0]).of_slots(
            torch.cat([metric.slots(tokens) for metric in metrics], 1), lengths, metrics[0].chunk
        )
    return made


def _padded(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (tokens - rows.shape[1], 0))
