"""Score by how far a key points away from the others' common direction."""

from torch import Tensor

from .directions import unit, unit_keys
from .op import KernelOp, samples


def key_diff(key: Tensor, valid: Tensor | None) -> Tensor:
    """Score each token by the negated cosine between its key and the mean of the row's unit keys.

    Keys that resemble all others tell little apart (KeyDiff, Park et al., arXiv:2504.15364).

    Args:
        key: [B, Hkv, S, D], any float dtype and strides.
        valid: [B, S] bool, False at padding; None means every token is real.

    Returns:
        Scores, [B, Hkv, S] float32, in [-1, 1] up to rounding, higher = keep; 0 at padding and where a key or the mean
        is zero.

    Numerics: float32; the lengths of keys cancel, and so does the number of tokens. Cost: reads key twice.
    """
    directions = unit_keys(key, valid)
    common = unit(directions.sum(2, keepdim=True))
    return -(directions * common).sum(-1)


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S, dims.D)), None


OP = KernelOp(
    "key_diff",
    "(Tensor key, Tensor? valid) -> Tensor",
    key_diff,
    _inputs,
    triton="key_diff_triton:key_diff",
    cost="reads B*Hkv*S*D twice",
)
