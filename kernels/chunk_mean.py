"""Let the tokens of a chunk stay or leave together."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import chunk_slots, from_front, places, ranks, to_front, unchunk


def chunk_mean(scores: Tensor, valid: Tensor | None, chunk: int, sinks: int, recent: int) -> Tensor:
    """Replace each score by the mean of its chunk, so that `select` takes whole chunks; ChunkKV, arXiv:2502.00299.

    Chunks are runs of `chunk` real tokens; the last may be short. Equal scores keep the earlier token, so chunks come
    whole, best first, and the one that no longer fits gives its first tokens. Protected tokens, which stay anyway,
    are left out of the mean of their chunk.

    Args:
        scores: [B, Hkv, S], any float dtype; anything at padding.
        valid: [B, S] bool, False at padding; None means every token is real.
        chunk: tokens in a chunk.
        sinks: protected real tokens at the start of a row.
        recent: protected real tokens at its end.

    Returns:
        Scores, [B, Hkv, S] float32; 0 at padding and in a chunk that is protected throughout.

    Numerics: float32; the tokens of a chunk get the same bits. Cost: two sweeps over the scores.
    """
    tokens = scores.shape[2]
    place = places(valid)
    slot = chunk_slots(tokens, chunk, scores.device)  # [N, C]
    length = ranks(valid, tokens, scores.device)[1][..., None]  # [B or 1, 1, 1]
    counted = (slot < length) & (slot >= sinks) & (slot < length - recent)  # [B or 1, N, C]
    part = to_front(scores, place)[:, :, slot.clamp(max=tokens - 1)].float()
    total = torch.where(counted[:, None], part, 0).sum(-1, keepdim=True)
    mean = total / counted.sum(-1, keepdim=True).clamp(min=1)[:, None]
    mean = from_front(unchunk(mean.expand(-1, -1, -1, chunk), tokens), place)
    return mean if valid is None else mean.masked_fill(~valid[:, None], 0)


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S)), None, 8, 4, 4


OP = KernelOp(
    "chunk_mean",
    "(Tensor scores, Tensor? valid, int chunk, int sinks, int recent) -> Tensor",
    chunk_mean,
    _inputs,
    cost="reads B*Hkv*S scores, writes as many",
)
