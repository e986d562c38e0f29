"""Move the kept tokens together and store them in 8 bits."""

import torch
from torch import Tensor

from .compact import compact
from .op import KernelOp, samples

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 2.0**-117  # a row's scale, and one over it, are then normal numbers of float32


def compact_cast(
    key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool, turns: Tensor | None, interleaved: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gather keys, values and positions as `compact`, and divide each row by a scale of its own, so that 8 bits hold it.

    The scale of a row is its largest magnitude over the largest number of the type: 127 of int8, 448 of float8_e4m3fn.

    Args:
        key: [B, Hkv, S, D], float32, bfloat16 or float16.
        value: [B, Hkv, S, Dv].
        positions: [B, S] int32, position of each token in its sequence.
        slots: [B, Hkv, n] int64, from `select`.
        padded: slots may hold -1, which gives a zero row, scale 0 and position -1.
        turns: as of `compact`. Keys are turned before they are scaled, and not rounded in between.
        interleaved: as of `compact`.
        dtype: int8 or float8_e4m3fn.

    Returns:
        Keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] of `dtype`, positions [B, Hkv, n] int32, and the scales of keys and of
        values, [B, Hkv, n] float32. `keys.float() * key_scales[..., None]` is what is stored.

    Numerics: float32, rounded to the nearest number of the type, of two equally near to the even one. What is stored differs from
    the number itself by at most half a scale in int8; in float8 by at most 1/16 of the number where that is at least 1/64 scale,
    below by at most 1/1024 scale; all up to the rounding of float32. A row without a magnitude of 2**-117 is stored as zeros.
    Cost: reads the kept rows once, and writes a byte per element.
    """
    if dtype not in LARGEST:
        raise ValueError(f"compact_cast: dtype={dtype}: expected torch.int8 or torch.float8_e4m3fn")
    key = key if turns is None else key.float()
    keys, values, positions = compact(key, value, positions, slots, padded, turns, interleaved)
    (keys, key_scales), (values, value_scales) = (_in_8_bits(rows.float(), dtype) for rows in (keys, values))
    return keys, values, positions, key_scales, value_scales


def _in_8_bits(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows, [..., D] float32, over their scales, and the scales, [...]."""
    magnitude = rows.abs().amax(-1, keepdim=True)
    small = magnitude < SMALLEST
    scale = (magnitude / LARGEST[dtype]).masked_fill(small, 0)
    scaled = rows * (LARGEST[dtype] / magnitude).masked_fill(small, 0)
    # None is beyond the largest by more than float32's rounding, which the type's own takes away: nothing to clamp.
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale[..., 0]


def _inputs(dims, dtype, device, seed):
    B, H, _, S, D = dims
    key, value, order = samples(dtype, device, seed, (B, H, S, D), (B, H, S, D), (B, H, S))
    positions = torch.arange(S, dtype=torch.int32, device=device).repeat(B, 1)
    slots = order.argsort(-1)[..., : (S + 1) // 2].sort(-1).values
    angle = torch.arange(S, device=device)[:, None] * 10000 ** (-torch.arange(0, D, 2, device=device) / D)
    return key, value, positions, slots, False, torch.stack([angle.cos(), angle.sin()]), False, torch.int8


OP = KernelOp(
    "compact_cast",
    "(Tensor key, Tensor value, Tensor positions, Tensor slots, bool padded, Tensor? turns, bool interleaved, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    compact_cast,
    _inputs,
    triton="compact_cast_triton:compact_cast",
    cost="reads 2*B*Hkv*n*D elements and writes as many bytes",
)
