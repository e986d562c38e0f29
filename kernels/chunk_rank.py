"""Let every chunk of a row keep the same share."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import chunk_slots, from_front, places, protected, ranks, to_front, unchunk


def chunk_rank(scores: Tensor, valid: Tensor | None, chunk: int, sinks: int, recent: int) -> Tensor:
    """Replace each score by its rank within its chunk, so that `select` takes the same share of every chunk.

    Chunks are runs of `chunk` real tokens; the last may be short. The best of a chunk gets 0, the next -1/n, and so on
    to -(n - 1)/n, n being the tokens of its chunk; so no chunk is emptied while another keeps two, and what a share
    leaves over goes to the earlier chunks. FINCH (Corallo & Papotti, TACL 2024) budgets its chunks alike.

    Args:
        scores: [B, Hkv, S], any float dtype; anything at padding.
        valid: [B, S] bool, False at padding; None means every token is real.
        chunk: tokens in a chunk.
        sinks: protected real tokens at the start of a row; they stand first in their chunk, inside its share.
        recent: protected real tokens at its end, likewise.

    Returns:
        Scores, [B, Hkv, S] float32, in (-1, 0]; 0 at padding. A score that is not finite stays, for `protect` to report.

    Numerics: exact ranks, the earlier of equals first. Cost: one sort of B*Hkv*S scores in chunks.
    """
    tokens = scores.shape[2]
    place = places(valid)
    slot = chunk_slots(tokens, chunk, scores.device)  # [N, C]
    length = ranks(valid, tokens, scores.device)[1][..., None]  # [B or 1, 1, 1]
    scores = scores.float()
    safe = protected(valid, tokens, scores.device, sinks, recent)[:, None]
    part = to_front(scores.masked_fill(safe, torch.inf), place)[:, :, slot.clamp(max=tokens - 1)]
    part = part.masked_fill((slot >= length)[:, None], -torch.inf)  # absent tokens come last
    order = part.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(-1, order, torch.arange(chunk, device=scores.device).expand_as(order))
    size = (length - slot[:, :1]).clamp(1, chunk)[:, None]  # [B or 1, 1, N, 1], tokens of each chunk
    share = from_front(unchunk(-rank / size, tokens), place)
    share = torch.where(scores.isfinite(), share, scores)
    return share if valid is None else share.masked_fill(~valid[:, None], 0)


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S)), None, 8, 4, 4


OP = KernelOp(
    "chunk_rank",
    "(Tensor scores, Tensor? valid, int chunk, int sinks, int recent) -> Tensor",
    chunk_rank,
    _inputs,
    cost="one sort of B*Hkv*S scores in chunks",
)
