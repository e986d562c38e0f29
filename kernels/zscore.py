"""Bring scores of different origin to one scale."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import protected


def zscore(scores: Tensor, valid: Tensor | None, sinks: int, recent: int) -> Tensor:
    """Subtract each row's mean and divide by its standard deviation.

    Both are taken over the row's unprotected real tokens and all its KV heads together, so heads stay comparable, and
    tokens that are kept anyway do not distort the scale of those that compete. Rows never see each other.

    Args:
        scores: [B, Hkv, S], any float dtype; anything at padding.
        valid: [B, S] bool, False at padding; None means every token is real.
        sinks: protected real tokens at the start of a row.
        recent: protected real tokens at its end.

    Returns:
        Scores, [B, Hkv, S] float32, protected tokens scaled like the others; 0 at padding. A row whose deviation is
        below 1e-6, or where every token is protected, is 0 throughout.

    Numerics: float32, two passes, population deviation; the mean is taken twice, so a constant row gives 0 exactly
    enough at any magnitude. Not finite scores make their row NaN, which `protect` reports.
    Cost: three sweeps over the scores.
    """
    counted = ~protected(valid, scores.shape[2], scores.device, sinks, recent)[:, None]
    if valid is not None:
        counted = counted & valid[:, None]
    counted = counted.expand(scores.shape)
    total = counted.sum((1, 2), keepdim=True).clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(counted, x, 0).sum((1, 2), keepdim=True) / total

    scores = scores.float()
    scores = scores - mean(scores)
    scores = scores - mean(scores)  # what rounding left of the mean: a constant row must not be scaled up
    deviation = mean(scores.square()).sqrt()
    flat = (deviation < 1e-6) | ~counted.any(2, keepdim=True).any(1, keepdim=True)
    scores = torch.where(flat, 0, scores / deviation)
    return scores if valid is None else scores.masked_fill(~valid[:, None], 0)


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S)), None, 4, 4


OP = KernelOp(
    "zscore",
    "(Tensor scores, Tensor? valid, int sinks, int recent) -> Tensor",
    zscore,
    _inputs,
    triton="zscore_triton:zscore",
    cost="reads B*Hkv*S scores three times",
)
