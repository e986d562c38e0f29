"""The marker through which a traced forward sees a cache whose heads hold unequally many slots, in blocks of a pool.

As `cache_read`, it lets a model compute masks and positions by its own rules as if nothing had been evicted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.passes.cache_write import LIBRARY

LIBRARY.define(
    "ragged_read(Tensor keys, Tensor values, Tensor positions, Tensor key, Tensor value, SymInt tokens, int layer,"
    " Tensor table, Tensor lengths, Tensor[] work, Tensor shift, int chunk) -> (Tensor, Tensor)"
)


def ragged_read(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: int,
    layer: int,
    table: Tensor,
    lengths: Tensor,
    work: list[Tensor],
    shift: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Stand for the keys and values of all tokens seen, and of the new ones. Shapes only; the passes replace every call.

    Args:
        keys: blocks of a pool, [N, P, D].
        values: [N, P, Dv].
        positions: of the token in each slot within its row, [N, P] int32.
        key: new keys, [B, Hkv, n, D].
        value: new values, [B, Hkv, n, Dv].
        tokens: seen, and the new ones.
        layer: index of the cache layer.
        table: blocks of each extent in order, [B, Hkv, m] int32.
        lengths: slots that each extent holds, [B, Hkv] int64.
        work: how attention splits its work, see `kernels.ragged_attention`.
        shift: the token at position p of row b is column p + shift[b] of a mask, [B] int64.
        chunk: slots of a piece of that work.

    Returns:
        keys [B, Hkv, tokens, D] and values [B, Hkv, tokens, Dv] of a cache from which nothing was evicted.
    """
    batch, heads = key.shape[:2]
    return key.new_empty(batch, heads, tokens, key.shape[3]), value.new_empty(batch, heads, tokens, value.shape[3])


torch.library.register_fake("kvfx::ragged_read", ragged_read)
READ_RAGGED = torch.ops.kvfx.ragged_read.default
