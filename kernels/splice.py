"""Rank by one score up to a share of the budget, and by another behind it."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .select import best
from .shares import counts_of, share_of


def splice(first: Tensor, then: Tensor, count: int, counts: Tensor | None, numerator: int, denominator: int) -> Tensor:
    """Let the best tokens of one score win, as many as a share of what is kept; rank the others by a second score.

    The two stages of CriticalKV (Feng et al., arXiv:2502.03805). A row that keeps n tokens takes the first
    floor(n * numerator / denominator) of them by `first`: at least one, as kvpress does, unless the share is 0.
    Equal scores keep the earlier token.

    Args:
        first: [B, Hkv, S] float32, as `protect` leaves it: protected tokens win, padding loses.
        then: [B, Hkv, S] float32, the same.
        count: slots that will be selected, 1 <= count <= S.
        counts: [B] int64, tokens kept by each row, 0 <= counts[b] <= count; None means `count` in every row.
        numerator: of the share, 0 <= numerator <= denominator.
        denominator: of the share, at most 10^9, so that its products with counts fit 64 bits.

    Returns:
        Scores, [B, Hkv, S] float32: `then`, and +inf for the tokens of the first share. All of +inf are selected, if
        the protected tokens alone are.

    Numerics: exact. Cost: one top-k and a few sweeps over the scores.
    """
    share = share_of(counts_of(first, count, counts), numerator, denominator)
    return then.masked_fill(best(first, count, share), torch.inf)


def _inputs(dims, dtype, device, seed):
    first, then = samples(torch.float32, device, seed, *[(dims.B, dims.Hkv, dims.S)] * 2)
    return first, then, (dims.S + 1) // 2, None, 1, 2


OP = KernelOp(
    "splice",
    "(Tensor first, Tensor then, SymInt count, Tensor? counts, int numerator, int denominator) -> Tensor",
    splice,
    _inputs,
    triton="splice_triton:splice",
    cost="one top-k over B*Hkv rows of S",
)
