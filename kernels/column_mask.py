"""The columns of a mask that slots stand for, given as such."""

import torch
from torch import Tensor

from .op import KernelOp


def column_mask(mask: Tensor | None, columns: Tensor, heads: int) -> Tensor:
    """Turn a mask over the tokens of a text into one over slots that hold some of them.

    Args:
        mask: [1 or B, 1 or Hq, 1 or S, M] or one column for all; bool (True takes part) or additive. None: nothing is hidden but
            empty slots.
        columns: token that each slot holds, [B, Hkv or 1, T] int64, -1 for an empty slot. Heads of a row hold equally many, in the
            same slots.
        heads: Hq.

    Returns:
        [B, 1, Hkv or Hq, 1 or S, T], of the mask's type: empty slots are hidden.

    Cost: reads T columns for each head and writes T values for each mask row and head with slots of its own.
    """
    there = columns[:, :1, None] >= 0
    if mask is None:
        return there
    batch, each, slots = columns.shape
    if isinstance(mask.shape[3], int) and mask.shape[3] == 1:
        held = mask.expand(batch, -1, -1, slots)
    else:
        columns = columns.clamp(min=0)[:, :, None]
        if mask.shape[1] != 1:
            columns = columns.repeat_interleave(heads // each, 1)
        held = mask.expand(batch, columns.shape[1], -1, -1).gather(3, columns.expand(-1, -1, mask.shape[2], -1))
    return held & there if mask.dtype == torch.bool else held.masked_fill(~there, torch.finfo(mask.dtype).min)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, _ = dims
    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(B, H, 2 * S, generator=generator).argsort(-1)[..., : max(3, S // 2)]
    columns[..., -2:] = -1
    mask = torch.rand(B, H * G, 3, 2 * S, generator=generator) < 0.7
    return mask.to(device), columns.to(device), H * G


OP = KernelOp(
    "column_mask",
    "(Tensor? mask, Tensor columns, int heads) -> Tensor",
    column_mask,
    _inputs,
    cost="reads T columns for each head, writes T values for each mask row and head",
)
