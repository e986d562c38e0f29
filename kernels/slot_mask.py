"""The columns of a mask that slots stand for."""

import torch
from torch import Tensor

from .op import KernelOp


def slot_mask(
    mask: Tensor | None, keys: Tensor, prefix: Tensor, start: Tensor, seen: Tensor, length: int, new: int, empty: bool, heads: int
) -> Tensor:
    """Turn a mask over all tokens seen into one over the slots that are left of them.

    Column c of the given mask belongs to token c of a row that has seen `length` tokens. A row that has seen fewer is aligned on the
    right, so its token p has column p + length - seen. The columns of the new tokens stay as they are.

    Args:
        mask: [1 or B, 1 or Hq, 1 or S, length + new] or one column for all; bool (True takes part) or additive. None: nothing is hidden but empty slots.
        keys: slots, [B, Hkv, T, D]; read for its shape alone.
        prefix: positions of the first P slots, [B, Hkv, P] int32, -1 for an empty slot.
        start: position of slot P of each row, from which on slots are consecutive, [B] int64; negative ones are empty.
        seen: real tokens that each row has seen, [B] int64.
        length: columns of the tokens seen.
        new: columns of new tokens.
        empty: whether there may be empty slots, which are hidden.
        heads: Hq.

    Returns:
        [1 or B, 1 or Hq, 1 or S, T + new], or the mask itself where it has one column for all and no slot is empty.

    Cost: reads and writes T values for each mask row and head with slots of its own.
    """
    batch, kv_heads, slots = keys.shape[:3]
    each = kv_heads if prefix.shape[2] else 1  # without a prefix, slots are consecutive and alike in all heads
    tail = torch.arange(slots - prefix.shape[2], device=start.device) + start[:, None]
    tail = tail[:, None].expand(batch, each, -1)
    positions = torch.cat([prefix.long(), tail], 2) if prefix.shape[2] else tail
    there = positions[:, :1, None] >= 0  # all heads of a row have equally many, on the right
    if mask is None:
        return torch.cat([there, there.new_ones(batch, 1, 1, new)], 3)
    if not isinstance(mask.shape[3], int) or mask.shape[3] != 1:
        columns = (positions + (length - seen)[:, None, None]).clamp(min=0)[:, :, None]
        if mask.shape[1] != 1:
            columns = columns.repeat_interleave(heads // each, 1)
        held = mask[..., :length].expand(batch, columns.shape[1], -1, -1)
        held = held.gather(3, columns.expand(-1, -1, mask.shape[2], -1))
        if columns.shape[1] not in (1, heads):
            held = held.repeat_interleave(heads // kv_heads, 1)
        fresh = mask[..., length:].expand(batch, held.shape[1], -1, -1)
    elif empty:
        held = mask.expand(batch, -1, -1, slots)
        fresh = mask.expand(batch, -1, -1, new)
    else:
        return mask
    if empty:
        lost = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        held = held.masked_fill(~there, lost)
    return torch.cat([held, fresh], 3)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    generator = torch.Generator().manual_seed(seed)
    slots = max(1, S // 2)
    prefix = torch.rand(B, H, S, generator=generator).argsort(-1)[..., :slots].sort(-1).values.int().to(device)
    seen = torch.full((B,), S, device=device)
    mask = torch.ones(1, 1, 3, S + 3, dtype=torch.bool, device=device).tril(S)
    keys = torch.zeros(B, H, slots, D, dtype=dtype, device=device)
    return mask, keys, prefix, seen, seen, S, 3, False, H * G


OP = KernelOp(
    "slot_mask",
    "(Tensor? mask, Tensor keys, Tensor prefix, Tensor start, Tensor seen, SymInt length, SymInt new, bool empty, int heads) -> Tensor",
    slot_mask,
    _inputs,
    cost="reads and writes T values for each mask row and head",
)
