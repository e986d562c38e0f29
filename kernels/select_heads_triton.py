"""Choose the slots to keep where the KV heads of a layer compete for them, by thresholds found as `select` finds them."""

import torch
from torch import Tensor

from . import select_triton
from .select_triton import best, joint_best
from .shares import listed, share_of, sure


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
    _, heads, tokens = first.shape
    each = sure(first, count, counts, floor_numerator, floor_denominator, least)
    scores = first.masked_fill(best(first, count, each), torch.inf) if floor_numerator or least else first
    chosen = joint_best(scores, count * heads, None if counts is None else counts * heads)
    lengths = chosen.sum(-1)
    if then is not None:
        share = share_of(lengths, share_numerator, share_denominator).minimum(lengths)
        turn = then.masked_fill(best(first, tokens, share.maximum(each.unsqueeze(1))), torch.inf)
        chosen = best(turn, tokens, lengths)
    return listed(chosen, count * heads), lengths
