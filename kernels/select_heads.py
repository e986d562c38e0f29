"""Choose the slots to keep where the KV heads of a layer compete for them."""

import torch
from torch import Tensor

from .allocate import joint
from .op import KernelOp, samples
from .select import best
from .shares import listed, share_of, sure


def select_heads(
    first: Tensor,
    then: Tensor | None,
    count: int,
    counts: Tensor | None,
    floor_numerator: int,
    floor_denominator: int,
    least: int,
    share_numerator: int,
    share_denominator: int,
) -> tuple[Tensor, Tensor]:
    """List what each KV head keeps, head after head, where a row keeps Hkv n tokens and its heads compete for them.

    How many each head keeps is what `allocate` gives by `first`, and without `then` these are its best by `first`. With
    `then`, a head that keeps m tokens takes a share of m by `first` and the rest by `then`, as `splice` says; what it is sure
    of it takes by `first` in any case, as CriticalAdaKV does (Feng et al., arXiv:2502.03805; kvpress). Equal scores keep the
    earlier token; of two heads' equal scores for one token, that of the lower head wins.

    Args:
        first: [B, Hkv, S] float32, as `protect` leaves it: protected tokens win, padding loses.
        then: [B, Hkv, S] float32, the same of the second score, or None.
        count: the largest n, 1 <= count <= S.
        counts: [B] int64, n of each row, 0 <= counts[b] <= count and at most the row's real tokens; None means `count` in
            every row.
        floor_numerator: of the share of n that each head keeps in any case, see `allocate`.
        floor_denominator: of that share.
        least: tokens that each head keeps in any case.
        share_numerator: of the share of `first`, 0 <= share_numerator <= share_denominator. No meaning without `then`.
        share_denominator: of that share, at most 10^9.

    Returns:
        Slots, [B, M] int64 with M = Hkv * count: `head * S + token` of all that is kept, ascending, -1 behind them. And
        lengths, [B, Hkv] int64: how many are of each head.

    Numerics: exact. Cost: `allocate` and a few sweeps more over the scores; with `then`, two top-k of S per head besides. At
    the least 4*B*Hkv*S bytes are read, 8 with `then`, and 8*B*M are written.
    """
    heads, tokens = first.shape[1:]
    chosen = joint(first, count, counts, floor_numerator, floor_denominator, least, 0)
    lengths = chosen.sum(-1)
    if then is not None:
        size = torch.sym_min(tokens, count * heads)
        share = share_of(lengths, share_numerator, share_denominator).minimum(lengths)
        share = share.maximum(sure(first, count, counts, floor_numerator, floor_denominator, least)[:, None])
        chosen = best(then.masked_fill(best(first, size, share), torch.inf), size, lengths)
    return listed(chosen, count * heads), lengths


def _inputs(dims, dtype, device, seed):
    first, then = samples(torch.float32, device, seed, *[(dims.B, dims.Hkv, dims.S)] * 2)
    return first, then, (dims.S + 1) // 2, None, 1, 5, 0, 1, 2


OP = KernelOp(
    "select_heads",
    "(Tensor first, Tensor? then, SymInt count, Tensor? counts, int floor_numerator, int floor_denominator, int least,"
    " int share_numerator, int share_denominator) -> (Tensor, Tensor)",
    select_heads,
    _inputs,
    triton="select_heads_triton:select_heads",
    cost="one top-k over B rows of Hkv*S, and over B*Hkv rows of S where there is a floor; two more with `then`",
)
