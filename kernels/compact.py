"""Move the kept tokens together."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def compact(key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gather keys, values and positions of the chosen slots.

    Args:
        key: [B, Hkv, S, D], any dtype and strides.
        value: [B, Hkv, S, Dv].
        positions: [B, S] int32, position of each token in its sequence.
        slots: [B, Hkv, n] int64, from `select`.
        padded: slots may hold -1, which gives a zero row and position -1.

    Returns:
        Keys [B, Hkv, n, D], values [B, Hkv, n, Dv] and positions [B, Hkv, n] int32, all contiguous.

    Numerics: bit copies (only a NaN's payload may change); positions are not renumbered.
    Cost: reads and writes the kept rows once.
    """
    source = slots.clamp(min=0) if padded else slots
    rows = source[..., None]
    key = key.gather(2, rows.expand(-1, -1, -1, key.shape[-1]))
    value = value.gather(2, rows.expand(-1, -1, -1, value.shape[-1]))
    positions = positions[:, None].expand(-1, slots.shape[1], -1).gather(2, source)
    if padded:
        empty = slots < 0
        key, value = key.masked_fill(empty[..., None], 0), value.masked_fill(empty[..., None], 0)
        positions = positions.masked_fill(empty, -1)
    return key, value, positions


def _inputs(dims, dtype, device, seed):
    B, H, _, S, D = dims
    key, value, order = samples(dtype, device, seed, (B, H, S, D), (B, H, S, D), (B, H, S))
    positions = torch.arange(S, dtype=torch.int32, device=device).repeat(B, 1)
    slots = order.argsort(-1)[..., : (S + 1) // 2].sort(-1).values
    return key, value, positions, slots, False


OP = KernelOp(
    "compact",
    "(Tensor key, Tensor value, Tensor positions, Tensor slots, bool padded) -> (Tensor, Tensor, Tensor)",
    compact,
    _inputs,
    triton="compact_triton:compact",
    cost="reads and writes 2*B*Hkv*n*D elements",
)
