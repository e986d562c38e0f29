"""Compactor as kvpress computes it, for comparison with published numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .leverage import draw_sketch
from .op import KernelOp, samples
from .rows import chunk_slots, unchunk

_SINKS, _RECENT = 8, 4


def kvpress_compactor(
    query: Tensor, key: Tensor, value: Tensor, pre_key: Tensor, sketch: Tensor, blend: float, chunk: int
) -> Tensor:
    """Score tokens by kvpress 0.5.5's CompactorPress, bug for bug.

    Deliberately kept: statistics over the whole batch with the sample deviation; absent keys of a short last chunk
    take part with logit -1e-9 and absent queries spread their weight evenly; average pooling counts the zeros beyond
    the ends; the ridge is absolute; the first 8 and last 4 tokens are left out of all of it and then tie with the best
    score. One difference: kvpress retries a failed Cholesky with a larger ridge, which needs a host sync; here a
    failure shows as scores that are not finite.

    Args:
        query: [B, Hq, S, D] after rotary embedding, S > 12 (kvpress fails below too), no padding.
        key: [B, Hkv, S, D] after rotary embedding.
        value: [B, Hkv, S, Dv].
        pre_key: [B, Hkv, S, D] before rotary embedding.
        sketch: [Hkv, D, k] or [B, Hkv, D, k]; kvpress draws a fresh one per call from the global generator.
        blend: weight of the leverage term.
        chunk: tokens in a chunk of the attention term.

    Returns:
        Scores, [B, Hkv, S] float32, higher = keep.

    Numerics: logits, centring and sketch in the dtype of their inputs, as there, so float16 may overflow; the rest
    float32.
    Cost: 2*B*Hq*S*chunk*D + B*Hkv*S*(2*D*k + 6*k*k) flops.
    """
    scored = key.shape[2] - _SINKS - _RECENT
    query, key, value, pre_key = (x.narrow(2, _SINKS, scored) for x in (query, key, value, pre_key))
    attention = _normalise(_chunk_attention(query, key, value, chunk))
    scores = blend * _normalise(_leverage(pre_key, sketch.to(pre_key.dtype))) + attention
    best = scores.max().expand(*scores.shape[:2], 1)
    return torch.cat([best.expand(-1, -1, _SINKS), scores, best.expand(-1, -1, _RECENT)], -1)


def _chunk_attention(query: Tensor, key: Tensor, value: Tensor, chunk: int) -> Tensor:
    heads, tokens = key.shape[1], key.shape[2]
    slot = chunk_slots(tokens, chunk, key.device)
    absent = slot >= tokens  # [N, C]

    def chunks(x: Tensor) -> Tensor:
        x = x[:, :, slot.clamp(max=tokens - 1)]
        return x.masked_fill(absent.reshape(absent.shape + (1,) * (x.dim() - 4)), 0)

    grouped = chunks(query.unflatten(1, (heads, -1)).transpose(2, 3))  # [B, Hkv, N, C, G, D]
    logits = grouped.flatten(3, 4) @ chunks(key).transpose(-2, -1)
    weights = logits.masked_fill(absent[:, None], -1e-9).float().softmax(-1)
    mass = unchunk(weights.sum(-2) / grouped.shape[4], tokens)
    return F.avg_pool1d(mass * value.norm(dim=-1), kernel_size=3, stride=1, padding=1)


def _leverage(key: Tensor, sketch: Tensor) -> Tensor:
    x = ((key - key.mean(2, keepdim=True)) @ sketch).float()
    columns = x.transpose(-2, -1)
    gram = columns @ x
    gram = (gram + gram.transpose(-2, -1)) / 2 + 1e-2 * torch.eye(x.shape[-1], device=x.device)
    solved = torch.cholesky_solve(columns, torch.linalg.cholesky_ex(gram).L)
    return (x * solved.transpose(-2, -1)).sum(-1).clamp(min=0)


def _normalise(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std().clamp(min=1e-6)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    S = S + _SINKS + _RECENT
    query, *keys = samples(dtype, device, seed, (B, H * G, S, D), *[(B, H, S, D)] * 3)
    return query, *keys, draw_sketch(seed, 0, H, D, max(1, D // 2)).to(device), 0.5, 16


OP = KernelOp(
    "kvpress_compactor",
    "(Tensor query, Tensor key, Tensor value, Tensor pre_key, Tensor sketch, float blend, int chunk) -> Tensor",
    kvpress_compactor,
    _inputs,
    cost="2*B*Hq*S*chunk*D flops",
)
