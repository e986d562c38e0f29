"""The narrow waist: every spelling of attention becomes this op."""

import torch.nn.functional as F
from torch import Tensor

from .op import KernelOp, samples


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Attend from queries to the keys of their group.

    Graph rules rewrite each attention they know to this op, so later passes read one spelling. Keys and values stay
    unexpanded: query head h*G + g reads KV head h.

    Args:
        query: [B, Hq, S, D], any float dtype and strides.
        key: [B, Hkv, T, D], Hq = G * Hkv.
        value: [B, Hkv, T, Dv].
        mask: broadcastable to [B, Hq, S, T]; bool (True takes part) or additive in query's dtype. None: no mask.
        dropout: probability of dropping a weight.
        is_causal: query i sees keys 0..i, aligned at the top left; excludes a mask.
        scale: factor on the logits; None means 1/sqrt(D).

    Returns:
        [B, Hq, S, Dv], query's dtype.

    Numerics: those of `scaled_dot_product_attention`, bit for bit.
    Cost: 4*B*Hq*S*T*D flops; reads query, key, value and mask once.
    """
    grouped = bool(query.shape[-3] != key.shape[-3])  # head counts may come as symbols, the flag may not
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=grouped)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    query, key, value = samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    return query, key, value, None, 0.0, True, None


OP = KernelOp(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout, bool is_causal, float? scale) -> Tensor",
    attention,
    _inputs,
    cost="4*B*Hq*S*T*D flops",
)
