"""The columns of a mask that slots stand for."""

import torch
from torch import Tensor

from .op import KernelOp


def slot_mask(
    mask: Tensor | None,
    keys: Tensor,
    fresh: Tensor,
    prefix: Tensor,
    start: Tensor,
    seen: Tensor,
    size: Tensor,
    empty: bool,
    heads: int,
) -> Tensor:
    """Turn a mask over all tokens seen into one over the slots that are left of them.

    Column c of the given mask belongs to token c of a row that has seen L tokens. A row that has seen fewer is aligned on the
    right, so its token p has column p + L - seen. The columns of the n new tokens behind them stay as they are.

    Args:
        mask: [1 or B, 1 or Hq, 1 or S, L + n] or one column for all; bool (True takes part) or additive. None: nothing is hidden
            but empty slots.
        keys: slots, [B, Hkv, T, D]; read for its shape alone, like the next one and `size`.
        fresh: new keys, [B, Hkv, n, D].
        prefix: positions of the first P slots, [B, Hkv, P] int32, -1 for an empty slot.
        start: position of slot P of each row, from which on slots are consecutive, [B] int64; negative ones are empty.
        seen: real tokens that each row has seen, [B] int64.
        size: [L + 1, 0].
        empty: whether there may be empty slots, which are hidden.
        heads: Hq.

    Returns:
        [1 or B, 1, Hkv or Hq, 1 or S, T + n], per KV head where slots are a head's own and the mask is one for all; or the mask
        itself where it has one column for all and no slot is empty. Heads of a row may hold unequally many.

    Cost: reads and writes T values for each mask row and head with slots of its own.
    """
    batch, kv_heads, slots = keys.shape[:3]
    length, new = size.shape[0] - 1, fresh.shape[2]
    each = kv_heads if prefix.shape[2] else 1  # without a prefix, slots are consecutive and alike in all heads
    place = torch.arange(slots, device=start.device).expand(batch, each, -1)
    positions = place - prefix.shape[2] + start[:, None, None]
    if prefix.shape[2]:
        last = prefix.shape[2] - 1
        positions = torch.where(place <= last, prefix.long().gather(2, place.clamp(max=last)), positions)
    there = positions[:, :, None] >= 0
    if mask is None:
        return torch.cat([there, there.new_ones(batch, each, 1, new)], 3)
    if mask.shape[1] != 1:
        there = there.repeat_interleave(heads // each, 1)
    if not isinstance(mask.shape[3], int) or mask.shape[3] != 1:
        columns = (positions + (length - seen)[:, None, None]).clamp(min=0)[:, :, None]
        if mask.shape[1] != 1:
            columns = columns.repeat_interleave(heads // each, 1)
        held = mask[..., :length].expand(batch, columns.shape[1], -1, -1)
        held = held.gather(3, columns.expand(-1, -1, mask.shape[2], -1))
        behind = mask[..., length:].expand(batch, held.shape[1], -1, -1)
    elif empty:
        held = mask.expand(batch, there.shape[1], -1, slots)
        behind = mask.expand(batch, there.shape[1], -1, new)
    else:
        return mask
    if empty:
        lost = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        held = held.masked_fill(~there, lost)
    return torch.cat([held, behind], 3)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    generator = torch.Generator().manual_seed(seed)
    slots = max(1, S // 2)
    prefix = torch.rand(B, H, S, generator=generator).argsort(-1)[..., :slots].sort(-1).values.int().to(device)
    seen = torch.full((B,), S, device=device)
    mask = torch.rand(B, H * G, 3, S + 3, generator=generator).to(device) < 0.7
    keys, fresh = torch.zeros(B, H, slots, D, dtype=dtype, device=device), torch.zeros(B, H, 3, D, dtype=dtype, device=device)
    return mask, keys, fresh, prefix, seen, seen, torch.empty(S + 1, 0, device=device), False, H * G


OP = KernelOp(
    "slot_mask",
    "(Tensor? mask, Tensor keys, Tensor fresh, Tensor prefix, Tensor start, Tensor seen, Tensor size, bool empty, int heads)"
    " -> Tensor",
    slot_mask,
    _inputs,
    cost="reads and writes T values for each mask row and head",
)
