"""Every operator against a slow definition in float64, and against what must not change its answer."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves

from examples import examples
from forms import forms
from kvfx.kernels import OPS, Dims
from kvfx.kernels.leverage import draw_sketch
from yardstick import assert_within_rounding

kvfx = torch.ops.kvfx
CHUNK = 8
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3, 5 * CHUNK - 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PADDINGS = ["none", "left", "right", "interior"]

many = settings(deadline=None, max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow])
some = settings(many, max_examples=examples(20))  # of kernels of many steps, each of which the interpreter takes its time for
seeds = st.integers(0, 2**31)


class Case(NamedTuple):
    """Sizes, precision, padding and a generator for one random example."""

    dims: Dims
    dtype: torch.dtype
    padding: str
    strided: bool
    seed: int

    def draw(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Normal tensors; poisoned with NaN at padding where they have tokens on axis 2."""
        generator = torch.Generator().manual_seed(self.seed)
        return [self._layout(torch.randn(shape, generator=generator).to(self.dtype)) for shape in shapes]

    def _layout(self, x: Tensor) -> Tensor:
        valid = self.valid()
        if valid is not None and x.dim() > 2:
            x = x.masked_fill(~valid.reshape(self.dims.B, 1, -1, *[1] * (x.dim() - 3)), torch.nan)
        if self.strided:  # heads and tokens swapped in memory, as projections leave them, and every other element
            x = torch.stack([x.transpose(1, 2), torch.full_like(x.transpose(1, 2), torch.nan)], -1)
            x = x.transpose(1, 2)[..., 0]
        return x

    def valid(self) -> Tensor | None:
        B, S = self.dims.B, self.dims.S
        if self.padding == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        length = torch.randint(1, S + 1, (B, 1), generator=generator)
        slot = torch.arange(S)
        return {
            "left": slot >= S - length,
            "right": slot < length,
            "interior": torch.rand(B, S, generator=generator) < 0.6,  # a row may be empty
        }[self.padding]


@st.composite
def cases(draw, lengths=tuple(LENGTHS)):
    dims = Dims(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 8])),
        draw(st.sampled_from(lengths)),
        draw(st.sampled_from([4, 12])),
    )
    return Case(dims, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(PADDINGS)), draw(st.booleans()), draw(seeds))


# Slow definitions. Each row is taken out of its batch, without its padding, and computed with loops in `dtype`.


def rows_alone(function, tensors: list[Tensor | None], valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Apply function to each row's real tokens, [H, n, ...], and put its [Hkv, n] answer back between zeros."""
    first = next(x for x in reversed(tensors) if x is not None)  # query, which comes first, has more heads
    B, H, S = first.shape[:3]
    answer = torch.zeros(B, H, S, dtype=dtype)
    for b in range(B):
        real = torch.arange(S) if valid is None else valid[b].nonzero()[:, 0]
        if len(real):
            row = [None if x is None else x[b][:, real].to(dtype) for x in tensors]
            answer[b][:, real] = function(*row)
    return answer


def slow_key_norm(key, dtype):
    return rows_alone(lambda k: -(k * k).sum(-1).sqrt(), [key], None, dtype)


def slow_chunk_attention(query, key, value, valid, chunk, scale, pool, dtype):
    def row(q, k, v=None):
        heads, n = k.shape[:2]
        group = q.shape[0] // heads
        score = torch.zeros(heads, n, dtype=dtype)
        for h, start in itertools.product(range(heads), range(0, n, chunk)):
            part = slice(start, start + chunk)
            for g in range(group):
                weights = torch.softmax(scale * q[h * group + g, part] @ k[h, part].T, -1)
                for weight in weights:
                    score[h, part] += weight
        if v is not None:
            score = score * (v * v).sum(-1).sqrt()
        half = pool // 2
        return torch.stack([score[:, max(0, j - half) : j + half + 1].mean(-1) for j in range(n)], -1)

    tensors = [query, key] if value is None else [query, key, value]
    return rows_alone(row, tensors, valid, dtype)


def slow_leverage(key, valid, sketch, chunk, dtype):
    def head(k, phi):
        n, size = len(k), phi.shape[-1]
        edges = [*range(0, n, chunk), n] if chunk else [0, n]
        if len(edges) > 2 and edges[-1] - edges[-2] < chunk:
            del edges[-2]
        parts = []
        for a, b in itertools.pairwise(edges):
            x = (k[a:b] - k[a:b].mean(0)) @ phi.to(dtype)
            gram = x.T @ x
            ridge = 1e-4 * gram.trace() / size + 1e-6
            inverse = torch.linalg.inv(gram + ridge * torch.eye(size, dtype=dtype))
            parts.append(torch.stack([r @ inverse @ r for r in x]).clamp(0, 1))
        return torch.cat(parts)

    return rows_alone(lambda k: torch.stack([head(*pair) for pair in zip(k, sketch, strict=True)]), [key], valid, dtype)


def slow_random(key, valid, seed, layer):
    def mix(x):
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    def row(k):
        heads, n = k.shape[:2]
        start = mix(mix(seed) + layer)
        words = [[mix(r * 0x9E3779B1 + h * 0x85EBCA77 + start) >> 8 for r in range(n)] for h in range(heads)]
        return torch.tensor(words, dtype=torch.float64) / 2**24

    return rows_alone(row, [key], valid, torch.float64)


def slow_zscore(scores, valid, sinks, recent, dtype):
    def row(x):
        counted = x[:, sinks : max(sinks, x.shape[1] - recent)]
        if counted.numel() == 0:
            return torch.zeros_like(x)
        mean = counted.sum() / counted.numel()
        deviation = ((counted - mean) ** 2).mean().sqrt()
        return torch.zeros_like(x) if deviation < 1e-6 else (x - mean) / deviation

    return rows_alone(row, [scores], valid, dtype)


def slow_select(scores, count, counts):
    B, H, S = scores.shape
    slots = torch.full((B, H, count), -1)
    for b, h in itertools.product(range(B), range(H)):
        kept = count if counts is None else int(counts[b])
        best = sorted(range(S), key=lambda s: (-scores[b, h, s].item(), s))[:kept]
        slots[b, h, count - kept :] = torch.tensor(sorted(best), dtype=torch.int64)
    return slots


def slow_kvpress_compactor(query, key, value, pre_key, sketch, blend, chunk, dtype):
    query, key, value, pre_key = (x[:, :, 8:-4].to(dtype) for x in (query, key, value, pre_key))
    B, Hkv, S, _ = key.shape
    G, size, phi = query.shape[1] // Hkv, sketch.shape[-1], sketch.to(dtype)
    attention, leverage = torch.zeros(B, Hkv, S, dtype=dtype), torch.zeros(B, Hkv, S, dtype=dtype)
    for b, h in itertools.product(range(B), range(Hkv)):
        for start, g in itertools.product(range(0, S, chunk), range(G)):
            n = min(chunk, S - start)
            logits = torch.zeros(chunk, chunk, dtype=dtype)
            logits[:n, :n] = query[b, h * G + g, start : start + n] @ key[b, h, start : start + n].T
            logits[:, n:] = -1e-9
            attention[b, h, start : start + n] += torch.softmax(logits, -1).sum(0)[:n] / G
        attention[b, h] *= value[b, h].norm(dim=-1)
        around = torch.cat([torch.zeros(1, dtype=dtype), attention[b, h], torch.zeros(1, dtype=dtype)])
        attention[b, h] = (around[:-2] + around[1:-1] + around[2:]) / 3
        x = (pre_key[b, h] - pre_key[b, h].mean(0)) @ phi[h]
        inverse = torch.linalg.inv(x.T @ x + 1e-2 * torch.eye(size, dtype=dtype))
        leverage[b, h] = torch.stack([r @ inverse @ r for r in x]).clamp(min=0)
    z = [(x - x.mean()) / x.std(unbiased=True).clamp(min=1e-6) for x in (leverage, attention)]
    scores = blend * z[0] + z[1]
    answer = torch.full((B, Hkv, S + 12), scores.max().item(), dtype=dtype)
    answer[:, :, 8:-4] = scores
    return answer


# Each op against its definition.


@given(cases(lengths=LENGTHS[1:]))
@many
def test_attention_is_the_library_call_bit_for_bit(case):
    B, H, G, S, D = case.dims
    query, key, value = case._replace(padding="none").draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    for arguments in ((None, 0.0, True, None), (mask, 0.0, False, 0.3), (None, 0.0, False, None)):
        library = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, *arguments[:3], scale=arguments[3], enable_gqa=G > 1
        )
        assert torch.equal(kvfx.attention(query, key, value, *arguments), library)


@given(cases(), st.sampled_from([1, 3]), st.sampled_from(["none", "one", "KV", "all"]), st.booleans(), st.sampled_from([None, 2.0]))
@many
def test_a_mask_may_be_one_for_all_heads_or_for_each_kv_head_or_each_head(case, new, heads, additive, softcap):
    B, H, G, S, D = case.dims
    query, key, value = case._replace(padding="none").draw((B, H * G, new, D), (B, H, S, D), (B, H, S, D))
    count = {"none": 1, "one": 1, "KV": H, "all": H * G}[heads]
    visible = torch.rand(B, count, new, S, generator=torch.Generator().manual_seed(case.seed)) < 0.7
    visible |= heads == "none"
    visible[..., 0] |= additive  # only a bool mask says what the sum of nothing is
    mask = torch.zeros(visible.shape, dtype=case.dtype).masked_fill(~visible, -torch.inf) if additive else visible

    def formula(dtype):
        out = torch.empty(B, H * G, new, D, dtype=dtype)
        for head in range(H * G):
            logits = query[:, head].to(dtype) @ key[:, head // G].to(dtype).mT * D**-0.5
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            seen = visible[:, {1: 0, H: head // G, H * G: head}[count]]
            weights = logits.masked_fill(~seen, -torch.inf).double().softmax(-1).nan_to_num(0)  # 0 where nothing is seen
            out[:, head] = weights.to(dtype) @ value[:, head // G].to(dtype)
        return out

    ours = kvfx.attention(query, key, value, None if heads == "none" else mask, 0.0, False, None, softcap, None)
    assert_within_rounding(ours, formula(case.dtype), formula(torch.float64))


@given(cases(), st.sampled_from([None, 0.5, 30.0]), st.booleans(), st.sampled_from(["none", "causal", "bool", "additive"]))
@many
def test_attention_with_a_cap_or_sinks_is_what_the_formula_says(case, softcap, has_sinks, masked):
    B, H, G, S, D = case.dims
    query, key, value, sinks = case._replace(padding="none").draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D), (1, H * G, 1))
    sinks = sinks[0, :, 0]
    visible = torch.ones(S, S, dtype=torch.bool).tril() if masked != "none" else torch.ones(S, S, dtype=torch.bool)
    mask = {"bool": visible, "additive": torch.zeros(S, S, dtype=case.dtype).masked_fill(~visible, -torch.inf)}.get(masked)

    def formula(dtype):
        out = torch.empty(B, H * G, S, D, dtype=dtype)
        for head in range(H * G):
            logits = query[:, head].to(dtype) @ key[:, head // G].to(dtype).mT * 0.3
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            weights = logits.masked_fill(~visible, -torch.inf).double().exp()
            total = weights.sum(-1, keepdim=True) + (sinks[head].double().exp() if has_sinks else 0)
            out[:, head] = (weights / total).to(dtype) @ value[:, head // G].to(dtype)
        return out

    ours = kvfx.attention(query, key, value, mask, 0.0, masked == "causal", 0.3, softcap, sinks if has_sinks else None)
    assert ours.dtype == case.dtype
    assert_within_rounding(ours, formula(case.dtype), formula(torch.float64))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_single_query_that_sees_nothing_gets_nothing(softcap):
    query, key, value = torch.randn(2, 4, 1, 8), *(torch.randn(2, 2, 3, 8) for _ in range(2))
    mask = torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 3)
    out = kvfx.attention(query, key, value, mask, 0.0, False, None, softcap, None)
    assert torch.equal(out[0], torch.zeros(4, 1, 8))
    assert bool((out[1] != 0).all())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_query_that_sees_nothing_gets_nothing(softcap):
    query, key, value = (torch.randn(1, 2, 3, 8) for _ in range(3))
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    out = kvfx.attention(query, key, value, mask, 0.0, False, None, softcap, None)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 8))
    assert out.isfinite().all()


def test_dropout_beside_a_cap_is_an_error():
    query, key, value = (torch.randn(1, 2, 3, 8) for _ in range(3))
    with pytest.raises(ValueError, match=r"attention with softcap or sinks has no dropout, got 0\.1"):
        kvfx.attention(query, key, value, None, 0.1, True, None, 30.0, None)


@forms("key_norm")
@given(cases())
@many
def test_key_norm_is_the_negated_length(op, case):
    B, H, _, S, D = case.dims
    (key,) = case._replace(padding="none").draw((B, H, S, D))
    exact, low = (slow_key_norm(key, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(key), low, exact)


@forms("chunk_attention")
@given(cases(), st.booleans(), st.sampled_from([1.0, 0.35]), st.sampled_from([1, 3, 7]), st.sampled_from([1, 3, CHUNK]))
@some
def test_chunk_attention_matches_its_definition_row_by_row(op, case, weighted, scale, pool, chunk):
    B, H, G, S, D = case.dims
    query, key, value = case.draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D + 1))
    arguments = (query, key, value if weighted else None, case.valid(), chunk, scale, pool)
    exact, low = (slow_chunk_attention(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@forms("leverage")
@given(cases(), st.sampled_from([0, 3, CHUNK]), st.sampled_from([1, 3, 12]))
@some
def test_leverage_matches_its_definition_row_by_row(op, case, chunk, size):
    B, H, _, S, D = case.dims
    (key,) = case.draw((B, H, S, D))
    arguments = (key, case.valid(), draw_sketch(case.seed, 0, H, D, size), chunk)
    exact, low = (slow_leverage(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@given(cases(), st.integers(-(2**40), 2**40), st.integers(0, 100))
@many
def test_random_matches_its_definition_exactly(case, seed, layer):
    B, H, _, S, D = case.dims
    (key,) = case.draw((B, H, S, D))
    actual = kvfx.random(key, case.valid(), seed, layer)
    assert torch.equal(actual.double(), slow_random(key, case.valid(), seed, layer))


@forms("zscore")
@given(cases(), st.integers(0, 10), st.integers(0, 10), st.sampled_from([1e-3, 1.0, 1e3]))
@many
def test_zscore_matches_its_definition_row_by_row(op, case, sinks, recent, scale):
    B, H, _, S, _ = case.dims
    (scores,) = case.draw((B, H, S))
    arguments = (scores * scale + scale, case.valid(), sinks, recent)
    exact, low = (slow_zscore(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@given(cases(), st.integers(0, 10), st.integers(0, 10))
@many
def test_protect_marks_the_ends_of_each_row(case, sinks, recent):
    B, H, _, S, _ = case.dims
    (scores,) = case.draw((B, H, S))
    valid = case.valid()
    actual, finite = kvfx.protect(scores, valid, sinks, recent)
    assert finite
    for b in range(B):
        real = list(range(S)) if valid is None else valid[b].nonzero()[:, 0].tolist()
        inside = real[sinks : max(sinks, len(real) - recent)]
        expected = torch.full((H, S), -torch.inf)
        expected[:, real] = torch.inf
        expected[:, inside] = scores[b][:, inside].float()
        assert torch.equal(actual[b], expected)


@forms("select")
@given(cases(), st.data(), st.booleans(), st.integers(1, 4))
@some
def test_select_is_a_stable_sort_that_keeps_the_earlier_of_equals(op, case, data, per_row, levels):
    B, H, _, S, _ = case.dims
    generator = torch.Generator().manual_seed(case.seed)
    scores = torch.randint(levels, (B, H, S), generator=generator).to(case.dtype)  # full of ties; one level: all equal
    scores = scores.masked_fill(scores == 3, torch.inf)
    count = data.draw(st.integers(1, S))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, count), min_size=B, max_size=B))) if per_row else None
    assert torch.equal(op(scores, count, counts), slow_select(scores, count, counts))


@forms("compact")
@given(cases(), st.booleans())
@many
def test_compact_copies_bits_and_leaves_zeros_where_nothing_was_chosen(op, case, padded):
    B, H, _, S, D = case.dims
    key, value = case._replace(padding="none").draw((B, H, S, D), (B, H, S, D + 1))
    for x in (key, value):
        x[..., 0], x[..., 1], x[..., 2] = -0.0, torch.inf, torch.finfo(case.dtype).tiny / 2  # bits must survive
    positions = torch.arange(S, dtype=torch.int32).repeat(B, 1) + 1000
    slots = torch.randint(-1 if padded else 0, S, (B, H, (S + 1) // 2), generator=torch.Generator().manual_seed(case.seed))
    keys, values, kept = op(key, value, positions, slots, padded)
    assert all(x.is_contiguous() for x in (keys, values, kept))
    assert kept.dtype == torch.int32
    bits = torch.int32 if case.dtype == torch.float32 else torch.int16
    for b, h, n in itertools.product(*map(range, slots.shape)):
        slot = int(slots[b, h, n])
        for copy, source in ((keys, key), (values, value)):
            expected = torch.zeros_like(source[b, h, 0]) if slot < 0 else source[b, h, slot]
            assert torch.equal(copy[b, h, n].view(bits), expected.contiguous().view(bits))
        assert kept[b, h, n] == (-1 if slot < 0 else 1000 + slot)


@given(cases(lengths=(15, 20, 28, 29, 45)), st.sampled_from([0.0, 0.3]), st.sampled_from([4, CHUNK]))
@many
def test_kvpress_compactor_matches_its_definition(case, blend, chunk):
    B, H, G, S, D = case.dims
    draw = case._replace(padding="none", dtype=torch.float32).draw
    query, key, value, pre_key = draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D), (B, H, S, D))
    arguments = (query, key, value, pre_key, draw_sketch(case.seed, 0, H, D, 3), blend, chunk)
    exact, low = (slow_kvpress_compactor(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(kvfx.kvpress_compactor(*arguments), low, exact)


# What the scores mean.


def chunk_bounds(tokens: int, chunk: int, merge_tail: bool) -> list[tuple[int, int]]:
    edges = [*range(0, tokens, chunk), tokens]
    if merge_tail and len(edges) > 2 and tokens % chunk:
        del edges[-2]
    return list(itertools.pairwise(edges))


@pytest.mark.sample(2)
@forms("leverage")
@pytest.mark.parametrize("tokens", LENGTHS)
def test_leverage_lies_in_0_1_and_sums_to_at_most_the_rank(op, tokens):
    size = 6
    key = torch.randn(2, 3, tokens, 12, generator=torch.Generator().manual_seed(tokens))
    score = op(key, None, draw_sketch(0, 0, 3, 12, size), CHUNK)
    assert ((score >= 0) & (score <= 1)).all()
    for a, b in chunk_bounds(tokens, CHUNK, merge_tail=True):
        assert (score[..., a:b].sum(-1) <= min(size, b - a - 1) + 1e-4).all()


@forms("leverage")
def test_leverage_without_reduction_is_exact_leverage_and_ignores_shift_scale_and_rotation(op):
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 200, 8, generator=generator, dtype=torch.float64)
    centred = key[0, 0] - key[0, 0].mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred)
    ridge = 1e-4 * eigenvalues.mean() + 1e-6
    exact = (torch.linalg.qr(centred).Q ** 2).sum(-1)
    lowest = exact * eigenvalues[0] / (eigenvalues[0] + ridge)  # the ridge shrinks each direction by l / (l + ridge)
    rounding = 1e-5 * exact.max()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    for changed in (key, key + 3, 50 * key, key @ turn):
        score = op(changed.float(), None, torch.eye(8)[None], 0)[0, 0].double()
        assert (score <= exact + rounding).all()
        assert (score >= lowest - rounding).all()


@forms("leverage")
def test_leverage_moves_with_the_tokens_of_a_chunk_and_finds_the_outlier(op):
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(1, 2, 64, 12, generator=generator)
    key[:, :, 5] = 40 * torch.randn(12, generator=generator)
    key[:, :, 10:14] = key[:, :, 10:11]
    sketch = draw_sketch(0, 0, 2, 12, 6)
    score = op(key, None, sketch, 0)
    assert (score[..., 5] > 0.9).all()
    assert (score[..., 10:14].amax(-1) - score[..., 10:14].amin(-1) < 1e-6).all()
    assert (score[..., 10:14] <= 1 / 4 + 1e-6).all()
    order = torch.randperm(64, generator=generator)
    exact = slow_leverage(key, None, sketch, 0, torch.float64)[..., order]
    assert_within_rounding(op(key[:, :, order], None, sketch, 0), score[..., order], exact)


@forms("chunk_attention")
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("group", [1, 2, 8])
def test_chunk_attention_averages_to_the_group_size_in_every_chunk(op, tokens, group):
    generator = torch.Generator().manual_seed(tokens)
    query, key = (torch.randn(2, heads, tokens, 12, generator=generator) for heads in (2 * group, 2))
    score = op(query, key, None, None, CHUNK, 1.0, 1)
    assert (score >= 0).all()
    for a, b in chunk_bounds(tokens, CHUNK, merge_tail=False):
        torch.testing.assert_close(score[..., a:b].mean(-1), torch.full((2, 2), float(group)))


@forms("chunk_attention", "leverage")
def test_a_chunk_does_not_see_the_others(op):
    dims = Dims(S=4 * CHUNK + 3)
    query, key, value, *_ = OPS["chunk_attention"].inputs(dims, torch.float32, "cpu", 0)
    sketch = draw_sketch(0, 0, dims.Hkv, dims.D, 6)
    inside = torch.arange(dims.S) // CHUNK == 1
    changed = torch.where(inside[:, None], key.flip(-1), key)
    attention = op.name == "chunk_attention"
    before, after = (op(query, x, value, None, CHUNK, 1.0, 1) if attention else op(x, None, sketch, CHUNK) for x in (key, changed))
    assert torch.equal(before[..., ~inside], after[..., ~inside])
    assert not torch.equal(before[..., inside], after[..., inside])


@forms("chunk_attention")
def test_query_heads_of_a_group_are_interchangeable(op):
    dims = Dims(G=4)
    query, *rest = OPS["chunk_attention"].inputs(dims, torch.float32, "cpu", 0)
    swapped = query.unflatten(1, (dims.Hkv, dims.G)).flip(2).flatten(1, 2)
    exact = slow_chunk_attention(query, *rest, torch.float64)
    assert_within_rounding(op(swapped, *rest), op(query, *rest), exact)


@forms("zscore")
def test_zscore_is_zero_where_nothing_varies(op):
    for constant in (0.0, 1.0, 3.7, -12345.678):
        assert (op(torch.full((2, 3, 5000), constant), None, 2, 2) == 0).all()
    scores = torch.randn(2, 3, 10)
    assert (op(scores, None, 8, 4) == 0).all()
    lone = torch.arange(10) == 4
    assert (op(torch.randn(2, 1, 10), lone.repeat(2, 1), 0, 0) == 0).all()


@forms("zscore")
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_zscore_of_many_pieces_is_as_of_one(op, shift):
    scores = torch.randn(2, 2, 9001, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 9001) + shift
    valid = torch.rand(2, 9001, generator=torch.Generator().manual_seed(1)) < 0.8
    for arguments in ((scores, None, 8, 4), (scores, valid, 8, 4)):
        exact, low = (slow_zscore(*arguments, dtype) for dtype in (torch.float64, torch.float32))
        assert_within_rounding(op(*arguments), low, exact)


@forms("zscore")
def test_zscore_ignores_protected_scores_but_scales_them(op):
    scores = torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(0))
    extreme = scores.clone()
    extreme[..., :3] = 1e6
    before, after = op(scores, None, 3, 2), op(extreme, None, 3, 2)
    assert torch.equal(before[..., 3:], after[..., 3:])
    assert (after[..., :3] > 1e5).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_protect_reports_a_score_that_is_not_finite_and_keeps_padding_last(bad):
    scores = torch.zeros(2, 1, 6)
    scores[1, 0, 3] = bad
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 0] = False
    safe, finite = kvfx.protect(scores, valid, 1, 1)
    assert not finite
    assert safe[1, 0].tolist() == [-torch.inf, torch.inf, 0, safe[1, 0, 3], 0, torch.inf]
    assert safe[1, 0, 3].isfinite()
    assert kvfx.select(safe, 5, None)[1, 0].tolist() == [1, 2, 3, 4, 5]
    valid[1, 3] = False
    assert kvfx.protect(scores, valid, 1, 1)[1]


def test_random_is_uniform_and_differs_between_seeds_layers_heads_and_tokens():
    key = torch.empty(1, 4, 4096, 1)
    score = kvfx.random(key, None, 1, 2)
    assert torch.equal(score, kvfx.random(key, None, 1, 2))
    assert ((score >= 0) & (score < 1)).all()
    counts = torch.histc(score, 16, 0, 1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 45  # chi square, 15 degrees of freedom: exceeded once in 10^4 seeds
    variants = [score, kvfx.random(key, None, 2, 2), kvfx.random(key, None, 1, 3)]
    rows = torch.cat([x[0] for x in variants])
    correlation = torch.corrcoef(rows) - torch.eye(12)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_a_sketch_depends_on_seed_layer_and_head_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sketch = draw_sketch(7, 3, 4, 64, 48)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw_sketch(7, 3, 2, 64, 48), sketch[:2])
    others = [draw_sketch(8, 3, 1, 64, 48)[0], draw_sketch(7, 4, 1, 64, 48)[0], sketch[1]]
    assert not any(torch.equal(other, sketch[0]) for other in others)
    assert abs(sketch.var() * 48 - 1) < 0.05


@given(cases(), st.data())
@many
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(case, data):
    B, H, _, S, _ = case.dims
    scores = torch.randint(5, (B, H, S), generator=torch.Generator().manual_seed(case.seed)).float()
    small, large = sorted(data.draw(st.tuples(st.integers(1, S), st.integers(1, S))))
    few, more = kvfx.select(scores, small, None), kvfx.select(scores, large, None)
    assert (few[..., :, None] == more[..., None, :]).any(-1).all()
    assert torch.equal(kvfx.select(scores, S, None), torch.arange(S).expand(B, H, S))


# What holds for every row of the table. A new row is tested without a new line here.

OP_LIST = list(OPS.values())
ATTENTION_OVER_BLOCKS = ("ragged_attention", "ragged_probabilities", "ragged_received")


def variants(op, dims: Dims, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[str, list]]:
    """Example arguments of an op: as its row makes them, and with padding where it takes any."""
    plain = list(op.inputs(dims, dtype, "cpu", seed))
    found = [("plain", plain)]
    names = argument_names(op)
    generator = torch.Generator().manual_seed(seed)
    if "valid" in names:
        valid = torch.rand(dims.B, dims.S, generator=generator) < 0.7
        found.append(("padded", replaced(plain, names.index("valid"), valid)))
    if "buffer" in names and "heads" in names:
        arguments = replaced(found[-1][1], names.index("buffer"), 3)
        found.append(("buffered", replaced(arguments, names.index("heads"), "sum")))
    if "counts" in names and "slots" in names:
        slots = plain[names.index("slots")]
        counts = torch.randint(0, slots.shape[-1] + 1, (dims.B,), generator=generator)
        empty = torch.arange(slots.shape[-1]) < slots.shape[-1] - counts[:, None, None]
        arguments = replaced(plain, names.index("slots"), slots.masked_fill(empty, -1))
        found.append(("counted", replaced(arguments, names.index("counts"), counts)))
    elif "counts" in names:
        counts = torch.randint(0, plain[names.index("count")] + 1, (dims.B,), generator=generator)
        found.append(("counted", replaced(plain, names.index("counts"), counts)))
    if "padded" in names:
        slots = plain[names.index("slots")]
        slots = slots.masked_fill(torch.arange(slots.shape[-1]) < slots.shape[-1] // 2, -1)
        arguments = replaced(plain, names.index("slots"), slots)
        found.append(("padded", replaced(arguments, names.index("padded"), True)))
    return found


def argument_names(op) -> list[str]:
    return [argument.name for argument in op.overload._schema.arguments]


def replaced(items: list, index: int, item) -> list:
    return [*items[:index], item, *items[index + 1 :]]


def answers(op, arguments) -> list[Tensor]:
    """What an operator returns, or leaves in what it writes to; `arguments` stay as they are."""
    closed, tensors = over_tensors(op, op.overload, list(arguments), follow=False)
    return tree_leaves(closed(*tensors))


def rows_are_independent(op) -> bool:
    """Say whether batch rows are apart: not where statistics run over the batch, or where rows share a pool and a list of work."""
    return op.name not in ("kvpress_compactor", "place", "pack", "block_moves", *ATTENTION_OVER_BLOCKS)


def numbers_heads(op) -> bool:
    """Say whether an answer counts or numbers the heads, so that it does not simply move with them."""
    numbering = ("random", "allocate", "select_heads", "place", "pack", "schedule_blocks", "place_kept")
    return op.name in (*numbering, *ATTENTION_OVER_BLOCKS)


@pytest.mark.parametrize("op", OP_LIST, ids=str)
def test_each_row_of_the_table_stands_under_its_own_name(op):
    assert OPS[op.name] is op
    assert op.reference.__doc__
    assert "Returns:" in op.reference.__doc__


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
AOT = ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", OP_LIST, ids=str)
@pytest.mark.parametrize("checks", [QUICK, pytest.param(AOT, marks=pytest.mark.slow)], ids=["op", "aot dispatch"])
def test_opcheck_finds_nothing(op, checks):
    for _, arguments in variants(op, Dims(S=19)):
        result = torch.library.opcheck(op.overload, tuple(arguments), test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("op", "dtype"),
    [pair for pair in itertools.product(OP_LIST, DTYPES) if not (pair[0].name.startswith("kvpress_") and pair[1] == torch.float16)],
    ids=str,
)
def test_finite_input_never_gives_nan(op, dtype):
    """The excepted pairs overflow: those ops keep the logits in the keys' dtype, as their model does.

    An absolute ridge lets the Cholesky factorisation of few, large keys fail on some machines; its op says how that shows.
    """
    sizes = (0.0, 1e-4, 1.0) if op.name == "kvpress_compactor" else (0.0, 1e-4, 1.0, 300.0)
    for tokens, size in itertools.product((2, 17, 40), sizes):
        for _, arguments in variants(op, Dims(S=tokens), dtype):
            scaled = [x * size if isinstance(x, Tensor) and x.dtype == dtype else x for x in arguments]
            assert not any(x.isnan().any() for x in answers(op, scaled))


@pytest.mark.parametrize("op", [op for op in OP_LIST if rows_are_independent(op)], ids=str)
def test_rows_of_a_batch_do_not_see_each_other(op):
    dims = Dims(B=3, Hkv=2)
    for _, arguments in variants(op, dims):
        together = answers(op, arguments)
        for b in range(dims.B):
            row = [x[b : b + 1] if isinstance(x, Tensor) and len(x) == dims.B else x for x in arguments]
            for whole, alone in zip(together, answers(op, row), strict=True):
                if whole.dim():  # a flag over the batch is about the batch
                    part = whole[b : b + 1]
                    assert_within_rounding(part, alone, alone.double())


@pytest.mark.parametrize("op", [op for op in OP_LIST if not numbers_heads(op)], ids=str)
def test_permuted_heads_give_permuted_answers(op):
    dims = Dims(B=3, Hkv=4, G=2)
    order = torch.tensor([2, 0, 3, 1])

    def permute(x, name=""):
        if not isinstance(x, Tensor) or (x.dim() < 3 and name != "weight") or name == "turns":
            return x
        axis = 0 if x.shape[0] == dims.Hkv else 1  # sketches have no batch axis
        return x.unflatten(axis, (dims.Hkv, -1)).index_select(axis, order).flatten(axis, axis + 1)

    for _, arguments in variants(op, dims):
        straight, permuted = answers(op, arguments), list(map(permute, arguments, argument_names(op)))
        for expected, actual in zip(map(permute, straight), answers(op, permuted), strict=True):
            assert_within_rounding(actual, expected, expected.double())


def over_tensors(op, function, arguments: list, follow: bool = True):
    """Close function over all but the tensors; a `count` follows the length as a budget makes it, and `tokens` and `places` too.

    What it writes to are copies, which it then returns.
    """
    sizes = ("tokens", "places") if follow else ()
    tokens = [i for i, name in enumerate(argument_names(op)) if name in sizes and isinstance(arguments[i], int)]
    arguments = [torch.empty(x, 0) if i in tokens else x for i, x in enumerate(arguments)]  # a size is an axis of a tensor
    where = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    counts = [i for i, name in enumerate(argument_names(op)) if name == "count" and follow]
    written = [argument_names(op).index(name) for name in op.written]

    def closed(*tensors):
        full = list(arguments)
        for i, x in zip(where, tensors, strict=True):
            full[i] = x.shape[0] if i in tokens else x
        for i in counts:
            full[i] = (tensors[0].shape[2] + 1) // 2
        for i in written:
            full[i] = full[i].clone()
        returned = function(*full)
        return [full[i] for i in written] if written else returned

    return closed, [arguments[i] for i in where]


def moving_axes(op, form: str, dims: Dims) -> list[list[bool]]:
    """For each tensor argument, which axes change with the number of tokens or of rows."""
    shapes = [
        [x.shape for x in over_tensors(op, op, dict(variants(op, each))[form])[1]]
        for each in (dims, dims._replace(S=2 * dims.S, B=2 * dims.B))
    ]
    return [[a != b for a, b in zip(*pair, strict=True)] for pair in zip(*shapes, strict=True)]


@pytest.mark.parametrize("pre_dispatch", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["pre_dispatch", "aten"])
@pytest.mark.parametrize("op", OP_LIST, ids=str)
def test_one_trace_serves_every_length_and_number_of_rows(op, pre_dispatch):
    """Traced before dispatch the op itself stays in the graph, so there its reference is traced."""
    dims = Dims(B=3, S=37)
    for form, arguments in variants(op, dims):
        closed, tensors = over_tensors(op, op.reference if pre_dispatch else op.overload, arguments)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fakes = []
        for x, moving in zip(tensors, moving_axes(op, form, dims), strict=True):
            sizes = [DimDynamic.DYNAMIC if moves else DimDynamic.STATIC for moves in moving]
            fakes.append(mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
        graph = make_fx(closed, pre_dispatch=pre_dispatch, tracing_mode="symbolic")(*fakes)
        assert not any(value.is_number for value in mode.shape_env.replacements.values())
        assert all(limit.upper > 2**40 for limit in mode.shape_env.var_to_range.values())
        for rows, length in ((3, 1), (2, 2), (5, 15), (3, 16), (2, 17), (3, 35), (3, 48), (4, 64)):
            other = dict(variants(op, dims._replace(B=rows, S=length)))[form]
            expected, actual = answers(op, other), graph(*over_tensors(op, op.overload, other)[1])
            for x, y in zip(expected, tree_leaves(actual), strict=True):
                assert_within_rounding(y, x, x.double())


@pytest.mark.sample(4)
@pytest.mark.parametrize("op", OP_LIST, ids=str)
def test_compiling_takes_one_graph_for_rows_of_one_chunk_and_one_for_longer_rows(op):
    dims = Dims(S=37)
    for form, arguments in variants(op, dims):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        closed, tensors = over_tensors(op, op.reference, arguments)
        compiled = torch.compile(closed, fullgraph=True, backend=counter)
        for x, moving in zip(tensors, moving_axes(op, form, dims), strict=True):
            torch._dynamo.mark_dynamic(x, [axis for axis, moves in enumerate(moving) if moves])
        compiled(*tensors)
        for length in (3, 16, 17, 32, 48, 99):
            tensors = over_tensors(op, op.reference, dict(variants(op, dims._replace(S=length)))[form])[1]
            for x, y in zip(tree_leaves(closed(*tensors)), tree_leaves(compiled(*tensors)), strict=True):
                assert_within_rounding(y, x, x.double())
        assert counter.frame_count <= 2
