"""Expected attention: the score against slow definitions, and the rotation of later queries against models' own RoPE."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import kvfx
import reference
from examples import examples
from forms import forms
from graphs import computed, readable, traced_step
from kvfx.kernels import OPS, Dims
from kvfx.lower import lower
from kvfx.passes.attach_cache import attach_cache
from kvfx.passes.find_attention import find_attention
from kvfx.passes.report import Refuse, Report
from kvfx.passes.rotation import FutureRotation
from kvfx.policy import Policy
from test_equivalence import decoder
from test_graphs import LENGTHS, graphs
from test_kernels import Case, cases, many
from test_passes import graph_of, randn, rotate
from yardstick import assert_within_rounding

# -- the score ---------------------------------------------------------------------------------------------------------------------


def slow(query, key, rotation, value, valid, sinks, covariance, epsilon, scale, dtype) -> Tensor:
    """The definition, by loops over rows, heads and tokens."""
    (B, H, S, D), G = key.shape, query.shape[1] // key.shape[1]
    scale, answer = scale or D**-0.5, torch.zeros(B, H, S, dtype=dtype)
    for b, head in itertools.product(range(B), range(H * G)):
        real = torch.arange(S) if valid is None else valid[b].nonzero()[:, 0]
        counted = real[sinks:]
        if len(counted) == 0:
            continue
        queries, keys = query[b, head, counted].to(dtype), key[b, head // G, counted].to(dtype)
        turn = torch.eye(D, dtype=dtype) if rotation is None else rotation[b, head].to(dtype)
        mean = sum(queries) / len(counted)
        spread = sum(torch.outer(q - mean, q - mean) for q in queries) / len(counted)
        mean, spread = mean @ turn, turn.T @ spread @ turn
        logits = torch.stack([scale * mean @ k + (scale**2 / 2 * k @ spread @ k if covariance else 0) for k in keys])
        answer[b, head // G, counted] += torch.softmax(logits, 0) / G
    for b in range(B) if value is not None else ():
        counted = (torch.arange(S) if valid is None else valid[b].nonzero()[:, 0])[sinks:]
        norms = value[b][:, counted].to(dtype).square().sum(-1).sqrt()
        answer[b][:, counted] = (answer[b][:, counted] + epsilon) * norms
    return answer


options = st.tuples(st.sampled_from([0, 2, 4]), st.booleans(), st.sampled_from([0.0, 0.25]), st.sampled_from([None, 0.4]))


@forms("expected_attention")
@given(cases(), st.booleans(), st.booleans(), options)
@settings(many, max_examples=examples(25))
def test_the_score_matches_its_definition_row_by_row(op, case, turned, weighted, options):
    B, H, G, S, D = case.dims
    query, key, value = case.draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D + 1))
    rotation = (
        torch.linalg.qr(torch.randn(B, H * G, D, D, generator=torch.Generator().manual_seed(case.seed))).Q if turned else None
    )
    arguments = (query, key, rotation, value if weighted else None, case.valid(), *options)
    exact, low = (slow(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@forms("expected_attention")
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_score_stays_exact_over_thousands_of_tokens_and_for_queries_far_from_zero(op, offset):
    query, key = Case(Dims(), torch.float32, "none", False, 0).draw((1, 2, 2500, 32), (1, 1, 2500, 32))
    arguments = (query + offset, key, None, None, None, 4, True, 0.0, None)
    exact, low = (slow(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@pytest.mark.sample(3)
@forms("expected_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 160, 256])
def test_wide_heads_score_as_defined(op, dim, dtype):
    case = Case(Dims(2, 1, 2, 70, dim), dtype, "interior", True, dim)
    query, key, value = case.draw((2, 2, 70, dim), (2, 1, 70, dim), (2, 1, 70, dim))
    turn = torch.linalg.qr(torch.randn(2, 2, dim, dim, generator=torch.Generator().manual_seed(dim))).Q
    arguments = (query + 3, key, turn, value, case.valid(), 4, True, 0.0, None)
    exact, low = (slow(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@pytest.mark.sample(3)
@forms("expected_attention")
@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("padding", ["none", "interior"])
def test_the_score_is_that_of_the_whole_row_where_queries_drift_and_one_is_far_away(op, padding, covariance):
    case = Case(Dims(1, 1, 2, 4500, 6), torch.float32, padding, False, 1)
    query, key = case.draw((1, 2, 4500, 6), (1, 1, 4500, 6))
    query = query + torch.linspace(-3, 5, 4500)[:, None]
    query[:, :, 10] += 50
    arguments = (query, key / 8, None, None, case.valid(), 4, covariance, 0.0, None)
    exact, low = (slow(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@forms("expected_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 6, 33, 257, 261])
def test_queries_that_are_all_alike_have_no_spread(op, tokens, dtype):
    (query,) = Case(Dims(), dtype, "none", False, 2).draw((1, 2, 1, 12))
    (key,) = Case(Dims(), dtype, "none", False, 3).draw((1, 1, tokens, 12))
    arguments = (query.expand(1, 2, tokens, 12), key, None, None, None, 4)
    exact, low = (slow(*arguments, False, 0.0, None, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments, True, 0.0, None), low, exact)


@forms("expected_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_variances_that_differ_by_orders_of_magnitude_all_count(op, dtype):
    """With keys that are long where queries vary little, every channel adds about as much to a logit."""
    query, key = Case(Dims(), torch.float32, "none", False, 4).draw((1, 2, 100, 16), (1, 1, 100, 16))
    size = 2.0 ** torch.arange(-8, 8)
    arguments = ((query * size).to(dtype), (key / size).to(dtype), None, None, None, 4, True, 0.0, None)
    exact, low = (slow(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(*arguments), low, exact)


@forms("expected_attention")
def test_the_score_is_the_attention_of_normal_queries(op):
    """Against many queries drawn from the distribution: the error of their mean is known."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 1, 40, 6, generator=generator), torch.randn(1, 1, 40, 6, generator=generator)
    score = op(query, key, None, None, None, 0, True, 0.0, None)[0, 0].double()
    seen, keys = query[0, 0].double(), key[0, 0].double()
    root = torch.linalg.cholesky(torch.cov(seen.T, correction=0))
    drawn = seen.mean(0) + torch.randn(200_000, 6, generator=generator, dtype=torch.float64) @ root.T
    paid = (drawn @ keys.T / 6**0.5).exp()
    error = paid.std(0) / len(paid) ** 0.5 / paid.mean(0)
    share = paid.mean(0) / paid.mean(0).sum()
    assert ((share / score - 1).abs() <= 5 * (error + error.mean())).all()


@forms("expected_attention")
def test_turning_queries_and_keys_alike_changes_nothing(op):
    query, key, _, value, *rest = OPS["expected_attention"].inputs(Dims(), torch.float32, "cpu", 0)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    plain = op(query, key, None, value, *rest)
    exact, low = (slow(query, key, None, value, *rest, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(query @ turn, key @ turn, None, value, *rest), low, exact)
    assert_within_rounding(op(query, key @ turn, turn.expand(2, 4, -1, -1), value, *rest), low, exact)
    assert not torch.allclose(op(query, key @ turn, None, value, *rest), plain, rtol=0.1)


@forms("expected_attention")
def test_without_the_covariance_a_shift_of_all_keys_changes_nothing(op):
    query, key, rotation, value, valid, sinks, _, *rest = OPS["expected_attention"].inputs(Dims(), torch.float32, "cpu", 0)
    arguments = (rotation, value, valid, sinks, False, *rest)
    exact, low = (slow(query, key + 1.5, *arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_rounding(op(query, key, *arguments), low, exact)


@forms("expected_attention")
def test_rows_that_are_all_sinks_score_zero(op):
    query, key, rotation, value, _, *rest = OPS["expected_attention"].inputs(Dims(S=9), torch.float32, "cpu", 0)
    valid = torch.arange(9) >= torch.tensor([[5], [4]])
    score = op(query, key, rotation, value, valid, *rest)
    assert (score[0] == 0).all()
    assert (score[1, :, :8] == 0).all()
    torch.testing.assert_close(score[1, :, 8], value[1, :, 8].norm(dim=-1))  # alone, it gets all attention


# -- the hook library's ------------------------------------------------------------------------------------------------------------


def hook_score(query, key, turn, value, sinks=4, epsilon=0.0):
    """Of one row, [H, S, D], in the precision of its tensors: statistics, rotation, logits, softmax, mean, norm, sinks on top."""
    group, (heads, length, dim) = query.shape[0] // key.shape[0], key.shape
    states = query[:, sinks:]
    mu = states.mean(1)
    centred = states - mu[:, None]
    cov = torch.einsum("nsi,nsj->nij", centred, centred) / (length - sinks)
    R = turn.T.to(query.dtype)
    mu, cov = mu @ R.T, torch.matmul(R, torch.matmul(cov, R.T))
    keys = key[:, sinks:].repeat_interleave(group, 0).transpose(1, 2)
    scores = torch.matmul(mu[:, None], keys)[:, 0] / dim**0.5
    scores = scores + torch.einsum("hin,hij,hjn->hn", keys, cov, keys) / dim / 2
    scores = scores.softmax(-1).view(heads, group, -1).mean(1)
    scores = (scores + epsilon) * value[:, sinks:].norm(dim=-1)
    return F.pad(scores, (sinks, 0), value=scores.max().item() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_the_hook_librarys_score_rounds_as_that_library_does(dtype, epsilon):
    (query, key, value), S = Case(Dims(), dtype, "none", False, 3).draw((1, 6, 50, 16), (1, 2, 50, 16), (1, 2, 50, 16)), 50
    turn = reference.rotation(decoder("llama", 2, 3, 16, 0), S, 512)
    low = hook_score(query[0], key[0], turn, value[0], epsilon=epsilon)
    exact = hook_score(query[0].double(), key[0].double(), turn, value[0].double(), epsilon=epsilon)
    rotation = turn.float().expand(1, 6, -1, -1)
    actual = torch.ops.kvfx.kvpress_expected_attention(query, key, rotation, value, 4, True, epsilon)[0]
    assert (actual[:, :4] > actual[:, 4:].amax(-1, keepdim=True)).all()
    assert_within_rounding(actual[:, 4:], low[:, 4:], exact[:, 4:])


@pytest.mark.sample(1)
@pytest.mark.parametrize("length", [5, 60, 700])
def test_a_model_keeps_what_the_hook_library_keeps(length):
    model = decoder("llama", 2, 3, 16, 0)
    ids = torch.randint(1, 97, (1, length), generator=torch.Generator().manual_seed(length))
    cache = kvfx.compile(model, "expected_attention@kvpress:0.3", backend="eager").compress(ids)
    turn = reference.rotation(model, length, 512)
    for layer, taps in zip(cache.layers, reference.capture(model, ids)[0], strict=True):
        score = hook_score(taps.pre_query[0], taps.key[0], turn, taps.value[0])
        exact = hook_score(*(taps.pre_query[0].double(), taps.key[0].double(), turn, taps.value[0].double()))
        noise = 8 * float((score - exact).abs().max())
        count = max(1, int(length * (1 - (1 - 0.3))))
        for head, (ours, theirs) in enumerate(zip(layer.positions[0].tolist(), reference.best(exact, count), strict=True)):
            lost, won = reference.swapped(exact[head], theirs, ours)
            assert len(ours) == count
            assert all(a - b <= noise for a, b in zip(sorted(lost), sorted(won), strict=True))


def test_the_hook_librarys_preset_asks_for_more_tokens_than_sinks_and_one_row():
    compiled = kvfx.compile(decoder("llama", 2, 2, 16, 0, layers=1), "expected_attention@kvpress:0.5", backend="eager")
    with pytest.raises(kvfx.InputError, match="at least 5 tokens"):
        compiled.compress(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(kvfx.InputError, match="needs one row without padding"):
        compiled.compress(torch.ones(2, 9, dtype=torch.long))


# -- the rotation of later queries -------------------------------------------------------------------------------------------------

PLAN = lower(Policy.parse("expected(6) | budget=uniform(0.5)"))
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "attn_implementation": "sdpa", "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODELS = {
    "Llama": {},
    "Llama with yarn": {"rope_parameters": YARN},  # scales cosines and sines
    "Qwen3": {"head_dim": 16},  # norms before RoPE
    "Phi3": {"rope_parameters": HALF},  # half of the channels, fused projections
    "Glm4": {"head_dim": 16},  # pairs, half of the channels
    "Cohere": {},  # pairs, in float32 whatever the model is in
    "GPTNeoX": {"num_key_value_heads": None},
    "StableLm": {},
    "Gemma3": {"head_dim": 16, "layer_types": ["full_attention"] * 2},
}


def model_of(name: str, dtype: torch.dtype = torch.float32):
    family = name.split()[0]
    sizes = {key: value for key, value in {**SIZES, **MODELS[name]}.items() if value is not None}
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)
    model.config.head_dim = 16
    model.config.num_key_value_heads = sizes.get("num_key_value_heads", 4)
    return model


def attached(module: fx.GraphModule) -> Report:
    report = Report()
    find_attention(module, PLAN, report)
    attach_cache(module, PLAN, report)
    module.graph.lint()
    return report


def mean_query(model, ids: Tensor, starts: Tensor, future: int) -> Tensor:
    """The first layer's queries with RoPE, averaged over positions: there a query depends on its token and position alone."""
    seen: list[Tensor] = []
    real = F.scaled_dot_product_attention

    def attend(query: Tensor, *args, **kwargs) -> Tensor:
        seen.append(query.double())
        return real(query, *args, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        for step in range(future):
            model(input_ids=ids, position_ids=(starts + step)[:, None].expand(ids.shape), use_cache=False)
    finally:
        F.scaled_dot_product_attention = real
    return sum(seen[:: len(seen) // future]) / future


@torch.no_grad()
def check_rotation(model, exact_model, padded: bool, past: int = 0) -> None:
    ids = torch.arange(18).reshape(2, 9)
    valid = torch.arange(9) >= torch.tensor([[0], [3]]) if padded else None
    module = traced_step(model, ids, valid=valid, keep=4, past=past)
    report = attached(module)
    assert report.reasons() == []
    for site in report.sites:
        assert site.taps == ("key", "value", "pre_query", "rotation")
    nodes = [report.sites[0].nodes[name] for name in ("pre_query", "rotation_6")]
    seen = torch.full((2,), past)
    pre_query, rotation = computed(module, nodes, model=model, tokens={"input_ids": ids}, seen=seen, valid=valid)
    assert rotation.dtype == torch.float32
    starts = seen + (torch.tensor([9, 6]) if padded else 9)
    exact, low = (mean_query(m, ids, starts, 6) for m in (exact_model, model))
    assert_within_rounding(pre_query.double() @ rotation.double(), low, exact)


@pytest.mark.sample(2)
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("name", MODELS)
def test_the_rotation_is_what_the_model_does_to_queries_at_the_positions_that_follow(name, padded):
    model = model_of(name)
    exact = model if name == "Cohere" else model_of(name, torch.float64)  # its RoPE does not run in float64
    check_rotation(model, exact, padded)


def test_behind_a_grown_cache_positions_go_on():
    check_rotation(model_of("Llama"), model_of("Llama", torch.float64), padded=True, past=7)


def test_half_precision_rotates_by_the_factors_that_the_model_rounded():
    check_rotation(model_of("Llama", torch.bfloat16), model_of("Llama", torch.bfloat16).double(), padded=False)


def test_a_model_without_rope_needs_no_rotation():
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64,
        attn_implementation="sdpa",
    )  # fmt: skip
    config.num_key_value_heads, config.head_dim = 4, 16
    module = traced_step(transformers.OPTForCausalLM(config).eval(), torch.ones(2, 9, dtype=torch.long), keep=4)
    (site,) = attached(module).sites
    assert site.refusal == ""
    assert site.nodes["pre_query"] is site.nodes["query"]
    assert "rotation_6" not in site.nodes


def query_of(turn) -> fx.GraphModule:
    """The graph of a query that `turn` makes of token data, positions and other integers; its lengths are symbols."""

    def queries(ids, weight, projection, positions, other):
        x = F.linear(F.embedding(ids, weight), projection).view(*ids.shape, 2, 8).transpose(1, 2)
        return turn(x, positions, other)

    ids = torch.ones(2, 7, dtype=torch.long)
    positions = torch.arange(7)[None].repeat(2, 1)
    return graph_of(queries, ids, randn(9, 16), randn(16, 16), positions, positions + 2)


def angles(positions: Tensor) -> Tensor:
    return positions[:, None, :, None] * torch.arange(1, 5) / 10


def turned(x: Tensor, positions: Tensor, spelling: str = "halves") -> Tensor:
    return rotate(x, angles(positions).cos(), angles(positions).sin(), spelling)


def rotation_of(module: fx.GraphModule, future: int = 3) -> fx.Node | None:
    positions = module.graph.find_nodes(op="placeholder")[3]
    return FutureRotation(future).of(module.graph.output_node().args[0], positions, before=module.graph.output_node())


def turned_by_parts(x: Tensor, positions: Tensor, spelling: str) -> Tensor:
    """With frequencies, and then cosines and sines, taken out of joint tensors."""
    low, high = torch.arange(1, 5, device=x.device).div(10).split(2)
    angle = positions[:, None, :, None] * torch.cat([low, high])
    cos, sin = torch.stack([angle.cos(), angle.sin()]).unbind(0)
    return rotate(x, cos, sin, spelling)


def turned_as_complex(x: Tensor, positions: Tensor, _: str) -> Tensor:
    factors = torch.polar(torch.ones_like(angles(positions)), angles(positions))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(3, (4, 2))) * factors).flatten(3)


def turned_behind_tokens(x: Tensor, positions: Tensor, spelling: str) -> Tensor:
    """With heads behind tokens while they are turned, [B, S, H, D]."""
    angle = angles(positions).transpose(1, 2)
    return rotate(x.transpose(1, 2).clone(), angle.cos(), angle.sin(), spelling).transpose(1, 2)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("turn", "spelling"),
    [
        *itertools.product([turned, turned_by_parts, turned_behind_tokens], ["halves", "pairs", "part of the head"]),
        (turned_as_complex, "pairs"),
    ],
)
def test_the_rotation_is_read_from_every_spelling(spelling, turn):
    module = query_of(lambda x, positions, _: 0.5 * turn(x, positions // 2, spelling))
    module.graph.output_node().args = (rotation_of(module),)
    module.recompile()
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]])
    ours = module(torch.ones(2, 7, dtype=torch.long), randn(9, 16), randn(16, 16), positions, positions)
    eye = torch.eye(8).expand(2, 1, 8, 8)
    steps = [turned(eye, (torch.tensor([[5], [12]]) + step).expand(2, 8) // 2, spelling) for step in range(3)]
    torch.testing.assert_close(ours, (sum(steps) / 6).expand(2, 2, 8, 8))


def test_the_rotation_is_not_rounded_where_rope_rounds_its_result():
    module = query_of(lambda x, positions, _: turned(x, positions).bfloat16())
    module.graph.output_node().args = (rotation_of(module),)
    module.recompile()
    positions = torch.arange(7)[None].repeat(2, 1)
    ours = module(torch.ones(2, 7, dtype=torch.long), randn(9, 16), randn(16, 16), positions, positions)
    exact, low = (sum(turned(torch.eye(8, dtype=d)[None, None], torch.full((1, 8), 7 + step)) for step in range(3)) / 3
                  for d in (torch.float64, torch.float32))  # fmt: skip
    assert_within_rounding(ours, low.expand(2, 2, 8, 8), exact.expand(2, 2, 8, 8))


def looked_up(x: Tensor, positions: Tensor, _: Tensor) -> Tensor:
    table = (torch.arange(64)[:, None] * torch.arange(1, 5)).to(x.dtype)
    return rotate(x, table.cos()[positions][:, None], table.sin()[positions][:, None], "halves")


NOT_LINEAR = "inside RoPE is not known to be linear in the query and in the factors of its position"
NEAR_MISSES = {
    "a norm behind RoPE": (lambda x, p, _: F.normalize(turned(x, p), dim=-1), rf"`\w*norm\w*` {NOT_LINEAR}"),
    "a shift": (lambda x, p, _: turned(x, p) + 1, rf"`add_1` {NOT_LINEAR}"),
    "a bias": (lambda x, p, _: turned(x, p) + p[:, None, :, None], rf"`add_1` {NOT_LINEAR}"),
    "a second factor": (lambda x, p, _: turned(x, p) * (1 + p[:, None, :, None]).log(), rf"`mul_\d` {NOT_LINEAR}"),
    "RoPE twice": (lambda x, p, _: turned(turned(x, p), p), rf"`mul_\d` {NOT_LINEAR}"),
    "division by a factor": (lambda x, p, _: turned(x, p) / (1 + p)[:, None, :, None], rf"`div_\d` {NOT_LINEAR}"),
    "the square of the query": (lambda x, p, _: x * turned(x, p), rf"`mul_\d` {NOT_LINEAR}"),
    "a table": (looked_up, r"looks its factors up \(`index`\) in a table that may not reach the positions that follow"),
    "positions of its own": (
        lambda x, p, _: turned(x, torch.arange(x.shape[2])[None]),
        "RoPE reads `arange`, which is not the positions that the cache stores",
    ),
    "other positions": (lambda x, p, other: turned(x, other), r"RoPE reads `other_1`, which is not the positions"),
    "positions of the whole row": (
        lambda x, p, _: turned(x, p - p.amax(-1, keepdim=True)),
        "`amax`, of which RoPE makes its factors, does not have one axis of tokens",
    ),
    "a size that grows twice as fast": (
        lambda x, p, _: turned(x, p.repeat_interleave(2, 1).view(p.shape[0], -1, 2)[..., 0]),
        "does not have one axis of tokens",
    ),
    "a computed size": (
        lambda x, p, _: turned(x, p).reshape(*x.shape[:2], 2 * x.shape[2], 4).reshape(x.shape),
        r"RoPE reads the size `\w+` = 2\*s\d+, computed from the number of tokens",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_is_not_understood_is_refused_with_its_reason_and_nothing_is_changed(case):
    turn, reason = NEAR_MISSES[case]
    module = query_of(turn)
    before = readable(module)
    with pytest.raises(Refuse, match=reason):
        rotation_of(module)
    assert readable(module) == before


def test_a_graph_of_one_length_is_refused_but_for_one_token_which_stays_whatever_its_score():
    for tokens in (7, 1):
        shape = (2, 2, tokens, 8)
        positions = torch.arange(tokens)[None].repeat(2, 1)
        module = make_fx(lambda ids, weight, p: turned(F.embedding(ids, weight), p), pre_dispatch=True)(
            torch.ones(shape[:3], dtype=torch.long), randn(9, 8), positions
        )
        query, placeholders = module.graph.output_node().args[0], module.graph.find_nodes(op="placeholder")
        if tokens == 1:
            assert FutureRotation(3).of(query, placeholders[2], module.graph.output_node()) is None
        else:
            with pytest.raises(Refuse, match="the graph is for 7 tokens alone, which hides where RoPE depends on their number"):
                FutureRotation(3).of(query, placeholders[2], module.graph.output_node())


# -- in the graph of a model -------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded rows"])
def test_the_rotation_adds_no_graph(padded):
    torch._dynamo.reset()
    model = decoder("llama", 2, 2, 16, 0, layers=1)
    compiled = kvfx.compile(model, "expected_attention:0.5", backend="eager", on_refuse="error")
    for length in LENGTHS[2:] if padded else LENGTHS:
        ids = torch.ones(2, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, 0] = not padded
        compiled.compress(ids, mask)
    counts = graphs(model)
    assert sum(counts.values()) == (1 if padded else 2), counts


def test_layers_share_the_factors_of_later_positions():
    cosines = []
    for layers in (1, 4):
        module = traced_step(decoder("llama", 2, 2, 16, 0, layers=layers), torch.ones(1, 9, dtype=torch.long), keep=4)
        attached(module)
        cosines.append(len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)))
    assert cosines == [2, 2]


@pytest.mark.slow
def test_two_horizons_in_one_policy_are_two_rotations():
    model, ids = decoder("llama", 2, 2, 16, 0, layers=1), torch.arange(60)[None]
    texts = ("expected(4)", "expected(2000)", "expected(4) + 0*expected(2000)", "0*expected(4) + expected(2000)")
    near, far, with_near, with_far = (
        kvfx.compile(model, f"{text} | budget=uniform(0.3)", backend="eager").compress(ids).layers[0].positions for text in texts
    )
    assert torch.equal(near, with_near)
    assert torch.equal(far, with_far)
    assert not torch.equal(near, far)


def test_a_second_document_is_scored_by_the_queries_that_follow_it():
    model, ids = decoder("llama", 2, 2, 16, 0, layers=1), torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    compiled = kvfx.compile(model, "expected_attention:0.5", backend="eager")
    cache = kvfx.compile(model, "knorm:1", backend="eager").compress(ids[:, :37])
    grown = compiled.compress(ids[:, 37:], past_key_values=cache).layers[0].positions[0, :, -11:]
    (taps,), _ = reference.capture(model, ids)
    read = (getattr(taps, name)[:, :, 37:] for name in ("query", "key", "value", "pre_query", "pre_key"))
    later = reference.Taps(*read, taps.output)
    score = reference.expected_attention(later, model, start=60)
    best = reference.best(reference.protected(score, 4, 0), 11)
    assert grown.tolist() == [[37 + position for position in head] for head in best]
