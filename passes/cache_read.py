"""The marker through which a traced forward sees the slots held: at the length they would have, had nothing been evicted.

A model computes masks, positions and biases from the number of past keys. With `cache_read` in the graph it computes them for all
tokens seen, by its own rules; `read_slots` then puts the slots in place of the marker, and takes from each mask the columns of the
tokens that they stand for. So nothing needs to be known of how a model makes a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.passes.cache_write import LIBRARY, slots_of

LIBRARY.define(
    "cache_read(Tensor keys, Tensor values, Tensor prefix, Tensor start, Tensor seen, Tensor size,"
    " int layer, bool empty, bool whole) -> (Tensor, Tensor)"
)
LIBRARY.define("window_write(Tensor key, Tensor value, int layer, int window) -> (Tensor, Tensor)")


def cache_read(
    keys: Tensor, values: Tensor, prefix: Tensor, start: Tensor, seen: Tensor, size: Tensor, layer: int, empty: bool, whole: bool
) -> tuple[Tensor, Tensor]:
    """Stand for the keys and values of all tokens seen. Shapes only; the passes replace every call.

    Args:
        keys: slots held, [B, Hkv, T, D].
        values: [B, Hkv, T, Dv].
        prefix: positions of the first P slots, [B, Hkv, P] int32, -1 for an empty slot.
        start: position of slot P of each row, from which on slots are consecutive, [B] int64; negative ones are empty.
        seen: real tokens that each row has seen, [B] int64.
        size: an empty tensor [L + 1, 0]; L is the number of tokens seen, padding included.
        layer: index of the cache layer.
        empty: whether some row may hold empty slots.
        whole: whether the slots are all tokens seen, padding included, so that nothing has to be done.

    Returns:
        keys [B, Hkv, L, D] and values [B, Hkv, L, Dv] of a cache from which nothing was evicted, rows aligned on the right.
    """
    length = slots_of(size)
    batch, heads = keys.shape[:2]
    return keys.new_empty(batch, heads, length, keys.shape[3]), values.new_empty(batch, heads, length, values.shape[3])


def window_write(key: Tensor, value: Tensor, layer: int, window: int) -> tuple[Tensor, Tensor]:
    """Say that a layer stores new keys and values by a sliding window, which no policy touches.

    Args:
        key: new keys, [B, Hkv, S, D].
        value: new values, [B, Hkv, S, Dv].
        layer: index of the cache layer.
        window: tokens that a query sees, itself included.

    Returns:
        key and value.
    """
    return torch.empty_like(key), torch.empty_like(value)


torch.library.register_fake("kvfx::cache_read", cache_read)
torch.library.register_fake("kvfx::window_write", window_write)
READ = torch.ops.kvfx.cache_read.default
WINDOW = torch.ops.kvfx.window_write.default
