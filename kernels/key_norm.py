"""Score by the length of the key."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def key_norm(key: Tensor) -> Tensor:
    """Score each token by the negated L2 norm of its key.

    Keys of small norm tend to receive attention, so the largest norm leaves first (Devoto et al., arXiv:2406.11430).
    A token's score reads nothing but its own key, hence no `valid`.

    Args:
        key: [B, Hkv, S, D], any float dtype and strides.

    Returns:
        Scores, [B, Hkv, S] float32, higher = keep.

    Numerics: squares summed in float32. Cost: reads key once, writes one float per token and head.
    """
    return -torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32)


def _inputs(dims, dtype, device, seed):
    return tuple(samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S, dims.D)))


OP = KernelOp(
    "key_norm", "(Tensor key) -> Tensor", key_norm, _inputs, triton="key_norm_triton:key_norm", cost="reads B*Hkv*S*D elements"
)
