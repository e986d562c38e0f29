"""The marker that a cache puts into a traced graph where it stores new keys and values.

`cache_write` says what is to be stored and how many slots the result shall hold; what is kept is the passes' business. It carries
sizes as the length of an empty tensor, which makes them inputs of the graph: one graph serves every share of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("kvfx", "FRAGMENT")
LIBRARY.define(
    "cache_write(Tensor key, Tensor value, Tensor positions, Tensor? counts, Tensor size, int layer)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def cache_write(
    key: Tensor, value: Tensor, positions: Tensor, counts: Tensor | None, size: Tensor, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stand for the eviction of one layer's new tokens. Shapes only; the passes replace every call.

    Args:
        key: new keys as attention sees them, [B, Hkv, S, D].
        value: new values, [B, Hkv, S, Dv].
        positions: RoPE index of each token within its row, -1 for padding, [B, S], int32.
        counts: slots that each row keeps, [B], int64, or None if every row keeps all n and none is padded.
        size: an empty tensor [n + 1, 0]; n is the number of slots to hold. One more, because a graph specialises sizes 0 and 1.
        layer: index of the cache layer.

    Returns:
        kept keys [B, Hkv, n, D], values [B, Hkv, n, Dv], positions [B, Hkv, n] int32, and whether all scores were finite, [] bool.
    """
    slots = slots_of(size)
    batch, heads = key.shape[:2]
    return (
        key.new_empty(batch, heads, slots, key.shape[3]),
        value.new_empty(batch, heads, slots, value.shape[3]),
        positions.new_empty(batch, heads, slots),
        torch.empty((), dtype=torch.bool, device=key.device),
    )


def size_of(slots: int, device: torch.device) -> Tensor:
    """The tensor whose length carries `slots`."""
    return torch.empty(slots + 1, 0, device=device)


def slots_of(size: Tensor) -> int:
    """The number of slots that `size` carries."""
    return size.shape[0] - 1


torch.library.register_fake("kvfx::cache_write", cache_write)
WRITE = torch.ops.kvfx.cache_write.default
