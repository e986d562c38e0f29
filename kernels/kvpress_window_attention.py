"""SnapKV and TOVA as kvpress computes them, for comparison with published numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import KernelOp, samples


def kvpress_window_attention(query: Tensor, key: Tensor, window: int, kernel: int, layer: bool) -> Tensor:
    """Score tokens by kvpress 0.5.5's SnapKVPress or, over all heads of the layer, TOVAPress, bug for bug.

    Deliberately kept: weights rounded to the dtype of the queries before they are averaged, average pooling that counts
    the zeros beyond the ends, also beyond the window's first token, and logits over sqrt(D) whatever the model does.
    The window's own tokens get 1 more than the best of their row, where kvpress takes the best of the batch, which is
    one row; ties among them are `select`'s, not top-k's.

    Args:
        query: [B, Hq, S, D], S > window (kvpress fails below too), no padding.
        key: [B, Hkv, S, D].
        window: queries that ask.
        kernel: odd width of the pooling; 1 means none.
        layer: whether to average over all query heads instead of those of a group.

    Returns:
        Scores, [B, Hkv, S] float32, higher = keep.

    Numerics: logits and averages in the dtype of the inputs, as there; the softmax float32.
    Cost: 2*B*Hq*window*S*D flops.
    """
    tokens, width = key.shape[2:]
    asking = query[:, :, tokens - window + torch.arange(window, device=query.device)]
    keys = key[:, :, None].expand(-1, -1, query.shape[1] // key.shape[1], -1, -1).flatten(1, 2)
    logits = asking @ keys.transpose(-2, -1) / width**0.5
    asks = tokens - window + torch.arange(window, device=key.device)
    future = torch.arange(tokens, device=key.device) > asks[:, None]
    weights = logits.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    received = weights[..., : tokens - window].mean(-2)
    if layer:
        score = received.mean(1, keepdim=True).expand(-1, key.shape[1], -1)
    else:
        score = F.avg_pool1d(received, kernel, 1, kernel // 2).unflatten(1, (key.shape[1], -1)).mean(2)
    best = score.amax((1, 2), keepdim=True) + 1
    return torch.cat([score, best.expand(-1, score.shape[1], window)], -1).float()


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    S = S + 8
    return *samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D)), 8, 5, False


OP = KernelOp(
    "kvpress_window_attention",
    "(Tensor query, Tensor key, int window, int kernel, bool layer) -> Tensor",
    kvpress_window_attention,
    _inputs,
    cost="2*B*Hq*window*S*D flops",
)
