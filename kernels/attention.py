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
        mask: broadcastable to [B, Hq, S, T], or per KV head, [1 or B, Hkv, 1 or S, T]; bool (True takes part), or additive in
            query's dtype or float32. None: no mask.
        dropout: probability of dropping a weight; 0 with softcap or sinks.
        is_causal: query i sees keys 0..i, aligned at the top left; excludes a mask.
        scale: factor on the logits; None means 1/sqrt(D).
        softcap: if given, logits become softcap * tanh(logits / softcap) before the mask.
        sinks: [Hq], one more logit per head that takes probability and gives no value.

    Returns:
        [B, Hq, S, Dv], query's dtype. A query that a bool mask lets see nothing gets 0.

    Numerics: without softcap and sinks those of `scaled_dot_product_attention`, bit for bit; a single query is given to it as the
    G queries of each KV head, which rounds otherwise. With softcap or sinks products, scale and cap in query's dtype, softmax in
    fp32, weights rounded to query's dtype, as decoders spell it.
    Cost: 4*B*Hq*S*T*D flops; keys and values are read as they are, for S = 1 once, and never expanded. With softcap or sinks
    [B, Hq, S, T] logits are held.
    """
    (B, Hq, S, D), Hkv, T = query.shape, key.shape[1], key.shape[2]
    grouped = bool(Hq != Hkv)  # head counts may come as symbols, the flag may not
    if softcap is None and sinks is None:
        if grouped and isinstance(S, int) and S == 1 and not is_causal:
            # The kernel would read the keys once for each query head: on a CPU this takes 0.4 to 0.8 of the time in fp32 and 0.6 to
            # 1.1 in bf16, at 512 to 8192 keys; matmuls and a softmax of their own take 1.1 to 3 times as long as this.
            rows = None if mask is None else _by_group(mask, Hq, Hkv).squeeze(3)
            packed = query.reshape(B, Hkv, -1, D)
            return F.scaled_dot_product_attention(packed, key, value, rows, dropout, scale=scale).reshape(B, Hq, S, -1)
        if mask is not None and mask.dim() == 4 and mask.shape[1] not in (1, Hq):
            mask = mask.repeat_interleave(Hq // Hkv, 1)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=grouped)
    if dropout:
        raise ValueError(f"attention with softcap or sinks has no dropout, got {dropout}")
    G = Hq // Hkv
    # The queries of a group stand behind each other, so that no key is repeated.
    logits = (query.reshape(B, Hkv, -1, D) @ key.mT).view(B, Hkv, G, S, T) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if is_causal:
        mask = torch.ones(S, T, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = _by_group(mask, Hq, Hkv)
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits.dtype).view(Hkv, G, 1, 1).expand(B, Hkv, G, S, 1)], -1)
    weights = torch.softmax(logits, -1, dtype=torch.float32)[..., :T].to(query.dtype)
    if mask is not None and mask.dtype == torch.bool:
        weights = weights.masked_fill(~mask, 0)
    return (weights.reshape(B, Hkv, -1, T) @ value).view(B, Hq, S, value.shape[3])


def _by_group(mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    """View a mask as [1 or B, 1 or Hkv, 1 or G, 1 or S, T]."""
    for _ in range(4 - mask.dim()):
        mask = mask.unsqueeze(0)
    return mask.unsqueeze(2) if mask.shape[1] in (1, kv_heads) else mask.unflatten(1, (kv_heads, heads // kv_heads))


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
