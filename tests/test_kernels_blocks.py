"""Which blocks of slots go, and what moves to free them: against lists of plain numbers, and what must hold of any schedule."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from kvfx.kernels import OPS
from schedule_by_definition import Row, schedule

schedule_blocks, place_kept, block_moves = (OPS[name].overload for name in ("schedule_blocks", "place_kept", "block_moves"))
SLOTS = 24


@st.composite
def rows(draw: st.DrawFn, heads: int) -> tuple[Row, list[int], int]:
    """Heads of unequal length, few scores, so that many are equal; some protected. Slots held besides, and blocks to give up."""
    row = []
    for _ in range(heads):
        length = draw(st.integers(0, SLOTS))
        scores = draw(
            st.lists(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1e-40, -3.0, 7.0, math.inf]), min_size=length, max_size=length)
        )
        positions = draw(st.permutations(range(SLOTS)))
        row.append(list(zip(scores, positions, strict=False)))
    return row, [draw(st.integers(0, 9)) for _ in range(heads)], draw(st.integers(-2, 3 * heads))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[Row, list[int], int]], int]:
    heads = draw(st.integers(1, 4))
    return draw(st.lists(rows(heads), min_size=1, max_size=3)), draw(st.integers(1, 6))


def as_tensors(batch: list[tuple[Row, list[int], int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = len(batch[0][0])
    scores, positions = torch.full((len(batch), heads, SLOTS), -math.inf), torch.zeros(len(batch), heads, SLOTS, dtype=torch.int32)
    for b, (row, _, _) in enumerate(batch):
        for h, head in enumerate(row):
            for slot, (score, position) in enumerate(head):
                scores[b, h, slot], positions[b, h, slot] = score, position
    held = torch.tensor([held for _, held, _ in batch])
    return scores, positions, held, torch.tensor([evictions for _, _, evictions in batch])


@given(batches())
@settings(max_examples=examples(300), deadline=None)
def test_rows_give_up_their_cheapest_blocks(drawn):
    batch, block = drawn
    scores, positions, held, evictions = as_tensors(batch)
    kept, lengths = schedule_blocks(scores, positions, held, evictions, block)
    assert torch.equal(kept.sum(-1), lengths)
    for b, (row, before, count) in enumerate(batch):
        expected = schedule(row, before, count, block)
        for h, head in enumerate(row):
            gone = {slot for slot in range(len(head)) if not kept[b, h, slot]}
            assert gone == expected[h]
            assert not kept[b, h, len(head) :].any()
            assert not any(head[slot][0] == math.inf for slot in gone)  # protected
        freed = sum(
            -(-(n + len(head)) // block) - -(-(n + int(k)) // block) for n, head, k in zip(before, row, lengths[b], strict=True)
        )
        assert freed <= max(count, 0)


@given(batches(), st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=examples(100), deadline=None)
def test_two_schedules_free_as_much_as_one(drawn, first, second):
    batch, block = drawn
    scores, positions, held, _ = as_tensors(batch)
    both = torch.full((len(batch),), first + second)
    once = schedule_blocks(scores, positions, held, both, block)[0]
    kept = schedule_blocks(scores, positions, held, torch.full_like(both, first), block)[0]
    again = schedule_blocks(scores.masked_fill(~kept, -math.inf), positions, held, torch.full_like(both, second), block)[0]
    assert torch.equal(again, once)


@given(batches())
@settings(max_examples=examples(100), deadline=None)
def test_a_row_of_a_batch_is_scheduled_as_it_is_alone(drawn):
    batch, block = drawn
    tensors = as_tensors(batch)
    kept, lengths = schedule_blocks(*tensors, block)
    for b in range(len(batch)):
        alone = schedule_blocks(*(tensor[b : b + 1] for tensor in tensors), block)
        assert torch.equal(kept[b : b + 1], alone[0])
        assert torch.equal(lengths[b : b + 1], alone[1])


def test_tokens_in_order_need_no_positions():
    scores, held = torch.tensor([[[1.0, 0.5, 0.5, 0.5, 0.5, 2.0]]]), torch.zeros(1, 1, dtype=torch.int64)
    ordered = torch.arange(6, dtype=torch.int32).view(1, 1, 6)
    for positions in (None, ordered):
        kept, _ = schedule_blocks(scores, positions, held, torch.tensor([1]), 3)
        assert kept.flatten().tolist() == [True, True, False, False, False, True]


@st.composite
def kept_slots(draw: st.DrawFn) -> tuple[list[list[bool]], int, int]:
    """Of each head which slots stay, and the slots of a block; a head that loses some ends with a full block."""
    block = draw(st.integers(1, 5))
    flags = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, SLOTS))
        blocks = draw(st.integers(1, -(-length // block)))
        stay = length if blocks == -(-length // block) else blocks * block
        flags.append(draw(st.permutations([True] * stay + [False] * (length - stay))))
    return flags, block, draw(st.integers(0, 10))


@given(kept_slots())
@settings(max_examples=examples(200), deadline=None)
def test_moves_gather_what_stays_in_the_first_slots(drawn):
    flags, block, spare = drawn
    width = -(-SLOTS // block)
    table = torch.randperm(len(flags) * width + 1)[1:].view(len(flags), width).int()
    kept = torch.zeros(len(flags), width * block, dtype=torch.bool)
    pool, expected, wanted = [None] * (int(table.max()) + 1) * block, [], 0

    def place(head: int, slot: int) -> int:
        return int(table[head, slot // block]) * block + slot % block

    for h, head in enumerate(flags):
        kept[h, : len(head)] = torch.tensor(head)
        for slot in range(len(head)):
            pool[place(h, slot)] = (h, slot)
        stay = [slot for slot, stays in enumerate(head) if stays]
        expected.append({(h, slot) for slot in stay})
        wanted += sum(slot >= len(stay) for slot in stay)
    moves, places = block_moves(kept, table, wanted + spare, block)
    assert (moves[:, wanted:] == -1).all()
    assert (moves[:, :wanted] >= 0).all()
    sources, targets = places[:, :wanted].tolist()
    assert not set(sources) & set(targets)
    for (h, slot), at in zip((divmod(each, kept.shape[1]) for each in moves[0, :wanted].tolist()), sources, strict=True):
        assert place(h, slot) == at
    for source, target in zip(sources, targets, strict=True):
        pool[target] = pool[source]
    for h, slots in enumerate(expected):
        assert {pool[place(h, slot)] for slot in range(len(slots))} == slots


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=examples(150), deadline=None)
def test_kept_tokens_go_behind_those_held(batch, heads, tokens, block, random):
    kept = torch.tensor([[[random.random() < 0.5 for _ in range(tokens)] for _ in range(heads)] for _ in range(batch)])
    held = torch.tensor([[random.randrange(7) for _ in range(heads)] for _ in range(batch)])
    width = -(-(7 + tokens) // block)
    table = torch.randperm(batch * heads * width).view(batch, heads, width).int()
    slots, places = place_kept(kept, held, table, heads * tokens, block)
    for b in range(batch):
        expected = []
        for h in range(heads):
            for number, token in enumerate(kept[b, h].nonzero().flatten().tolist()):
                index = int(held[b, h]) + number
                expected.append((h * tokens + token, int(table[b, h, index // block]) * block + index % block))
        count = len(expected)
        assert slots[b, :count].tolist() == [slot for slot, _ in expected]
        assert places[b, :count].tolist() == [place for _, place in expected]
        assert (slots[b, count:] == -1).all()
