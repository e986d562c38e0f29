"""Score by how far a key stands outside the span of its neighbours."""

import hashlib

import torch
from torch import Tensor

from .op import KernelOp, samples
from .rows import chunk_slots, from_front, places, ranks, spread, to_front, unchunk


def leverage(key: Tensor, valid: Tensor | None, sketch: Tensor, chunk: int) -> Tensor:
    """Score each token by the ridge leverage of its sketched key within its chunk.

    A chunk is a run of `chunk` real tokens; a short last one joins its predecessor, since few rows span everything and
    say nothing. With X the centred keys times the sketch, the score of row x is x (XᵀX + εI)⁻¹ xᵀ, in [0, 1]; over a
    chunk of n tokens the scores add up to at most min(k, n - 1). The leverage term of Compactor (Chari & Van Durme,
    arXiv:2507.08143), with Cholesky in place of an SVD.

    Args:
        key: keys before rotary embedding, [B, Hkv, S, D], any float dtype and strides.
        valid: [B, S] bool, False at padding; None means every token is real.
        sketch: [Hkv, D, k] or [B, Hkv, D, k] float32; see `draw_sketch`.
        chunk: tokens in a chunk; 0 takes the whole row.

    Returns:
        Scores, [B, Hkv, S] float32, in [0, 1], higher = keep; 0 at padding.

    Numerics: float32 throughout. Keys are centred before the sketch, because rounding a large common mean drowns the
    spread, and the Gram matrix stays float32, because in bfloat16 it turns indefinite. The ridge
    ε = 1e-4 * trace / k + 1e-6 follows the scale of the keys. Keys whose squares overflow float32 give NaN.
    Cost: 2*D*k + 3*k*k flops per token and KV head, one k*k Cholesky per chunk. No host sync: no error check.
    """
    tokens = key.shape[2]
    size = sketch.shape[-1]
    place = places(valid)
    length = ranks(valid, tokens, key.device)[1]
    slot = chunk_slots(tokens, chunk, key.device) if chunk else torch.arange(tokens, device=key.device)[None]
    count, width = slot.shape
    absent = ~(slot < length[:, None, :, None])[..., None]  # [B or 1, 1, N, C, 1]
    last = (length // width - 1).clamp(min=0)  # the chunk which takes in the short tail
    owner = torch.minimum(torch.arange(count, device=key.device), last)

    def merged(x: Tensor) -> Tensor:
        """Sum per-chunk x, [B, H, N, ...], over chunks of one owner."""
        index = spread(owner, x)
        return torch.zeros_like(x).scatter_add(2, index, x).gather(2, index)

    keys = to_front(key, place)[:, :, slot.clamp(max=tokens - 1)].float().masked_fill(absent, 0)  # [B, Hkv, N, C, D]
    mean = merged(keys.sum(3)) / merged((~absent).float().sum(3).expand(absent.shape[0], 1, -1, 1)).clamp(min=1)
    centred = (keys - mean[:, :, :, None]).masked_fill(absent, 0)
    x = (centred.flatten(2, 3) @ sketch).unflatten(2, (count, width))  # [B, Hkv, N, C, k]
    gram = merged(x.transpose(-2, -1) @ x)
    eye = torch.eye(size, device=key.device)
    ridge = 1e-4 / size * (gram * eye).sum((-2, -1)) + 1e-6
    root = torch.linalg.cholesky_ex(gram + ridge[..., None, None] * eye).L
    score = torch.linalg.solve_triangular(root, x.transpose(-2, -1), upper=False).square().sum(-2).clamp(0, 1)
    return from_front(unchunk(score, tokens), place)


def draw_sketch(seed: int, layer: int, heads: int, dim: int, size: int) -> Tensor:
    """Draw the Gaussian sketches of one layer, [heads, dim, size] float32 on the CPU, entries N(0, 1/size).

    Head h of a layer gets the same numbers whatever is drawn before, after or beside it; the global generator is not
    touched.
    """

    def draw(head: int) -> Tensor:
        digest = hashlib.sha256(f"sketch {seed} {layer} {head}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        return torch.randn(dim, size, generator=generator)

    return torch.stack([draw(head) for head in range(heads)]) / size**0.5


def _inputs(dims, dtype, device, seed):
    B, H, _, S, D = dims
    (key,) = samples(dtype, device, seed, (B, H, S, D))
    return key, None, draw_sketch(seed, 0, H, D, max(1, D // 2)).to(device), 16


OP = KernelOp(
    "leverage",
    "(Tensor key, Tensor? valid, Tensor sketch, int chunk) -> Tensor",
    leverage,
    _inputs,
    triton="leverage_triton:leverage",
    cost="B*Hkv*S*(2*D*k + 3*k*k) flops",
)
