"""Scores that read attention, keys and places: each against a slow definition and what its formula implies."""

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forms import Form, forms, forms_of
from kvfx.kernels import OPS, Dims
from test_kernels import CHUNK, LENGTHS, Case, cases, many, rows_alone
from yardstick import assert_within_rounding

kvfx = torch.ops.kvfx


class Columns(NamedTuple):
    """How attention is reduced to one score per key."""

    buffer: int
    scale: float | None
    reduce: str
    heads: str
    pool: int
    pool_kind: str


def columns(reduce: tuple[str, ...]):
    return st.builds(
        Columns,
        st.sampled_from([0, 0, 1, 3, 10]),
        st.sampled_from([None, 0.35]),
        st.sampled_from(reduce),
        st.sampled_from(["mean", "max", "sum", "layer"]),
        st.sampled_from([1, 3, 7]),
        st.sampled_from(["avg", "max"]),
    )


def slow_columns(query, key, value, valid, window: int | None, how: Columns, dtype) -> Tensor:
    """Attention received from the last `window` queries, from all if None."""

    def row(q, k, v=None):
        heads, n = k.shape[:2]
        group = q.shape[0] // heads
        scale = how.scale or q.shape[-1] ** -0.5
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        received = torch.zeros(heads, group, n, dtype=dtype)
        for h, g in itertools.product(range(heads), range(group)):
            logits = scale * q[h * group + g] @ k[h].T
            counts = torch.ones(n, n, dtype=dtype).tril(-how.buffer)[-min(window or n, n) :]
            weights = torch.softmax(logits.masked_fill(future, -torch.inf), -1)[-min(window or n, n) :] * counts
            received[h, g] = {
                "mean": weights.mean(0),
                "sum": weights.sum(0),
                "max": weights.amax(0),
                "squares": (weights * weights).sum(0),
                "count": weights.sum(0) / counts.sum(0).clamp(min=1),
            }[how.reduce]
        norm = torch.ones(heads, n, dtype=dtype) if v is None else (v * v).sum(-1).sqrt()
        if how.heads == "sum":
            return pooled(received * norm[:, None]).sum(1)
        score = received.amax(1) if how.heads == "max" else received.mean(1)
        if how.heads == "layer":
            score = score.mean(0).repeat(heads, 1)
        return pooled(score * norm)

    def pooled(score):
        half = how.pool // 2
        around = [score[..., max(0, j - half) : j + half + 1] for j in range(score.shape[-1])]
        return torch.stack([x.mean(-1) if how.pool_kind == "avg" else x.amax(-1) for x in around], -1)

    return rows_alone(row, [query, key] if value is None else [query, key, value], valid, dtype)


@forms("window_attention")
@given(cases(), st.booleans(), st.sampled_from([1, 3, CHUNK]), columns(("mean", "sum", "max", "count", "squares")))
@many
def test_window_attention_matches_its_definition_row_by_row(op, case, weighted, window, how):
    B, H, G, S, D = case.dims
    query, key, value = case.draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D + 1))
    arguments = (query, key, value if weighted else None, case.valid(), window)
    exact, low = (slow_columns(*arguments, how, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments, *how), low, exact)


@forms("column_attention")
@given(cases(), st.booleans(), columns(("sum", "count", "squares")))
@many
def test_column_attention_matches_its_definition_row_by_row(op, case, weighted, how):
    B, H, G, S, D = case.dims
    query, key, value = case.draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D + 1))
    arguments = (query, key, value if weighted else None, case.valid())
    exact, low = (slow_columns(*arguments, None, how, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments, None, *how), low, exact)
    if case.valid() is None and case.dtype == torch.float32:  # in lower precision attention's own is good to 1e-4
        lse = kvfx.attention_lse(query.contiguous(), key.contiguous(), key.contiguous(), how.scale)[1]
        assert_within_rounding(op(*arguments, lse, *how), low, exact)


# Both operators in the same form, and what they take between `valid` and `scale`: a window or a log-sum-exp, and a buffer.
BOTH = list(zip(forms_of("window_attention"), forms_of("column_attention"), strict=True))
BEFORE_SCALE = {"window_attention": (8, 0), "column_attention": (None, 0)}


@given(cases())
@many
def test_attention_with_its_log_sum_exp_is_the_attention_bit_for_bit(case):
    B, H, G, S, D = case.dims
    whole = case._replace(padding="none", dtype=torch.float32)
    query, key, value = (x.contiguous() for x in whole.draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D)))
    out, lse = kvfx.attention_lse(query, key, value, 0.3)
    assert torch.equal(out, kvfx.attention(query, key, value, None, 0.0, True, 0.3))

    def of(dtype):
        logits = 0.3 * query.to(dtype) @ key.to(dtype).repeat_interleave(G, 1).transpose(-2, -1)
        return logits.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)

    assert_within_rounding(lse, of(torch.float32), of(torch.float64))


@pytest.mark.sample(2)
@forms("column_attention")
@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("reduce", ["sum", "squares"])
def test_column_attention_stays_exact_over_thousands_of_tokens(op, reduce, size):
    tokens = 900 if op.kernel else 2500  # the interpreter takes its time
    query, key = Case(Dims(), torch.float32, "none", False, 0).draw((1, 2, tokens, 64), (1, 1, tokens, 64))
    how = Columns(0, None, reduce, "mean", 1, "avg")
    exact, low = (slow_columns(size * query, size * key, None, None, None, how, d) for d in (torch.float64, torch.float32))
    assert_within_rounding(op(size * query, size * key, None, None, None, *how), low, exact)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("window_attention", "column_attention"), BOTH)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_queries_give_away_one_each_and_a_window_of_all_is_the_column(tokens, window_attention, column_attention):
    query, key, *_ = OPS["column_attention"].inputs(Dims(S=tokens), torch.float32, "cpu", tokens)
    how = Columns(0, None, "sum", "mean", 1, "avg")
    column = column_attention(query, key, None, None, None, *how)
    window = window_attention(query, key, None, None, 64, *how)
    assert (column >= 0).all()
    torch.testing.assert_close(column.sum(-1), torch.full((2, 2), float(tokens)))
    torch.testing.assert_close(column, window)
    few = window_attention(query, key, None, None, 3, *how)
    torch.testing.assert_close(few.sum(-1), torch.full((2, 2), float(min(3, tokens))))


@forms("window_attention", "column_attention")
def test_over_all_heads_of_a_layer_every_kv_head_scores_alike(op):
    query, key, *_ = OPS["window_attention"].inputs(Dims(G=3), torch.float32, "cpu", 0)
    score = op(query, key, None, None, *BEFORE_SCALE[op.name], None, "sum", "layer", 1, "avg")
    assert torch.equal(score[:, 0], score[:, 1])


@forms("window_attention", "column_attention")
def test_attention_ignores_a_shift_of_all_keys(op):
    """A vector added to every key adds one number to all logits of a query."""
    query, key, *_ = OPS["window_attention"].inputs(Dims(), torch.float32, "cpu", 0)
    for reduce in ("sum", "count", "squares"):
        how = (None, reduce, "mean", 3, "max")
        before, after = (op(query, k, None, None, *BEFORE_SCALE[op.name], *how) for k in (key, key + 1.5))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


@forms("window_attention", "column_attention")
@pytest.mark.parametrize(("option", "value"), [("reduce", "median"), ("heads", "all"), ("pool_kind", "min")])
def test_unknown_reductions_are_refused(op, option, value):
    names = [argument.name for argument in OPS[op.name].overload._schema.arguments]
    arguments = list(OPS[op.name].inputs(Dims(), torch.float32, "cpu", 0))
    arguments[names.index(option)] = value
    with pytest.raises(ValueError, match=f"{option}='{value}': expected"):
        op(*arguments)


# The metric of KV-Compress, arXiv:2410.00161.


def kv_compress(query, key, window: int, reduce: str, heads: str, buffer: int, dtype) -> Tensor:
    """Of one row without padding, [Hq, n, D] and [Hkv, n, D]: its formula with pools of 7, a number at a time."""
    query, key = query.to(dtype), key.to(dtype)
    group, n = query.shape[0] // key.shape[0], key.shape[1]
    received = torch.zeros(query.shape[0], n, dtype=dtype)
    for head in range(query.shape[0]):
        for i in range(max(0, n - window), n):
            exponentials = (key[head // group, : i + 1] @ query[head, i] / query.shape[-1] ** 0.5).exp()
            for j in range(i + 1):
                if i >= j + buffer:
                    paid = exponentials[j] / exponentials.sum()
                    received[head, j] += paid**2 if reduce == "squares" else paid
    score = torch.zeros(key.shape[0], n, dtype=dtype)
    for head in range(key.shape[0]):
        mine = received[head * group : (head + 1) * group]
        for j in range(n):
            near = slice(max(0, j - 3), j + 4)
            if heads == "sum":
                score[head, j] = sum(one[near].max() for one in mine)
            else:
                score[head, j] = (mine.sum(0) / group)[near].max()
    return score


@pytest.mark.sample(6)
@pytest.mark.parametrize("buffer", [0, 3, 10])
@pytest.mark.parametrize("heads", ["sum", "mean"])
@pytest.mark.parametrize("reduce", ["squares", "sum"])
@forms("window_attention", "column_attention")
def test_the_metric_of_kv_compress_is_its_formula_in_every_row(op, reduce, heads, buffer):
    """Rows of one token, shorter than the window, as long, and longer; padding anywhere; two heads in a group."""
    valid = torch.zeros(4, 21, dtype=torch.bool)
    valid[0, 13] = valid[1, 4:9] = valid[2, ::3] = valid[3] = True
    valid[2, 20] = True
    case = Case(Dims(4, 2, 2, 21, 8), torch.bfloat16, "none", True, buffer)
    query, key = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in case.draw((4, 4, 21, 8), (4, 2, 21, 8)))
    window = 8 if op.name == "window_attention" else None
    low, exact = torch.zeros(4, 2, 21), torch.zeros(4, 2, 21, dtype=torch.float64)
    for row, real in enumerate(valid):
        for answer in (low, exact):
            answer[row][:, real] = kv_compress(
                query[row][:, real], key[row][:, real], window or 21, reduce, heads, buffer, answer.dtype
            )
    assert_within_rounding(op(query, key, None, valid, window, buffer, None, reduce, heads, 7, "max"), low, exact)


@forms("window_attention", "column_attention")
def test_neighbours_are_pooled_in_each_query_head_before_these_are_summed(op):
    """One head looks at token 10 and the other at token 12: between them both count."""
    key = torch.zeros(1, 1, 30, 16)
    key[0, 0, 10, 0] = key[0, 0, 12, 1] = 100
    query = torch.zeros(1, 2, 30, 16)
    query[0, 0, 20:, 0] = query[0, 1, 20:, 1] = 100
    before = (8 if op.name == "window_attention" else None, 3)  # the last 8 queries, and those from 13 and 15 on
    score = op(query, key, None, None, *before, None, "sum", "sum", 7, "max")[0, 0]
    one = op(query, key, None, None, *before, None, "sum", "sum", 1, "max")[0, 0]
    torch.testing.assert_close(score[9:14], (one[10] + one[12]).expand(5), rtol=0.3, atol=0)
    assert (score[9:14] > 1.3 * one.max()).all()
    assert (score[16:] < 0.1 * one.max()).all()


@forms("window_attention", "column_attention")
def test_a_buffer_beyond_the_row_leaves_no_query_that_counts(op):
    query, key, value, *_ = OPS["window_attention"].inputs(Dims(), torch.float32, "cpu", 0)
    for buffer in (37, 1000, 2**62):
        for reduce in ("sum", "count", "squares"):
            score = op(query, key, value, None, BEFORE_SCALE[op.name][0], buffer, None, reduce, "sum", 3, "avg")
            assert torch.equal(score, torch.zeros(2, 2, 37))


@forms("window_attention", "column_attention")
def test_a_negative_buffer_is_refused(op):
    query, key, *_ = OPS["window_attention"].inputs(Dims(), torch.float32, "cpu", 0)
    with pytest.raises(ValueError, match="buffer=-1: expected 0, or"):
        op(query, key, None, None, BEFORE_SCALE[op.name][0], -1, None, "sum", "sum", 3, "avg")


# What kernels that take tiles of tokens could get wrong.


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("tokens", "window", "width", "dtype", "padding", "buffer"),
    [
        # A tile of keys and one token; the window ends in the second; no query counts for one more tile than sees it.
        (257, 64, 80, torch.bfloat16, "none", 64),
        (320, 65, 96, torch.float16, "left", 1),  # whole tiles; the window is a tile of queries and one
        (255, 300, 256, torch.bfloat16, "interior", 10),  # a window longer than the row, in tiles of the widest heads
        (129, 128, 80, torch.float32, "right", 200),  # channels in two parts and a half; no query counts at all
        (513, 1, 32, torch.float32, "interior", 65),  # the last piece is one token, and one query asks
    ],
)
@forms("window_attention", "column_attention")
def test_tiles_end_where_they_should(op, tokens, window, width, dtype, padding, buffer):
    case = Case(Dims(2, 1, 3, tokens, width), dtype, padding, True, tokens)
    query, key = case.draw((2, 3, tokens, width), (2, 1, tokens, width))
    is_window = op.name == "window_attention"
    for reduce, heads, first in ("max", "mean", buffer), ("squares", "max", 0), ("sum", "sum", buffer):
        if reduce == "max" and not is_window:
            continue
        how = Columns(first, None, reduce, heads, 1, "avg")
        exact, low = (
            slow_columns(query, key, None, case.valid(), window if is_window else None, how, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_rounding(op(query, key, None, case.valid(), window if is_window else None, *how), low, exact)


@forms("window_attention", "column_attention")
def test_rows_without_a_real_token_score_nothing_beside_rows_of_one(op):
    valid = torch.zeros(3, 70, dtype=torch.bool)
    valid[1, 66] = True
    query, key = Case(Dims(B=3, S=70), torch.float32, "none", False, 0).draw((3, 4, 70, 16), (3, 2, 70, 16))
    query, key = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (query, key))
    score = op(query, key, None, valid, *BEFORE_SCALE[op.name], None, "sum", "mean", 1, "avg")
    assert torch.equal(score, valid[:, None].expand(-1, 2, -1).float())


@forms("window_attention", "column_attention")
def test_equal_keys_share_what_each_query_gives_and_one_that_stands_out_takes_it_all(op):
    tokens = 300
    query, key = torch.ones(1, 2, tokens, 16), torch.ones(1, 1, tokens, 16)
    how = (None, "sum", "mean", 1, "avg")
    asking = torch.arange(tokens - 8 if op.name == "window_attention" else 0, tokens)
    shares = torch.where(asking[:, None] >= torch.arange(tokens), 1 / (asking[:, None] + 1.0), 0).sum(0)
    torch.testing.assert_close(op(query, key, None, None, *BEFORE_SCALE[op.name], *how)[0, 0], shares)
    key[:, :, 100] = 300
    score = op(query, key, None, None, *BEFORE_SCALE[op.name], *how)[0, 0]
    rounding = 1200 * torch.finfo(torch.float32).eps  # of its logit, which is that of the weight
    torch.testing.assert_close(score[100], (asking >= 100).sum().float(), rtol=rounding, atol=0)
    assert (score[101:] == 0).all()


@forms("column_attention")
def test_a_given_log_sum_exp_is_what_queries_pay_by(op):
    """Shifting it scales what a key receives; and it may have any strides."""
    query, key, *_ = OPS["column_attention"].inputs(Dims(S=70), torch.float32, "cpu", 0)
    lse = kvfx.attention_lse(query, key, key, None)[1].contiguous()
    shifted = torch.stack([lse + 1, lse], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]
    for reduce, factor in (("sum", 1), ("squares", 2)):
        how = (0, None, reduce, "mean", 1, "avg")
        expected = op(query, key, None, None, lse, *how) * math.exp(-factor)
        torch.testing.assert_close(op(query, key, None, None, shifted, *how), expected)


@pytest.mark.parametrize("name", ["window_attention", "column_attention"])
def test_kernels_of_columns_say_what_they_do_not_take(name):
    query, key, *rest = OPS[name].inputs(Dims(), torch.float32, "cpu", 0)
    negative = [*rest[:4], -0.5, *rest[5:]]
    assert OPS[name].refusal(query, key, *negative) == "the scale -0.5 is not positive"
    assert OPS[name].refusal(query.half(), key, *rest) == "queries are torch.float16 and keys torch.float32"
    assert OPS[name].refusal(query.double(), key.double(), *rest) == "torch.float64 is not one of float32, bfloat16 and float16"


# Keys alone.


def slow_cosines(key, valid, dtype, *, others: bool) -> Tensor:
    """Minus the cosine to the mean unit key, or minus the mean cosine to the other keys."""

    def head(k):
        units = [x / x.norm() if x.norm() else x for x in k]
        if others:
            pairs = [[a @ b for j, b in enumerate(units) if i != j] for i, a in enumerate(units)]
            return torch.stack([-sum(p) / len(p) if p else torch.zeros((), dtype=dtype) for p in pairs])
        mean = sum(units) / len(units)
        return torch.stack([-(x @ mean) / mean.norm() for x in units])

    return rows_alone(lambda k: torch.stack([head(x) for x in k]), [key], valid, dtype)


@forms("key_diff", "redundancy")
@given(cases(lengths=(1, 2, 9, 19)))
@many
def test_key_diff_and_redundancy_match_their_definitions(op, case):
    B, H, _, S, D = case.dims
    (key,) = case.draw((B, H, S, D))
    others = op.name == "redundancy"
    exact, low = (slow_cosines(key, case.valid(), dtype, others=others) for dtype in (torch.float64, torch.float32))
    actual = op(key, case.valid())
    assert (actual.abs() <= 1 + 1e-5).all()
    # Rounding is that of the terms, which are as large as 1 where their sum is small.
    assert_within_rounding(*(x.double() + 2 for x in (actual, low, exact)))


@pytest.mark.sample(2)
@forms("key_diff", "redundancy")
@pytest.mark.parametrize(("dtype", "padding"), [(torch.float32, "none"), (torch.bfloat16, "interior")], ids=str)
def test_directions_are_added_up_over_tiles_and_pieces_of_a_row(dtype, padding, op):
    case = Case(Dims(2, 1, 1, 300, 256), dtype, padding, False, 3)  # of 32 and 256 tokens
    (key,) = case.draw((2, 1, 300, 256))
    exact, low = (slow_cosines(key, case.valid(), kind, others=op.name == "redundancy") for kind in (torch.float64, torch.float32))
    assert_within_rounding(op(key, case.valid()), low, exact)


@pytest.mark.parametrize("kernel", [False, True])
def test_only_directions_count_and_equal_directions_are_all_alike(kernel):
    key = torch.randn(2, 3, 30, 8, generator=torch.Generator().manual_seed(0))
    lengths = 2.0 ** torch.randint(-9, 9, (2, 3, 30, 1))
    key_diff, redundancy = Form("key_diff", kernel), Form("redundancy", kernel)
    for op in (key_diff, redundancy):
        torch.testing.assert_close(op(key * lengths, None), op(key, None))
        torch.testing.assert_close(op(key[:, :, :1] * lengths, None), torch.full((2, 3, 30), -1.0))
        assert (op(torch.zeros(1, 1, 5, 4), None) == 0).all()
    lone = torch.arange(30) == 7
    assert (redundancy(key, lone.repeat(2, 1)) == 0).all()
    odd = key[:, :, :1].repeat(1, 1, 30, 1)
    odd[:, :, 11] = -odd[:, :, 11]
    assert (key_diff(odd, None).argmax(-1) == 11).all()
    assert (redundancy(odd, None).argmax(-1) == 11).all()


@given(cases())
@many
def test_position_counts_the_real_tokens(case):
    B, H, _, S, D = case.dims
    (key,) = case.draw((B, H, S, D))
    rank = rows_alone(lambda k: torch.arange(0.0, k.shape[1]).expand(k.shape[:2]), [key], case.valid(), torch.float32)
    assert torch.equal(kvfx.position(key, case.valid(), 0), rank)


@given(cases(), st.integers(1, 6))
@many
def test_sinks_come_before_all_others_the_first_first(case, sinks):
    B, H, _, S, D = case.dims
    (key,) = case.draw((B, H, S, D))
    score, valid = kvfx.position(key, case.valid(), sinks), case.valid()
    for b in range(B):
        row = score[b, 0] if valid is None else score[b, 0][valid[b]]
        n = len(row)
        order = row.argsort(descending=True).tolist()
        assert order == list(range(min(sinks, n))) + list(range(n - 1, sinks - 1, -1))


# Blocks.


def slow_lag(key, value, lag, sinks):
    """Of one row without padding, [H, n, D]: where blocks have a next one, what they are ranked by; else None."""
    n = key.shape[1]
    count = max(0, (n - sinks) // lag)
    blocks = []
    for b in range(count - 1):
        part = slice(sinks + b * lag, sinks + (b + 1) * lag)
        after = slice(part.stop, part.stop + lag)
        both = []
        for x in (key.double(), value.double()):
            low, high = x[:, after].amin(1, keepdim=True), x[:, after].amax(1, keepdim=True)
            both.append(torch.softmax(((x[:, part] - low) / (high - low)).std(-1), -1))
        blocks.append((part, (both[0] + both[1]) / 2))
    return blocks


@given(cases(lengths=(1, 5, 11, 16, 20, 45)), st.sampled_from([3, CHUNK]), st.sampled_from([0, 2, 4]))
@many
def test_lag_ranks_each_block_by_its_definition(case, lag, sinks):
    B, H, _, S, D = case.dims
    key, value = case.draw((B, H, S, D), (B, H, S, D + 1))
    valid = case.valid()
    score = kvfx.lag(key, value, valid, lag, sinks)
    if valid is not None:
        assert (score.masked_select(~valid[:, None]) == 0).all()
    for b in range(B):
        real = torch.arange(S) if valid is None else valid[b].nonzero()[:, 0]
        row, n = score[b][:, real], len(real)
        assert (row[:, :sinks] == 2).all()
        blocks = slow_lag(key[b][:, real], value[b][:, real], lag, sinks)
        for part, expected in blocks:
            ranks = (row[:, part] * lag).round().long()
            assert torch.equal(ranks.sort(-1).values, torch.arange(lag).expand(H, -1))
            ordered = expected.gather(-1, ranks.argsort(-1))
            assert (ordered.diff(dim=-1) >= -1e-5 * ordered[:, 1:]).all()  # rounding may swap what is almost equal
        rest = row[:, max([sinks] + [part.stop for part, _ in blocks]) :]
        assert ((rest >= 1) & (rest < 2)).all()
        assert (rest.diff(dim=-1) > 0).all()
        if n > sinks:
            assert rest[0, -1] == row[:, sinks:].max()


def test_lag_ignores_the_scale_and_shift_of_channels():
    key, value = torch.randint(-64, 64, (2, 2, 2, 45, 6), generator=torch.Generator().manual_seed(0)).float()
    scale = 2.0 ** torch.arange(-3, 3)
    changed = kvfx.lag(key * scale + 32, value * scale - 8, None, CHUNK, 4)
    assert torch.equal(changed, kvfx.lag(key, value, None, CHUNK, 4))


def test_equal_tokens_of_a_block_rank_by_age():
    score = kvfx.lag(torch.zeros(1, 1, 20, 4), torch.zeros(1, 1, 20, 4), None, 4, 2)
    assert (score[0, 0, 2:14].reshape(3, 4) * 4).tolist() == [[3, 2, 1, 0]] * 3


@given(cases(), st.sampled_from([2, 3, CHUNK]), st.integers(0, 10), st.integers(0, 10))
@many
def test_chunk_mean_matches_its_definition_row_by_row(case, chunk, sinks, recent):
    B, H, _, S, _ = case.dims
    (scores,) = case.draw((B, H, S))

    def row(x):
        n, answer = x.shape[1], torch.zeros_like(x)
        for start in range(0, n, chunk):
            inside = [i for i in range(start, min(n, start + chunk)) if sinks <= i < n - recent]
            if inside:
                answer[:, start : start + chunk] = x[:, inside].mean(-1, keepdim=True)
        return answer

    exact, low = (rows_alone(row, [scores], case.valid(), dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(kvfx.chunk_mean(scores, case.valid(), chunk, sinks, recent), low, exact)


@given(cases(), st.data())
@many
def test_chunks_stay_whole_but_the_last_which_gives_its_first_tokens(case, data):
    B, H, _, S, _ = case.dims
    (scores,) = case._replace(padding="none").draw((B, H, S))
    means = kvfx.chunk_mean(scores, None, 4, 0, 0)
    slots = kvfx.select(means, data.draw(st.integers(1, S)), None)
    kept = torch.zeros(B, H, S, dtype=torch.bool).scatter(-1, slots, True)
    for b, h in itertools.product(range(B), range(H)):
        cut = [part for part in kept[b, h].split(4) if part.any() and not part.all()]
        assert len(cut) <= 1
        assert all(part.int().diff().max() <= 0 for part in cut if len(part) > 1)


@given(cases(), st.sampled_from([2, 4, CHUNK]), st.integers(0, 3), st.integers(0, 3))
@many
def test_chunk_rank_matches_its_definition_row_by_row(case, chunk, sinks, recent):
    B, H, _, S, _ = case.dims
    (scores,) = case.draw((B, H, S))

    def row(x):
        n = x.shape[1]
        safe = torch.full_like(x, torch.inf)
        x = torch.cat([safe[:, :sinks], x[:, sinks:]], 1)
        x = torch.cat([x[:, : max(0, n - recent)], safe[:, max(0, n - recent) :]], 1)
        answer = torch.zeros_like(x)
        for h, start in itertools.product(range(x.shape[0]), range(0, n, chunk)):
            part = x[h, start : start + chunk].tolist()
            order = sorted(range(len(part)), key=lambda i: (-part[i], i))
            for rank, i in enumerate(order):
                answer[h, start + i] = -rank / len(part)
        return answer

    exact = rows_alone(row, [scores], case.valid(), torch.float32)
    assert torch.equal(kvfx.chunk_rank(scores, case.valid(), chunk, sinks, recent), exact)


@given(cases(), st.integers(2, 9), st.data())
@many
def test_every_chunk_keeps_its_share_and_none_is_emptied(case, chunk, data):
    B, H, _, S, _ = case.dims
    (scores,) = case._replace(padding="none").draw((B, H, S))
    count = data.draw(st.integers(1, S))
    slots = kvfx.select(kvfx.chunk_rank(scores, None, chunk, 0, 0), count, None)
    kept = torch.zeros(B, H, S, dtype=torch.bool).scatter(-1, slots, True)
    for part in kept.split(chunk, -1):
        ideal = count * part.shape[-1] / S
        if count >= -(-S // chunk):
            assert (part.sum(-1) >= 1).all()
        assert ((part.sum(-1) - ideal).abs() <= 2).all()


def test_chunk_rank_hides_no_score_that_is_not_finite():
    scores = torch.zeros(1, 1, 8)
    scores[0, 0, 2], scores[0, 0, 5] = torch.nan, torch.inf
    assert not kvfx.protect(kvfx.chunk_rank(scores, None, 4, 0, 0), None, 0, 0)[1]


# Values behind the output projection, and two scores in turn.


def slow_value_projection(value, weight, group, valid, products) -> Tensor:
    """Of each token and query head, what the head's columns of the weight make of the value."""
    sums = torch.promote_types(products, torch.float32)

    def row(v):
        heads, n, width = v.shape
        score = torch.zeros(heads, n, dtype=sums)
        for h, g, s in itertools.product(range(heads), range(group), range(n)):
            columns = weight[:, (h * group + g) * width :][:, :width].to(products)
            score[h, s] += (columns @ v[h, s].to(products)).to(sums).abs().sum() / group
        return score

    return rows_alone(row, [value], valid, sums)


@given(cases(lengths=(1, 2, 9)), st.sampled_from([1, 5, 24]))
@many
def test_value_projection_matches_its_definition_row_by_row(case, hidden):
    B, H, G, S, D = case.dims
    (value,) = case.draw((B, H, S, D + 1))
    weight = torch.randn(H * G * (D + 1), hidden, generator=torch.Generator().manual_seed(case.seed)).to(case.dtype).t()
    weight = weight if case.strided else weight.contiguous()
    exact, low = (slow_value_projection(value, weight, G, case.valid(), dtype) for dtype in (torch.float64, case.dtype))
    assert_within_rounding(kvfx.value_projection(value, weight, case.valid()), low, exact)


def test_value_projection_grows_with_the_value_and_is_the_mean_of_its_heads():
    value, weight, _ = OPS["value_projection"].inputs(Dims(G=3), torch.float32, "cpu", 0)
    score = kvfx.value_projection(value, weight, None)
    torch.testing.assert_close(kvfx.value_projection(-2 * value, weight, None), 2 * score)
    heads = weight.unflatten(1, (2, 3, -1))
    each = [kvfx.value_projection(value, heads[:, :, g].flatten(1), None) for g in range(3)]
    torch.testing.assert_close(torch.stack(each).mean(0), score)


def slow_splice(first, then, kept: list[int], share: Fraction) -> list[list[set[int]]]:
    """What each row and head keeps: the best of `first`, then the best of `then` among the others."""

    def head(a, b, count):
        asked = max(math.floor(share * count), 1) if share and count else 0
        chosen = sorted(range(len(a)), key=lambda s: (-a[s], s))[:asked]
        others = sorted(set(range(len(a))) - set(chosen), key=lambda s: (-b[s], s))
        return set(chosen + others[: count - len(chosen)])

    pairs = zip(first.tolist(), then.tolist(), kept, strict=True)
    return [[head(a, b, count) for a, b in zip(*row, strict=True)] for *row, count in pairs]


SHARES = st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(1, 2), Fraction("0.999999999"), Fraction(1)])


@forms("splice")
@given(cases(), st.data(), st.booleans(), SHARES, st.integers(0, 3), st.integers(0, 3))
@many
def test_splice_keeps_the_share_of_one_score_and_the_rest_of_the_other(op, case, data, levels, share, sinks, recent):
    B, H, _, S, _ = case.dims
    first, then = case._replace(dtype=torch.float32).draw((B, H, S), (B, H, S))
    if levels:  # full of ties
        first, then = first.round(), then.round()
    valid = case.valid()
    lengths = [S] * B if valid is None else valid.sum(1).tolist()
    least = [min(n, max(1, sinks + recent)) for n in lengths]
    kept = [data.draw(st.integers(low, n)) for low, n in zip(least, lengths, strict=True)]
    count = max(*kept, 1, data.draw(st.integers(1, S)))  # slots may stay empty in every row
    counts = torch.tensor(kept)
    if valid is None and data.draw(st.booleans()):
        kept, counts = [max(kept)] * B, None
        count = kept[0]
    a, b = (kvfx.protect(score, valid, sinks, recent)[0] for score in (first, then))
    scores = op(a, b, count, counts, *share.as_integer_ratio())
    slots = kvfx.select(scores, count, counts)
    for row, heads in enumerate(slow_splice(a, b, kept, share)):
        for head, expected in enumerate(heads):
            chosen = [slot for slot in slots[row, head].tolist() if slot >= 0]
            assert len(chosen) == kept[row]
            assert set(chosen) == expected
    alone = {Fraction(0): b, Fraction(1): a}.get(share)
    if alone is not None:
        assert torch.equal(slots, kvfx.select(alone, count, counts))


@forms("splice")
def test_a_large_count_is_shared_without_rounding(op):
    share = Fraction(999_999_999, 10**9)
    first, then = torch.arange(3000.0).expand(1, 1, -1), -torch.arange(3000.0).expand(1, 1, -1)
    marked = op(first, then, 2500, None, *share.as_integer_ratio()).isinf().sum()
    assert marked == 2499
    assert op(first, then, 2500, torch.tensor([1]), *share.as_integer_ratio()).isinf().sum() == 1


# The hook library's window, which knows no padding.


@given(cases(lengths=(9, 12, 25)), st.sampled_from([1, 4, CHUNK]), st.sampled_from([1, 5]), st.booleans())
@many
def test_kvpress_window_attention_matches_its_definition(case, window, kernel, layer):
    B, H, G, S, D = case.dims
    query, key = case._replace(padding="none", dtype=torch.float32).draw((B, H * G, S, D), (B, H, S, D))

    def slow(dtype):
        answer = torch.empty(B, H, S, dtype=dtype)
        for b, h in itertools.product(range(B), range(H)):
            heads = range(H * G) if layer else range(h * G, (h + 1) * G)
            received = torch.zeros(S - window, dtype=dtype)
            for head, i in itertools.product(heads, range(S - window, S)):
                q, k = query[b, head, i].to(dtype), key[b, head // G, : i + 1].to(dtype)
                received += torch.softmax(k @ q / D**0.5, 0)[: S - window] / (window * len(heads))
            if not layer:
                around = torch.nn.functional.pad(received, (kernel // 2, kernel // 2))
                received = around.unfold(0, kernel, 1).mean(-1)
            answer[b, h, : S - window] = received
        answer[:, :, S - window :] = answer[:, :, : S - window].amax((1, 2), keepdim=True) + 1
        return answer

    exact, low = slow(torch.float64), slow(torch.float32)
    assert_within_rounding(kvfx.kvpress_window_attention(query, key, window, kernel, layer), low, exact)
