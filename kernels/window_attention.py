"""Score by the attention received from the last queries of a prompt."""

import torch
from torch import Tensor

from .columns import WINDOW_REDUCE, distance, joined, known
from .op import KernelOp, samples
from .rows import places, ranks, sources, stored


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    window: int,
    buffer: int,
    scale: float | None,
    reduce: str,
    heads: str,
    pool: int,
    pool_kind: str,
) -> Tensor:
    """Score each token by the causal attention that the last `window` real queries of its row pay to it.

    The observation window of SnapKV (Li et al., arXiv:2404.14469); one query and all heads give TOVA (Oren et al.,
    arXiv:2401.06104). A row shorter than the window asks with all its queries. The window's own tokens get what the
    formula gives: protecting them is not done here. Squares that are summed over heads, each pooled by itself, give the
    metric of KV-Compress (Rehg, arXiv:2410.00161).

    Args:
        query: [B, Hq, S, D], any float dtype and strides; head h*G + g belongs to KV head h.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv]; if given, scores are multiplied by the L2 norm of the token's value before pooling.
        valid: [B, S] bool, False at padding; None means every token is real.
        window: queries that ask.
        buffer: queries that do not count for a key, itself and those right behind it, though they pay: of tokens i and j,
            numbered in their row, query i counts for key j if i >= j + buffer. 0 counts all that see it.
        scale: factor on the logits; None means 1/sqrt(D).
        reduce: over the window's queries: `mean`, `sum`, `max`, `count` (the mean over those that count for the token)
            or `squares` (the sum of squares). `mean` divides by all queries that ask. A token for which none counts gets 0.
        heads: over query heads, then: `mean` or `max` of the group, or `layer`, the mean over all query heads, the
            same for every KV head; or at the very end, behind the pooling of each query head, `sum` over the group.
        pool: odd width of the pooling over neighbouring real tokens at the end; 1 means none.
        pool_kind: `avg` (the number of real taps divides) or `max`.

    Returns:
        Scores, [B, Hkv, S] float32, not negative, higher = keep; 0 at padding.

    Numerics: float32 throughout; each weight is exp(logit - log-sum-exp of its row). Rows are shorter than 2^24 tokens.
    Cost: 2*B*Hq*window*S*D flops, B*Hq*window*S floats of scratch.
    """
    known("reduce", reduce, WINDOW_REDUCE)
    buffer = distance(buffer)
    groups, tokens, width = key.shape[1:]
    rank, length = ranks(valid, tokens, key.device)
    asks = length - window + torch.arange(window, device=key.device)  # ranks of the queries; negative: none there
    slot = asks.clamp(min=0)
    place = places(valid)
    if place is not None:
        slot = sources(place).gather(-1, slot)
    asking = query.gather(2, slot[:, None, :, None].expand(query.shape[0], query.shape[1], -1, width)).float()
    asking = asking * (width**-0.5 if scale is None else scale)
    # The G heads of a group become rows of their KV head's matmul, so keys are not copied G times.
    rows = asking.unflatten(1, (groups, -1)).flatten(2, 3)
    key = key.float()
    if valid is not None:
        key = key.masked_fill(~valid[:, None, :, None], 0)  # padding may hold NaN
        rank = torch.where(valid, rank, tokens)  # behind every query
    logits = (rows @ key.transpose(-2, -1)).unflatten(2, (-1, window))  # [B, Hkv, G, W, S]
    behind = stored(rank.float())[:, None] - asks[..., None].float()  # [B or 1, W, S], above 0 where a query does not see
    logits = logits - behind.relu()[:, None, None] * 1e30
    total = torch.where(asks[:, None, None, :, None] < 0, 1e30, logits.logsumexp(-1, keepdim=True))  # no query pays nothing
    if buffer:  # all that a query sees has its share, but not all is counted
        logits = logits - (behind + buffer).relu()[:, None, None] * 1e30
    weights = (logits - total).exp()
    asked = length.clamp(1, window)
    if reduce == "max":
        columns = weights.amax(3)
    elif reduce == "squares":
        columns = weights.square().sum(3)
    elif reduce == "sum":
        columns = weights.sum(3)
    elif reduce == "mean":
        columns = weights.sum(3) / asked[:, None, None]
    else:
        columns = weights.sum(3) / torch.minimum(asked, length - rank - buffer).clamp(min=1)[:, None, None]
    return joined(columns, heads, value, valid, pool, pool_kind)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    query, key, value = samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    return query, key, value, None, 16, 0, None, "mean", "mean", 5, "avg"


OP = KernelOp(
    "window_attention",
    "(Tensor query, Tensor key, Tensor? value, Tensor? valid, int window, int buffer, float? scale, str reduce, "
    "str heads, int pool, str pool_kind) -> Tensor",
    window_attention,
    _inputs,
    triton="window_attention_triton:window_attention",
    cost="2*B*Hq*window*S*D flops",
)
