"""A cache shorter than its text, in every way that transformers can be given one: right, or an error that says what to do.

With the caches of transformers, seven of these situations are silently wrong and five die of a shape. The ids are their names.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, StaticCache

import kvfx
from decoding import GREEDY, KeysValues, compiled, decode, eager_llama, llama, ones, positions_kept, prefill, rotate, tokens

S = 60  # tokens of the context
KEPT = 24
CONTEXT = tokens(1, S, seed=1)
ONE, FIVE = tokens(1, 1, seed=2), tokens(1, 5, seed=3)
PLACEHOLDERS = torch.full((1, KEPT), 7)


@dataclass(frozen=True)
class Held:
    """Slots of a context, and what the reference says follows them."""

    layers: KeysValues
    positions: list[Tensor]
    seen: int
    ids: Tensor | None = None

    def cache(self, rows: int = 1) -> kvfx.Cache:
        triples = [(k, v, p) for (k, v), p in zip(self.layers, self.positions, strict=True)]
        cache = kvfx.Cache.from_layers(triples, self.seen, self.ids)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def then(self, question: Tensor, count: int = 12) -> list[int]:
        return decode(llama(), self.layers, self.seen, question, count)[0]


def original(lengths: list[int]) -> Held:
    """Keys with the RoPE phase they had."""
    layers, positions = [], []
    for index, (keys, values) in enumerate(prefill(llama(), CONTEXT)):
        kept = positions_kept(lengths[index], S, index)
        layers.append((keys[:, :, kept], values[:, :, kept]))
        positions.append(kept)
    return Held(layers, positions, S, CONTEXT)


def rerotated(lengths: list[int], ids: Tensor | None = None) -> Held:
    """Keys turned so that every layer's slots end at the same position."""
    seen = max(lengths)
    layers, positions = [], []
    for (keys, values), kept in zip(original(lengths).layers, original(lengths).positions, strict=True):
        at = torch.arange(seen - len(kept), seen)
        layers.append((rotate(llama(), keys, at - kept), values))
        positions.append(at)
    return Held(layers, positions, seen, ids)


def per_head() -> Held:
    """Each head keeps other tokens, equally many."""
    layers, positions = [], []
    for index, (keys, values) in enumerate(prefill(llama(), CONTEXT)):
        kept = torch.stack([positions_kept(KEPT, S, 100 * index + head) for head in range(2)])[None]
        place = kept[..., None].expand(-1, -1, -1, keys.shape[3])
        layers.append((keys.gather(2, place), values.gather(2, place)))
        positions.append(kept)
    return Held(layers, positions, S, CONTEXT)


A = rerotated([KEPT, KEPT], PLACEHOLDERS)
B = original([KEPT, KEPT])
C = rerotated([KEPT, 40])
D = original([KEPT, 40])
P = per_head()


def new_tokens(out: Tensor, row: int = 0) -> list[int]:
    return out[row, -12:].tolist()


def ask(ids: Tensor, cache: Any, model: Any = None, **options: Any) -> list[int]:
    model = compiled() if model is None else model
    return new_tokens(model.generate(ids, past_key_values=cache, **{**GREEDY, **options}))


def full(question: Tensor, context: Tensor = CONTEXT) -> Tensor:
    return torch.cat([context, question], 1)


def any_mask(module, query, key, value, attention_mask, scaling=None, **ignored):
    """An attention that makes its own mask, of its own layer's length; registered without one for the whole model."""
    new, slots = query.shape[2], key.shape[2]
    mask = torch.ones(new, slots, dtype=torch.bool).tril(slots - new)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("test_any_mask", any_mask)


def own_mask_model() -> Any:
    model = copy.deepcopy(llama())
    model.set_attn_implementation("test_any_mask")
    return model


def own_loop() -> list[int]:
    model, cache, out = compiled(), C.cache(), []
    for token in FIVE[0]:
        logits = model(token.view(1, 1), past_key_values=cache).logits
    while len(out) < 12:
        out.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([[out[-1]]]), past_key_values=cache).logits
    return out


def two_turns() -> list[int]:
    cache = D.cache()
    first = compiled().generate(full(FIVE), past_key_values=cache, **GREEDY)
    return ask(torch.cat([first, FIVE], 1), cache)


@functools.cache
def compiled_eager() -> Any:
    """Whose masks are added, not looked up."""
    return kvfx.compile(eager_llama(), "none", backend="eager")


def padded_questions(held: Held, model: Any) -> list[list[int]]:
    """Two rows on one context; the second asks only the last three tokens of the question, behind padding."""
    ids = torch.cat([full(FIVE), full(FIVE)])
    ids[1, S : S + 2] = 0
    mask = torch.ones_like(ids)
    mask[1, S : S + 2] = 0
    out = model.generate(ids, attention_mask=mask, past_key_values=held.cache(rows=2), **GREEDY)
    return [new_tokens(out, 0), new_tokens(out, 1)]


def beam_score(held: Held, model: Any, ids: Tensor, question: Tensor, cache: kvfx.Cache) -> tuple[float, float]:
    """What beam search says its best sequence scores, and what the reference says of it."""
    beams = {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(ids, past_key_values=cache, **GREEDY, **beams)
    chosen = out.sequences[:, -12:]
    logits = decode(llama(), held.layers, held.seen, question, forced=chosen)[1]
    scores = logits.log_softmax(-1).gather(1, chosen[0, :, None])
    return pytest.approx(float(scores.mean()), abs=1e-4), float(out.sequences_scores[0])


def static() -> StaticCache:
    cache = StaticCache(config=llama().config, max_cache_len=80)
    llama()(CONTEXT, past_key_values=cache)
    return cache


RIGHT: dict[str, Callable[[], tuple[Any, Any]]] = {
    "A1 the ids it was made for": lambda: (A.then(FIVE), ask(full(FIVE, PLACEHOLDERS), A.cache())),
    "A2 append, mask over slots": lambda: (A.then(FIVE), ask(FIVE, A.cache(), append=True, attention_mask=ones(1, 29))),
    "A3 append, no mask": lambda: (A.then(FIVE), ask(FIVE, A.cache(), append=True)),
    "A4 append one token": lambda: (A.then(ONE), ask(ONE, A.cache(), append=True)),
    "A6 stock eager": lambda: (A.then(FIVE), ask(full(FIVE, PLACEHOLDERS), A.cache(), eager_llama())),
    "B1 full ids": lambda: (B.then(FIVE), ask(full(FIVE), B.cache())),
    "B4 append, mask over the text": lambda: (B.then(FIVE), ask(FIVE, B.cache(), append=True, attention_mask=ones(1, 65))),
    "C1 one token": lambda: (C.then(ONE), ask(ONE, C.cache(), append=True)),
    "C2 five tokens": lambda: (C.then(FIVE), ask(FIVE, C.cache(), append=True)),
    "C2 forward of five": lambda: (C.then(FIVE)[0], int(compiled()(FIVE, past_key_values=C.cache()).logits[0, -1].argmax())),
    "C5 own loop": lambda: (C.then(FIVE), own_loop()),
    "C7 two rows": lambda: (C.then(FIVE), ask(torch.cat([FIVE, FIVE]), C.cache(rows=2), append=True)),
    "C8 two beams": lambda: beam_score(C, compiled(), full(ONE, tokens(1, 40)), ONE, rerotated([KEPT, 40], tokens(1, 40)).cache()),
    "D1 stock sdpa": lambda: (B.then(FIVE), ask(full(FIVE), B.cache(), llama())),
    "D2 stock forward": lambda: (B.then(FIVE)[0], int(llama()(FIVE, past_key_values=B.cache()).logits[0, -1].argmax())),
    "D3 stock eager": lambda: (B.then(FIVE), ask(full(FIVE), B.cache(), eager_llama())),
    "E1 lengths differ": lambda: (D.then(FIVE), ask(full(FIVE), D.cache())),
    "E2 lengths differ, rerotated": lambda: (C.then(FIVE), ask(FIVE, C.cache(), append=True)),
    "E5 two turns": lambda: (D.then(torch.cat([FIVE, torch.tensor([D.then(FIVE)]), FIVE], 1)), two_turns()),
    "G1 stock, own masks": lambda: (D.then(FIVE), ask(full(FIVE), D.cache(), own_mask_model())),
    "G2 stock, own masks, beams": lambda: beam_score(D, own_mask_model(), full(FIVE), FIVE, D.cache(rows=2)),
    "G3 heads differ": lambda: (P.then(FIVE), ask(full(FIVE), P.cache())),
    "G3 heads differ, stock": lambda: (P.then(FIVE), ask(full(FIVE), P.cache(), llama())),
    "G4 padded questions": lambda: ([B.then(FIVE), B.then(FIVE[:, 2:])], padded_questions(B, compiled())),
    "G4 padded questions, eager": lambda: ([B.then(FIVE), B.then(FIVE[:, 2:])], padded_questions(B, compiled_eager())),
    "G5 padded questions, stock": lambda: ([B.then(FIVE), B.then(FIVE[:, 2:])], padded_questions(B, llama())),
    "G6 lengths differ, padded": lambda: ([D.then(FIVE), D.then(FIVE[:, 2:])], padded_questions(D, compiled())),
    "G7 lengths differ, full ids": lambda: (D.then(ONE), ask(full(ONE), D.cache())),
}  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize("line", RIGHT)
def test_a_shortened_cache_gives_what_its_slots_say(line):
    expected, actual = RIGHT[line]()
    assert actual == expected


ANOTHER = r"the cache holds another context: row 0 differs first at index 0 .* append=True"
UNKNOWN = r"does not know the ids of the 40 tokens it has seen.*append=True"
NO_SLOT = r"layer 0 holds no slot; every layer needs at least one"
ONE_MASK = r"layers hold \[24, 40\] slots, but a stock model makes one mask for all of them.*kvfx\.compile"
FOREIGN = r"past_key_values is a {}, whose slots say nothing of the positions.*kvfx\.Cache\.from_layers"
HOLDS = r"this transformers\.StaticCache holds tokens that kvfx has not seen\. Give an empty one"
Mismatch, Input = kvfx.CacheMismatch, kvfx.InputError
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "A1 ids not known": (lambda: ask(full(FIVE, tokens(1, 40)), C.cache()), Mismatch, UNKNOWN),
    "A2 question only, mask": (lambda: ask(FIVE, A.cache(), attention_mask=ones(1, 29)), Mismatch, ANOTHER),
    "A3 question only": (lambda: ask(FIVE, A.cache()), Mismatch, ANOTHER),
    "A5 the original ids": (lambda: ask(full(FIVE), A.cache()), Mismatch, ANOTHER),
    "B2 placeholders": (lambda: ask(full(FIVE, PLACEHOLDERS), B.cache()), Mismatch, ANOTHER),
    "B3 question only, positions": (
        lambda: ask(FIVE, B.cache(), attention_mask=ones(1, 29), position_ids=torch.arange(60, 65)[None]), Mismatch, ANOTHER),
    "B3 append, mask over slots": (
        lambda: ask(FIVE, B.cache(), append=True, attention_mask=ones(1, 29)), Input,
        r"attention_mask is \(1, 29\), expected \(1, 65\)"),
    "B4 question only": (lambda: ask(FIVE, B.cache(), attention_mask=ones(1, 65)), Mismatch, ANOTHER),
    "C3 stock eager": (lambda: eager_llama()(ONE, past_key_values=C.cache()), Mismatch, ONE_MASK),
    "C4 placeholders": (lambda: ask(full(ONE, PLACEHOLDERS), C.cache()), Mismatch, UNKNOWN),
    "C6 a layer is empty": (lambda: rerotated([0, 10]).cache(), Mismatch, NO_SLOT),
    "C9 prefill_chunk_size": (lambda: ask(FIVE, C.cache(), append=True, prefill_chunk_size=1), Input,
                              r"prefill_chunk_size would compress only the first chunk; call model\.compress"),
    "D4 stock, lengths differ": (lambda: ask(full(FIVE), D.cache(), llama()), Mismatch, ONE_MASK),
    "D4 stock, one token": (lambda: llama()(ONE, past_key_values=D.cache()), Mismatch, ONE_MASK),
    "E3 a layer is empty": (lambda: original([0, 10]).cache(), Mismatch, NO_SLOT),
    "E4 DynamicCache": (lambda: compiled()(FIVE, past_key_values=DynamicCache(C.layers), position_ids=torch.arange(40, 45)[None]),
                        Mismatch, FOREIGN.format("DynamicCache")),
    "F1 StaticCache, full ids": (lambda: ask(full(FIVE), static()), Mismatch, HOLDS),
    "F2 StaticCache, mask": (lambda: ask(FIVE, static(), attention_mask=ones(1, 29)), Mismatch, HOLDS),
    "F3 StaticCache, positions": (lambda: compiled()(FIVE, past_key_values=static(), position_ids=torch.arange(60, 65)[None]),
                                  Mismatch, HOLDS),
    "F4 StaticCache, one token": (lambda: compiled()(ONE, past_key_values=static()), Mismatch, HOLDS),
    "F5 StaticCache, five tokens": (lambda: compiled()(FIVE, past_key_values=static()), Mismatch, HOLDS),
    "F6 StaticCache, append": (lambda: ask(FIVE, static(), append=True), Mismatch, HOLDS),
    "F7 StaticCache by name": (lambda: ask(full(FIVE), B.cache(), cache_implementation="static"), Input,
                               r"cache_implementation='static' asks for a new cache, but past_key_values was given"),
    "G2 rows repeated by hand": (lambda: ask(full(FIVE), B.cache(rows=2), num_beams=2), Mismatch,
                                 r"the cache has 2 rows, input_ids have 1"),
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_right_says_what_to_do(line):
    run, error, message = WRONG[line]
    with pytest.raises(error, match="(?s)" + message):
        run()


def test_a_stock_model_does_not_attend_to_empty_slots():
    mask = ones(2, 20)
    mask[1, :5] = 0
    cache = compiled().compress(tokens(2, 20), mask)
    with pytest.raises(
        kvfx.CacheMismatch, match=r"empty slots from padded rows, which a stock model would attend to.*kvfx\.compile"
    ):
        llama()(tokens(2, 1), past_key_values=cache)


def test_a_stock_model_cannot_fill_an_empty_cache():
    with pytest.raises(kvfx.CacheMismatch, match=r"filled only by the model that kvfx\.compile returned: model\.compress"):
        llama()(FIVE, past_key_values=kvfx.Cache())


def test_a_cache_goes_on_with_kvfx_after_a_stock_model_grew_it():
    cache = B.cache()
    llama()(FIVE, past_key_values=cache)
    assert ask(ONE, cache, append=True) == B.then(torch.cat([FIVE, ONE], 1))
    with pytest.raises(kvfx.CacheMismatch, match="does not know the ids"):
        ask(torch.cat([full(FIVE), ONE, ONE], 1), cache)
