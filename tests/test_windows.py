"""Layers with sliding windows: they hold their window, whatever the policy, and the model's own masks say what it is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import kvfx
from kvfx.engine import engine_of

WINDOW = 8
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW, "initializer_range": 0.2, "attn_implementation": "sdpa",
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@functools.cache
def mixed() -> Gemma3ForCausalLM:
    """A window below, full attention above; norms are random, so that keys do not all have one norm."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"])
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.5, 0.5)
    return model


@functools.cache
def compiled(policy: str) -> Any:
    return kvfx.compile(mixed(), policy, backend="eager", on_refuse="error")


def forget_models() -> None:
    """Let the next test trace anew."""
    mixed.cache_clear()
    compiled.cache_clear()
    torch._dynamo.reset()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.sample(1)
@torch.no_grad()
@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, 30])
def test_keeping_all_is_the_model_itself_over_a_growing_window(length):
    model, plain = compiled("knorm:1.0"), DynamicCache(config=mixed().config)
    cache = model.compress(tokens(1, length))
    mixed()(tokens(1, length), past_key_values=plain)
    for step, new in enumerate([1, 1, 3, 1, 12, 1, 1]):
        more = tokens(1, new, seed=step)
        expected = mixed()(more, past_key_values=plain).logits
        torch.testing.assert_close(model(more, past_key_values=cache).logits, expected)
    assert [layer.slots for layer in cache.layers] == [WINDOW - 1, length + 20]
    assert [layer.kind for layer in cache.layers] == ["window", "full"]
    seen = length + 20
    assert cache.layers[0].positions[0, 0].tolist() == list(range(seen - WINDOW + 1, seen))


def test_a_policy_evicts_from_full_layers_and_leaves_windows_alone():
    cache = compiled("knorm:0.5").compress(tokens(1, 30))
    assert [layer.slots for layer in cache.layers] == [WINDOW - 1, 15]
    [window, full] = kvfx.explain(compiled("knorm:0.5")).report.sites
    assert (window.layer, window.window, window.score) == (0, WINDOW, "")
    assert (full.layer, full.window, full.score) == (1, None, "key_norm")


def test_decoding_after_an_eviction_hides_what_was_evicted_and_nothing_else():
    context, more = tokens(1, 30), tokens(1, 12, seed=3)
    cache = compiled("knorm:0.5").compress(context)
    kept = cache.layers[1].positions[0].long()
    assert kept[0].tolist() != kept[1].tolist()
    hidden = torch.ones(1, 2, 30, dtype=torch.bool)
    hidden[0].scatter_(1, kept, False)
    expected = with_hidden(context, hidden, more)
    actual = torch.cat([compiled("knorm:0.5")(more[:, i : i + 1], past_key_values=cache).logits for i in range(12)], 1)
    torch.testing.assert_close(actual, expected)
    block = compiled("knorm:0.5")(more, past_key_values=compiled("knorm:0.5").compress(context)).logits
    torch.testing.assert_close(block, expected)


@torch.no_grad()
def with_hidden(context: Tensor, hidden: Tensor, more: Tensor) -> Tensor:
    """Logits of `more` by the plain model with all keys, some of which the second layer's heads do not see."""
    plain, real, calls = DynamicCache(config=mixed().config), torch.nn.functional.scaled_dot_product_attention, []
    mixed()(context, past_key_values=plain)

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        calls.append(key)
        if len(calls) % 2 == 0:
            seen = torch.nn.functional.pad(~hidden, (0, key.shape[2] - 30), value=True).repeat_interleave(2, 1)[:, :, None]
            attn_mask = seen if attn_mask is None else seen & attn_mask
        return real(query, key, value, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        return torch.cat([mixed()(more[:, i : i + 1], past_key_values=plain).logits for i in range(more.shape[1])], 1)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


@pytest.mark.sample(1)
@pytest.mark.parametrize("pads", [5, 27])
def test_padded_rows_equal_themselves_alone(pads):
    model = compiled("knorm:0.5")
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    ids[0, :pads], mask[0, :pads] = 0, 0
    together, alone = model.compress(ids, mask), model.compress(ids[:1, pads:])
    for step in range(WINDOW + 2):
        new = tokens(2, 1, seed=step)
        logits = model(new, past_key_values=together).logits[:1]
        torch.testing.assert_close(logits, model(new[:1], past_key_values=alone).logits)
    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        positions = [position for position in ours.positions[0, 0].tolist() if position >= 0]
        assert positions == theirs.positions[0, 0].tolist()


def test_later_turns_of_different_lengths_are_refused():
    model = compiled("knorm:0.5")
    cache = model.compress(tokens(2, 12))
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 12] = 0
    with pytest.raises(
        kvfx.InputError, match=r"\[2, 3\], after the first turn: padding would count as part of the sliding windows"
    ):
        model(tokens(2, 3), attention_mask=mask, past_key_values=cache)


def test_later_turns_of_different_lengths_are_refused_where_a_bias_counts_columns():
    config = MptConfig(vocab_size=97, d_model=32, n_layers=1, n_heads=2, max_seq_len=64, expansion_ratio=2)
    model = kvfx.compile(MptForCausalLM(config).eval(), "knorm:0.5", backend="eager")
    cache = model.compress(tokens(2, 12))
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 12] = 0
    with pytest.raises(kvfx.InputError, match=r"\[2, 3\], after the first turn: padding would count as distance in the bias"):
        model(tokens(2, 3), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 12
    assert model(tokens(2, 3), past_key_values=cache).past_key_values.get_seq_length() == 15


def test_a_window_survives_copies_files_beams_and_says_what_it_cannot_forget(tmp_path):
    model = compiled("knorm:0.5")
    cache = model.compress(tokens(1, 30))
    cache.save(tmp_path / "a.kvfx")
    loaded, new = kvfx.load_cache(tmp_path / "a.kvfx"), tokens(1, 1, seed=9)
    expected = model(new, past_key_values=cache.copy()).logits
    assert torch.equal(model(new, past_key_values=loaded).logits, expected)
    out = model.generate(tokens(1, 1), past_key_values=cache.copy(), append=True, num_beams=2, do_sample=False, max_new_tokens=4)
    assert out.shape == (1, 5)
    model(new, past_key_values=cache)
    with pytest.raises(kvfx.CacheMismatch, match="cannot crop 1 tokens"):
        cache.crop(-1)


@pytest.mark.slow
def test_all_lengths_share_few_graphs():
    torch._dynamo.reset()
    model = kvfx.compile(mixed(), "knorm:0.5", backend="eager")
    engine = engine_of(mixed(), "eager")
    engine.reports.clear()
    for length in (30, 12, 5, 8, 7, 6, 31, 9):
        cache = model.compress(tokens(1, length))
        for _ in range(4):
            model(tokens(1, 1), past_key_values=cache)
    counts = {key.phase: len(reports) for key, reports in engine.reports.items()}
    assert counts["prefill"] <= 4
    assert counts["decode"] <= 4


def test_a_model_of_windows_alone_is_told_that_nothing_is_compressed():
    model = kvfx.compile(MistralForCausalLM(MistralConfig(**SIZES)).eval(), "knorm:0.5", backend="eager")
    with pytest.warns(UserWarning, match=r"no cache layer of MistralForCausalLM is compressed: all hold sliding windows, of \[8\]"):
        cache = model.compress(tokens(1, 20))
    assert [layer.slots for layer in cache.layers] == [WINDOW - 1] * 2


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_keeps_and_says_what_the_eager_backend_does():
    context, logits, caches = tokens(1, 30), {}, {}
    for backend in ("eager", "inductor"):
        model = kvfx.compile(mixed(), "compactor:0.5", backend=backend, on_refuse="error")
        caches[backend] = cache = model.compress(context)
        steps = [model(tokens(1, new, seed=new), past_key_values=cache).logits for new in (1, 3, 1)]
        logits[backend] = torch.cat(steps, 1)
    for ours, theirs in zip(caches["inductor"].layers, caches["eager"].layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
    torch.testing.assert_close(logits["inductor"], logits["eager"])
