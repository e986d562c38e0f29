"""Score by how alike a key is to the other keys, in two passes over the keys."""

import torch
from torch import Tensor

from .directions_triton import products, sums
from .tiles_triton import refused


def refusal(key: Tensor, valid: Tensor | None) -> str | None:
    """See `KernelOp.refusal`."""
    return refused(key)


def redundancy(key: Tensor, valid: Tensor | None) -> Tensor:
    """Launch two kernels, as `key_diff`: directions are added up, and each key is held against the sum of the others.

    Floor: that of `key_diff`. The division by the number of keys is left to the compiler, which has more to do with scores.
    """
    others = torch.sym_max(key.shape[2] - 1, 1) if valid is None else (valid.sum(-1) - 1).clamp(min=1).view(-1, 1, 1)
    return -products(key, valid, sums(key, valid), others=True) / others
