"""Budgets that heads or layers compete for, against a slow definition: sort every pair, take the best."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from examples import examples
from forms import forms, forms_of
from kvfx.algebra import Splice
from kvfx.kernels import OPS
from kvfx.policy import Policy
from presets_by_definition import HEADS, among_heads, heads_press
from test_equivalence import decoder, padded
from yardstick import assert_within_rounding

allocate, select, select_heads = (OPS[name].overload for name in ("allocate", "select", "select_heads"))
many = settings(deadline=None, max_examples=examples(60))


def slow_numbers(scores, n, floor, least, most=0):
    """What one row's units win: `scores` is a list of lists, each without padding."""
    n = min(n, most) if most else n
    sure = min(n, max(floor.numerator * n // floor.denominator, least))
    ranked = [sorted(range(len(unit)), key=lambda t, unit=unit: (-unit[t], t)) for unit in scores]
    order = []
    for u, unit in enumerate(ranked):
        for rank, t in enumerate(unit):
            if not most or rank < most:
                order.append((0 if rank < sure else 1, -scores[u][t] if rank >= sure else 0, t, u))
    won = sorted(order)[: n * len(scores)]
    return [sum(u == unit for *_, unit in won) for u in range(len(scores))]


def slow_choice(first, then, count, share, sure):
    """What one head keeps of its tokens, none of them padding; it is sure of some of its best by the first score."""
    by = lambda unit: sorted(range(len(unit)), key=lambda t: (-unit[t], t))  # noqa: E731
    if then is None:
        return sorted(by(first)[:count])
    asked = min(count, max(share.numerator * count // share.denominator, min(share.numerator, 1)))
    taken = set(by(first)[: max(asked, sure)])
    return sorted(by([torch.inf if t in taken else score for t, score in enumerate(then)])[:count])


@st.composite
def rows(draw, turns=1):
    """Scores of a few rows with ties, padding and protected tokens, and what each row keeps in the mean."""
    batch, units, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    scores = [torch.randint(-levels, levels, (batch, units, tokens), generator=generator).float() for _ in range(turns)]
    padded = draw(st.booleans())
    valid = torch.rand(batch, tokens, generator=generator) < 0.6 if padded else torch.ones(batch, tokens, dtype=torch.bool)
    safe = valid & (torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from([0.0, 0.2])))
    for score in scores:
        score.masked_fill_(safe[:, None], torch.inf).masked_fill_(~valid[:, None], -torch.inf)
    given_counts = padded or draw(st.booleans())
    if given_counts:
        counts = [draw(st.integers(int(some), int(real))) for some, real in zip(safe.sum(1), valid.sum(1), strict=True)]
        count = draw(st.integers(max(1, *counts), tokens))
    else:
        counts, count = None, draw(st.integers(max(1, int(safe.sum(1).max())), tokens))
    return scores, valid, count, counts


FLOORS = st.sampled_from([Fraction(0), Fraction(1, 5), Fraction(1, 2), Fraction(1)])


def asked(counts):
    return None if counts is None else torch.tensor(counts)


@given(rows(), FLOORS, st.integers(0, 3), st.integers(0, 16))
@many
def test_units_win_what_a_sort_of_all_their_scores_says(case, floor, least, most):
    (scores,), valid, count, counts = case
    most = most and max(most, count)
    won = allocate(scores, count, asked(counts), floor.numerator, floor.denominator, least, most)
    for row, numbers in enumerate(won.tolist()):
        n = count if counts is None else counts[row]
        units = [unit[valid[row]].tolist() for unit in scores[row]]
        assert numbers == slow_numbers(units, n, floor, least, most)
        assert sum(numbers) == n * len(units)


@given(rows(), st.integers(1, 5))
@many
def test_no_unit_wins_more_than_the_most_that_it_may(case, most):
    (scores,), valid, count, counts = case
    scores = scores.clamp(max=torch.finfo(torch.float32).max)  # nothing protected, which would be more
    won = allocate(scores, count, asked(counts), 0, 1, 0, most)
    for row, numbers in enumerate(won.tolist()):
        n = min(most, count if counts is None else counts[row])
        assert numbers == slow_numbers([unit[valid[row]].tolist() for unit in scores[row]], n, Fraction(0), 0, most)
        assert max(numbers) <= most


TURNS = st.sampled_from([None, Fraction(0), Fraction(1, 3), Fraction(1, 2), Fraction(1)])


@given(rows(turns=2), FLOORS, st.integers(0, 3), TURNS)
@many
def test_heads_keep_the_best_of_the_layer_each_by_its_own_number(case, floor, least, share):
    assert_heads_keep_the_best(select_heads, case, floor, least, share)


@given(rows(turns=2), FLOORS, st.integers(0, 3), TURNS)
@settings(deadline=None, max_examples=examples(12))  # up to twenty launches each
def test_so_they_do_by_the_kernel(case, floor, least, share):
    (kernel,) = (form for form in forms_of("select_heads") if form.kernel)
    assert_heads_keep_the_best(kernel, case, floor, least, share)


def assert_heads_keep_the_best(op, case, floor, least, share):
    (first, then), valid, count, counts = case
    share, then = (share, then) if share is not None else (Fraction(0), None)
    slots, lengths = op(
        first, then, count, asked(counts), floor.numerator, floor.denominator, least, share.numerator, share.denominator
    )
    batch, heads, tokens = first.shape
    assert slots.shape == (batch, heads * count)
    assert torch.equal(lengths, allocate(first, count, asked(counts), floor.numerator, floor.denominator, least, 0))
    for row in range(batch):
        real = valid[row].nonzero()[:, 0].tolist()
        expected = []
        for head, number in enumerate(lengths[row].tolist()):
            n = count if counts is None else counts[row]
            sure = min(n, max(floor.numerator * n // floor.denominator, least))
            one, two = (None if x is None else x[row, head][valid[row]].tolist() for x in (first, then))
            expected += [head * tokens + real[t] for t in slow_choice(one, two, number, share, sure)]
        assert slots[row].tolist() == expected + [-1] * (heads * count - len(expected))


@given(rows(turns=2), FLOORS, st.booleans())
@many
def test_a_row_chooses_as_it_chooses_alone(case, floor, spliced):
    (first, then), _, count, counts = case
    more = (floor.numerator, floor.denominator, 1, 1, 2)
    slots, lengths = select_heads(first, then if spliced else None, count, asked(counts), *more)
    for row in range(len(first)):
        n = count if counts is None else counts[row]
        if n:
            rest = first[row : row + 1], then[row : row + 1] if spliced else None
            alone = select_heads(*rest, n, None, *more)
            held = slots[row][slots[row] >= 0]
            assert torch.equal(held, alone[0][0])
            assert torch.equal(lengths[row], alone[1][0])


@forms("select_heads")
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_heads_of_a_long_row_keep_the_best_of_the_layer(op, levels):
    """Of equal scores the earlier token's wins, then the lower head's."""
    first = torch.randint(levels, (1, 3, 3000), generator=torch.Generator().manual_seed(levels)).float()
    slots, lengths = op(first, None, 1100, None, 0, 1, 0, 0, 1)
    by_token = first.transpose(1, 2).flatten().sort(descending=True, stable=True).indices[:3300]
    expected = (by_token % 3 * 3000 + by_token // 3).sort().values
    assert torch.equal(slots[0], expected)
    assert lengths[0].tolist() == [int((expected // 3000 == head).sum()) for head in range(3)]


def test_heads_in_another_order_keep_the_same_tokens():
    first = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 3, 1])
    slots, lengths = select_heads(first, None, 9, None, 1, 5, 0, 0, 1)
    moved, other = select_heads(first[:, order], None, 9, None, 1, 5, 0, 0, 1)
    assert torch.equal(lengths[:, order], other)
    back = order[moved // 30] * 30 + moved % 30
    assert torch.equal(back.sort(-1).values, slots)


def test_a_floor_of_everything_is_a_budget_for_each_head():
    first = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(2))
    slots, lengths = select_heads(first, None, 7, None, 1, 1, 0, 0, 1)
    assert torch.equal(lengths, torch.full((2, 3), 7))
    assert torch.equal(slots.unflatten(1, (3, 7)) - torch.arange(3)[:, None] * 20, select(first, 7, None))


@pytest.mark.parametrize("least", [0, 1, 4])
def test_a_head_of_low_scores_keeps_its_floor_and_without_one_nothing(least):
    first = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(3))
    first[:, 1] -= 100
    assert select_heads(first, None, 10, None, 0, 1, least, 0, 1)[1].tolist() == [[20 - least, least]]


def test_a_large_count_has_its_floor_without_rounding():
    first = torch.zeros(1, 2, 1000)
    first[:, 1] = -1
    floor = Fraction(300_000_007, 10**9)
    (numbers,) = allocate(first, 1000, torch.tensor([999]), floor.numerator, floor.denominator, 0, 0).tolist()
    assert numbers == [1000, 998]
    (numbers,) = allocate(first, 1000, torch.tensor([400]), floor.numerator, floor.denominator, 0, 0).tolist()
    assert numbers == [680, 120]


@pytest.mark.parametrize("spliced", [False, True], ids=["one score", "splice"])
@pytest.mark.parametrize("keep", [0.02, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("length", [5, 65, 200])
def test_a_safeguard_of_one_token_at_least_is_what_kvpress_keeps(keep, length, spliced):
    for seed in range(5):
        first, then = torch.rand(2, 4, length, generator=torch.Generator().manual_seed(seed)).float()
        first[0] += 0.5  # so that the safeguard matters to the others
        count = max(1, int(length * keep))
        slots, lengths = select_heads(first[None], then[None] if spliced else None, count, None, 1, 5, 1, 1, 2)
        expected = heads_press(first.double(), then.double() if spliced else None, keep)
        assert slots[0].tolist() == [head * length + t for head, kept in enumerate(expected) for t in kept]
        assert lengths[0].tolist() == [len(kept) for kept in expected]


@pytest.mark.parametrize("preset", HEADS)
@pytest.mark.parametrize(("length", "keep"), [(60, "0.5"), (90, "0.25"), (33, "0.8"), (7, "0.5")])
def test_presets_whose_heads_compete_choose_as_they_are_defined_to(preset, length, keep):
    taps = reference.capture(decoder("qwen3", 3, 2, 16, 3), padded([length], 3)[0])[0]
    row, policy = HEADS[preset], Policy.parse(f"{preset}:{keep}")
    budget, splice = policy.budget, policy.score if isinstance(policy.score, Splice) else None
    assert (policy.protect.sinks, policy.protect.recent) == (row.sinks, row.recent)
    assert (budget.pool, budget.floor, splice.share if splice else Fraction(0)) == ("heads", row.floor, row.share)
    count = reference.count_kept(length, keep, row.sinks + row.recent)
    assert policy.counts(length, 2) == [count] * 2
    for layer in taps:
        # Rounded first: what is judged here is the choice, whatever is a tie in float32.
        scores = [reference.protected(of(layer), row.sinks, row.recent).float() for of in (row.first, row.then) if of]
        first, then = (*scores, None)[:2]
        floor = budget.floor.as_integer_ratio()
        slots, _ = select_heads(
            first[None], then if then is None else then[None], count, None, *floor, budget.least, *row.share.as_integer_ratio()
        )
        exact = among_heads(first.double(), then if then is None else then.double(), count, row.floor, row.share)
        assert slots[0].tolist() == [head * length + t for head, kept in enumerate(exact) for t in kept]


@given(rows())
@many
def test_the_curve_of_a_layer_is_the_mean_of_its_heads_ranks(case):
    (scores,), *_ = case
    curve = OPS["rank_curve"].overload(scores)
    ranked = [[sorted(head, reverse=True) for head in row] for row in scores.tolist()]
    exact = torch.tensor([[sum(ranks) / len(ranks) for ranks in zip(*row, strict=True)] for row in ranked], dtype=torch.float64)
    assert_within_rounding(curve, exact.float(), exact)
    assert bool((curve[:, 1:] <= curve[:, :-1]).all())
