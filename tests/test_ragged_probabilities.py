"""What each slot got of attention over extents of unequal length, against a loop over heads in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forms import Form, forms
from kvfx.kernels import OPS
from kvfx.work_list import work_list
from test_ragged_attention import CHUNK, DTYPES, PLAIN, Case, Given, cases, check, given_of, many, slow_probabilities
from yardstick import assert_within_rounding


def slow_sums(given: Given, power: int, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Powers of probabilities, summed over the heads that read a slot: of each chunk's slots, and of the new tokens."""
    query, key = given.arguments[:2]
    owner, first = given.arguments[9:11]
    (rows, heads), group = key.shape[:2], query.shape[1] // key.shape[1]
    held, new = torch.zeros(len(owner), chunk, dtype=dtype), torch.zeros(rows, heads, dtype=dtype)
    for row, head, one in itertools.product(range(rows), range(heads), range(group)):
        share = slow_probabilities(given, dtype, row, head * group + one, 0) ** power
        new[row, head] += share[-1]
        for number, (extent, start) in enumerate(zip(owner.tolist(), first.tolist(), strict=True)):
            if extent == row * heads + head:
                part = share[:-1][start : start + chunk]
                held[number, : len(part)] += part
    return held, new


def check_sums(op: Form, case: Case, given: Given, power: int, chunk: int = CHUNK) -> None:
    *arguments, last, scale, softcap, sinks = given.arguments
    out, held, new = op(*arguments, last, power, scale, softcap, sinks)
    check(lambda *_: out, case, given)
    lows, exacts = (slow_sums(given, power, chunk, dtype) for dtype in (torch.float32, torch.float64))
    for actual, low, exact in zip((held, new), lows, exacts, strict=True):
        assert actual.dtype == torch.float32
        assert_within_rounding(actual, low, exact)


@forms("ragged_probabilities")
@given(cases(), st.sampled_from([1, 2]))
@many
def test_every_slot_is_told_what_its_heads_gave_it(op, case, power):
    case = case._replace(new=1)
    check_sums(op, case, given_of(case), power)


@forms("ragged_probabilities")
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("lengths", [[[0, 0], [0, 0]], [[0, 60], [1, 0]], [[8, 16], [9, 15]]], ids=str)
def test_extents_may_be_empty_and_differ_wildly(lengths, power, op):
    check_sums(op, PLAIN, given_of(PLAIN, torch.tensor(lengths)), power)


@forms("ragged_probabilities")
def test_chunks_of_room_that_is_not_filled_yet_are_told_nothing(op):
    given = given_of(PLAIN)
    lengths, table = given.arguments[8][None], given.arguments[7][None]
    given.arguments[9:13] = [part[0] for part in work_list(lengths.numpy() + 20, table.numpy(), PLAIN.block, CHUNK)]
    check_sums(op, PLAIN, given, 2)


@forms("ragged_probabilities")
def test_a_query_that_sees_nothing_gives_nothing(op):
    case = PLAIN._replace(mask="bool")
    *arguments, chunk, scale, softcap, sinks = given_of(case).arguments
    arguments[3] = torch.zeros(1, 1, 1, case.text + 1, dtype=torch.bool)
    for answer in op(*arguments, chunk, 2, scale, softcap, sinks):
        assert torch.equal(answer, torch.zeros_like(answer))


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "block", "chunk", "group"), [(80, 16, 128, 4), (96, 48, 144, 17), (256, 16, 128, 2)])
def test_chunks_of_any_size_are_told(dtype, dim, block, chunk, group):
    case = PLAIN._replace(dtype=dtype, dim=dim, block=block, kv_heads=4, group=group, text=300, mask="bool")
    given = given_of(case, torch.tensor([[0, 1, 63, 64], [65, 127, 129, 290]]), chunk)
    check_sums(Form("ragged_probabilities", True), case, given, 2, chunk)


def test_probabilities_sum_to_one():
    """The promise behind both answers: over all slots that a head reads and the new token."""
    *arguments, chunk, scale, softcap, sinks = given_of(PLAIN._replace(group=1)).arguments
    _, held, new = OPS["ragged_probabilities"].overload(*arguments, chunk, 1, scale, softcap, sinks)
    total = torch.zeros(new.numel()).index_add(0, arguments[9].long(), held.sum(1)) + new.flatten()
    torch.testing.assert_close(total, torch.ones_like(total))
