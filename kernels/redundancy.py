"""Score by how alike a key is to the other keys."""

from torch import Tensor

from .directions import unit_keys
from .op import KernelOp, samples
from .rows import ranks


def redundancy(key: Tensor, valid: Tensor | None) -> Tensor:
    """Score each token by the negated mean cosine between its key and the other keys of its row and head.

    The redundancy term of R-KV (Cai et al., arXiv:2505.24133) without its softmax over tokens and without its threshold
    that spares the last of several alike keys: that one compares all pairs of tokens. The mean over all pairs does
    not: it is one product with the sum of the unit keys.

    Args:
        key: [B, Hkv, S, D], any float dtype and strides.
        valid: [B, S] bool, False at padding; None means every token is real.

    Returns:
        Scores, [B, Hkv, S] float32, in [-1, 1] up to rounding, higher = keep; 0 at padding and for a lone token.

    Numerics: float32; lengths of keys cancel. Cost: reads key twice, no pair of tokens is visited.
    """
    directions = unit_keys(key, valid)
    others = directions.sum(2, keepdim=True) - directions
    count = ranks(valid, key.shape[2], key.device)[1] - 1  # [B or 1, 1]
    return -(directions * others).sum(-1) / count.clamp(min=1)[..., None]


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S, dims.D)), None


OP = KernelOp(
    "redundancy",
    "(Tensor key, Tensor? valid) -> Tensor",
    redundancy,
    _inputs,
    triton="redundancy_triton:redundancy",
    cost="reads B*Hkv*S*D twice",
)
