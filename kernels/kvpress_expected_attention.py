"""Expected attention as kvpress computes it, for comparison with published numbers."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def kvpress_expected_attention(
    pre_query: Tensor, key: Tensor, rotation: Tensor | None, value: Tensor | None, sinks: int, covariance: bool, epsilon: float
) -> Tensor:
    """Score tokens by kvpress 0.5.5's ExpectedAttentionPress, bug for bug.

    Deliberately kept: statistics, logits and softmax rounded to the dtype of the queries at every step, and logits over
    sqrt(D) whatever the model does. Sinks get 1 more than the best of their head, where kvpress takes the best of the
    batch: they win either way, and ties among them are `select`'s, not top-k's.

    Args:
        pre_query: queries before rotary embedding, [B, Hq, S, D], S > sinks (kvpress fails below too), no padding.
        key: keys after rotary embedding, [B, Hkv, S, D].
        rotation: [B, Hq, D, D] float32, times which row vectors are rotated; None means that nothing is.
        value: [B, Hkv, S, Dv]; if given, scores plus `epsilon` are multiplied by the L2 norm of the token's value.
        sinks: first tokens, left out and then kept.
        covariance: whether to count the covariance of the queries.
        epsilon: see `value`.

    Returns:
        Scores, [B, Hkv, S] float32, higher = keep.

    Numerics: in the dtype of the inputs, as there, so float16 may overflow.
    Cost: 4*B*Hq*S*D*D flops.
    """
    groups, tokens, width = key.shape[1:]
    counted = tokens - sinks
    queries = pre_query.narrow(2, sinks, counted)
    keys = key.narrow(2, sinks, counted)[:, :, None].expand(-1, -1, queries.shape[1] // groups, -1, -1).flatten(1, 2)
    mean = queries.mean(2, keepdim=True)
    centred = queries - mean
    spread = centred.transpose(-2, -1) @ centred / counted
    if rotation is not None:
        turn = rotation.to(queries.dtype)
        mean, spread = mean @ turn, turn.transpose(-2, -1) @ (spread @ turn)
    logits = (mean @ keys.transpose(-2, -1)).squeeze(2) / width**0.5
    if covariance:
        logits = logits + ((keys @ spread)[..., None, :] @ keys[..., None])[..., 0, 0] / width / 2
    score = logits.softmax(-1).unflatten(1, (groups, -1)).mean(2)
    if value is not None:
        score = (score + epsilon) * value.narrow(2, sinks, counted).norm(dim=-1)
    best = score.amax(-1, keepdim=True) + 1
    return torch.cat([best.expand(-1, -1, sinks), score], -1).float()


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    S = S + 4
    query, key, value = samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    (rotation,) = samples(torch.float32, device, seed + 1, (B, H * G, D, D))
    return query, key, rotation / D**0.5, value, 4, True, 0.0


OP = KernelOp(
    "kvpress_expected_attention",
    "(Tensor pre_query, Tensor key, Tensor? rotation, Tensor? value, int sinks, bool covariance, float epsilon) -> Tensor",
    kvpress_expected_attention,
    _inputs,
    cost="4*B*Hq*S*D*D flops",
)
