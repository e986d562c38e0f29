"""Score by recency."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import ranks


def position(key: Tensor, valid: Tensor | None, sinks: int) -> Tensor:
    """Score each token by its place among the row's real tokens, so that the newest stay.

    With the first tokens protected, or `sinks`, this is StreamingLLM (Xiao et al., arXiv:2309.17453).

    Args:
        key: [B, Hkv, S, D]; only its shape and device are read.
        valid: [B, S] bool, False at padding; None means every token is real.
        sinks: real tokens at the start of a row that come before all others, the first of them first.

    Returns:
        Scores, [B, Hkv, S] float32: 0, 1, 2, ... along the real tokens of a row, S + sinks, one less each, at its sinks;
        0 at padding.

    Numerics: exact below 2^24 tokens. Cost: writes one float per token and head.
    """
    rank = ranks(valid, key.shape[2], key.device)[0]
    rank = torch.where(rank < sinks, key.shape[2] + sinks - rank, rank)
    score = rank.float()[:, None].expand(key.shape[0], key.shape[1], -1)
    return score.clone() if valid is None else score.masked_fill(~valid[:, None], 0)


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S, dims.D)), None, 2


OP = KernelOp("position", "(Tensor key, Tensor? valid, int sinks) -> Tensor", position, _inputs, cost="writes B*Hkv*S floats")
