"""Rank by one score up to a share of the budget, and by another behind it; the first share is found as `select` finds slots."""

import torch
from torch import Tensor

from . import select_triton
from .select_triton import best


def refusal(first: Tensor, then: Tensor, count: int, counts: Tensor | None, numerator: int, denominator: int) -> str | None:
    """See `KernelOp.refusal`."""
    return select_triton.refusal(first, count, counts)


def splice(first: Tensor, then: Tensor, count: int, counts: Tensor | None, numerator: int, denominator: int) -> Tensor:
    """Launch the kernels of `best`; the rest is for a compiler to fuse.

    Floor: 20 bytes of `first` read per score, most from the L2 cache, 5 read and 4 written to mark the share.
    """
    if counts is None:
        counts = torch.full((first.shape[0],), count, dtype=torch.int64, device=first.device)
    share = (counts * numerator // denominator).clamp(min=min(numerator, 1))
    return then.masked_fill(best(first, count, share), torch.inf)
