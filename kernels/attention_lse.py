"""Attention that also gives the log-sum-exp of its logits, for scores that would compute it again."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def attention_lse(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attend causally and without a mask, as `attention` with `is_causal` does, on a CPU.

    Args:
        query: [B, Hq, S, D], any float dtype, the channels of a token side by side.
        key: [B, Hkv, S, D], Hq = G * Hkv.
        value: [B, Hkv, S, D].
        scale: factor on the logits; None means 1/sqrt(D).

    Returns:
        [B, Hq, S, D], query's dtype, and the natural log-sum-exp of each query's logits, [B, Hq, S] float32.

    Numerics: bit for bit those of `scaled_dot_product_attention`, which calls the same kernel; the log-sum-exp of
    bfloat16 and float16 inputs is good to 1e-4 there.
    Cost: that of the attention; the log-sum-exp is at hand there and costs nothing.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    return *samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D)), None


OP = KernelOp(
    "attention_lse",
    "(Tensor query, Tensor key, Tensor value, float? scale) -> (Tensor, Tensor)",
    attention_lse,
    _inputs,
    cost="2*B*Hq*S*S*D flops",
)
