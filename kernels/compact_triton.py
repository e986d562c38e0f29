"""Move the kept tokens together, keys, values and positions in one launch."""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .moved_rows_triton import move_refused, rows_of_tile, store_rows, without_float8
from .tiles_triton import load_rows


def refusal(key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool) -> str | None:
    """See `KernelOp.refusal`."""
    return move_refused(key, value)


def compact(key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel: one program for each tile of kept tokens of a head.

    Floor: the kept rows of keys and values are read and written once, 2 * (D + Dv) * itemsize bytes a token, and 16 bytes of
    slots and positions besides.
    """
    batch, heads, count = slots.shape
    dim, dim_v = key.shape[3], value.shape[3]
    keys, values = key.new_empty((batch, heads, count, dim)), value.new_empty((batch, heads, count, dim_v))
    kept = positions.new_empty((batch, heads, count))
    block_n = rows_of_tile(key, value)
    tiles = triton.cdiv(count, block_n)
    wrap_triton(_compact_kernel)[(batch * heads * tiles,)](
        without_float8(key), without_float8(value), positions, slots, without_float8(keys), without_float8(values), kept,
        *key.stride(), *value.stride(), *positions.stride(), *slots.stride(), heads, count, tiles,
        DIM=dim, DIM_V=dim_v, BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(dim), BLOCK_V=triton.next_power_of_2(dim_v),
        PADDED=padded, num_warps=4,
    )  # fmt: skip
    return keys, values, kept


@triton.jit
def _compact_kernel(
    key_ptr, value_ptr, position_ptr, slot_ptr, keys_ptr, values_ptr, kept_ptr,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd, stride_pb, stride_ps,
    stride_b, stride_h, stride_n, heads, count, tiles,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = row // heads, row % heads
    place = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < count
    slot = tl.load(slot_ptr + batch * stride_b + head * stride_h + place.to(tl.int64) * stride_n, mask=inside, other=0)
    live = inside
    if PADDED:
        live = inside & (slot >= 0)
    # Both loads before either store, so that they are under way together.
    key = load_rows(key_ptr + batch * stride_kb + head * stride_kh, slot, live, stride_ks, stride_kd, DIM, BLOCK_D)
    value = load_rows(value_ptr + batch * stride_vb + head * stride_vh, slot, live, stride_vs, stride_vd, DIM_V, BLOCK_V)
    position = tl.load(position_ptr + batch * stride_pb + slot * stride_ps, mask=live, other=-1)
    store_rows(keys_ptr + row * count * DIM, place, inside, key, DIM, 1, DIM, BLOCK_D)
    store_rows(values_ptr + row * count * DIM_V, place, inside, value, DIM_V, 1, DIM_V, BLOCK_V)
    tl.store(kept_ptr + row * count + place, position, mask=inside)
