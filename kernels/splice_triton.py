"""Rank by one score up to a share of the budget, and by another behind it; the first share is found as `select` finds slots."""

import torch
from torch import Tensor

from . import select_triton
from .select_triton import best
from .shares import counts_of, share_of


def refusal(first: Tensor, then: Tensor, count: int, counts: Tensor | None, numerator: int, denominator: int) -> str | None:
    """See `KernelOp.refusal`."""
    return select_triton.refusal(first, count, counts)


def splice(first: Tensor, then: Tensor, count: int, counts: Tensor | None, numerator: int, denominator: int) -> Tensor:
    """Launch the kernels of `best`; the rest is for a compiler to fuse.

    Floor: 20 bytes of `first` read per score, most from the L2 cache, 5 read and 4 written to mark the share.
    """
    share = share_of(counts_of(first, count, counts), numerator, denominator)
    return then.masked_fill(best(first, count, share), torch.inf)
