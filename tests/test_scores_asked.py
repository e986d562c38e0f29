"""The marker by which a cache asks what new tokens are worth, and makes its choice itself."""

from __future__ import annotations

import pytest
import torch

from kvfx.cache import CacheLayer
from kvfx.engine import step
from kvfx.lower import lower
from kvfx.passes import capture, run
from kvfx.passes.report import Unscored
from kvfx.policy import Policy
from kvfx.slot_cache import SlotCache
from reference import capture as taps_of
from reference import knorm, protected, snapkv
from test_equivalence import decoder, padded
from yardstick import assert_within_rounding

SNAPKV = "attn(q=win(8), mask=causal, over=mean, heads=mean, v=none, pool=avg(3), scale=model)"


class Asking(SlotCache):
    """Stores everything, and remembers what it is told of its tokens."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        layer, counts = self.layers[layer_idx], self.counts and self.counts[0]
        told = torch.ops.kvfx.cache_score(key_states, value_states, self.positions, counts, layer_idx)
        layer.keys, layer.values, layer.finite = told
        return key_states, value_states


def told(model, ids, mask, policy: str) -> list[CacheLayer]:
    """What the layers of a cache are told about a prompt."""
    layers = [CacheLayer() for _ in range(model.config.num_hidden_layers)]
    counts = None if mask is None else [mask.sum(1)]
    slots = Asking(layers, counts=counts)
    plan = lower(Policy.parse(policy))
    compiled = capture.compile_with(step, lambda module: run(module, plan, check_each=True) and None, "eager")
    valid = None if mask is None else mask.bool()
    with torch.no_grad():
        compiled(model, slots, torch.zeros(len(ids), dtype=torch.long), valid, {"input_ids": ids}, {}, True)
    return layers


@pytest.mark.parametrize("lengths", [[23], [23, 9]], ids=str)
def test_a_cache_is_told_the_protected_score_of_its_tokens(lengths):
    model = decoder("llama", 2, 2, 16, 0)
    ids, mask = padded(lengths, 0)
    mask = mask if len(lengths) > 1 else None
    layers = told(model, ids, mask, "knorm:0.5 | protect(sinks=2, recent=3)")
    taps, _ = taps_of(model, ids, mask)
    for layer, each in zip(layers, taps, strict=True):
        assert torch.equal(layer.keys, layer.values)
        assert bool(layer.finite)
        for row, length in enumerate(lengths):
            real = slice(ids.shape[1] - length, None)
            alone = type(each)(*(x[row : row + 1, :, real] if x.dim() == 4 else x for x in vars(each).values()))
            exact = protected(knorm(alone), 2, 3)
            assert_within_rounding(layer.keys[row, :, real], exact.float(), exact)
            assert bool((layer.keys[row, :, : ids.shape[1] - length] == -torch.inf).all())


def test_of_a_splice_both_scores_are_told():
    model, ids = decoder("llama", 2, 2, 16, 0), padded([30], 1)[0]
    layers = told(model, ids, None, f"splice(-knorm, {SNAPKV}, 0.5) | budget=uniform(0.5)")
    for layer, each in zip(layers, taps_of(model, ids)[0], strict=True):
        first, then = knorm(each), snapkv(each, 8, 3)
        torch.testing.assert_close(layer.keys[0].double(), first, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.values[0].double(), then, rtol=1e-5, atol=1e-6)


def test_a_layer_that_no_attention_understood_reads_cannot_be_scored(monkeypatch):
    model, ids = decoder("llama", 2, 2, 16, 0), padded([9], 1)[0]
    other = model.model.layers[1].self_attn
    monkeypatch.setattr(other, "forward", unread(other))
    with pytest.raises(Exception, match="no attention found in this graph reads it") as failed:
        told(model, ids, None, "knorm:0.5")
    error = failed.value
    while not isinstance(error, Unscored):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    assert list(error.layers) == [1]


def unread(attention):
    """An attention that stores keys and reads none of them."""

    def forward(hidden_states, past_key_values=None, **kwargs):
        heads = attention.k_proj(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        past_key_values.update(heads, heads, attention.layer_idx)
        return hidden_states, None

    return forward
