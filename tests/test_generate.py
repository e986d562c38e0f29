"""Generation on compressed caches: every way of asking gives what asking plainly gives."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import kvfx
from decoding import GREEDY, compiled, fresh_llama, llama, ones, tokens
from kvfx.presets import PRESETS

CONTEXT, QUESTION = tokens(1, 40), tokens(1, 5, seed=2)
FULL = torch.cat([CONTEXT, QUESTION], 1)
HALF = "knorm:0.5"


def left(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the left to `length`, and their mask."""
    ids = torch.stack([torch.cat([torch.zeros(length - row.numel(), dtype=torch.long), row.flatten()]) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - row.numel()).long() for row in rows])
    return ids, mask


def state(cache: kvfx.Cache) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cache.tensors().items()}


def assert_same_state(cache: kvfx.Cache, before: dict[str, Tensor]) -> None:
    now = cache.tensors()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.sample(4)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_keeping_all_gives_the_logits_of_the_model(preset):
    policy = preset if preset == "none" else f"{preset}:1.0"
    context = torch.cat([CONTEXT, CONTEXT], 1)  # snapkv@kvpress scores no prompt as short as its window
    logits = compiled(policy)(context).logits
    torch.testing.assert_close(logits, llama()(context).logits)


def test_sampling_when_all_is_kept_draws_what_the_model_draws():
    options = {"do_sample": True, "top_k": 20, "temperature": 1.3, "max_new_tokens": 12}
    torch.manual_seed(7)
    expected = llama().generate(FULL, **options)
    torch.manual_seed(7)
    assert torch.equal(compiled("knorm:1.0").generate(FULL, **options), expected)


def test_prompt_compressed_by_generate_equals_compress_and_append():
    model = compiled(HALF)
    cache = model.compress(FULL)
    out = model(torch.tensor([[9]]), past_key_values=cache.copy())
    other = model(FULL).past_key_values
    assert torch.equal(model(torch.tensor([[9]]), past_key_values=other).logits, out.logits)
    assert cache.layers[0].slots == 22
    assert cache.get_seq_length() == 45


@pytest.mark.slow
@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=["best", "two"])
def test_beams_when_all_is_kept_are_those_of_the_model(beams):
    expected = llama().generate(FULL, **GREEDY, **beams)
    assert torch.equal(compiled("knorm:1.0").generate(FULL, **GREEDY, **beams), expected)
    cache = compiled("knorm:1.0").compress(CONTEXT)
    assert torch.equal(compiled("knorm:1.0").generate(FULL, past_key_values=cache, **GREEDY, **beams), expected)
    assert cache.get_seq_length() == 40  # beams work on a copy


def test_beams_on_a_compressed_cache_do_not_depend_on_the_batch():
    model = compiled(HALF)
    cache = model.compress(CONTEXT)
    alone = model.generate(FULL, past_key_values=cache, num_beams=3, **GREEDY)
    cache.batch_repeat_interleave(2)
    both = model.generate(FULL.expand(2, -1), past_key_values=cache, num_beams=3, **GREEDY)
    assert torch.equal(both, alone.expand(2, -1))


def test_several_samples_of_one_compressed_prompt():
    cache = compiled(HALF).compress(CONTEXT)
    out = compiled(HALF).generate(FULL, past_key_values=cache, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert out.shape == (3, 49)
    assert torch.equal(out[:, :45], FULL.expand(3, -1))


def test_two_turns_as_one_text_or_as_new_tokens_are_the_same():
    model = compiled(HALF)
    cache = model.compress(CONTEXT)
    first = model.generate(FULL, past_key_values=cache, **GREEDY)
    other = cache.copy()
    whole = model.generate(torch.cat([first, QUESTION], 1), past_key_values=cache, **GREEDY)
    last = first[:, -1:]  # chosen, but not fed by the first turn
    appended = model.generate(torch.cat([last, QUESTION], 1), past_key_values=other, append=True, **GREEDY)
    assert torch.equal(whole[:, 56:], appended)
    assert torch.equal(cache.ids, whole[:, :-1])


def test_append_on_an_empty_cache_is_plain_generation():
    assert torch.equal(compiled(HALF).generate(FULL, append=True, **GREEDY), compiled(HALF).generate(FULL, **GREEDY))


def test_a_padded_row_is_the_row_alone_over_two_turns():
    model = compiled(HALF)
    rows = [tokens(1, 30, seed=4), tokens(1, 21, seed=5)]
    ids, mask = left(rows, 33)  # a column that is padding in every row, too
    cache = model.compress(ids, mask)
    questions, question_mask = left([QUESTION[0], QUESTION[0, 2:]], 5)
    full, full_mask = torch.cat([ids, questions], 1), torch.cat([mask, question_mask], 1)
    out = model.generate(full, attention_mask=full_mask, past_key_values=cache, **GREEDY)
    for row, (context, question) in enumerate(zip(rows, [QUESTION, QUESTION[:, 2:]], strict=True)):
        alone = model.compress(context)
        for index in range(2):
            real = cache.layers[index].positions[row, 0] >= 0
            expected = model.generate(torch.cat([context, question], 1), past_key_values=alone.copy(), **GREEDY)
            kept = alone.layers[index].positions
            assert torch.equal(cache.layers[index].positions[row, :, real][:, : kept.shape[2]], kept[0])
        assert torch.equal(out[row, 38:], expected[0, -12:])
    assert cache.lengths_seen.tolist() == [30 + 5 + 11, 21 + 3 + 11]
    third = torch.cat([out, QUESTION.expand(2, -1)], 1)
    third_mask = torch.cat([full_mask, ones(2, 12 + 5)], 1)
    again = model.generate(third, attention_mask=third_mask, past_key_values=cache, **GREEDY)
    alone = model.compress(rows[1])
    text = torch.cat([rows[1], QUESTION[:, 2:], out[1:, 38:], QUESTION], 1)
    expected = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=alone, **GREEDY)
    assert torch.equal(again[1, -12:], expected[0, -12:])


@pytest.mark.parametrize("policy", ["none", HALF])
def test_padding_on_the_right_is_padding_on_the_left(policy):
    model = compiled(policy)
    rows = [tokens(1, 30, seed=4), tokens(1, 21, seed=5)]
    ids, mask = left(rows, 30)
    right = torch.stack([torch.cat([row[keep.bool()], row[~keep.bool()]]) for row, keep in zip(ids, mask, strict=True)])
    there, here = model.compress(right, mask.flip(1)), model.compress(ids, mask)
    for a, b in zip(there.layers, here.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
        assert torch.equal(a.positions, b.positions)
    assert there.has_empty == here.has_empty
    torch.testing.assert_close(
        model(torch.tensor([[5], [5]]), past_key_values=there).logits,
        model(torch.tensor([[5], [5]]), past_key_values=here).logits,
    )


def test_padding_inside_a_block_is_skipped():
    model = compiled(HALF)
    ids = torch.cat([CONTEXT[:, :10], torch.zeros(1, 3, dtype=torch.long), CONTEXT[:, 10:]], 1)
    mask = ones(1, 43)
    mask[0, 10:13] = 0
    padded, plain = model.compress(ids, mask), model.compress(CONTEXT)
    assert torch.equal(padded.layers[1].positions, plain.layers[1].positions)
    torch.testing.assert_close(padded.layers[1].values, plain.layers[1].values)


def test_a_copy_is_asked_without_changing_the_original():
    model = compiled(HALF)
    cache = model.compress(CONTEXT)
    before = state(cache)
    for seed in (2, 3):
        full = torch.cat([CONTEXT, tokens(1, 5, seed)], 1)
        shared = model.generate(full, past_key_values=cache.copy(), **GREEDY)
        assert torch.equal(shared, model.generate(full, past_key_values=model.compress(CONTEXT), **GREEDY))
    assert_same_state(cache, before)


def test_compress_in_parts_evicts_from_the_new_part_alone():
    model = compiled(HALF)
    cache = model.compress(CONTEXT)
    first = state(cache)
    assert model.compress(tokens(1, 10, seed=3), past_key_values=cache) is cache
    for index, layer in enumerate(cache.layers):
        assert layer.slots == 20 + 5
        assert torch.equal(layer.keys[:, :, :20], first[f"layers.{index}.keys"])
        assert torch.equal(layer.positions[..., :20], first[f"layers.{index}.positions"])
        assert bool((layer.positions[..., 20:] >= 40).all())
    assert cache.get_seq_length() == 50
    assert cache.policy == str(kvfx.Policy.parse(HALF))


def test_use_cache_false_is_the_plain_model():
    model = compiled(HALF)
    out = model(FULL, use_cache=False)
    assert torch.equal(out.logits, llama()(FULL, use_cache=False).logits)
    assert out.past_key_values is None
    assert torch.equal(model.generate(FULL, use_cache=False, **GREEDY), llama().generate(FULL, **GREEDY))
    with pytest.raises(kvfx.InputError, match="use_cache=False with past_key_values: leave one of them out"):
        model(FULL, use_cache=False, past_key_values=kvfx.Cache())


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["prompt", "second turn"])
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_is_greedy_decoding(how, cached):
    model = compiled(HALF)
    ids = torch.cat([CONTEXT, CONTEXT[:, :12]], 1)
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": fresh_llama(seed=1)}
    prompt = model.compress(CONTEXT) if cached else None
    if prompt is None:  # candidates come after the eviction, which leaves the last token of the prompt out
        prompt = model.compress(ids[:, :-1])
        expected = model.generate(ids, past_key_values=prompt, **GREEDY)
        prompt = None
    else:
        expected = model.generate(ids, past_key_values=prompt.copy(), **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=prompt, **GREEDY, **options), expected)


def test_crop_forgets_appended_tokens_exactly():
    model = compiled(HALF)
    cache = model.compress(CONTEXT)
    before = state(cache)
    model(QUESTION, past_key_values=cache)
    middle = state(cache)
    model(torch.tensor([[9]]), past_key_values=cache)
    cache.crop(-1)
    assert_same_state(cache, middle)
    cache.crop(-5)
    assert_same_state(cache, before)
    with pytest.raises(kvfx.CacheMismatch, match=r"cannot crop 1 tokens: 0 came after the last eviction.*cache\.copy"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negated number of tokens to forget, got 3"):
        cache.crop(3)
    assert_same_state(cache, before)


def test_crop_is_exact_where_nothing_was_evicted():
    cache = compiled("knorm:1.0").compress(CONTEXT)
    cache.crop(-15)
    short = compiled("knorm:1.0").compress(CONTEXT[:, :25])
    assert torch.equal(cache.layers[0].positions, short.layers[0].positions)
    torch.testing.assert_close(cache.layers[1].keys, short.layers[1].keys)
    cache.crop(-25)
    assert not cache.layers
    assert torch.equal(compiled(HALF).generate(FULL, past_key_values=cache, **GREEDY), compiled(HALF).generate(FULL, **GREEDY))


def test_crop_stops_at_padding():
    ids, mask = left([tokens(1, 10), tokens(1, 7)], 10)
    cache = compiled("none").compress(ids, mask)
    cache.crop(-7)
    assert cache.lengths_seen.tolist() == [3, 0]
    with pytest.raises(kvfx.CacheMismatch, match="cannot crop 1 tokens: 0 came after the last eviction or padding"):
        cache.crop(-1)
    compiled("none")(tokens(2, 4), past_key_values=cache)
    assert cache.layers[0].positions[1, 0].tolist() == [-1, -1, -1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (QUESTION, r"another context: row 0 differs first at index 0 \(token \d+ in the cache, \d+ in input_ids\).*append=True"),
        (FULL.index_fill(1, torch.tensor([17, 30]), 1), r"another context: row 0 differs first at index 17 "),
        (CONTEXT, r"input_ids hold 40 tokens, the cache has already seen 40: at least one new token is needed.*append=True"),
        (FULL.expand(2, -1), r"the cache has 1 rows, input_ids have 2"),
    ],
    ids=["question only", "another text", "no new token", "more rows"],
)
def test_ids_that_do_not_go_on_from_the_cache_are_refused(ids, message):
    cache = compiled(HALF).compress(CONTEXT)
    before = state(cache)
    with pytest.raises(kvfx.CacheMismatch, match="(?s)" + message):
        compiled(HALF).generate(ids, past_key_values=cache, **GREEDY)
    assert_same_state(cache, before)


def test_embeddings_give_what_their_ids_give():
    model = compiled(HALF)
    cache = model(inputs_embeds=llama().get_input_embeddings()(CONTEXT)).past_key_values
    assert cache.ids is None
    expected = model.generate(FULL, past_key_values=model.compress(CONTEXT), **GREEDY)
    assert torch.equal(model.generate(QUESTION, past_key_values=cache, append=True, **GREEDY), expected[:, 40:])
    with pytest.raises(kvfx.InputError, match="generate needs input ids; for embeddings call the model itself"):
        model.generate(inputs_embeds=llama().get_input_embeddings()(CONTEXT))
    with pytest.raises(kvfx.InputError, match="expected one of input_ids and inputs_embeds, got neither"):
        model()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_a_mask_of_any_dtype_means_the_same(dtype):
    model = compiled(HALF)
    expected = model(CONTEXT).logits
    assert torch.equal(model(CONTEXT, attention_mask=ones(1, 40).to(dtype)).logits, expected)


def test_masks_that_do_not_fit_are_refused():
    model, cache = compiled(HALF), compiled(HALF).compress(CONTEXT)
    with pytest.raises(kvfx.InputError, match=r"attention_mask is \(1, 1, 40, 40\), expected \[B, S\]"):
        model(CONTEXT, attention_mask=torch.ones(1, 1, 40, 40))
    with pytest.raises(
        kvfx.InputError, match=r"attention_mask is \(1, 5\), expected \(1, 45\): the 40 tokens that the cache has seen"
    ):
        model(QUESTION, attention_mask=ones(1, 5), past_key_values=cache)
    wrong = ones(1, 45)
    wrong[0, 3] = 0
    for question in (QUESTION, QUESTION[:, :1]):
        with pytest.raises(kvfx.CacheMismatch, match="attention_mask differs from the one that the cache was built with"):
            model(question, attention_mask=wrong[:, : 40 + question.shape[1]], past_key_values=cache)


def test_position_ids_are_taken_if_right_and_refused_if_not():
    model, cache = compiled(HALF), compiled(HALF).compress(CONTEXT)
    expected = model(QUESTION, past_key_values=cache.copy()).logits
    given = model(QUESTION, position_ids=torch.arange(40, 45)[None], past_key_values=cache.copy()).logits
    assert torch.equal(given, expected)
    with pytest.raises(kvfx.InputError, match=r"position_ids do not count on from the tokens.*Leave them out"):
        model(QUESTION, position_ids=torch.arange(20, 25)[None], past_key_values=cache)


def test_generate_returns_a_dict_with_the_cache_and_streams():
    seen = []

    class Streamer:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    model, cache = compiled(HALF), compiled(HALF).compress(CONTEXT)
    out = model.generate(
        FULL, past_key_values=cache, return_dict_in_generate=True, output_logits=True, streamer=Streamer(), **GREEDY
    )
    assert out.past_key_values is cache
    assert seen == [*out.sequences[0].tolist(), "end"]
    assert len(out.logits) == 12
    appended = model.generate(
        QUESTION, past_key_values=model.compress(CONTEXT), append=True, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(appended.sequences, out.sequences[:, 40:])


def test_hidden_states_logits_to_keep_and_tuples():
    model, plain = compiled("knorm:1.0"), llama()
    out = model(CONTEXT, output_hidden_states=True, logits_to_keep=2)
    expected = plain(CONTEXT, output_hidden_states=True, logits_to_keep=2)
    assert out.logits.shape == (1, 2, 64)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)
    logits, cache = model(CONTEXT, return_dict=False)[:2]
    torch.testing.assert_close(logits, plain(CONTEXT).logits)
    assert isinstance(cache, kvfx.Cache)
    with pytest.raises(kvfx.InputError, match="output_attentions=True: scaled_dot_product_attention never makes"):
        model(CONTEXT, output_attentions=True)


@pytest.mark.sample(2)
@pytest.mark.parametrize("phase", ["prefill", "compress", "extend", "decode"])
def test_a_forward_that_fails_leaves_the_cache_as_it_was(phase):
    model = kvfx.compile(broken(), HALF, backend="eager")
    good = model.compress(CONTEXT.clamp(max=49))
    cache = kvfx.Cache() if phase == "prefill" else good
    before = state(cache)
    new = torch.full((1, 1 if phase == "decode" else 5), 50)  # its embedding is nan
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = torch.nan
    if phase in ("prefill", "compress"):
        with pytest.raises(kvfx.InputError, match=r"scores of knorm:0.5 are not finite in layers \[0\]"):
            model.compress(new, past_key_values=cache)
    else:
        with pytest.raises(IndexError):
            model(torch.full_like(new, 5000), past_key_values=cache)
    assert_same_state(cache, before)


@functools.cache
def broken():
    return fresh_llama(num_hidden_layers=1)


def test_an_option_that_nothing_takes_is_an_error():
    with pytest.raises(ValueError, match="max_new_tokns"):
        compiled(HALF).generate(FULL, max_new_tokns=5)
