"""Choose the slots to keep where the KV heads of a layer compete for them, by thresholds found as `select` finds them."""

import torch
from torch import Tensor

from . import select_triton
from .select_triton import best, joint_best


def refusal(
    first: Tensor, then: Tensor | None, count: int, counts: Tensor | None, floor_numerator: int, floor_denominator: int, least: int,
    share_numerator: int, share_denominator: int,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    return select_triton.refusal(first, count, counts) or (None if then is None else select_triton.refusal(then, count, counts))


def select_heads(
    first: Tensor, then: Tensor | None, count: int, counts: Tensor | None, floor_numerator: int, floor_denominator: int, least: int,
    share_numerator: int, share_denominator: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernels of `best`: once for the layer, once for a floor, and twice for `then`; the rest is for a compiler to fuse.

    Floor: 20 bytes read and 1 written per score each time, most of it in the L2 cache, and 8 written per slot.
    """
    batch, heads, tokens = first.shape
    each = torch.full((batch,), count, dtype=torch.int64, device=first.device) if counts is None else counts
    sure = (each * floor_numerator // floor_denominator).clamp(min=least).minimum(each)
    scores = first.masked_fill(best(first, count, sure), torch.inf) if floor_numerator or least else first
    chosen = joint_best(scores, count * heads, None if counts is None else counts * heads)
    lengths = chosen.sum(-1)
    if then is not None:
        share = (lengths * share_numerator // share_denominator).clamp(min=min(share_numerator, 1)).minimum(lengths)
        turn = then.masked_fill(best(first, tokens, share.maximum(sure.unsqueeze(1))), torch.inf)
        chosen = best(turn, tokens, lengths)
    places = count * heads
    flat = chosen.flatten(1)
    target = torch.where(flat, flat.cumsum(-1) - 1, places)  # the last place is thrown away
    slot = torch.arange(flat.shape[1], device=first.device)
    slots = torch.full((batch, places + 1), -1, dtype=torch.int64, device=first.device)
    return slots.scatter(-1, target, slot.expand_as(target)).narrow(1, 0, places), lengths
