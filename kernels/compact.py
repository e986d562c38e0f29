"""Move the kept tokens together."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def compact(
    key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool, turns: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gather keys, values and positions of the chosen slots; with `turns` give them new positions, from 0 without gaps.

    A key holds its position as an angle (RoPE), so one that moves from position p to n is turned back by p - n.

    Args:
        key: [B, Hkv, S, D], any dtype and strides.
        value: [B, Hkv, S, Dv].
        positions: [B, S] int32, position of each token in its sequence.
        slots: [B, Hkv, n] int64, from `select`.
        padded: slots may hold -1, which gives a zero row and position -1.
        turns: cosine and sine of d * frequency for d from 0 to T - 1, [2, T, R/2] float32, of the first R <= D channels, which RoPE
            turns. T is more than any token moves. None leaves keys and positions as they are.
        interleaved: channel 2c is turned with 2c + 1 (GPT-J, Cohere); else c with c + R/2 (Llama, GPT-NeoX).

    Returns:
        Keys [B, Hkv, n, D], values [B, Hkv, n, Dv] and positions [B, Hkv, n] int32, all contiguous.

    Numerics: bit copies (only a NaN's payload may change); with `turns`, the kept tokens of each head are numbered in the order of
    `slots`, and their first R channels are turned in float32 and rounded once.
    Cost: reads and writes the kept rows once; with `turns`, 3 flops per element of R and R/2 cosines and sines for each row.
    """
    source = slots.clamp(min=0) if padded else slots
    rows = source[..., None]
    key = key.gather(2, rows.expand(-1, -1, -1, key.shape[-1]))
    value = value.gather(2, rows.expand(-1, -1, -1, value.shape[-1]))
    positions = positions[:, None].expand(-1, slots.shape[1], -1).gather(2, source)
    if turns is not None:
        number = (slots >= 0).cumsum(-1, dtype=torch.int32) - 1
        distance = (positions - number).masked_fill(slots < 0, 0)
        key, positions = _turned_back(key, distance, turns, interleaved), number
    if padded:
        empty = slots < 0
        key, value = key.masked_fill(empty[..., None], 0), value.masked_fill(empty[..., None], 0)
        positions = positions.masked_fill(empty, -1)
    return key, value, positions


def _turned_back(key: Tensor, distance: Tensor, turns: Tensor, interleaved: bool) -> Tensor:
    """Turn keys, [B, Hkv, n, D], back by `distance`, [B, Hkv, n]; forward where that is negative."""
    cosine, sine = turns[:, distance.abs()]
    sine = sine * distance.sign()[..., None]
    half = turns.shape[-1]
    angular = key[..., : 2 * half].float()
    first, second = angular.unflatten(-1, (half, 2)).unbind(-1) if interleaved else angular.split(half, -1)
    pair = [first * cosine + second * sine, second * cosine - first * sine]
    angular = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([angular.to(key.dtype), key[..., 2 * half :]], -1)


def _inputs(dims, dtype, device, seed):
    B, H, _, S, D = dims
    key, value, order = samples(dtype, device, seed, (B, H, S, D), (B, H, S, D), (B, H, S))
    positions = torch.arange(S, dtype=torch.int32, device=device).repeat(B, 1)
    slots = order.argsort(-1)[..., : (S + 1) // 2].sort(-1).values
    return key, value, positions, slots, False


OP = KernelOp(
    "compact",
    "(Tensor key, Tensor value, Tensor positions, Tensor slots, bool padded, Tensor? turns=None, bool interleaved=False)"
    " -> (Tensor, Tensor, Tensor)",
    compact,
    _inputs,
    triton="compact_triton:compact",
    cost="reads and writes 2*B*Hkv*n*D elements",
)
