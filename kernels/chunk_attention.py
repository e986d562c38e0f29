"""Score by the attention received inside a chunk, without a causal mask."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import chunk_slots, from_front, places, pooled, ranks, sources, spread, stored, to_front, unchunk

# The query heads of a group are taken in so many parts, one after the other: what a part makes of all chunks soon outgrows the
# allocator's reuse, and fresh pages cost more than the matmul.
PARTS = 4


def chunk_attention(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, chunk: int, scale: float, pool: int
) -> Tensor:
    """Score each token by the attention its chunk pays to it, past and future queries alike.

    Chunks are disjoint runs of `chunk` real tokens. Without a mask the mean score of a chunk is G whatever its length,
    so the short last chunk needs no correction: absent keys get -inf, absent queries pay nothing. The attention term
    of Compactor (Chari & Van Durme, arXiv:2507.08143).

    Args:
        query: [B, Hq, S, D], any float dtype and strides; head h*G + g belongs to KV head h.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv]; if given, scores are multiplied by the L2 norm of the token's value.
        valid: [B, S] bool, False at padding; None means every token is real.
        chunk: tokens in a chunk.
        scale: factor on the logits.
        pool: odd width of the average taken over neighbouring real tokens at the end; 1 means none.

    Returns:
        Scores, [B, Hkv, S] float32, not negative, higher = keep; 0 at padding.

    Numerics: float32 throughout; the number of real taps divides the average. Scaled queries are rounded once more.
    Cost: 2*B*Hq*S*chunk*D flops in batched matmuls. Scratch is B*Hq*S*chunk/PARTS floats, as each part needs the one before.
    """
    heads, tokens = key.shape[1], key.shape[2]
    place = places(valid)
    slot = chunk_slots(tokens, chunk, key.device)
    length = ranks(valid, tokens, key.device)[1]
    real = slot < length[:, None, :, None]  # [B or 1, 1, N, C]

    def chunks(x: Tensor) -> Tensor:
        """Cut x, [B, H, S, ...], into [B, H, N, C, ...], float32; absent slots repeat the row's last token.

        So they leave maxima as they are, and no padding, which may hold NaN, is read.
        """
        if place is None:
            return x[:, :, slot.clamp(max=tokens - 1)].float()
        last = (length - 1).clamp(min=0)
        source = sources(place).gather(-1, torch.minimum(slot.flatten(), last))  # [B, N*C]
        return x.gather(2, spread(source, x)).unflatten(2, slot.shape).float()

    keys = chunks(key).flatten(0, 2).transpose(1, 2)  # [B*Hkv*N, D, C]
    # The running score is kept negative, and an absent key starts at 1e30, where it stays: what is above zero is the mask.
    debt = torch.where(real, 0, 1e30).expand(key.shape[0], heads, -1, -1)
    debt = stored(debt.flatten(0, 2))[:, None]  # [B*Hkv*N, 1, C]
    for part in query.unflatten(1, (heads, -1)).chunk(PARTS, 2):  # [B, Hkv, g, S, D]
        # The g heads become rows of their KV head's matmul, so keys are not copied g times.
        rows = (chunks(part.transpose(2, 3)) * scale).flatten(3, 4).flatten(0, 2)  # [B*Hkv*N, C*g, D]
        logits = rows @ keys
        weights = (logits - logits.amax(-1, keepdim=True) - debt.relu()).exp()
        asking = real.float().repeat_interleave(part.shape[2], -1)  # absent queries pay nothing
        paid = asking / weights.sum(-1).view(key.shape[0], heads, -1, asking.shape[-1])
        debt = torch.baddbmm(debt, paid.flatten(0, 2)[:, None], weights, alpha=-1)
    score = unchunk(-debt.view(key.shape[0], heads, -1, chunk), tokens)
    if value is not None:
        norm = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
        score = score * to_front(norm, place)
    score = from_front(pooled(score, unchunk(real.float(), tokens), "avg", pool), place)
    return score if valid is None else score.masked_fill(~valid[:, None], 0)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    query, key, value = samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    return query, key, value, None, 16, 1.0, 3


OP = KernelOp(
    "chunk_attention",
    "(Tensor query, Tensor key, Tensor? value, Tensor? valid, int chunk, float scale, int pool) -> Tensor",
    chunk_attention,
    _inputs,
    triton="chunk_attention_triton:chunk_attention",
    cost="2*B*Hq*S*chunk*D flops",
)
