"""From one layout of a cache to another: the same slots in other tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfx.cache import Cache
from kvfx.cache_layer import CacheLayer, gather_slots, no_positions
from kvfx.errors import CacheMismatch
from kvfx.ragged_layer import STATE, RaggedLayer
from kvfx.static_layer import StaticLayer

if TYPE_CHECKING:
    from kvfx.ragged_cache import RaggedCache
    from kvfx.static_cache import StaticCache


def fill_static(cache: StaticCache, dense: Cache) -> None:
    """Put the slots of a dense cache into an empty one of fixed capacity.

    Raises:
        PoolExhausted: they do not fit.
        CacheMismatch: a decoder's own tensors are held too, or heads hold unequally many slots.
    """
    dense._refuse_others("a static layout cannot be made")
    logical, seen = dense.get_seq_length(), dense.lengths_seen
    cache.check_room(logical, [0 if layer.window else layer.slots for layer in dense.layers], logical)
    like = [(layer.keys[:1, :, :1], layer.values[:1, :, :1]) for layer in dense.layers]
    cache.allocate(like, [layer.window for layer in dense.layers], dense.batch_size, logical)
    for layer, source in zip(cache.layers, dense.layers, strict=True):
        positions = source.positions
        there = positions >= 0
        if bool((there != there[:, :1]).any()):
            raise CacheMismatch("heads of a row hold unequally many slots, which a static cache cannot. Keep the cache ragged")
        count = there[:, 0].sum(-1)
        order = (torch.arange(source.slots, device=count.device) + count[:, None]) % source.slots  # empty ones go behind
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


def to_ragged(dense: Cache) -> RaggedCache:
    """The slots of a dense cache in blocks, empty ones left out. Windows stay as they are.

    Raises:
        CacheMismatch: a decoder's own tensors are held too.
    """
    from kvfx.ragged_cache import RaggedCache  # which makes dense caches

    dense._refuse_others("a ragged layout cannot be made")
    cache, states = RaggedCache(), {}
    if dense.is_empty:
        return cache
    cache._inherit(dense)
    cache.layers = [layer.copy() for layer in dense.layers]
    for index, layer in enumerate(dense.layers):
        if layer.window is None:
            there = layer.positions >= 0
            held = [tensor[there] for tensor in (layer.keys, layer.values, layer.positions)]
            states[index] = dict(zip(STATE, (*held, there.sum(-1)), strict=True))
    cache.fill(states, dict.fromkeys(states, dense.get_seq_length()))
    cache.has_empty = any(bool((layer.positions < 0).any()) for layer in cache.layers if not isinstance(layer, RaggedLayer))
    return cache


def ragged_to_dense(cache: RaggedCache) -> Cache:
    """The slots of a ragged cache in one that grows; empty ones to the left of each head."""
    dense = Cache()
    if cache.is_empty:
        return dense
    dense._inherit(cache)
    for layer in cache.layers:
        if isinstance(layer, RaggedLayer):
            other = CacheLayer()
            positions = layer.positions
            order = positions.argsort(dim=-1, stable=True)  # blocks that were evicted leave slots in any order
            other.store(gather_slots(layer.keys, order), gather_slots(layer.values, order))
            other.prefix, other.next_position, other.evicted = positions.gather(2, order), cache.lengths_seen.clone(), layer.evicted
            dense.has_empty |= bool((other.prefix < 0).any())
            dense.layers.append(other)
        else:
            dense.layers.append(layer.copy())
    dense.mark()
    return dense
