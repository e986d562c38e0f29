"""Choose the slots to keep."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def best(scores: Tensor, count: int, counts: Tensor | None) -> Tensor:
    """Mark the best scores of each head; equal scores keep the earlier token.

    Top-k gives only the threshold; a running count then fills the places left over by larger scores with the first
    scores equal to it. That is exact about ties, which top-k's own indices are not, and needs no sort of slots.

    Args:
        scores: [B, Hkv, S], any float dtype, no NaN.
        count: how many, 1 <= count <= S.
        counts: [B] or [B, Hkv] int64, how many in each row or head, 0 <= counts <= count; None means `count` in each.

    Returns:
        [B, Hkv, S] bool.
    """
    kept: int | Tensor = count
    if counts is None:
        threshold = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    else:
        kept = counts[:, None, None] if counts.dim() == 1 else counts[..., None]
        top = scores.topk(count, -1).values
        threshold = top.gather(-1, (kept - 1).clamp(min=0).expand(-1, top.shape[1], -1))
    above, equal = scores > threshold, scores == threshold
    return above | equal & (equal.cumsum(-1) <= kept - above.sum(-1, keepdim=True))


def select(scores: Tensor, count: int, counts: Tensor | None) -> Tensor:
    """List the slots of the best scores of each head, in ascending order; equal scores keep the earlier token.

    Args:
        scores: [B, Hkv, S], any float dtype, no NaN.
        count: slots in the answer, 1 <= count <= S.
        counts: [B] int64, tokens kept by each row, 0 <= counts[b] <= count; None means `count` in every row.

    Returns:
        Slots, [B, Hkv, count] int64. A row that keeps fewer than `count` has its slots at the right, -1 at the left.

    Numerics: exact. Cost: one top-k and a few sweeps over the scores.
    """
    chosen = best(scores, count, counts)
    kept = count if counts is None else counts[:, None, None]
    target = torch.where(chosen, chosen.cumsum(-1) - 1 + (count - kept), count)  # the place `count` is thrown away
    slot = torch.arange(scores.shape[-1], device=scores.device)
    slots = torch.full((*scores.shape[:-1], count + 1), -1, dtype=torch.int64, device=scores.device)
    return slots.scatter(-1, target, slot.expand_as(target))[..., :count]


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S)), (dims.S + 1) // 2, None


OP = KernelOp(
    "select",
    "(Tensor scores, SymInt count, Tensor? counts) -> Tensor",
    select,
    _inputs,
    triton="select_triton:select",
    cost="one top-k over B*Hkv rows of S",
)
