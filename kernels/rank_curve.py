"""Say what the best, the second best, the third best ... slot of a layer is worth."""

from torch import Tensor

from .op import KernelOp, samples


def rank_curve(scores: Tensor) -> Tensor:
    """Average over heads, rank by rank, the scores of a layer whose heads keep equally many tokens but not the same.

    Entry k is the mean of every head's k-th best score: the worth of the k-th slot of the layer, the composite importance
    of KVCompose (arXiv:2509.05165; kvpress KVComposePress).

    Args:
        scores: [B, Hkv, S], any float dtype, no NaN; as `protect` leaves them: protected tokens and padding are the same
            ones for all heads, so that infinities meet their like.

    Returns:
        [B, S] float32, not increasing; -inf for the ranks that a row has no tokens for.

    Numerics: fp32. Cost: one sort of B*Hkv rows of S. At the least 4*B*Hkv*S bytes are read and 4*B*S written.
    """
    return scores.float().sort(dim=-1, descending=True).values.mean(1)


def _inputs(dims, dtype, device, seed):
    return tuple(samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S)))


OP = KernelOp("rank_curve", "(Tensor scores) -> Tensor", rank_curve, _inputs, cost="one sort of B*Hkv rows of S")
