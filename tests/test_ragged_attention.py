"""Attention over extents of unequal length, against a loop over heads in float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from forms import Form, forms
from kvfx.kernels import OPS
from kvfx.work_list import NOWHERE, work_list
from yardstick import assert_within_rounding

many = settings(deadline=None, max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])
CHUNK = 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "bool", "additive", "bool per head", "additive per head", "one column"]


class Case(NamedTuple):
    """Sizes of one example, and what is special about it."""

    rows: int
    kv_heads: int
    group: int
    new: int
    dim: int
    block: int
    text: int
    dtype: torch.dtype
    mask: str
    softcap: float | None
    with_sinks: bool
    seed: int


class Given(NamedTuple):
    """Arguments of the op, and beside the pool what each head holds."""

    arguments: list
    kept: list[list[tuple[Tensor, Tensor, Tensor]]]  # of each row and head the keys, values and positions


@st.composite
def cases(draw):
    return Case(
        rows=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 4])),
        new=draw(st.sampled_from([1, 1, 2, 5])),
        dim=draw(st.sampled_from([4, 12, 16])),
        block=draw(st.sampled_from([1, 2, 4, 8])),
        text=draw(st.sampled_from([1, 7, 8, 33, 60])),
        dtype=draw(st.sampled_from(DTYPES)),
        mask=draw(st.sampled_from(MASKS)),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        with_sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def given_of(case: Case, lengths: Tensor | None = None, chunk: int = CHUNK) -> Given:
    """Random extents in a shuffled pool in which all else is NaN."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    rows, heads, dim = case.rows, case.kv_heads, case.dim
    if lengths is None:
        lengths = torch.randint(0, case.text + 1, (rows, heads), generator=generator)
        lengths = torch.where(torch.rand(rows, heads, generator=generator) < 0.2, 0, lengths)
    needs = -(lengths // -case.block)
    spare = int(torch.randint(0, 3, (), generator=generator))
    blocks, width = 1 + int(needs.sum()) + spare, max(2, int(needs.max()) + spare)
    order = (1 + torch.randperm(blocks - 1, generator=generator)).tolist()
    keys, values = (torch.full((blocks, case.block, dim), torch.nan, dtype=case.dtype) for _ in range(2))
    positions = torch.randint(-(2**31), 2**31 - 1, (blocks, case.block), generator=generator).int()
    table = torch.zeros(rows, heads, width, dtype=torch.int32)
    seen = torch.randint(max(1, int(lengths.max())), case.text + 1, (rows,), generator=generator)  # the others stand on the right
    kept: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(rows)]
    for row in range(rows):
        for head in range(heads):
            length = int(lengths[row, head])
            mine = [order.pop() for _ in range(int(needs[row, head]))]
            table[row, head, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            at = torch.randperm(int(seen[row]), generator=generator)[:length].sort().values
            held = normal(length, dim), normal(length, dim), at
            kept[row].append(held)
            for slot in range(length):
                block, place = mine[slot // case.block], slot % case.block
                keys[block, place], values[block, place], positions[block, place] = (x[slot] for x in held)
    query, key, value = (normal(rows, many_heads, case.new, dim) for many_heads in (heads * case.group, heads, heads))
    work = [part[0] for part in work_list(lengths[None].numpy(), table[None].numpy(), case.block, chunk)]
    sinks = normal(heads * case.group) if case.with_sinks else None
    places = keys, values, positions, table, lengths, *work, case.text - seen
    return Given([query, key, value, mask_of(case, generator), *places, chunk, None, case.softcap, sinks], kept)


def mask_of(case: Case, generator: torch.Generator) -> Tensor | None:
    """Over the text and the new tokens; every query sees something unless the mask is bool."""
    if case.mask == "none":
        return None
    heads = case.kv_heads * case.group if "per head" in case.mask else 1
    width = 1 if case.mask == "one column" else case.text + case.new
    rows = case.rows if case.seed % 2 else 1
    queries = case.new if case.seed % 3 else 1
    drawn = torch.randn(rows, heads, queries, width, generator=generator)
    return drawn.to(case.dtype) if case.mask.startswith("additive") else drawn > -0.3


def slow_probabilities(given: Given, dtype: torch.dtype, row: int, head: int, place: int) -> Tensor:
    """Of one query over what its head holds and then the new tokens, by the definition."""
    query, key, _, mask, *rest = given.arguments
    shift, sinks, softcap = rest[9], rest[-1], rest[-2]
    _, heads, new, dim = query.shape
    mine, text = head // (heads // key.shape[1]), 0 if mask is None else mask.shape[3] - new
    held_keys, _, at = given.kept[row][mine]
    logits = torch.cat([held_keys, key[row, mine]]).to(dtype) @ query[row, head, place].to(dtype) * dim**-0.5
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        columns = torch.cat([at + shift[row], text + torch.arange(new)])
        line = mask[row % mask.shape[0], head % mask.shape[1], place % mask.shape[2]]
        seen = line.expand(len(columns)) if len(line) == 1 else line[columns]
        logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen.to(dtype)
    tokens = len(logits)
    if sinks is not None:
        logits = torch.cat([logits, sinks[head, None].to(dtype)])
    return torch.softmax(logits, 0)[:tokens] if (logits > -torch.inf).any() else torch.zeros(tokens, dtype=dtype)


def slow(given: Given, dtype: torch.dtype) -> Tensor:
    """One query after the other, by the definition."""
    query, _, value = given.arguments[:3]
    rows, heads, new, _ = query.shape
    out = torch.zeros(rows, heads, new, value.shape[3], dtype=dtype)
    for row, head, place in itertools.product(range(rows), range(heads), range(new)):
        mine = head // (heads // value.shape[1])
        values = torch.cat([given.kept[row][mine][1], value[row, mine]]).to(dtype)
        out[row, head, place] = slow_probabilities(given, dtype, row, head, place) @ values
    return out


def check(op: Form, case: Case, given: Given) -> None:
    """A single query is worked out in float32, several in the precision of the queries."""
    low = slow(given, torch.float32 if case.new == 1 else case.dtype).to(case.dtype)
    assert_within_rounding(op(*given.arguments), low, slow(given, torch.float64))


@forms("ragged_attention")
@given(cases())
@many
def test_every_query_attends_to_what_its_head_holds_and_to_nothing_else(op, case):
    case = case._replace(new=1) if op.kernel else case
    check(op, case, given_of(case))


PLAIN = Case(2, 2, 2, 1, 16, 4, 60, torch.float32, "none", None, False, 1)
REFERENCE, KERNEL = (Form("ragged_attention", kernel) for kernel in (False, True))
asked = pytest.mark.parametrize(("op", "new"), [(REFERENCE, 1), (REFERENCE, 3), (KERNEL, 1)], ids=str)  # the kernel takes one query


@asked
@pytest.mark.parametrize("lengths", [[[0, 0], [0, 0]], [[0, 60], [1, 0]], [[8, 16], [9, 15]]], ids=str)
def test_extents_may_be_empty_and_differ_wildly(lengths, op, new):
    case = PLAIN._replace(new=new)
    check(op, case, given_of(case, torch.tensor(lengths)))


@pytest.mark.sample(1)
@forms("ragged_attention")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_and_heads_are_as_few(dtype, op):
    case = Case(4, 8, 4, 1, 16, 8, 200, dtype, "bool", None, False, 5)
    lengths = torch.randint(0, 201, (4, 8), generator=torch.Generator().manual_seed(0))
    check(op, case, given_of(case, lengths))


@asked
def test_a_query_that_sees_nothing_gets_zero(op, new):
    case = PLAIN._replace(new=new, mask="bool")
    given = given_of(case)
    given.arguments[3] = torch.zeros(1, 1, new, case.text + new, dtype=torch.bool)
    assert torch.equal(op(*given.arguments), torch.zeros_like(given.arguments[0]))


# What a kernel gets wrong and a reference does not: edges of its tiles, here of the sizes that real models have.


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "block", "chunk"), [(80, 16, 128), (96, 48, 144), (256, 16, 128), (32, 100, 200)])
def test_extents_end_anywhere_in_a_tile(dtype, dim, block, chunk):
    case = PLAIN._replace(dtype=dtype, dim=dim, block=block, kv_heads=4, text=300, mask="bool")
    check(KERNEL, case, given_of(case, torch.tensor([[0, 1, 63, 64], [65, 127, 129, 290]]), chunk))


@pytest.mark.sample(2)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("group", [1, 3, 17])
def test_groups_may_have_any_size(group, mask):
    case = PLAIN._replace(group=group, dtype=torch.bfloat16, mask=mask, softcap=2.0, with_sinks=True)
    check(KERNEL, case, given_of(case))


def test_more_chunks_are_put_together_than_a_tile_has():
    case = PLAIN._replace(block=1, text=800, dim=80)  # tiles of 64 chunks, and of 64 channels
    check(KERNEL, case, given_of(case, torch.tensor([[800, 3], [64 * CHUNK, 64 * CHUNK + 1]])))


@forms("ragged_attention")
@pytest.mark.parametrize("mask", ["bool per head", "additive"])
def test_tensors_may_lie_anyhow_and_values_be_narrower_than_keys(mask, op):
    case = PLAIN._replace(dim=12, mask=mask, with_sinks=True)
    given = given_of(case)
    kept = [[(keys, values[:, :5], at) for keys, values, at in row] for row in given.kept]
    narrow = [x[..., :5] if place in (2, 5) else x for place, x in enumerate(given.arguments)]
    given = Given([_spread(x) if isinstance(x, Tensor) else x for x in narrow], kept)
    check(op, case, given)


def _spread(x: Tensor) -> Tensor:
    """The same numbers at every other place of memory, axes in another order."""
    turned = x.movedim(0, -1)
    return torch.stack([turned, torch.zeros_like(turned)], -1)[..., 0].movedim(-1, 0)


@forms("ragged_attention")
def test_chunks_of_room_that_is_not_filled_yet_give_nothing(op):
    given = given_of(PLAIN)
    lengths, table = given.arguments[8][None], given.arguments[7][None]
    given.arguments[9:13] = [part[0] for part in work_list(lengths.numpy() + 20, table.numpy(), PLAIN.block, CHUNK)]
    check(op, PLAIN, given)


@forms("ragged_attention")
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("factor", [0.0, 1e-3, 10.0, 300.0])
def test_logits_may_be_equal_small_or_large(factor, softcap, op):
    case = PLAIN._replace(softcap=softcap, with_sinks=True)
    given = given_of(case)
    given.arguments[0] = given.arguments[0] * factor
    check(op, case, given)


@forms("ragged_attention")
def test_the_lowest_number_added_to_all_logits_hides_none(op):
    case = PLAIN._replace(mask="additive")
    given = given_of(case)
    given.arguments[3] = torch.full_like(given.arguments[3], torch.finfo(torch.float32).min)
    check(op, case, given)


def test_the_kernel_says_what_it_does_not_take():
    refusal = OPS["ragged_attention"].refusal
    case = PLAIN._replace(new=3)
    assert refusal(*given_of(case).arguments) == "3 queries of each head are not one"
    double = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given_of(PLAIN).arguments]
    assert refusal(*double) == "torch.float64 is not one of float32, bfloat16 and float16"


@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 4, 64]),
    st.sampled_from([1, 4]),
)
@many
def test_a_work_list_covers_every_slot_once_and_in_order(seed, layers, rows, heads, blocks, block):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 200, (layers, rows, heads), generator=generator)
    lengths = lengths * torch.randint(0, 2, lengths.shape, generator=generator)
    table = torch.randint(1, 1000, (layers, rows, heads, -(-200 // block)), generator=generator).int()
    table = table.where(torch.arange(table.shape[3]) < -(lengths // -block)[..., None], 0)
    chunk = block * blocks
    work = work_list(lengths.numpy(), table.numpy(), block, chunk)
    assert {part.dtype for part in work} == {torch.int32}
    assert min(work.owner.shape[1], work.merge.shape[3]) >= 2
    for layer in range(layers):
        listed = []
        for extent in range(rows * heads):
            mine = [place for place in work.merge[layer].view(rows * heads, -1)[extent].tolist() if place >= 0]
            needed = -(int(lengths[layer].flatten()[extent]) // -block)
            assert work.first[layer, mine].tolist() == list(range(0, int(lengths[layer].flatten()[extent]), chunk))
            assert (work.owner[layer, mine] == extent).all()
            named = work.blocks[layer, mine].flatten()
            assert torch.equal(named[:needed], table[layer].flatten(0, 1)[extent, :needed])
            assert not named[needed:].any()
            listed += mine
        assert sorted(listed) == list(range(len(listed)))
        assert (work.first[layer, len(listed) :] == NOWHERE).all()


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("new", [1, 3])
def test_one_graph_serves_extents_of_all_lengths(new):
    torch._dynamo.reset()
    attention = OPS["ragged_attention"].reference
    compiled = torch.compile(lambda *arguments: attention(*arguments), fullgraph=True)
    moving = {3: [3], 4: [0], 5: [0], 6: [0], 7: [2], 9: [0], 10: [0], 11: [0], 12: [2]}
    for seed, lengths in enumerate(([[0, 0], [0, 0]], [[300, 17], [64, 3]], [[1, 400], [399, 8]], [[40, 50], [0, 60]])):
        case = PLAIN._replace(text=400 + seed, seed=6 * seed + 1, new=new, mask="bool")
        given = given_of(case, torch.tensor(lengths))
        for index, axes in moving.items():
            torch._dynamo.mark_dynamic(given.arguments[index], axes)
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            actual = compiled(*given.arguments)
        assert_within_rounding(actual, slow(given, torch.float32), slow(given, torch.float64))
