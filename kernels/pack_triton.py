"""Write rows of new tokens to slots of a buffer in place, keys, values and positions in one launch."""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .moved_rows_triton import move_refused, rows_of_tile, store_rows, without_float8
from .tiles_triton import load_rows


def refusal(
    pool_keys: Tensor, pool_values: Tensor, pool_positions: Tensor, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor,
    places: Tensor,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    for name, pool, new in (("keys", pool_keys, key), ("values", pool_values, value), ("positions", pool_positions, positions)):
        if pool.dtype != new.dtype:
            return f"the pool's {name} are {pool.dtype}, the new ones {new.dtype}"
    return move_refused(key, value)


def pack(
    pool_keys: Tensor, pool_values: Tensor, pool_positions: Tensor, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor,
    places: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel: one program for each tile of written tokens of a row of the batch.

    Floor: the chosen rows of keys and values are read and written once, 2 * (D + Dv) * itemsize bytes a token, and 24 bytes of
    slots, places and positions besides.
    """
    batch, count = slots.shape
    dim, dim_v = key.shape[3], value.shape[3]
    block_m = rows_of_tile(key, value)
    tiles = triton.cdiv(count, block_m)
    wrap_triton(_pack_kernel)[(batch * tiles,)](
        without_float8(pool_keys), without_float8(pool_values), pool_positions,
        without_float8(key), without_float8(value), positions, slots, places,
        *pool_keys.stride(), *pool_values.stride(), *pool_positions.stride(), *key.stride(), *value.stride(), *positions.stride(),
        *slots.stride(), *places.stride(), key.shape[2], pool_keys.shape[1], count, tiles,
        DIM=dim, DIM_V=dim_v, BLOCK_M=block_m, BLOCK_D=triton.next_power_of_2(dim), BLOCK_V=triton.next_power_of_2(dim_v),
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _parts(index, size):
    """Quotient and remainder, 64-bit; of 32-bit numbers, whose division is several times cheaper: no memory has more slots."""
    index = index.to(tl.int32)
    return (index // size).to(tl.int64), (index % size).to(tl.int64)


@triton.jit
def _pack_kernel(
    pool_key_ptr, pool_value_ptr, pool_position_ptr, key_ptr, value_ptr, position_ptr, slot_ptr, place_ptr,
    stride_pkn, stride_pkp, stride_pkd, stride_pvn, stride_pvp, stride_pvd, stride_ppn, stride_ppp,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd, stride_b, stride_s,
    stride_slot, stride_slot_m, stride_place, stride_place_m, tokens, size, count, tiles,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    index = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < count
    index = index.to(tl.int64)
    slot = tl.load(slot_ptr + batch * stride_slot + index * stride_slot_m, mask=inside, other=-1)
    live = slot >= 0
    place = tl.load(place_ptr + batch * stride_place + index * stride_place_m, mask=live, other=0)
    head, token = _parts(slot, tokens)
    block, within = _parts(place, size)
    # Both loads before either store, so that they are under way together.
    key = load_rows(key_ptr + batch * stride_kb, head * stride_kh + token * stride_ks, live, 1, stride_kd, DIM, BLOCK_D)
    value = load_rows(value_ptr + batch * stride_vb, head * stride_vh + token * stride_vs, live, 1, stride_vd, DIM_V, BLOCK_V)
    position = tl.load(position_ptr + batch * stride_b + token * stride_s, mask=live, other=0)
    store_rows(pool_key_ptr, block * stride_pkn + within * stride_pkp, live, key, 1, stride_pkd, DIM, BLOCK_D)
    store_rows(pool_value_ptr, block * stride_pvn + within * stride_pvp, live, value, 1, stride_pvd, DIM_V, BLOCK_V)
    tl.store(pool_position_ptr + block * stride_ppn + within * stride_ppp, position, mask=live)
