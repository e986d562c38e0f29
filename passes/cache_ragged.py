"""The markers through which a traced forward sees a cache whose heads hold unequally many slots, in blocks of a pool.

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
LIBRARY.define(
    "ragged_read_received(Tensor keys, Tensor values, Tensor positions, Tensor key, Tensor value, SymInt tokens, int layer,"
    " Tensor table, Tensor lengths, Tensor[] work, Tensor shift, int chunk, Tensor new_positions, int power, int buffer)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
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


def ragged_read_received(
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
    new_positions: Tensor,
    power: int,
    buffer: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ragged_read` that also asks what attention pays. Shapes only; the passes replace every call.

    Args, behind those of `ragged_read`:
        new_positions: of the new tokens, [B, n] int32, -1 for padding.
        power: of the probabilities that are summed, 1 or 2.
        buffer: a query counts for tokens at least that far before it; only of a block of several, see `kernels.ragged_received`.

    Returns:
        what `ragged_read` returns; sums of each slot of each chunk of work, [chunks, chunk] fp32; and of each new token,
        [B, Hkv, n] fp32.
    """
    batch, heads, new = key.shape[:3]
    received = key.new_empty(work[0].shape[0], chunk, dtype=torch.float32), key.new_empty(batch, heads, new, dtype=torch.float32)
    return *ragged_read(keys, values, positions, key, value, tokens, layer, table, lengths, work, shift, chunk), *received


torch.library.register_fake("kvfx::ragged_read", ragged_read)
torch.library.register_fake("kvfx::ragged_read_received", ragged_read_received)
READ_RAGGED = torch.ops.kvfx.ragged_read.default
READ_RECEIVED = torch.ops.kvfx.ragged_read_received.default
