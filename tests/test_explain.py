"""What a user is told: sites found, sites refused, and what a partly understood model does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kvfx
import reference
from kvfx.kernels.leverage import draw_sketch
from test_equivalence import decoder
from yardstick import assert_within_rounding

IDS = torch.arange(40)[None]


def every_other_eager(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Layer 0 uses scaled_dot_product_attention; layer 1 spells its softmax out, which no rule knows."""
    group, new, held = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if module.layer_idx == 0:
        mask = torch.ones(new, held, dtype=torch.bool).tril(held - new)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=group > 1)
        return out.transpose(1, 2).contiguous(), None
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    hidden = torch.ones(new, held, dtype=torch.bool).triu(held - new + 1)
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf).exp()
    return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("every_other_eager", every_other_eager)
AttentionMaskInterface.register("every_other_eager", sdpa_mask)


@pytest.fixture
def half_understood():
    model = decoder("llama", 2, 2, 16, 3)
    model.set_attn_implementation("every_other_eager")
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
    for word in ("2 of 2 layers compressed", "0-1", "sdpa", "4 q / 2 kv x 16", "pre_key", "chunk_attention", "leverage"):
        assert word in text
    data = json.loads(json.dumps(explanation.as_dict()))
    assert data["policy"] == str(compiled._kvfx.policy)
    assert data["coverage"] == 1.0


def test_a_model_that_has_not_run_and_no_inputs_is_an_error():
    compiled = kvfx.compile(decoder("llama", 2, 2, 16, 0), "knorm:0.5", backend="eager")
    with pytest.raises(kvfx.InputError, match="has not run yet; pass inputs"):
        kvfx.explain(compiled)


def test_only_compressed_models_are_explained():
    with pytest.raises(kvfx.InputError, match=r"was not made by kvfx\.compile"):
        kvfx.explain(decoder("llama", 2, 2, 16, 0))


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
    assert "left alone because" in str(explanation)


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
