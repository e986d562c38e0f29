"""Move the kept tokens together, behind what a cache of fixed capacity holds."""

import torch
from torch import Tensor

from .compact import compact
from .op import KernelOp, samples


def compact_into(
    keys: Tensor,
    values: Tensor,
    held: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    slots: Tensor,
    counts: Tensor | None,
    length: Tensor,
) -> None:
    """Copy keys, values and positions of the chosen slots into buffers: the in-place form of `compact`.

    Args:
        keys: [B, Hkv, C, D], any strides; written.
        values: [B, Hkv, C, Dv]; written.
        held: [B, Hkv, C] int32, position of the token in each slot; written.
        key: [B, Hkv, S, D], of the buffer's dtype, any strides.
        value: [B, Hkv, S, Dv].
        positions: [B, S] int32, position of each token in its sequence.
        slots: [B, Hkv, n] int64, from `select`: what a row keeps at the right, -1 at the left.
        counts: [B] int64, how many each row keeps; None if all keep n, and no slot is -1.
        length: [B] int64, slots that each row holds already: the first it keeps goes to slot `length[b]`, and so on.
            What is empty goes behind them, a row of zeros with position -1. There must be room: length[b] + n <= C.

    Returns:
        Nothing.

    Numerics: bit copies (only a NaN's payload may change). Cost: reads and writes the kept rows once.
    """
    batch, heads, count = slots.shape
    place = torch.arange(count, device=slots.device)[None]
    if counts is not None:
        place = (place + counts[:, None]) % count
    row = torch.arange(batch, device=slots.device)[:, None, None]
    head = torch.arange(heads, device=slots.device)[:, None]
    place = (place + length[:, None])[:, None]
    moved = compact(key, value, positions, slots, counts is not None)
    for buffer, new in zip((keys, values, held), moved, strict=True):
        buffer.index_put_((row, head, place), new)


def _inputs(dims, dtype, device, seed):
    B, H, _, S, D = dims
    key, value, order = samples(dtype, device, seed, (B, H, S, D), (B, H, S, D), (B, H, S))
    positions = torch.arange(S, dtype=torch.int32, device=device).repeat(B, 1)
    slots = order.argsort(-1)[..., : (S + 1) // 2].sort(-1).values
    buffers = (torch.zeros(B, H, 2 * S, D, dtype=dtype, device=device) for _ in range(2))
    held = torch.full((B, H, 2 * S), -1, dtype=torch.int32, device=device)
    length = torch.arange(B, device=device) % (S // 2 + 1)
    return *buffers, held, key, value, positions, slots, None, length


OP = KernelOp(
    "compact_into",
    "(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) held, Tensor key, Tensor value, Tensor positions, Tensor slots,"
    " Tensor? counts, Tensor length) -> ()",
    compact_into,
    _inputs,
    triton="compact_into_triton:compact_into",
    cost="reads and writes 2*B*Hkv*n*D elements",
)
