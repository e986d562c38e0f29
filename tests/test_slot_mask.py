"""The columns of a mask that slots stand for, against one loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import kvfx.kernels  # noqa: F401  (registers the ops)

ROWS, KV_HEADS, GROUP, SLOTS, NEW = 2, 2, 3, 5, 2
SEEN = (11, 8)
LENGTH = 12  # one more than any row has seen, so that every row is aligned on the right


def positions_of(row: int, head: int, empty: bool) -> list[int]:
    """Where the slots of a head stood; those behind the first three go on to the last token seen."""
    first = sorted(torch.randperm(SEEN[row] - 2, generator=torch.Generator().manual_seed(10 * row + head))[:3].tolist())
    if empty and row == 1:
        first = [-1, *first[1:]]
    return [*first, SEEN[row] - 2, SEEN[row] - 1]


def masks(kind: str, heads: int, rows: int, queries: int) -> Tensor:
    mask = torch.randn(rows, heads, queries, LENGTH + NEW, generator=torch.Generator().manual_seed(7))
    return mask > 0 if kind == "bool" else mask


def by_loop(mask: Tensor | None, positions: list[list[list[int]]], heads: int) -> Tensor:
    queries = NEW if mask is None else mask.shape[2]
    out = torch.zeros(ROWS, heads, queries, SLOTS + NEW, dtype=torch.bool if mask is None else mask.dtype)
    full = torch.ones(1, 1, queries, LENGTH + NEW, dtype=torch.bool) if mask is None else mask
    for row, head, query, slot in itertools.product(range(ROWS), range(heads), range(queries), range(SLOTS + NEW)):
        given = full[row % full.shape[0], head % full.shape[1], query]
        if slot >= SLOTS:
            out[row, head, query, slot] = given[LENGTH + slot - SLOTS]
            continue
        position = positions[row][head // GROUP][slot]
        hidden = False if out.dtype == torch.bool else torch.finfo(out.dtype).min
        out[row, head, query, slot] = given[position + LENGTH - SEEN[row]] if position >= 0 else hidden
    return out


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty slots"])
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("heads", [1, KV_HEADS * GROUP])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_each_slot_gets_the_column_of_its_token(kind, heads, rows, empty):
    mask = masks(kind, heads, rows, NEW)
    assert_right(mask, empty)


def test_without_a_mask_only_empty_slots_are_hidden():
    assert_right(None, True)


def assert_right(mask: Tensor | None, empty: bool) -> None:
    positions = [[positions_of(row, head, empty) for head in range(KV_HEADS)] for row in range(ROWS)]
    prefix = torch.tensor(positions, dtype=torch.int32)[:, :, :3]
    seen = torch.tensor(SEEN)
    keys, fresh = torch.zeros(ROWS, KV_HEADS, SLOTS, 4), torch.zeros(ROWS, KV_HEADS, NEW, 4)
    size = torch.empty(LENGTH + 1, 0)
    out = torch.ops.kvfx.slot_mask(mask, keys, fresh, prefix, seen - 2, seen, size, empty, KV_HEADS * GROUP)
    expected = by_loop(mask, positions, KV_HEADS * GROUP)
    if out.shape[1] == KV_HEADS:
        out = out.repeat_interleave(GROUP, 1)
    assert torch.equal(out.expand_as(expected), expected)


def test_a_mask_for_all_heads_becomes_one_per_kv_head():
    keys, fresh = torch.zeros(ROWS, KV_HEADS, SLOTS, 4), torch.zeros(ROWS, KV_HEADS, NEW, 4)
    prefix, seen = torch.zeros(ROWS, KV_HEADS, 3, dtype=torch.int32), torch.tensor(SEEN)
    given = (keys, fresh, prefix, seen - 2, seen, torch.empty(LENGTH + 1, 0), False, KV_HEADS * GROUP)
    assert torch.ops.kvfx.slot_mask(masks("bool", 1, 1, NEW), *given).shape == (ROWS, KV_HEADS, NEW, SLOTS + NEW)


def test_slots_of_a_window_follow_each_other_up_to_the_last_token():
    mask = masks("additive", 1, 1, NEW)
    seen = torch.tensor([11, 3])
    keys, fresh = torch.zeros(2, 2, SLOTS, 4), torch.zeros(2, 2, NEW, 4)
    prefix = torch.empty(2, 2, 0, dtype=torch.int32)
    out = torch.ops.kvfx.slot_mask(mask, keys, fresh, prefix, seen - SLOTS, seen, torch.empty(LENGTH + 1, 0), True, 4)
    assert out.shape == (2, 1, NEW, SLOTS + NEW)
    assert torch.equal(out[0, 0], mask[0, 0, :, LENGTH - SLOTS :])
    assert torch.equal(out[1, 0, :, 2:], mask[0, 0, :, LENGTH - SLOTS + 2 :])
    assert bool((out[1, 0, :, :2] == torch.finfo(torch.float32).min).all())  # three tokens seen, so two slots are empty


def test_a_mask_of_one_column_for_all_stays_that():
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    keys, prefix, seen = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, dtype=torch.int32), torch.tensor([5, 5])
    out = torch.ops.kvfx.slot_mask(mask, keys, keys[:, :, :1], prefix, seen, seen, torch.empty(6, 0), False, 4)
    assert torch.equal(out, mask)


@pytest.mark.parametrize("heads", [1, KV_HEADS * GROUP])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_each_slot_that_names_its_column_gets_it(kind, heads):
    mask = masks(kind, heads, ROWS, NEW)
    columns = torch.randint(LENGTH, (ROWS, KV_HEADS, SLOTS), generator=torch.Generator().manual_seed(2))
    columns[1, :, 2] = -1
    out = torch.ops.kvfx.column_mask(mask, columns, KV_HEADS * GROUP)
    for row, kv_head, slot in itertools.product(range(ROWS), range(KV_HEADS), range(SLOTS)):
        column = int(columns[row, kv_head, slot])
        for head in [kv_head] if heads == 1 else range(kv_head * GROUP, (kv_head + 1) * GROUP):
            hidden = torch.zeros(NEW, dtype=torch.bool) if kind == "bool" else torch.full((NEW,), torch.finfo(mask.dtype).min)
            expected = mask[row, head % mask.shape[1], :, column] if column >= 0 else hidden
            assert torch.equal(out[row, head, :, slot], expected)


def test_slots_that_name_their_columns_are_all_seen_without_a_mask():
    columns = torch.tensor([[[0, 3, -1]]])
    assert torch.ops.kvfx.column_mask(None, columns, 2).tolist() == [[[[True, True, False]]]]
