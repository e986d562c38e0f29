"""Share a budget out among units that compete: the KV heads of a layer, or the layers of a model."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .select import best
from .shares import sure


def joint(
    scores: Tensor, count: int, counts: Tensor | None, floor_numerator: int, floor_denominator: int, least: int, most: int
) -> Tensor:
    """Mark the tokens by which the units of each row win their slots, [B, U, S] bool; see `allocate`."""
    units, tokens = scores.shape[1:]
    if most:
        count = torch.sym_min(count, most)
        counts = None if counts is None else counts.clamp(max=most)
        scores = scores.masked_fill(~best(scores, torch.sym_min(tokens, most), None), -torch.inf)
    if floor_numerator or least:
        size = torch.sym_min(count, torch.sym_max(count * floor_numerator // floor_denominator, max(1, least)))
        # A share of few tokens may be none, which only counts can say.
        counted = counts is not None or not least
        each = sure(scores, count, counts, floor_numerator, floor_denominator, least) if counted else None
        scores = scores.masked_fill(best(scores, size, each), torch.inf)
    every = scores.flatten(1)[:, None]
    kept: int | Tensor = count * units
    if counts is None:
        threshold = every.topk(count * units, -1, sorted=False).values.amin(-1, keepdim=True)
    else:
        kept = counts[:, None] * units
        threshold = every.topk(count * units, -1).values.gather(-1, (kept - 1).clamp(min=0)[:, None])
    above, equal = scores > threshold, scores == threshold
    # Places left over go to equal scores token by token, and within a token unit by unit.
    ties = equal.sum(1)
    before = ties.cumsum(-1) - ties + above.sum((1, 2))[:, None]
    return above | equal & (equal.cumsum(1) <= (kept - before)[:, None])


def allocate(
    scores: Tensor, count: int, counts: Tensor | None, floor_numerator: int, floor_denominator: int, least: int, most: int
) -> Tensor:
    """Say how many slots each unit of a row wins: as many as it has scores among the best of all units together.

    A row shares out U n slots, n being its own flat count. Every unit is sure of the best g of its own,
    g = min(n, max(floor(n * floor_numerator / floor_denominator), least)); what is left goes to the best scores of all.
    Of equal scores the earlier token wins, and of one token the lower unit.

    Args:
        scores: [B, U, S], any float dtype, no NaN; +inf for what a unit must not lose, at most n of each unit, and -inf at
            padding.
        count: the largest n, 1 <= count <= S.
        counts: [B] int64, n of each row, 0 <= counts[b] <= count and at most the row's real tokens; None means `count` in
            every row.
        floor_numerator: of the share of n that each unit is sure of, 0 <= floor_numerator <= floor_denominator.
        floor_denominator: of that share, at most 10^9, so that its products with counts fit 64 bits.
        least: slots that each unit is sure of, unless n is less.
        most: slots that no unit goes beyond; 0 means any number. A row with n > most shares out U * most slots.

    Returns:
        [B, U] int64, each at least g and all together U n.

    Numerics: exact. Cost: one top-k over U*S scores of each row and a few sweeps over them; a top-k of each unit more for
    a floor or `least`, and another for `most`. At the least 4*B*U*S bytes are read.
    """
    return joint(scores, count, counts, floor_numerator, floor_denominator, least, most).sum(-1)


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S)), (dims.S + 1) // 2, None, 1, 5, 0, 0


OP = KernelOp(
    "allocate",
    "(Tensor scores, SymInt count, Tensor? counts, int floor_numerator, int floor_denominator, int least, int most) -> Tensor",
    allocate,
    _inputs,
    cost="one top-k over B rows of U*S, and over B*U rows of S where there is a floor",
)
