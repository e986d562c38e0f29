"""Move the kept tokens together, keys, values and positions in one launch; and on the way turn keys, or round both to 8 bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .moved_rows_triton import MOST_ROWS, move_refused, rows_of_tile, store_rows, without_float8
from .tiles_triton import DTYPES, load_rows

COMPUTED_TILE = 2048  # elements of keys that are turned or scaled: in float32, beside their angles, they take more registers
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
SMALLEST = tl.constexpr(2.0**-117)  # a row's scale, and one over it, are then normal numbers, which no chip takes for 0
ROUND = tl.constexpr(1.5 * 2**23)  # a float32 this large has no place behind the point: adding it rounds, ties to even


def refusal(
    key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool, turns: Tensor | None = None,
    interleaved: bool = False,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    return move_refused(key, value) or turn_refused(key, turns)


def turn_refused(key: Tensor, turns: Tensor | None) -> str | None:
    """Why keys like these are not turned; None if they are, or stay as they are."""
    if turns is None:
        return None
    if key.dtype not in DTYPES:
        return f"keys of {key.dtype} are not turned, only of float32, bfloat16 and float16"
    if turns.dtype != torch.float32:
        return f"cosines and sines are {turns.dtype}, not float32"
    return None


def compact(
    key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool, turns: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel: one program for each tile of kept tokens of a head.

    Floor: the kept rows of keys and values are read and written once, 2 * (D + Dv) * itemsize bytes a token, and 16 bytes of
    slots and positions besides. What is turned reads its angles: the whole of `turns`, once, from memory.
    """
    keys, values, kept = launch(key, value, positions, slots, padded, turns, interleaved, None)
    return keys, values, kept


def launch(
    key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool, turns: Tensor | None, interleaved: bool,
    dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """Launch the kernel. With `dtype` rows are stored in it, and the scales of keys and of values follow the other answers."""
    batch, heads, count = slots.shape
    dim, dim_v = key.shape[3], value.shape[3]
    block_d, block_v = triton.next_power_of_2(dim), triton.next_power_of_2(dim_v)
    keys = key.new_empty((batch, heads, count, dim), dtype=dtype or key.dtype)
    values = value.new_empty((batch, heads, count, dim_v), dtype=dtype or value.dtype)
    kept = positions.new_empty((batch, heads, count))
    scales = [] if dtype is None else [kept.new_empty(kept.shape, dtype=torch.float32) for _ in range(2)]
    turns = None if turns is None else turns.contiguous()
    reach, half = (0, 0) if turns is None else turns.shape[1:]
    numbers = (slots >= 0).cumsum(-1, dtype=torch.int32) - 1 if padded and turns is not None else None
    if turns is None and dtype is None:
        block_n = rows_of_tile(key, value)
    else:
        block_n = min(MOST_ROWS, COMPUTED_TILE // max(block_d, block_v))
    tiles = triton.cdiv(count, block_n)
    wrap_triton(_compact_kernel)[(batch * heads * tiles,)](
        without_float8(key), without_float8(value), positions, slots, numbers, turns,
        without_float8(keys), without_float8(values), kept, *(scales or (None, None)),
        *key.stride(), *value.stride(), *positions.stride(), *slots.stride(), reach, heads, count, tiles,
        DIM=dim, DIM_V=dim_v, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_V=block_v, PADDED=padded,
        HALF=half, INTERLEAVED=interleaved, LARGEST=0 if dtype is None else LARGEST[dtype],
        num_warps=4,
    )  # fmt: skip
    return [keys, values, kept, *scales]


@triton.jit
def _compact_kernel(
    key_ptr, value_ptr, position_ptr, slot_ptr, number_ptr, turn_ptr, keys_ptr, values_ptr, kept_ptr,
    key_scale_ptr, value_scale_ptr,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd, stride_pb, stride_ps,
    stride_b, stride_h, stride_n, reach, heads, count, tiles,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """HALF: of the channels that are turned, 0 if none is. LARGEST: number of the type in which rows are stored, 0 if their own."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = row // heads, row % heads
    place = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < count
    slot = tl.load(slot_ptr + batch * stride_b + head * stride_h + place.to(tl.int64) * stride_n, mask=inside, other=0)
    live = inside
    if PADDED:
        live = inside & (slot >= 0)
    # All loads before any store, so that they are under way together.
    key_base = key_ptr + batch * stride_kb + head * stride_kh
    key = load_rows(key_base, slot, live, stride_ks, stride_kd, DIM, BLOCK_D)
    value = load_rows(value_ptr + batch * stride_vb + head * stride_vh, slot, live, stride_vs, stride_vd, DIM_V, BLOCK_V)
    position = tl.load(position_ptr + batch * stride_pb + slot * stride_ps, mask=live, other=-1)
    if HALF > 0:
        number = place
        if PADDED:
            number = tl.load(number_ptr + row * count + place, mask=live, other=-1)
        back = position - number
        position = tl.where(live, number, -1)
        within = live & (tl.abs(back) < reach)
        column = tl.arange(0, BLOCK_D)
        if INTERLEAVED:
            turned = _turned_neighbours(key, back, within, turn_ptr, reach, HALF)
        else:
            partner = tl.where(column < HALF, column + HALF, column - HALF)
            # Read again rather than moved between threads: what is read twice lies in the cache beside them.
            offset = slot[:, None] * stride_ks + partner[None] * stride_kd
            other = tl.load(key_base + offset, mask=live[:, None] & (column < 2 * HALF)[None], other=0.0)
            turned = _turned_halves(key, other, back, within, turn_ptr, reach, HALF)
        key = tl.where((column < 2 * HALF)[None], turned, key.to(tl.float32))
        key = tl.where((live & ~within)[:, None], float("nan"), key)  # `turns` does not reach so far: to be seen
    if LARGEST > 0:
        key, key_scale = _in_8_bits(key.to(tl.float32), LARGEST)
        value, value_scale = _in_8_bits(value.to(tl.float32), LARGEST)
        tl.store(key_scale_ptr + row * count + place, key_scale, mask=inside)
        tl.store(value_scale_ptr + row * count + place, value_scale, mask=inside)
    store_rows(keys_ptr + row * count * DIM, place, inside, key.to(keys_ptr.dtype.element_ty), DIM, 1, DIM, BLOCK_D)
    store_rows(values_ptr + row * count * DIM_V, place, inside, value, DIM_V, 1, DIM_V, BLOCK_V)
    tl.store(kept_ptr + row * count + place, position, mask=inside)


@triton.jit
def _turned_halves(key, partner, back, within, turn_ptr, reach, HALF: tl.constexpr):
    """The first channels of keys, [N, D], turned back by `back`, [N], in float32; `partner` holds each channel's other one."""
    column = tl.arange(0, key.shape[1])
    channel = tl.where(column < HALF, column, column - HALF)
    cosine, sine = _angles(back, within, channel, column < 2 * HALF, turn_ptr, reach, HALF)
    sine = tl.where((column < HALF)[None], sine, -sine)
    return key.to(tl.float32) * cosine + partner.to(tl.float32) * sine


@triton.jit
def _turned_neighbours(key, back, within, turn_ptr, reach, HALF: tl.constexpr):
    """The same where the channels of a pair are neighbours."""
    channel = tl.arange(0, key.shape[1] // 2)
    cosine, sine = _angles(back, within, channel, channel < HALF, turn_ptr, reach, HALF)
    even, odd = tl.split(tl.reshape(key.to(tl.float32), (key.shape[0], key.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cosine + odd * sine, odd * cosine - even * sine), key.shape)


@triton.jit
def _angles(back, within, channel, turned, turn_ptr, reach, HALF: tl.constexpr):
    """Cosine and sine, [N, len(channel)], of what each token is turned back by; 0 where a channel is not turned."""
    distance = tl.abs(back).to(tl.int64)[:, None]  # row of the cosine; `reach` rows behind it stands the sine
    mask = within[:, None] & turned[None]
    cosine = tl.load(turn_ptr + distance * HALF + channel[None], mask=mask, other=0.0)
    sine = tl.load(turn_ptr + (distance + reach) * HALF + channel[None], mask=mask, other=0.0)
    return cosine, tl.where((back < 0)[:, None], -sine, sine)


@triton.jit
def _in_8_bits(rows, LARGEST: tl.constexpr):
    """Rows, [N, D] float32, as 8 bits of a type whose largest number is LARGEST, and their scales, [N]."""
    magnitude = tl.max(tl.abs(rows), 1)
    small = magnitude < SMALLEST
    largest = tl.full(magnitude.shape, LARGEST, tl.float32)
    scale = tl.where(small, 0.0, tl.div_rn(magnitude, largest))
    scaled = rows * tl.where(small, 0.0, tl.div_rn(largest, tl.where(small, 1.0, magnitude)))[:, None]
    if LARGEST == 127:
        bits = (scaled + ROUND).to(tl.int32, bitcast=True)  # an int8 is the low byte of this
    else:
        bits = _float8(scaled)
    return bits.to(tl.int8), scale


@triton.jit
def _float8(x):
    """Float32 up to 448 as bits of float8_e4m3fn. By hand, since sm_80 does not know the type and its compiler refuses it."""
    raw = x.to(tl.int32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    # Three bits of 23 stay behind the point, and the exponent counts from 7 instead of from 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Numbers below 2**-6 are multiples of 2**-9, to which adding 2**14 rounds them.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(magnitude < 0x3C800000, subnormal, normal) | ((raw >> 24) & 0x80)
