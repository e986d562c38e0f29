"""From one layout of a cache to another: the same slots in other tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfx.cache import Cache
from kvfx.cache_layer import CacheLayer, gather_slots, no_positions
from kvfx.static_layer import StaticLayer

if TYPE_CHECKING:
    from kvfx.static_cache import StaticCache


def fill_static(cache: StaticCache, dense: Cache) -> None:
    """Put the slots of a dense cache into an empty one of fixed capacity.

    Raises:
        PoolExhausted: they do not fit.
        CacheMismatch: a decoder's own tensors are held too.
    """
    dense._refuse_others("a static layout cannot be made")
    logical, seen = dense.get_seq_length(), dense.lengths_seen
    cache.check_room(logical, [0 if layer.window else layer.slots for layer in dense.layers], logical)
    like = [(layer.keys[:1, :, :1], layer.values[:1, :, :1]) for layer in dense.layers]
    cache.allocate(like, [layer.window for layer in dense.layers], dense.batch_size, logical)
    for layer, source in zip(cache.layers, dense.layers, strict=True):
        positions = source.positions
        count = (positions[:, 0] >= 0).sum(-1)
        # Empty slots stand on the left, and go behind.
        order = (torch.arange(source.slots, device=seen.device) + count[:, None]) % source.slots
        if layer.window is None:
            layer.append(source.keys, source.values, positions, order, count)
        else:
            layer.slide(source.keys, source.values, seen - count, order, count)
            layer.prefix.masked_fill_(layer.prefix < (seen - count)[:, None, None], -1)
        layer.tokens, layer.filled, layer.evicted = logical, source.slots, logical - source.slots
    cache._inherit(dense)
    cache.compare_rows()


def to_dense(cache: StaticCache) -> Cache:
    """The slots of a cache of fixed capacity, in one that grows; empty ones to the left."""
    dense = Cache()
    if cache.is_empty:
        return dense
    dense._inherit(cache)
    dense.has_empty = False
    for layer in cache.layers:
        dense.layers.append(_grown(layer, dense))
    dense.mark()
    return dense


def _grown(layer: StaticLayer, dense: Cache) -> CacheLayer:
    other, seen = CacheLayer(layer.window), dense.lengths_seen
    count = layer.length if layer.window is None else seen.clamp(max=layer.window - 1)
    width = int(count.max())
    place = torch.arange(width, device=seen.device) - width + count[:, None]  # among those of the row, oldest first
    slot = place.clamp(min=0) if layer.window is None else (place + (seen - count)[:, None]).clamp(min=0) % layer.window
    slots, blank = slot[:, None].expand(-1, layer.keys.shape[1], -1), (place < 0)[:, None]
    keys, values = (gather_slots(tensor, slots).masked_fill(blank[..., None], 0) for tensor in (layer.keys, layer.values))
    other.store(keys, values)
    positions = layer.positions.gather(2, slots).masked_fill(blank, -1)
    other.prefix = positions if layer.window is None else no_positions(positions)
    other.next_position, other.evicted = seen.clone(), layer.tokens - width
    dense.has_empty |= bool(blank.any())
    return other
