"""What a user is told: sites found, sites refused, and what a partly understood model does."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama import modeling_llama

import kvfx
import reference
import zoo
from kvfx.explanation import Explanation
from kvfx.kernels.leverage import draw_sketch
from kvfx.passes.report import Refusal, Report, Site
from test_equivalence import decoder
from yardstick import assert_within_rounding

IDS = torch.arange(40)[None]


def no_rule_knows(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention without softmax, max or a fused call: the exponential of scores less their log-sum-exp."""
    group, new, held = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    hidden = torch.ones(new, held, dtype=torch.bool, device=key.device).triu(held - new + 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf)
    weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
    return (weights @ value).transpose(1, 2).contiguous(), None


def known_every_other(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Layer 0 uses scaled_dot_product_attention; layer 1 a spelling that no rule knows."""
    if module.layer_idx != 0:
        return no_rule_knows(module, query, key, value, attention_mask, scaling)
    new, held = query.shape[2], key.shape[2]
    mask = torch.ones(new, held, dtype=torch.bool).tril(held - new)
    gqa = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous(), None


def of_wrong_shape(module, query, key, value, attention_mask, **kwargs):
    return query @ key, None


for function in (no_rule_knows, known_every_other, of_wrong_shape):
    AttentionInterface.register(function.__name__, function)
    AttentionMaskInterface.register(function.__name__, sdpa_mask)


@pytest.fixture
def half_understood():
    model = decoder("llama", 2, 2, 16, 3)
    model.set_attn_implementation("known_every_other")
    return model


def test_a_model_that_has_not_run_is_explained_from_inputs_without_running_anything_of_its_own():
    compiled = kvfx.compile(decoder("llama", 2, 2, 16, 0), "compactor:0.5", backend="inductor")
    explanation = kvfx.explain(compiled, IDS)
    assert explanation.coverage == 1.0
    assert [site["layer"] for site in explanation.as_dict()["sites"]] == [0, 1]
    assert compiled._kvfx.engine.reports == {}


def test_an_explanation_is_a_table_and_json():
    compiled = kvfx.compile(decoder("llama", 2, 2, 16, 0), "compactor:0.5", backend="eager")
    compiled.compress(IDS)
    explanation = kvfx.explain(compiled)
    text = str(explanation)
    for word in (
        "2 of 2 layers compressed",
        "0-1",
        "sdpa",
        "4 q / 2 kv x 16",
        "pre_key",
        "chunk_attention",
        "0.5 of S",
        "reference",
    ):
        assert word in text
    data = explanation.as_dict()
    sites = [{**site, "taps": list(site["taps"]), "unseen": []} for site in data["sites"]]
    assert json.loads(json.dumps(data)) == {**data, "sites": sites}
    assert all("sdpa_attention.py" in site["where"] for site in data["sites"])
    assert data["policy"] == str(compiled._kvfx.policy)
    assert (data["coverage"], data["layout"], data["competition"]) == (1.0, "dense", "")


@pytest.fixture(scope="module")
def plain():
    return decoder("llama", 2, 2, 16, 0)


def test_without_inputs_a_short_prompt_is_made_up(plain):
    compiled = kvfx.compile(plain, "knorm:0.5", backend="inductor")
    assert kvfx.explain(compiled).coverage == 1.0
    assert compiled._kvfx.engine.reports == {}


def test_a_model_is_explained_under_any_policy_whether_compiled_or_not(plain):
    for model in (plain, kvfx.compile(plain, "compactor:0.5", backend="inductor")):
        explanation = kvfx.explain(model, policy="knorm:0.25")
        assert explanation.policy.name == "knorm:0.25"
        assert explanation.is_complete


def test_a_model_without_a_policy_is_an_error(plain):
    with pytest.raises(kvfx.InputError, match=r"was not made by kvfx\.compile, so it has no policy"):
        kvfx.explain(plain)


def test_a_model_without_any_known_attention_is_explained_too():
    model = decoder("llama", 2, 2, 16, 0)
    model.set_attn_implementation("no_rule_knows")
    explanation = kvfx.explain(model, IDS, policy="knorm:0.5")
    assert (explanation.coverage, explanation.layers, explanation.report.sites) == (0.0, 2, [])
    assert not explanation.is_complete
    [(op, count)] = explanation.as_dict()["leftovers"].items()
    assert op == "aten.matmul.default"
    assert count in (4, 5)  # two of each layer, and that of RoPE in some versions of transformers
    assert f"No attention was recognised. Found instead: {count} x aten.matmul.default." in str(explanation)


def test_a_model_that_cannot_be_traced_is_an_error_that_says_so():
    model = decoder("llama", 2, 2, 16, 0)
    model.set_attn_implementation("of_wrong_shape")
    with pytest.raises(kvfx.UnsupportedModel, match="LlamaForCausalLM cannot be traced"):
        kvfx.explain(model, policy="knorm:0.5")


def test_a_site_that_is_not_understood_is_left_whole_and_reported(half_understood):
    compiled = kvfx.compile(half_understood, "compactor:0.5", backend="eager")
    with pytest.warns(UserWarning, match="1 of 2 cache layers of LlamaForCausalLM are compressed"):
        cache = compiled.compress(IDS)
    assert [layer.slots for layer in cache.layers] == [20, 40]
    explanation = kvfx.explain(compiled)
    assert explanation.coverage == 0.5
    assert explanation.report.reasons() == [
        "cache_write_1 (attach_cache): cache layer 1 stores keys that no attention found in this graph reads"
    ]
    (refusal,) = explanation.as_dict()["refusals"]
    file, line, code = refusal["where"].removeprefix("model.layers.1.self_attn: ").split(":", 2)
    assert file == "transformers/models/llama/modeling_llama.py"
    assert code.strip() in Path(modeling_llama.__file__).read_text().splitlines()[int(line) - 1]
    assert "past_key_values.update(" in code
    assert "left alone cache_write_1 because cache layer 1" in " ".join(str(explanation).split())


def test_a_partly_compressed_model_decodes_what_its_slots_say(half_understood):
    compiled = kvfx.compile(half_understood, "compactor:0.5", backend="eager")
    with pytest.warns(UserWarning, match="1 of 2"):
        cache = compiled.compress(IDS)
    sdpa = decoder("llama", 2, 2, 16, 3)
    taps, _ = reference.capture(sdpa, IDS)
    score = reference.protected(reference.compactor(taps[0], sketch=draw_sketch(0, 0, 2, 16, 48)), 8, 4)
    hidden = [torch.ones(1, 2, 40, dtype=torch.bool), torch.zeros(1, 2, 40, dtype=torch.bool)]
    for head, positions in enumerate(reference.best(score, 20)):
        hidden[0][0, head, positions] = False
        assert cache.layers[0].positions[0, head].tolist() == positions
    tokens = torch.tensor([[5, 9, 2]])
    ours = torch.cat([compiled(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(3)], 1)
    low = reference.continue_with(sdpa, IDS, hidden, tokens)
    exact = reference.continue_with(copy.deepcopy(sdpa).double(), IDS, hidden, tokens)
    assert_within_rounding(ours, low, exact)


def test_a_site_that_is_not_understood_is_an_error_if_asked_for(half_understood):
    compiled = kvfx.compile(half_understood, "compactor:0.5", backend="eager", on_refuse="error")
    with pytest.raises(kvfx.SiteRefused, match="the others are kept whole"):
        compiled.compress(IDS)


def printed(explanation: Explanation, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(explanation)
    return console.file.getvalue()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("family", "policy", "layout", "kept", "said"),
    [
        ("llama", "adakv@kvpress:0.25", "ragged", "0.25 of S", "each is sure of 0.2 of that and of 1 slot. Slots are in"),
        (
            "mixtral",
            "knorm | budget=heads(tokens=20)",
            "ragged",
            "20 tokens",
            "the heads compete, and each is sure of nothing",
        ),
        (
            "llama",
            "knorm | budget=layers(0.5, max=99)",
            "dense",
            "0.5 of S, at most 99",
            "each is sure of 2 slots. The cut",
        ),
    ],
)
def test_heads_and_layers_that_compete_are_explained_without_weights(family, policy, layout, kept, said):
    explanation = kvfx.explain(zoo.make(zoo.ROWS[family]).to("meta"), policy=policy)  # where mixtral cannot run
    data, text = explanation.as_dict(), " ".join(str(explanation).split())
    assert explanation.is_complete
    assert (data["layout"], {site["budget"] for site in data["sites"]}) == (layout, {kept})
    assert said in data["competition"]
    assert data["competition"] in text
    assert ("layout ragged" in text) == (layout == "ragged")
    assert all(site["score"] for site in data["sites"])


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["heads", "layers"])
def test_what_is_not_understood_takes_no_part_in_a_competition(half_understood, pool):
    explanation = kvfx.explain(half_understood, policy=f"knorm | budget={pool}(0.5)")
    assert (explanation.coverage, explanation.layers) == (0.5, 2)
    assert [site["budget"] for site in explanation.as_dict()["sites"]] == ["0.5 of S"]
    half_understood.set_attn_implementation("no_rule_knows")
    explanation = kvfx.explain(half_understood, policy=f"knorm | budget={pool}(0.5)")
    assert (explanation.coverage, explanation.layers, explanation.competition()) == (0.0, 2, "")
    half_understood.set_attn_implementation("of_wrong_shape")
    with pytest.raises(kvfx.UnsupportedModel, match="LlamaForCausalLM cannot be traced"):
        kvfx.explain(half_understood, policy=f"knorm | budget={pool}(0.5)")


def report(layers: int, **differing: list) -> Report:
    """Of a model of equal layers, but for what differs."""
    sites = [
        Site("eager", index, 8, 2, 64, "repeated keys", index, taps=("query", "key"), score="window_attention", lowering="kernel")
        for index in range(layers)
    ]
    for name, values in differing.items():
        for site, value in zip(sites, values, strict=True):
            setattr(site, name, value)
    return Report(sites, layers=layers)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("knorm:1/3", ["1/3 of S"] * 4),
        ("snapkv | budget=uniform(tokens=1024)", ["1024 tokens"] * 4),
        ("lagkv | budget=uniform(0.25, per=chunk(1024))", ["0.25 of each 1024"] * 4),
        ("knorm | budget=uniform(0.5, shape=pyramid(2))", ["0.75 of S", "0.583 of S", "0.417 of S", "0.25 of S"]),
        ("knorm | budget=uniform(tokens=100, shape=pyramid(2))", ["150 tokens", "116 tokens", "84 tokens", "50 tokens"]),
        ("none", ["all"] * 4),
    ],
)
def test_what_a_layer_keeps_is_said_in_words(policy, kept):
    explanation = Explanation("Model", kvfx.Policy.parse(policy), report(4))
    assert [site["budget"] for site in explanation.as_dict()["sites"]] == kept
    assert f"{kept[0].split()[0]} to {kept[-1]}" in str(explanation) or len(set(kept)) == 1


def test_layers_that_are_treated_alike_share_a_row_though_others_stand_between_them():
    windows = [512, 512, None, 512, 512, None]
    text = printed(Explanation("Model", kvfx.Policy.parse("snapkv:0.5"), report(6, window=windows)), 160)
    rows = [tuple(cell.strip() for cell in line.split("   ") if cell.strip()) for line in text.splitlines()]
    assert [(row[0], row[-2]) for row in rows if "kv x" in str(row)] == [("0-1, 3-4", "window of 512"), ("2, 5", "0.5 of S")]


@pytest.mark.parametrize("width", [100, 160])
def test_refusals_that_are_alike_are_one_with_everything_said(width):
    code = "transformers/models/some_model/modeling_some_model.py:300: attention = " + "scores + " * 8
    refused = [
        Refusal(
            "eager", f"`softmax_{n}` is over axis 1 of [b, h], expected the last", f"matmul_{n}", "kvfx.passes.attention.eager:40",
            "rule eager fitted 5 of 8 ops, then `tanh` where add was expected", f"model.layers.{n}.self_attn: {code}",
        )
        for n in range(3)
    ]  # fmt: skip
    found = report(2, refusal=["dropout 0.1 inside attention", ""])
    found.refusals += [*refused, Refusal("sinks", "no sinks", "cat_9")]
    text = printed(Explanation("Model", kvfx.Policy.parse("snapkv:0.5"), found), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for said in (
        "left alone layer 0 because dropout 0.1 inside attention rule eager",
        "left alone matmul_0 and 2 more like it, to matmul_2 because `softmax_0` is over axis 1 of [b, h], expected the last",
        f"in model.layers.0.self_attn: {code.strip()} rule eager, kvfx.passes.attention.eager:40 nearest rule eager fitted 5 of 8",
        "left alone cat_9 because no sinks rule sinks",
    ):
        assert said in words
    assert "matmul_1" not in words


def test_what_a_score_leaves_out_of_attention_is_said():
    config = Gemma2Config(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16, layer_types=["full_attention"])  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")  # the default of some versions has no cap
    [site] = kvfx.explain(model, policy="snapkv:0.5").report.sites
    assert site.unseen == ("soft cap",)
    [site] = kvfx.explain(model, policy="compactor:0.5").report.sites
    assert site.unseen == ()  # its attention is one of its own, without scale, mask and cap
