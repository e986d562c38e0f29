"""The marker through which a traced forward sees a cache of fixed capacity: at the length of the longest text it may see.

As `cache_read`, it lets a model compute masks and positions by its own rules as if nothing had been evicted. But neither the number
of slots nor that of tokens seen is the length of anything here, so one graph of fixed shapes serves every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.passes.cache_write import LIBRARY

LIBRARY.define(
    "static_read(Tensor keys, Tensor values, Tensor columns, Tensor? key, Tensor? value, SymInt tokens, int layer)"
    " -> (Tensor, Tensor)"
)


def static_read(
    keys: Tensor, values: Tensor, columns: Tensor, key: Tensor | None, value: Tensor | None, tokens: int, layer: int
) -> tuple[Tensor, Tensor]:
    """Stand for the keys and values of a text of `tokens` tokens. Shapes only; the passes replace every call.

    Args:
        keys: slots, filled or not, [B, Hkv, C, D].
        values: [B, Hkv, C, Dv].
        columns: which token of the text each slot stands for, and each new key behind them, [B, Hkv or 1, C or C + n] int64; -1 for
            none. Rows are aligned on the right.
        key: new keys that the slots do not hold yet, [B, Hkv, n, D], or None if they do.
        value: new values, or None.
        tokens: those of the text.
        layer: index of the cache layer.

    Returns:
        keys [B, Hkv, tokens, D] and values [B, Hkv, tokens, Dv], new ones among them.
    """
    batch, heads = keys.shape[:2]
    return keys.new_empty(batch, heads, tokens, keys.shape[3]), values.new_empty(batch, heads, tokens, values.shape[3])


torch.library.register_fake("kvfx::static_read", static_read)
READ_STATIC = torch.ops.kvfx.static_read.default
