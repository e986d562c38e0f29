"""Put protected tokens above, and padding below, every score."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import protected


def protect(scores: Tensor, valid: Tensor | None, sinks: int, recent: int) -> tuple[Tensor, Tensor]:
    """Make the first and last real tokens of each row win, padding lose, and all other scores finite.

    Args:
        scores: [B, Hkv, S], any float dtype; anything at padding.
        valid: [B, S] bool, False at padding; None means every token is real.
        sinks: real tokens protected at the start of a row.
        recent: real tokens protected at its end.

    Returns:
        Scores, [B, Hkv, S] float32: +inf where protected, -inf at padding, finite elsewhere. NaN and -inf become the
        lowest float and +inf the highest, so `select` stays defined and never takes padding for a real token.
        And `finite`, 0-dim bool: every score of a real token was finite.

    Numerics: exact. Cost: one sweep over the scores.
    """
    safe = protected(valid, scores.shape[2], scores.device, sinks, recent)[:, None]
    scores = scores.float()
    finite = scores.isfinite()
    limits = torch.finfo(torch.float32)
    scores = scores.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min).masked_fill(safe, torch.inf)
    if valid is not None:
        padding = ~valid[:, None]
        finite = finite | padding
        scores = scores.masked_fill(padding, -torch.inf)
    return scores, finite.all()


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S)), None, 4, 4


OP = KernelOp(
    "protect",
    "(Tensor scores, Tensor? valid, int sinks, int recent) -> (Tensor, Tensor)",
    protect,
    _inputs,
    cost="reads and writes B*Hkv*S scores",
)
