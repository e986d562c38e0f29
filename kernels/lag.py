"""Score by how a token differs from the block of tokens behind it."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import chunk_slots, from_front, places, ranks, to_front


def lag(key: Tensor, value: Tensor, valid: Tensor | None, lag: int, sinks: int) -> Tensor:
    """Score each token by its rank inside its block, where a block is judged on the scale of the next one.

    Behind the first `sinks` real tokens, blocks are runs of `lag` real tokens. Each channel of a block is brought to
    the range that the next block spans there; the spread over channels, put through a softmax over the block and
    averaged over key and value, ranks the block's tokens. So every block gives up the same share. The last whole block
    and what is behind it have no next block: there the newer stays. (LagKV, Liang et al., arXiv:2504.04704.)

    Args:
        key: [B, Hkv, S, D], any float dtype and strides.
        value: [B, Hkv, S, Dv].
        valid: [B, S] bool, False at padding; None means every token is real.
        lag: tokens in a block, at least 2.
        sinks: real tokens before the first block.

    Returns:
        Scores, [B, Hkv, S] float32, higher = keep: ranks / lag in [0, 1), the earlier of equals higher; in [1, 2),
        rising, behind the last block that has a next one; 2 at the sinks; 0 at padding.

    Numerics: float32, sample deviation over channels; a channel on which the next block is constant is only shifted.
    Cost: reads key and value twice, sorts B*Hkv*S scores in blocks.
    """
    tokens = key.shape[2]
    place = places(valid)
    length = ranks(valid, tokens, key.device)[1]  # [B or 1, 1]
    slot = chunk_slots(tokens, lag, key.device) + sinks  # [N, lag]
    whole = slot[:, -1] < length  # [B or 1, N]
    judged = (slot[:, -1] + lag < length)[:, None, :, None]  # [B or 1, 1, N, 1]

    def weights(x: Tensor) -> Tensor:
        blocks = to_front(x, place)[:, :, slot.clamp(max=tokens - 1)].float()  # [B, Hkv, N, lag, D]
        blocks = blocks.masked_fill(~whole[:, None, :, None, None], 0)
        # Of the block behind; the last block, which has none, is not judged.
        low, high = (bound.roll(-1, 2)[..., None, :] for bound in (blocks.amin(3), blocks.amax(3)))
        span = torch.where(high > low, high - low, 1)
        return ((blocks - low) / span).std(-1, correction=min(1, x.shape[-1] - 1)).softmax(-1)

    best = ((weights(key) + weights(value)) / 2).sort(dim=-1, descending=True, stable=True).indices
    rank = lag - 1 - torch.arange(lag, device=key.device).expand_as(best)
    rank = torch.empty_like(best).scatter(-1, best, rank)  # of each token in its block, 0 the worst
    # Back to the row: token t of it, after the sinks, is token t - sinks of the blocks laid end to end.
    token = torch.arange(tokens, device=key.device)
    source = torch.where(token < sinks, 0, token - sinks)  # Inductor fails on an index clamped at 0
    newest = 1 + token / length.clamp(min=1)
    score = torch.where(judged, rank / lag, -1).flatten(2)
    score = score.gather(2, source.expand(score.shape[0], score.shape[1], -1))
    score = torch.where(score < 0, newest[:, None], score)
    score = from_front(torch.where(token < sinks, 2, score), place)
    return score if valid is None else score.masked_fill(~valid[:, None], 0)


def _inputs(dims, dtype, device, seed):
    B, H, _, S, D = dims
    key, value = samples(dtype, device, seed, (B, H, S, D), (B, H, S, D))
    return key, value, None, 8, 4


OP = KernelOp(
    "lag",
    "(Tensor key, Tensor value, Tensor? valid, int lag, int sinks) -> Tensor",
    lag,
    _inputs,
    cost="reads B*Hkv*S*(D + Dv) twice, one sort of B*Hkv*S scores",
)
