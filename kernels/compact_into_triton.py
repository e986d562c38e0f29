"""Move the kept tokens together in a cache of fixed capacity, keys, values and positions in one launch."""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .moved_rows_triton import move_refused, rows_of_tile, store_rows, without_float8
from .tiles_triton import load_rows


def refusal(
    keys: Tensor, values: Tensor, held: Tensor, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, counts: Tensor | None,
    length: Tensor,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    for name, buffer, new in (("keys", keys, key), ("values", values, value), ("positions", held, positions)):
        if buffer.dtype != new.dtype:
            return f"the buffer's {name} are {buffer.dtype}, the new ones {new.dtype}"
    return move_refused(key, value)


def compact_into(
    keys: Tensor, values: Tensor, held: Tensor, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, counts: Tensor | None,
    length: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel: one program for each tile of kept tokens of a head.

    Floor: the kept rows of keys and values are read and written once, 2 * (D + Dv) * itemsize bytes a token, and 16 bytes of
    slots and positions besides.
    """
    batch, heads, count = slots.shape
    dim, dim_v = key.shape[3], value.shape[3]
    block_n = rows_of_tile(key, value)
    tiles = triton.cdiv(count, block_n)
    wrap_triton(_compact_into_kernel)[(batch * heads * tiles,)](
        without_float8(keys), without_float8(values), held, without_float8(key), without_float8(value), positions, slots,
        None if counts is None else counts.contiguous(), length.contiguous(),
        *keys.stride(), *values.stride(), *held.stride(), *key.stride(), *value.stride(), *positions.stride(), *slots.stride(),
        heads, count, tiles, DIM=dim, DIM_V=dim_v, BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_V=triton.next_power_of_2(dim_v), PADDED=counts is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _compact_into_kernel(
    keys_ptr, values_ptr, held_ptr, key_ptr, value_ptr, position_ptr, slot_ptr, count_ptr, length_ptr,
    stride_bufk_b, stride_bufk_h, stride_bufk_c, stride_bufk_d, stride_bufv_b, stride_bufv_h, stride_bufv_c, stride_bufv_d,
    stride_held_b, stride_held_h, stride_held_c, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_pb, stride_ps, stride_b, stride_h, stride_n, heads, count, tiles,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = row // heads, row % heads
    index = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < count
    index = index.to(tl.int64)
    slot = tl.load(slot_ptr + batch * stride_b + head * stride_h + index * stride_n, mask=inside, other=-1)
    live = slot >= 0
    place = index
    if PADDED:  # what is empty stands at the left, and goes behind
        kept = tl.load(count_ptr + batch)
        place = tl.where(index + kept < count, index + kept, index + kept - count)
    place += tl.load(length_ptr + batch)
    # All loads before any store, so that they are under way together.
    key = load_rows(key_ptr + batch * stride_kb + head * stride_kh, slot, live, stride_ks, stride_kd, DIM, BLOCK_D)
    value = load_rows(value_ptr + batch * stride_vb + head * stride_vh, slot, live, stride_vs, stride_vd, DIM_V, BLOCK_V)
    position = tl.load(position_ptr + batch * stride_pb + slot * stride_ps, mask=live, other=-1)
    keys_ptr += batch * stride_bufk_b + head * stride_bufk_h
    values_ptr += batch * stride_bufv_b + head * stride_bufv_h
    store_rows(keys_ptr, place * stride_bufk_c, inside, key, 1, stride_bufk_d, DIM, BLOCK_D)
    store_rows(values_ptr, place * stride_bufv_c, inside, value, 1, stride_bufv_d, DIM_V, BLOCK_V)
    tl.store(held_ptr + batch * stride_held_b + head * stride_held_h + place * stride_held_c, position, mask=inside)
