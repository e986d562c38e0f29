"""Rows of keys and values on the move: chosen by score, copied bit by bit, written to slots and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from forms import DEVICE, Form, forms
from kvfx.kernels import OPS
from test_kernels import cases, slow_select

some = settings(deadline=None, max_examples=examples(25))
LONG = 2 * 2048 + 77  # a few tiles of scores, the last one short


def bits(x: Tensor) -> Tensor:
    """The same bits, of a type whose values compare equal only if they are."""
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def rows(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits of a type; NaNs among them, whose payloads no copy changes, but in floats the CPU's own may."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-128, 127, (*shape, dtype.itemsize), dtype=torch.int8, generator=generator).view(dtype)[..., 0]
    return torch.where(raw.isnan(), torch.ones((), dtype=dtype), raw) if dtype.is_floating_point and dtype.itemsize > 1 else raw


# -- select ------------------------------------------------------------------------------------------------------------------------


def ordered(scores: Tensor, count: int) -> Tensor:
    """What `select` keeps, by a stable sort."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values


@pytest.mark.sample(2)
@forms("select")
@pytest.mark.parametrize("kind", ["normal", "ties", "all equal", "one bit apart", "of any size", "zeros of both signs"])
def test_long_rows_keep_what_a_stable_sort_keeps(op, kind):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 2, LONG, generator=generator)
    if kind == "ties":
        scores = (2 * scores).round()
    elif kind == "all equal":
        scores = torch.full_like(scores, -3.5)
    elif kind == "one bit apart":
        scores = (torch.randint(3, scores.shape, generator=generator) + 0x3F800000).int().view(torch.float32)
    elif kind == "of any size":
        raw = torch.randint(-(2**31), 2**31, scores.shape, generator=generator).int().view(torch.float32)
        scores = torch.where(raw.isnan(), torch.inf, raw)
    elif kind == "zeros of both signs":
        scores = torch.where(scores < 0, -0.0, 0.0)
    for count in (1, 2, LONG // 3, 2048, LONG - 1, LONG):
        assert torch.equal(op(scores, count, None), ordered(scores, count))


@forms("select")
def test_what_no_token_may_lose_and_padding_stand_at_the_ends(op):
    scores = torch.randn(1, 1, LONG, generator=torch.Generator().manual_seed(2))
    scores[..., ::3], scores[..., 1::7] = torch.inf, -torch.inf
    for count in (LONG // 4, LONG // 3 + 5, LONG - 3):
        assert torch.equal(op(scores, count, None), ordered(scores, count))


@forms("select")
def test_rows_of_a_long_batch_keep_as_many_as_each_is_told(op):
    counts = torch.tensor([0, 1, 2500, 3000])
    scores = torch.randn(4, 1, LONG, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    slots = op(scores, 3000, counts)
    for row, count in enumerate(counts.tolist()):
        assert (slots[row, 0, : 3000 - count] == -1).all()
        assert torch.equal(slots[row, 0, 3000 - count :], ordered(scores[row, 0], count))


@pytest.mark.slow
@forms("select")
def test_one_program_may_have_to_look_at_several_tiles(op):
    """Of as many rows as a chip has room for programs, each has one, however long it is."""
    scores = torch.randn(43, 3, 2048 + 77, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    assert torch.equal(op(scores, 1000, None), ordered(scores, 1000))


@forms("select")
@given(cases(), st.data())
@settings(deadline=None, max_examples=examples(8))
def test_scores_may_lie_anywhere_in_memory(op, case, data):
    B, H, _, S, _ = case.dims
    (scores,) = case._replace(padding="none").draw((B, H, S))
    count = data.draw(st.integers(1, S))
    expected = slow_select(scores, count, None)
    for view in (scores.transpose(0, 2).contiguous().transpose(0, 2), torch.stack([scores, -scores], -1)[..., 0]):
        assert torch.equal(op(view, count, None), expected)


def test_scores_in_float64_stay_with_the_reference():
    assert OPS["select"].refusal(torch.zeros(1, 1, 2, dtype=torch.float64), 1, None) == (
        "torch.float64 is not one of float32, bfloat16 and float16"
    )


# -- compact -----------------------------------------------------------------------------------------------------------------------

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn]


@pytest.mark.sample(3)
@forms("compact")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(128, 128), (80, 96), (256, 1), (12, 576)])
def test_rows_of_any_type_and_length_are_copied(op, dtype, dim, dim_v):
    if dtype == torch.float8_e4m3fn and not op.kernel:
        pytest.skip("PyTorch masks no float8")
    key, value = rows(1, dtype, 2, 2, 200, dim), rows(2, dtype, 2, 200, 2, dim_v).transpose(1, 2)
    positions = torch.randint(1000, (2, 200), dtype=torch.int32)
    slots = torch.randint(-1, 200, (2, 2, 131))
    keys, values, kept = op(key, value, positions, slots, True)
    source, empty = slots.clamp(min=0), slots < 0
    for copy, given_rows in ((keys, key), (values, value)):
        assert copy.dtype == dtype
        expected = torch.stack([torch.stack([bits(given_rows)[b, h, source[b, h]] for h in range(2)]) for b in range(2)])
        assert torch.equal(bits(copy), expected.masked_fill(empty[..., None], 0))
    assert torch.equal(kept, torch.stack([positions[b][source[b]] for b in range(2)]).masked_fill(empty, -1))


# -- compact_into -----------------------------------------------------------------------------------------------------------------


def written(op: Form, buffers: list[Tensor], *arguments: Tensor | None) -> list[Tensor]:
    """What stands in buffers after `op` has written to copies of them, strides and all."""
    device = DEVICE if op.kernel else "cpu"
    copies = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x) for x in buffers]
    moved = [None if x is None else x.to(device) for x in arguments]
    row = OPS[op.name]
    if op.kernel:
        assert row.refusal(*copies, *moved) is None
    (row.kernel if op.kernel else row.overload)(*copies, *moved)
    return [x.cpu() for x in copies]


def slow_compact_into(buffers, key, value, positions, slots, counts, length):
    buffers = [x.clone() for x in buffers]
    (B, H, n), zero = slots.shape, (torch.zeros_like(key[0, 0, 0]), torch.zeros_like(value[0, 0, 0]), -1)
    for b, h in itertools.product(range(B), range(H)):
        kept = [int(slot) for slot in slots[b, h] if slot >= 0]
        assert counts is None or len(kept) == counts[b]
        rows = [(key[b, h, slot], value[b, h, slot], positions[b, slot]) for slot in kept] + [zero] * (n - len(kept))
        for place, row in enumerate(rows, int(length[b])):
            for buffer, new in zip(buffers, row, strict=True):
                buffer[b, h, place] = new
    return buffers


@forms("compact_into")
@given(cases(), st.booleans(), st.booleans(), st.data())
@some
def test_what_is_kept_stands_behind_what_is_held_and_nothing_else_is_written(op, case, uneven, seen_from_afar, data):
    B, H, _, S, D = case.dims
    generator = torch.Generator().manual_seed(case.seed)
    key, value = case._replace(padding="none").draw((B, H, S, D), (B, H, S, D + 1))
    scores = torch.randn(B, H, S, generator=generator)
    positions = torch.randint(1000, (B, S), dtype=torch.int32, generator=generator)
    count = data.draw(st.integers(1, S))
    counts = torch.randint(0, count + 1, (B,), generator=generator) if uneven else None
    length = torch.randint(0, 9, (B,), generator=generator)
    buffers = [torch.randn(B, H, count + 10, width, generator=generator).to(case.dtype) for width in (D, D + 1)]
    buffers.append(torch.randint(-9, 0, buffers[0].shape[:3], dtype=torch.int32, generator=generator))
    if seen_from_afar:
        buffers = [torch.cat([x, torch.full_like(x, 99)], 2)[:, :, : count + 10] for x in buffers]
    arguments = (key, value, positions, slow_select(scores, count, counts), counts, length)
    for actual, expected in zip(written(op, buffers, *arguments), slow_compact_into(buffers, *arguments), strict=True):
        assert torch.equal(actual, expected)


@forms("compact_into")
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 80), (torch.int8, 96), (torch.float16, 256)], ids=str
)
def test_more_rows_than_one_program_moves_are_moved_in_place(op, dtype, dim):
    generator = torch.Generator().manual_seed(5)
    key, value = rows(3, dtype, 2, 150, 2, dim).transpose(1, 2), rows(4, dtype, 2, 2, 150, dim)
    positions = torch.randint(1000, (2, 150), dtype=torch.int32, generator=generator)
    counts, length = torch.tensor([137, 70]), torch.tensor([3, 0])
    slots = slow_select(torch.randn(2, 2, 150, generator=generator), 137, counts)
    buffers = [torch.zeros(2, 2, 141, dim, dtype=dtype), torch.zeros(2, 2, 141, dim, dtype=dtype)]
    buffers.append(torch.zeros(2, 2, 141, dtype=torch.int32))
    arguments = (key, value, positions, slots, counts, length)
    for actual, expected in zip(written(op, buffers, *arguments), slow_compact_into(buffers, *arguments), strict=True):
        assert torch.equal(bits(actual), bits(expected))


def test_a_buffer_of_another_type_is_refused():
    buffer, key, index = (
        torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16),
        torch.zeros(1, 1, 2, 8),
        torch.zeros(1, 1, 1, dtype=torch.int64),
    )
    positions = torch.zeros(1, 2, dtype=torch.int32)
    reason = OPS["compact_into"].refusal(buffer, buffer, positions[None], key, key, positions, index, None, index[0, 0])
    assert reason == "the buffer's keys are torch.bfloat16, the new ones torch.float32"


# -- pack --------------------------------------------------------------------------------------------------------------------------


def slow_pack(pool, key, value, positions, slots, places):
    pool = [x.clone() for x in pool]
    for b, m in itertools.product(*map(range, slots.shape)):
        slot, place = int(slots[b, m]), int(places[b, m])
        if slot >= 0:
            head, token = divmod(slot, key.shape[2])
            block, within = divmod(place, pool[0].shape[1])
            pool[0][block, within], pool[1][block, within] = key[b, head, token], value[b, head, token]
            pool[2][block, within] = positions[b, token]
    return pool


@forms("pack")
@given(cases(), st.integers(1, 20), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
@some
def test_pack_writes_what_is_chosen_where_it_shall_stand_and_nothing_else(op, case, size, skipped, seen_from_afar):
    B, H, _, S, D = case.dims
    generator = torch.Generator().manual_seed(case.seed)
    key, value = case._replace(padding="none").draw((B, H, S, D), (B, H, S, D + 1))
    positions = torch.randint(1000, (B, S), dtype=torch.int32, generator=generator)
    count = (H * S + 1) // 2
    slots = torch.stack([torch.randperm(H * S, generator=generator)[:count] for _ in range(B)])
    slots = slots.masked_fill(torch.rand(slots.shape, generator=generator) < skipped, -1)
    blocks = B * count // size + 1
    places = torch.randperm(blocks * size, generator=generator)[: B * count].view(B, count).where(slots >= 0, -5)
    pool = [torch.randn(blocks, size, width, generator=generator).to(case.dtype) for width in (D, D + 1)]
    pool.append(torch.randint(-9, 0, (blocks, size), dtype=torch.int32, generator=generator))
    if seen_from_afar:  # as the slots of a longer buffer
        pool = [torch.cat([x, torch.full_like(x, 99)], 1)[:, :size] for x in pool]
    arguments = (key, value, positions, slots, places)
    for actual, expected in zip(written(op, pool, *arguments), slow_pack(pool, *arguments), strict=True):
        assert torch.equal(actual, expected)


@forms("pack")
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 80), (torch.int8, 96), (torch.float16, 256)], ids=str
)
def test_more_rows_than_one_program_writes_are_packed(op, dtype, dim):
    generator = torch.Generator().manual_seed(5)
    key, value = rows(3, dtype, 2, 150, 2, dim).transpose(1, 2), rows(4, dtype, 2, 2, 150, dim)
    positions = torch.randint(1000, (2, 150), dtype=torch.int32, generator=generator)
    slots = torch.stack([torch.randperm(300, generator=generator)[:267] for _ in range(2)])
    places = torch.randperm(45 * 16, generator=generator)[: 2 * 267].view(2, 267)
    pool = [torch.zeros(45, 16, dim, dtype=dtype), torch.zeros(45, 16, dim, dtype=dtype), torch.zeros(45, 16, dtype=torch.int32)]
    arguments = (key, value, positions, slots, places)
    for actual, expected in zip(written(op, pool, *arguments), slow_pack(pool, *arguments), strict=True):
        assert torch.equal(bits(actual), bits(expected))


def test_a_pool_of_another_type_is_refused():
    pool = torch.zeros(1, 4, 8, dtype=torch.bfloat16)
    key, index = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, dtype=torch.int64)
    positions = torch.zeros(1, 2, dtype=torch.int32)
    reason = OPS["pack"].refusal(pool, pool, positions.view(1, 2), key, key, positions, index, index)
    assert reason == "the pool's keys are torch.bfloat16, the new ones torch.float32"
