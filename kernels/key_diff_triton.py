"""Score by how far a key points away from the others' common direction, in two passes over the keys."""

from torch import Tensor

from .directions import unit
from .directions_triton import products, sums
from .tiles_triton import refused


def refusal(key: Tensor, valid: Tensor | None) -> str | None:
    """See `KernelOp.refusal`."""
    return refused(key)


def key_diff(key: Tensor, valid: Tensor | None) -> Tensor:
    """Launch two kernels: directions are added up in pieces of a row, and each key is held against their sum.

    Floor: 2 * D * itemsize bytes read and 4 written per token and head; the second pass finds keys of up to 50 MB in the L2 cache.
    """
    return -products(key, valid, unit(sums(key, valid)))
