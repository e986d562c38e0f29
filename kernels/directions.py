"""Directions of keys: unit vectors, real tokens only."""

import torch
from torch import Tensor


def unit_keys(key: Tensor, valid: Tensor | None) -> Tensor:
    """Divide keys, [B, Hkv, S, D], by their lengths, in float32; zero keys and padding give zeros."""
    key = key.float()
    if valid is not None:
        key = key.masked_fill(~valid[:, None, :, None], 0)  # padding may hold NaN
    return unit(key)


def unit(x: Tensor) -> Tensor:
    """Divide vectors along the last axis by their lengths; zeros stay."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
