"""Score by chance: the baseline every score must beat."""

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import ranks

_WORD = 0xFFFFFFFF


def random(key: Tensor, valid: Tensor | None, seed: int, layer: int) -> Tensor:
    """Score each token by a number that depends on (seed, layer, KV head, rank among the row's real tokens) alone.

    Args:
        key: [B, Hkv, S, D]; only its shape and device are read.
        valid: [B, S] bool, False at padding; None means every token is real.
        seed: any integer; its low 32 bits count.
        layer: number of the layer.

    Returns:
        Scores, [B, Hkv, S] float32, uniform multiples of 2^-24 in [0, 1); 0 at padding. The same on every device.

    Numerics: exact. Cost: some 12 integer operations per token and head.
    """
    batch, heads, tokens, _ = key.shape
    rank = ranks(valid, tokens, key.device)[0].expand(batch, -1)[:, None]
    head = torch.arange(heads, device=key.device)[:, None]
    # One hash of one counter: a compiler that inlines a hash of hashes writes it out once for every use of its input.
    counter = rank * 0x9E3779B1 + head * 0x85EBCA77 + _mix(_mix(seed) + layer)
    score = (_mix(counter) >> 8).float() * 2.0**-24
    return score if valid is None else score.masked_fill(~valid[:, None], 0)


def _mix(x):
    """Finish a 32-bit hash (Wellons, hash-prospector), of an int or an int64 tensor.

    Both factors are below 2^31, so no product leaves int64, and shifts of masked words are logical.
    """
    x = x & _WORD
    x = ((x ^ x >> 16) * 0x21F0AAAD) & _WORD
    x = ((x ^ x >> 15) * 0x735A2D97) & _WORD
    return x ^ x >> 15


def _inputs(dims, dtype, device, seed):
    return *samples(dtype, device, seed, (dims.B, dims.Hkv, dims.S, dims.D)), None, seed, 3


OP = KernelOp(
    "random",
    "(Tensor key, Tensor? valid, int seed, int layer) -> Tensor",
    random,
    _inputs,
    cost="writes B*Hkv*S floats",
)
