"""The narrow waist: every spelling of attention becomes this op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import KernelOp, samples


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from queries to the keys of their group.

    Graph rules rewrite each attention they know to this op, so later passes read one spelling. Keys and values stay
    unexpanded: query head h*G + g reads KV head h.

    Args:
        query: [B, Hq, S, D], any float dtype and strides.
        key: [B, Hkv, T, D], Hq = G * Hkv.
        value: [B, Hkv, T, Dv].
        mask: broadcastable to [B, Hq, S, T]; bool (True takes part), or additive in query's dtype or float32. None: no mask.
        dropout: probability of dropping a weight; 0 with softcap or sinks.
        is_causal: query i sees keys 0..i, aligned at the top left; excludes a mask.
        scale: factor on the logits; None means 1/sqrt(D).
        softcap: if given, logits become softcap * tanh(logits / softcap) before the mask.
        sinks: [Hq], one more logit per head that takes probability and gives no value.

    Returns:
        [B, Hq, S, Dv], query's dtype. A query that a bool mask lets see nothing gets 0.

    Numerics: without softcap and sinks those of `scaled_dot_product_attention`, bit for bit. With them products, scale and
    cap in query's dtype, softmax in fp32, weights rounded to query's dtype, as decoders spell it.
    Cost: 4*B*Hq*S*T*D flops; reads query, key, value and mask once. With softcap or sinks [B, Hq, S, T] logits are held.
    """
    if softcap is None and sinks is None:
        grouped = bool(query.shape[-3] != key.shape[-3])  # head counts may come as symbols, the flag may not
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=grouped)
    if dropout:
        raise ValueError(f"attention with softcap or sinks has no dropout, got {dropout}")
    B, Hq, S, D = query.shape
    Hkv, T = key.shape[1], key.shape[2]
    # The queries of a group stand behind each other, so that no key is repeated.
    logits = (query.reshape(B, Hkv, -1, D) @ key.mT).view(B, Hq, S, T) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if is_causal:
        mask = torch.ones(S, T, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits.dtype)[:, None, None].expand(B, Hq, S, 1)], -1)
    weights = torch.softmax(logits, -1, dtype=torch.float32)[..., :T].to(query.dtype)
    if mask is not None and mask.dtype == torch.bool:
        weights = weights.masked_fill(~mask, 0)
    return (weights.reshape(B, Hkv, -1, T) @ value).view(B, Hq, S, value.shape[3])


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    query, key, value = samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    return query, key, value, None, 0.0, True, None, None, None


OP = KernelOp(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout, bool is_causal, float? scale,"
    " float? softcap=None, Tensor? sinks=None) -> Tensor",
    attention,
    _inputs,
    cost="4*B*Hq*S*T*D flops",
)
