"""Score by the attention expected from queries that are not asked yet."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import ranks


def expected_attention(
    pre_query: Tensor,
    key: Tensor,
    rotation: Tensor | None,
    value: Tensor | None,
    valid: Tensor | None,
    sinks: int,
    covariance: bool,
    epsilon: float,
    scale: float | None,
) -> Tensor:
    """Score each token by the attention that later queries pay to it on average, if they are normal as those of the prompt.

    A query head's mean m and covariance C, over the row's real tokens behind the first `sinks`, are rotated to where
    later queries stand. Then exp(scale * qᵀk) has the mean exp(scale * mᵀk + scale²/2 * kᵀCk), and a softmax over those
    tokens makes that a share of attention; the heads of a group are averaged. Expected Attention (Devoto et al.,
    arXiv:2510.00636). Sinks take no part and score 0: protecting them is not done here.

    Args:
        pre_query: queries before rotary embedding, [B, Hq, S, D], any float dtype and strides; head h*G + g belongs to
            KV head h.
        key: keys after rotary embedding, [B, Hkv, S, D].
        rotation: [B, Hq, D, D] float32, times which row vectors are rotated; None means that nothing is.
        value: [B, Hkv, S, Dv]; if given, scores plus `epsilon` are multiplied by the L2 norm of the token's value.
        valid: [B, S] bool, False at padding; None means every token is real.
        sinks: first real tokens of a row, left out.
        covariance: whether to count C; without it, the score is attention from the mean query.
        epsilon: see `value`.
        scale: factor on the logits; None means 1/sqrt(D).

    Returns:
        Scores, [B, Hkv, S] float32, higher = keep; 0 at sinks and padding.

    Numerics: float32 throughout. Queries are centred before they are multiplied, because the difference of large
    moments drowns the spread. Inputs whose fourth powers overflow float32 give NaN.
    Cost: 4*B*Hq*S*D*D flops, one copy of the queries and one of the keys for each query head as scratch.
    """
    groups, tokens, width = key.shape[1:]
    scale = width**-0.5 if scale is None else scale
    counted = ranks(valid, tokens, key.device)[0] >= sinks
    if valid is not None:
        counted = counted & valid
    number = counted.sum(-1).clamp(min=1)[:, None, None, None]
    absent = ~counted[:, None, :, None]
    queries, keys = pre_query.float(), key.float()
    mean = queries.masked_fill(absent, 0).sum(2, keepdim=True) / number  # [B, Hq, 1, D]
    later = mean if rotation is None else mean @ rotation
    # The gradient of the logits in the key, but for a factor of 2 in the second term: their dot product is the logit.
    slope = scale * later.unflatten(1, (groups, -1)).transpose(2, 3)  # [B, Hkv, 1, G, D]
    if covariance:
        centred = (queries - mean).masked_fill(absent, 0)
        spread = centred.transpose(-2, -1) @ centred * (scale**2 / 2 / number)
        if rotation is not None:
            spread = rotation.transpose(-2, -1) @ spread @ rotation
        # The G matrices of a group side by side are one matmul of their KV head, so keys are not copied G times.
        columns = spread.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)  # [B, Hkv, D, G*D]
        slope = slope + (keys @ columns).unflatten(-1, (-1, width))
    logits = (slope * keys[:, :, :, None]).sum(-1)  # [B, Hkv, S, G]
    logits = logits.masked_fill(absent, torch.finfo(torch.float32).min)
    score = (logits - logits.logsumexp(2, keepdim=True)).exp().mean(-1)
    if value is not None:
        score = (score + epsilon) * torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
    return score.masked_fill(~counted[:, None], 0)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    query, key, value = samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    (rotation,) = samples(torch.float32, device, seed + 1, (B, H * G, D, D))
    return query, key, rotation / D**0.5, value, None, 4, True, 0.0, None


OP = KernelOp(
    "expected_attention",
    "(Tensor pre_query, Tensor key, Tensor? rotation, Tensor? value, Tensor? valid, int sinks, bool covariance, "
    "float epsilon, float? scale) -> Tensor",
    expected_attention,
    _inputs,
    triton="expected_attention_triton:expected_attention",
    cost="4*B*Hq*S*D*D flops",
)
