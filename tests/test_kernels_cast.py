"""Keys turned to new positions, and rows rounded to 8 bits, on their way to where they are kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from forms import forms
from kvfx.kernels import OPS
from test_kernels import cases
from yardstick import assert_within_rounding

some = settings(deadline=None, max_examples=examples(25))
few = settings(deadline=None, max_examples=examples(12))
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
FAR = 300  # more than any token moves


def angles(channels: int, dtype: torch.dtype = torch.float64, base: float = 100.0) -> Tensor:
    """Of every distance below `FAR`, [FAR, channels / 2]."""
    frequency = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return (torch.arange(FAR)[:, None] * frequency).to(dtype)


def table(channels: int) -> Tensor:
    """The `turns` of an operator."""
    return torch.stack([angles(channels).cos(), angles(channels).sin()]).float()


def pairs(channels: int, interleaved: bool) -> list[tuple[int, int]]:
    """Which channels turn together."""
    half = channels // 2
    return [(2 * c, 2 * c + 1) if interleaved else (c, c + half) for c in range(half)]


def slow_compact(key, value, positions, slots, turns, interleaved, dtype):
    """Rows, one by one, in `dtype`; their positions."""
    B, H, N = slots.shape
    keys, values = torch.zeros(B, H, N, key.shape[-1], dtype=dtype), torch.zeros(B, H, N, value.shape[-1], dtype=dtype)
    kept = torch.full((B, H, N), -1, dtype=torch.int32)
    for b, h in itertools.product(range(B), range(H)):
        number = 0
        for n in range(N):
            slot = int(slots[b, h, n])
            if slot < 0:
                continue
            row, position = key[b, h, slot].to(dtype), int(positions[b, slot])
            keys[b, h, n], values[b, h, n], kept[b, h, n] = row, value[b, h, slot].to(dtype), position
            if turns is None:
                continue
            back, kept[b, h, n] = position - number, number
            number += 1
            for c, (i, j) in enumerate(pairs(2 * turns.shape[-1], interleaved)):
                turn = torch.complex(*(turns[:, abs(back), c] * torch.tensor([1, 1 if back < 0 else -1])).to(dtype))
                turned = torch.complex(row[i], row[j]) * turn
                keys[b, h, n, i], keys[b, h, n, j] = turned.real, turned.imag
    return keys, values, kept


def chosen(seed: int, B: int, H: int, S: int, count: int, padded: bool) -> Tensor:
    """Slots in order, [B, H, count]; with `padded`, fewer of some heads, maybe none, behind -1."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.rand(B, H, S, generator=generator).argsort(-1)[..., :count].sort(-1).values
    if padded:
        slots[torch.arange(count) < torch.randint(0, count + 1, (B, H, 1), generator=generator)] = -1
    return slots


def moved(case, padded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """The first arguments of both operators. Positions have gaps, and some lie before the places they move to."""
    B, H, _, S, D = case.dims
    key, value = case._replace(padding="none").draw((B, H, S, D), (B, H, S, D + 1))
    steps = torch.randint(0, 4, (B, S), generator=torch.Generator().manual_seed(case.seed))
    return key, value, (steps.cumsum(-1) - 3).int(), chosen(case.seed, B, H, S, (S + 1) // 2, padded), padded


# -- new positions -----------------------------------------------------------------------------------------------------------------


@forms("compact")
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.5]))
@some
def test_kept_tokens_are_numbered_and_their_keys_turned_as_far_as_they_move(op, case, padded, interleaved, part):
    arguments = moved(case, padded)
    turns = table(int(case.dims.D * part))
    keys, values, kept = op(*arguments, turns, interleaved)
    exact, low = (slow_compact(*arguments[:4], turns, interleaved, dtype) for dtype in (torch.float64, torch.float32))
    assert keys.dtype == values.dtype == case.dtype
    assert keys.is_contiguous()
    assert_within_rounding(keys, low[0].to(case.dtype), exact[0])
    untouched = slice(2 * turns.shape[-1], None)
    assert torch.equal(keys[..., untouched].double(), exact[0][..., untouched])
    assert torch.equal(values.double(), exact[1])
    assert kept.dtype == torch.int32
    assert torch.equal(kept, exact[2])


@forms("compact")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("dim", "turned"), [(128, 128), (80, 80), (96, 64), (256, 64), (80, 20), (6, 2)])
def test_a_key_at_its_old_position_becomes_that_key_at_its_new_one(op, interleaved, dim, turned):
    """RoPE itself says what is right. More tokens than a program moves, the last program's fewer."""
    S, count = 150, 77
    generator = torch.Generator().manual_seed(dim)
    plain = torch.randn(1, 2, S, dim, generator=generator, dtype=torch.float64)

    def rope(x: Tensor, positions: Tensor, angle: Tensor) -> Tensor:
        x, at = x.clone(), angle[positions].to(x.dtype)
        for c, (i, j) in enumerate(pairs(turned, interleaved)):
            cosine, sine = at[..., c].cos(), at[..., c].sin()
            x[..., i], x[..., j] = x[..., i] * cosine - x[..., j] * sine, x[..., j] * cosine + x[..., i] * sine
        return x

    positions = torch.arange(S, dtype=torch.int32)[None] + 100
    slots = chosen(dim, 1, 2, S, count, padded=True)
    key = rope(plain, positions[:, None].expand(1, 2, S), angles(turned)).float()
    keys, _, kept = op(key, key, positions, slots, True, table(turned), interleaved)
    rows = slots.clamp(min=0)[..., None].expand(-1, -1, -1, dim)
    exact = rope(plain.gather(2, rows), kept.clamp(min=0), angles(turned))
    low = rope(plain.gather(2, rows).float(), kept.clamp(min=0), angles(turned))
    empty = (slots < 0)[..., None]
    assert_within_rounding(keys, low.masked_fill(empty, 0), exact.masked_fill(empty, 0))


@forms("compact")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_tokens_that_stay_where_they_are_keep_their_bits(op, interleaved):
    key = torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions, slots = torch.arange(40, dtype=torch.int32).repeat(2, 1), torch.arange(33).expand(2, 2, 33)
    for turns in (table(16), table(16)[:, :1], torch.stack([table(16), table(16)], -1)[..., 0]):
        keys, values, kept = op(key, key, positions, slots, False, turns, interleaved)
        assert torch.equal(keys, key[:, :, :33])
        assert torch.equal(values, key[:, :, :33])
        assert torch.equal(kept, slots.int())


@forms("compact")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_channels_that_rope_leaves_alone_keep_their_bits(op, interleaved):
    key = torch.randn(1, 1, 9, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    key[..., 6:] = torch.tensor([-0.0, 3e38, -3e38, 0.0, 1e-40, -1e-40])
    positions, slots = torch.arange(9, dtype=torch.int32)[None], torch.tensor([[[1, 2, 5, 8]]])
    for places in (positions, positions - 5):  # that lie behind the new ones, and before them
        keys = op(key, key, places, slots, False, table(6), interleaved)[0]
        assert torch.equal(keys[..., 6:].contiguous().view(torch.int16), key[:, :, :4, 6:].contiguous().view(torch.int16))


@forms("compact")
def test_a_token_that_moves_further_than_the_table_reaches_does_not_pass_for_a_number(op):
    key, positions = torch.ones(1, 1, 3, 4), torch.tensor([[0, 1, 9]], dtype=torch.int32)
    arguments = (key, key, positions, torch.tensor([[[0, 2]]]), False, table(4)[:, :8])
    if not op.kernel:
        with pytest.raises(IndexError):
            op(*arguments)
        return
    keys = op(*arguments)[0]
    assert torch.equal(keys[0, 0, 0], key[0, 0, 0])
    assert keys[0, 0, 1].isnan().all()


# -- 8 bits ------------------------------------------------------------------------------------------------------------------------


def assert_stored(stored: Tensor, scale: Tensor, exact: Tensor, slack: Tensor | float = 0.0) -> None:
    """Assert that rows are within the error bound of `compact_cast`.

    Args:
        stored: [..., D], in 8 bits.
        scale: [...].
        exact: float64, what is to be stored, or within `slack` of it.
        slack: error of what was to be stored, per element.
    """
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[stored.dtype]
    u = torch.finfo(torch.float32).eps / 2
    # Largest magnitude over `largest`, and back: each quotient and product is off by u at most.
    expected = exact.abs().amax(-1) / largest
    assert ((scale.double() - expected).abs() <= 2 * u * expected + slack).all()
    error = (stored.double() * scale.double()[..., None] - exact).abs()
    scale = scale.double()[..., None]
    bound = scale / 2 if stored.dtype == torch.int8 else torch.maximum(scale / 1024, exact.abs() / 16)
    assert (error <= bound + 4 * u * largest * scale + 2 * slack).all()


@forms("compact_cast")
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@given(case=cases(), padded=st.booleans(), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]))
@some
def test_what_is_stored_is_as_near_as_8_bits_allow(op, dtype, case, padded, size):
    key, value, *rest = moved(case, padded)
    if case.dtype == torch.float16:
        size = min(max(size, 1e-3), 1e3)
    key, value = key * size, value * size
    key[:, :, 0], value[..., 1] = 0, -0.0
    arguments = (key, value, *rest)
    keys, values, kept, key_scales, value_scales = op(*arguments, None, False, dtype)
    assert all(x.is_contiguous() for x in (keys, values, kept, key_scales, value_scales))
    assert keys.dtype == values.dtype == dtype
    assert key_scales.dtype == value_scales.dtype == torch.float32
    exact = slow_compact(*arguments[:4], None, False, torch.float64)
    assert_stored(keys, key_scales, exact[0])
    assert_stored(values, value_scales, exact[1])
    assert torch.equal(kept, exact[2])
    assert (key_scales[arguments[3] < 0] == 0).all()


@forms("compact_cast")
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@given(case=cases(), padded=st.booleans(), interleaved=st.booleans(), part=st.sampled_from([1.0, 0.5]))
@few
def test_keys_are_turned_before_they_are_stored_and_not_rounded_in_between(op, dtype, case, padded, interleaved, part):
    arguments = moved(case, padded)
    turns = table(int(case.dims.D * part))
    keys, values, kept, key_scales, value_scales = op(*arguments, turns, interleaved, dtype)
    exact = slow_compact(*arguments[:4], turns, interleaved, torch.float64)
    # Two products and a sum in float32, of numbers not above the largest of the key.
    largest = arguments[0].double().abs().max()
    assert_stored(keys, key_scales, exact[0], slack=2 * torch.finfo(torch.float32).eps * largest)
    assert_stored(values, value_scales, exact[1])
    assert torch.equal(kept, exact[2])


@pytest.mark.sample(2)
@forms("compact_cast")
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(128, 80), (96, 256), (1, 576)])
def test_more_rows_than_one_program_stores(op, dtype, dim, dim_v):
    generator = torch.Generator().manual_seed(dim)
    key, value = (torch.randn(2, 2, 150, d, generator=generator).half() for d in (dim, dim_v))
    arguments = (key, value, torch.arange(150, dtype=torch.int32).repeat(2, 1), chosen(dim, 2, 2, 150, 77, True))
    keys, values, kept, *scales = op(*arguments, True, None, False, dtype)
    exact = slow_compact(*arguments, None, False, torch.float64)
    assert_stored(keys, scales[0], exact[0])
    assert_stored(values, scales[1], exact[1])
    assert torch.equal(kept, exact[2])


def stored_row(op, row: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One row of keys, and its scale."""
    key = row[None, None, None]
    answer = op(key, key, torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int64), False, None, False, dtype)
    return answer[0][0, 0, 0], answer[3][0, 0, 0]


@forms("compact_cast")
def test_of_two_equally_near_numbers_the_even_one_is_stored(op):
    halves = torch.arange(-126.5, 127)
    stored, scale = stored_row(op, torch.cat([torch.tensor([127.0]), halves]), torch.int8)
    assert scale == 1
    assert torch.equal(stored[1:].float(), halves.round())  # which goes to the even one
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0, and all that are positive
    between = (numbers[1:] + numbers[:-1]) / 2
    even = torch.stack([numbers[:-1], numbers[1:]])[torch.arange(126) % 2, torch.arange(126)]
    nearly = between * (1 + torch.finfo(torch.float32).eps)
    for sign in (1, -1):
        for row, expected in ((numbers, numbers), (between, even), (nearly, numbers[1:])):
            stored, scale = stored_row(op, sign * torch.cat([numbers[-1:], row]), torch.float8_e4m3fn)
            assert scale == 1
            assert torch.equal(stored[1:].float(), sign * expected)


@forms("compact_cast")
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_rows_near_the_ends_of_float32_are_stored_without_overflow(op, dtype):
    most, least = torch.finfo(torch.float32).max, 2.0**-117
    for size in (most, 2 * least, least):
        row = torch.tensor([size, -size, size / 3, 0.0])
        stored, scale = stored_row(op, row, dtype)
        assert_stored(stored[None], scale[None], row[None].double())
        assert stored.float()[0] == -stored.float()[1] == {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
    for size in (0.999 * least, torch.finfo(torch.float32).tiny, 1e-45, 0.0):
        stored, scale = stored_row(op, torch.tensor([size, -size]), dtype)
        assert scale == 0
        assert (stored.float() == 0).all()


def test_what_cannot_be_turned_or_stored_is_said_by_name():
    key, positions, slots = torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int64)
    rest = (positions, slots, False)
    assert OPS["compact"].refusal(key.int(), key, *rest, table(4)) == (
        "keys of torch.int32 are not turned, only of float32, bfloat16 and float16"
    )
    assert OPS["compact"].refusal(key, key, *rest, table(4).double()) == "cosines and sines are torch.float64, not float32"
    cast = OPS["compact_cast"]
    assert cast.refusal(key, key, *rest, None, False, torch.int32) == "torch.int32 is neither int8 nor float8_e4m3fn"
    assert cast.refusal(key, key.double(), *rest, None, False, torch.int8) == (
        "torch.float64 is not one of float32, bfloat16 and float16"
    )
    with pytest.raises(ValueError, match=r"dtype=torch.int32: expected torch.int8 or torch.float8_e4m3fn"):
        cast.reference(key, key, *rest, None, False, torch.int32)
