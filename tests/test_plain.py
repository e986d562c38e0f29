"""Decoders without transformers code: what is found, what is kept, and that decoding goes on as the decoder itself would."""

from __future__ import annotations

import copy
import functools
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import kvfx
import models_page
import reference
import zoo_reference
from kvfx import passes
from kvfx.kernels.leverage import draw_sketch
from kvfx.passes.capture import pytree
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report
from kvfx.passes.stores import forward_stores
from yardstick import assert_within_rounding
from zoo_plain import (
    DIM,
    HEADS,
    KV_HEADS,
    PLAIN,
    VOCABULARY,
    BufferBlock,
    Buffers,
    Decoder,
    Flat,
    NanoGPT,
    Preallocated,
    heads_first,
    make,
)

PROMPT, STEPS = 37, (1, 1, 1, 1, 3, 1, 1, 1)
SCORES = {"knorm": (0, 0), "compactor": (8, 4)}
CASES = [(name, policy) for name in PLAIN for policy in SCORES]
SINGLY = ("dataclass", "shared")  # take one token at a time here, their attention being that of another


@functools.cache
def shared(name: str) -> Decoder:
    return make(name)


@functools.cache
def compiled(name: str, policy: str) -> Any:
    return kvfx.compile(shared(name), policy, backend="eager", on_refuse="error")


def tokens(rows: int = 2, length: int = PROMPT, seed: int = 1) -> Tensor:
    """Random ids, none twice in a row: keys of the first layer would have equal norms in decoders without RoPE."""
    order = torch.rand(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order[:, :length]


@torch.no_grad()
def own(name: str, parts: list[Tensor], double: bool = False, hidden: list[Tensor] | None = None) -> Tensor:
    """Logits of the decoder itself, fed `parts` in turn; behind the first, slots `[B, Hkv, T]` of each site out of sight."""
    model, case = shared(name), PLAIN[name]
    model = copy.deepcopy(model).double() if double else model
    logits, past = case.run(model, parts[0])
    out = [logits]
    for part in parts[1:]:
        with zoo_reference.watching(model, case.kv_heads, hidden, rows=part.shape[0]):
            logits, past = case.run(model, part, past)
        out.append(logits)
    return torch.cat(out, 1)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", PLAIN)
def test_a_cache_that_keeps_everything_changes_nothing(name):
    assert changes_nothing(name)


@functools.cache  # the page of models asks again
def changes_nothing(name: str) -> bool:
    case, model = PLAIN[name], compiled(name, "knorm:1.0")
    parts = [tokens(), *tokens(2, 6, seed=2).split((1,) * 6 if name in SINGLY else (1, 1, 3, 1), 1)]
    logits, cache = case.run(model, parts[0])
    report = model._kvfx.engine.reports[next(key for key in model._kvfx.engine.reports if key.phase == "prefill")][0]
    assert [site.layer for site in report.sites] == list(case.layer_of_site)
    assert report.coverage == 1
    out = [logits]
    for part in parts[1:]:
        logits, cache = case.run(model, part, cache)
        out.append(logits)
    assert_within_rounding(torch.cat(out, 1), own(name, parts), own(name, parts, double=True))
    assert [layer.slots for layer in cache.layers] == [PROMPT + 6] * 2
    assert cache.get_seq_length() == PROMPT + 6
    return True


def kept(name: str, policy: str, prompt: Tensor) -> list[list[list[int]]]:
    """Positions that each head of each layer keeps of one row by the book, half of it."""
    case = PLAIN[name]
    with zoo_reference.watching(shared(name), case.kv_heads) as watch, torch.no_grad():
        case.run(shared(name), prompt)
    sinks, recent = SCORES[policy]
    positions = []
    for layer in sorted(set(case.layer_of_site)):
        read = watch.layers[case.layer_of_site.index(layer)]
        sketch = draw_sketch(0, layer, case.kv_heads, DIM, 48)
        score = getattr(reference, policy)(zoo_reference.taps(read), sketch=sketch)
        positions.append(reference.best(reference.protected(score, sinks, recent), PROMPT // 2))
    return positions


@pytest.mark.sample(3)
@pytest.mark.parametrize(("name", "policy"), CASES, ids=[f"{name}, {policy}" for name, policy in CASES])
def test_what_is_kept_and_the_text_that_follows_are_the_reference_s(name, policy):
    assert follows(name, policy)


@functools.cache
def follows(name: str, policy: str) -> bool:
    case, model, prompt = PLAIN[name], compiled(name, f"{policy}:0.5"), tokens()
    logits, cache = case.run(model, prompt)
    by_row = [kept(name, policy, prompt[row : row + 1]) for row in range(2)]
    found = [[layer.positions[row].tolist() for layer in cache.layers] for row in range(2)]
    assert found == by_row
    assert any(len(set(map(tuple, heads))) > 1 for heads in found[0])  # heads keep different tokens
    parts, out = [prompt], [logits]
    extra = tokens(2, 3, seed=3)
    for width in (1,) * 8 if name in SINGLY else STEPS:
        parts.append(out[-1][:, -1:].argmax(-1) if width == 1 else extra[:, :width])
        logits, cache = case.run(model, parts[-1], cache)
        out.append(logits)
    for row in range(2):
        hidden = []
        for layer in case.layer_of_site:
            mask = torch.ones(1, case.kv_heads, PROMPT, dtype=torch.bool)
            for head, positions in enumerate(by_row[row][layer]):
                mask[0, head, positions] = False
            hidden.append(mask)
        alone = [part[row : row + 1] for part in parts]
        low, exact = own(name, alone, hidden=hidden), own(name, alone, double=True, hidden=hidden)
        assert_within_rounding(torch.cat(out, 1)[row : row + 1], low, exact)
    return True


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", PLAIN)
def test_the_page_of_models_says_what_was_found(name):
    case = PLAIN[name]
    assert changes_nothing(name)
    assert all(follows(name, policy) for policy in SCORES)
    steps = {
        key.phase: list(reports[-1].sites)
        for key, reports in compiled(name, "knorm:0.5")._kvfx.engine.reports.items()
        if key.plan.taps == ("key",) or key.phase == "decode"
    }
    rules, caches = (", ".join(dict.fromkeys(names)) for names in (
        [site.rule for site in steps["prefill"]], [site.cache for site in steps["decode"]]
    ))  # fmt: skip
    with zoo_reference.watching(shared(name), case.kv_heads) as watch, torch.no_grad():
        case.run(shared(name), tokens(1))
    before = "yes" if watch.layers[0].roped else "no RoPE"
    models_page.assert_row(
        f"{name}, by hand", type(shared(name)).__name__, rules, caches, f"{case.kv_heads} of {HEADS}", "full", before,
        ", ".join(sorted(SCORES)), "yes", "yes", "takes no mask", "one by one here" if name in SINGLY else "yes",
    )  # fmt: skip


def test_layers_may_keep_different_numbers():
    case, model = PLAIN["flat tuple"], compiled("flat tuple", "knorm | budget=uniform(0.5, shape=pyramid(4))")
    logits, cache = case.run(model, tokens())
    first, second = (layer.slots for layer in cache.layers)
    assert first > second
    logits, grown = case.run(model, tokens(2, 3), cache)
    assert [layer.slots for layer in grown.layers] == [first + 3, second + 3]
    assert logits.isfinite().all()


# -- the cache ---------------------------------------------------------------------------------------------------------------------


def test_a_cache_that_was_given_stays_as_it_was():
    case, model = PLAIN["dataclass"], compiled("dataclass", "knorm:0.5")
    _, cache = case.run(model, tokens())
    twin, before = cache.copy(), cache.nbytes
    first, _ = case.run(model, tokens(2, 1, seed=5), cache)
    _, grown = case.run(model, tokens(2, 1, seed=6), twin)
    again, _ = case.run(model, tokens(2, 1, seed=5), cache)
    assert torch.equal(first, again)
    assert (cache.nbytes, cache.get_seq_length()) == (before, PROMPT)
    assert cache.others[0].tolist() == [PROMPT] * 2
    assert (grown.get_seq_length(), grown.others[0].tolist()) == (PROMPT + 1, [PROMPT + 1] * 2)


@pytest.mark.parametrize("name", ["flat tuple", "einsum", "dataclass", "preallocated"])
def test_a_saved_cache_goes_on_where_it_stood(name, tmp_path):
    case, model = PLAIN[name], compiled(name, "knorm:0.5")
    _, cache = case.run(model, tokens())
    cache.save(tmp_path / "doc.kvfx")
    loaded = kvfx.load_cache(tmp_path / "doc.kvfx")
    assert loaded.form == cache.form
    assert torch.equal(case.run(model, tokens(2, 1), loaded)[0], case.run(model, tokens(2, 1), cache)[0])


def test_a_cache_is_a_tree_of_its_tensors():
    case, model = PLAIN["dataclass"], compiled("dataclass", "knorm:0.5")
    _, cache = case.run(model, tokens())
    same = pytree.tree_map(lambda tensor: tensor.clone(), cache)
    assert torch.equal(case.run(model, tokens(2, 1), same)[0], case.run(model, tokens(2, 1), cache)[0])


def test_a_preallocated_past_is_not_held():
    _, cache = PLAIN["preallocated"].run(compiled("preallocated", "knorm:0.5"), tokens())
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == 2 * 2 * 2 * KV_HEADS * (PROMPT // 2) * DIM * 4
    assert cache.nbytes < 2 * 2 * 2 * KV_HEADS * Preallocated.room * DIM * 4 / 2


def test_an_empty_past_of_the_user_s_is_filled_but_not_written_to():
    model = compiled("preallocated", "knorm:0.5")
    shape = (2, KV_HEADS, Preallocated.room, DIM)
    given = Buffers([torch.zeros(shape) for _ in range(2)], [torch.zeros(shape) for _ in range(2)])
    logits, cache = model.prefill(tokens(), given)
    without, same = model.prefill(tokens())
    assert torch.equal(logits, without)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, same.layers, strict=True))
    assert not any(tensor.any() for tensor in given.k + given.v)


class WholeBlock(BufferBlock):
    """Adds to the zeros of its buffer, and reads all of them, those behind the last token hidden by the mask."""

    def forward(self, x: Tensor, k_buffer: Tensor, v_buffer: Tensor, start: int) -> Tensor:
        h, end = self.norm_1(x), start + x.shape[1]
        q, k, v = heads_first(self.q(h), HEADS), heads_first(self.k(h), KV_HEADS), heads_first(self.v(h), KV_HEADS)
        k_buffer.index_add_(2, torch.arange(start, end), k)
        v_buffer.index_add_(2, torch.arange(start, end), v)
        mask = torch.arange(k_buffer.shape[2]) <= torch.arange(start, end)[:, None]
        y = F.scaled_dot_product_attention(q, k_buffer, v_buffer, attn_mask=mask, enable_gqa=True)
        return self.feed(x + self.out(y.transpose(1, 2).flatten(2)))


class HalfWhole(Preallocated):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = WholeBlock()


@pytest.mark.filterwarnings("ignore:1 of 1 cache layers of HalfWhole are compressed")
def test_a_layer_that_adds_to_its_buffer_keeps_it_whole_and_no_call_writes_to_another_s():
    model = HalfWhole().eval()
    twin, exact = kvfx.compile(model, "knorm:1.0", backend="eager"), copy.deepcopy(model).double()
    with pytest.warns(UserWarning, match=r"tensors \[.*96.*\] that no attention found reads; they are kept whole"):
        _, cache = twin(tokens())
    assert len(cache.layers) == 1
    expected = []
    for plain in (model, exact):
        with torch.no_grad():
            _, past = plain(tokens())
            plain(tokens(2, 1, 2), past)
            expected.append(plain(tokens(2, 1, 3), replace(past, length=PROMPT + 1))[0])
    _, grown = twin(tokens(2, 1, 2), cache)
    twin(tokens(2, 1, 4), cache)
    twin(tokens(2, 1, 4), grown)
    assert_within_rounding(twin(tokens(2, 1, 3), grown)[0], *expected)


def test_a_past_may_begin_empty():
    given = tuple(torch.zeros(2, KV_HEADS, 0, DIM) for _ in range(4))
    _, cache = compiled("flat tuple", "knorm:0.5").prefill(tokens(), given)
    assert [layer.positions.tolist() for layer in cache.layers] == [layer.positions.tolist() for layer in cache_of().layers]


class Pair:
    """A past whose class is registered, with a number that stands for nothing."""

    def __init__(self, layers: list[Any], version: int) -> None:
        self.layers, self.version = layers, version


pytree.register_pytree_node(Pair, lambda pair: ([pair.layers, pair.version], None), lambda children, _: Pair(*children))


class OptreePair(Pair):
    """The same, registered with optree alone."""


optree.register_pytree_node(
    OptreePair,
    lambda pair: ([pair.layers, pair.version], None),
    lambda _, children: OptreePair(*children),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


class Registered(Flat):
    layers, pair = 1, Pair

    def forward(self, tokens: Tensor, past: Any = None) -> Any:
        if past is not None:
            assert past["past"].version == PROMPT
            past = tuple(past["past"].layers)
        logits, held = super().forward(tokens, past)
        return OrderedDict(out=(logits, {"past": self.pair(list(held), PROMPT)}))


class RegisteredWithOptree(Registered):
    pair = OptreePair


@pytest.mark.sample(1)
@pytest.mark.parametrize("decoder", [Registered, RegisteredWithOptree])
def test_a_registered_class_in_the_depths_of_the_output_is_found_and_its_number_stays_what_it_is(decoder):
    models = (kvfx.compile(decoder().eval(), "knorm:1.0", backend="eager", on_refuse="error"), decoder().eval().double())
    models[1].load_state_dict(models[0].base.state_dict())
    logits = []
    with torch.no_grad():
        for model in (models[0], models[0].base, models[1]):
            past, out = None, []
            for part in (tokens(), tokens(2, 1, 2), tokens(2, 1, 3)):  # the number equals the tokens seen once, behind the prompt
                more, past = model(part, past=past)["out"]
                out.append(more)
            logits.append(torch.cat(out, 1))
    assert_within_rounding(*logits)


def test_a_decoder_is_explained_before_it_runs():
    explanation = kvfx.explain(shared("shared"), tokens(), policy="knorm:0.5")
    assert [site.layer for site in explanation.report.sites] == [0, 0, 1, 1]
    assert [site.score for site in explanation.report.sites] == ["key_norm", "", "key_norm", ""]
    assert explanation.coverage == 1


def test_two_threads_with_two_caches_do_not_meet():
    case, model = PLAIN["flat tuple"], compiled("flat tuple", "knorm:0.5")
    alone, together = {}, {}

    def talk(seed: int, into: dict[int, Tensor]) -> None:
        _, cache = case.run(model, tokens(seed=seed))
        for step in range(4):
            logits, cache = case.run(model, tokens(2, 1, seed + step), cache)
        into[seed] = logits

    for seed in (7, 8):
        talk(seed, alone)
    threads = [threading.Thread(target=talk, args=(seed, together)) for seed in (7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[seed], together[seed]) for seed in (7, 8))


def test_a_compiled_decoder_is_unwrapped_and_parameters_are_shared():
    model = shared("flat tuple")
    twin = kvfx.compile(torch.compile(model), "knorm:0.5", backend="eager")
    assert twin.base is model
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert kvfx.compile(twin, "none", backend="eager").base is model


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.filterwarnings("ignore")])]
)
def test_every_backend_gives_the_same(backend):
    case, prompt = PLAIN["preallocated"], tokens()
    model = kvfx.compile(shared("preallocated"), "knorm:0.5", backend=backend, on_refuse="error")
    logits, cache = case.run(model, prompt)
    more, grown = case.run(model, tokens(2, 1), cache)
    expected, plain = case.run(compiled("preallocated", "knorm:0.5"), prompt)
    expected_more, _ = case.run(compiled("preallocated", "knorm:0.5"), tokens(2, 1), plain)
    assert [layer.positions.tolist() for layer in cache.layers] == [layer.positions.tolist() for layer in plain.layers]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(more, expected_more)
    assert grown.layers[0].slots == cache.layers[0].slots + 1


# -- what cannot be done -----------------------------------------------------------------------------------------------------------


class NoPast(Flat):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[0]


class Scattered(Flat):
    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        logits, past = super().forward(tokens)
        return logits, *past


class NoAttention(Decoder):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


class Prefixed(NanoGPT):
    def forward(self, idx: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        learned = self.embed.weight[: 3 * HEADS, :DIM].reshape(1, HEADS, 3, DIM).expand(idx.shape[0], -1, -1, -1)
        return super().forward(idx, past or [(learned, learned)] * len(self.blocks))


MODULES = {
    "keys of no token": (Prefixed, "Prefixed returns no keys and values that an attention reads"),
    "no past": (NoPast, "NoPast returns no keys and values that an attention reads"),
    "past in pieces": (Scattered, "Scattered returns its keys and values as several results"),
    "no attention": (NoAttention, "no attention was recognised in NoAttention"),
}


@pytest.mark.filterwarnings("ignore:.*cache layers of (NoPast|Prefixed).*")
@pytest.mark.parametrize("what", MODULES)
def test_a_module_that_cannot_be_compressed_is_refused_at_its_first_call(what):
    cls, message = MODULES[what]
    with pytest.raises(kvfx.UnsupportedModel, match=message):
        kvfx.compile(cls().eval(), "knorm:0.5", backend="eager")(tokens())


def test_training_is_refused():
    with pytest.raises(kvfx.UnsupportedModel, match="Flat is in training mode"):
        kvfx.compile(Flat().train(), "knorm:0.5")
    with pytest.raises(kvfx.UnsupportedModel, match="for inference"):
        compiled("flat tuple", "knorm:0.5").train()
    model = Flat().eval()
    twin = kvfx.compile(model, "knorm:0.5", backend="eager")
    model.train()
    with pytest.raises(kvfx.UnsupportedModel, match="is in training mode"):
        twin(tokens())


def cache_of(name: str = "flat tuple") -> kvfx.Cache:
    return PLAIN[name].run(compiled(name, "knorm:0.5"), tokens())[1]


def by_hand() -> kvfx.Cache:
    states = torch.zeros(2, KV_HEADS, 4, DIM)
    return kvfx.Cache.from_layers([(states, states, torch.arange(4))] * 2, 9)


CALLS = {
    "a cache of another model": (lambda model: model(tokens(2, 1), cache_of("dataclass")), "made by another model"),
    "two caches": (lambda model: model(cache_of(), cache_of()), "2 caches were given; expected one"),
    "other rows": (lambda model: model(tokens(3, 1), cache_of()), "the cache has 2 rows, the new tokens 3"),
    "a cache without form": (lambda model: model(tokens(2, 1), by_hand()), "does not say in which form"),
    "a cache at prefill": (lambda model: model.prefill(tokens(2, 1), cache_of()), "prefill starts a cache and was given one"),
    "no tokens": (lambda model: model(cache_of()), "hold no new tokens"),
    "an empty prompt": (lambda model: model(tokens(2, 0)), "hold no new tokens"),
    "no batch": (lambda model: model(tokens()[0]), "hold no new tokens"),
    "padding": (lambda model: model(tokens(), pad=torch.arange(PROMPT).expand(2, -1) > 2), "masks tokens out"),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_makes_no_sense_is_refused(what):
    call, message = CALLS[what]
    with pytest.raises((kvfx.CacheMismatch, kvfx.InputError), match=message):
        call(compiled("flat tuple", "knorm:0.5"))


def test_rows_of_a_past_with_tensors_of_its_own_are_not_chosen():
    with pytest.raises(kvfx.CacheMismatch, match="rows cannot be chosen: beside keys and values"):
        cache_of("dataclass").reorder_cache(torch.tensor([1, 0]))
    cache = cache_of()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, cache_of().layers[0].keys.flip(0))


def test_a_past_that_no_file_can_describe_is_not_saved(tmp_path):
    @dataclass
    class Local:
        held: Any

    class Hidden(Flat):
        def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
            logits, past = super().forward(tokens)
            return logits, Local(past)

    _, cache = kvfx.compile(Hidden().eval(), "knorm:0.5", backend="eager")(tokens())
    with pytest.raises(kvfx.ArtifactError, match="the class cannot be imported by that name"):
        cache.save(tmp_path / "doc.kvfx")


def test_sketches_are_for_transformers():
    with pytest.raises(kvfx.PolicyError, match="sketches are taken for transformers decoders only"):
        kvfx.compile(shared("flat tuple"), "compactor:0.5", sketch=[torch.zeros(KV_HEADS, DIM, 48)] * 2)


def written_and_read(buffer: Tensor, new: Tensor) -> Tensor:
    buffer[:, :, :3] = new
    return buffer[:, :, :3] + 1


def changed_behind(buffer: Tensor, new: Tensor) -> Tensor:
    buffer[:, :, :3] = new
    buffer.mul_(2)
    return buffer[:, :, :3] + 1


def changed_through_a_view(buffer: Tensor, new: Tensor) -> Tensor:
    buffer[:, :, :3] = new
    buffer.transpose(1, 2)[:, 1] = 7
    return buffer[:, :, :3] + 1


def changed_at_its_source(buffer: Tensor, new: Tensor) -> Tensor:
    new = new + 1
    buffer[:, :, :3] = new
    new.mul_(2)
    return buffer[:, :, :3] + 1


@pytest.mark.parametrize("function", [written_and_read, changed_behind, changed_through_a_view, changed_at_its_source])
def test_what_was_written_is_read_back_as_it_is_then(function):
    buffer, new = torch.zeros(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    module = make_fx(function, pre_dispatch=True)(buffer.clone(), new)
    forward_stores(module, Plan(None), Report())
    module.recompile()
    reads = [node for node in module.graph.nodes if "aten.add" in str(node.target) and node.args[1] == 1 and len(node.users) == 1]
    assert torch.equal(module(buffer.clone(), new), function(buffer.clone(), new.clone()))
    through_buffer = any(str(node.args[0]).startswith("slice") for node in reads)
    assert through_buffer == (function is not written_and_read)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["nanoGPT", "einsum", "preallocated"])
def test_a_decode_step_joins_slots_and_new_ones_once(name):
    model, graphs = kvfx.compile(make(name), "knorm:0.5", backend="eager"), []
    with pytest.MonkeyPatch.context() as patch:
        run = passes.run
        patch.setattr(passes, "run", lambda module, plan: (run(module, plan), graphs.append(module))[0])
        logits, cache = PLAIN[name].run(model, tokens())
        PLAIN[name].run(model, logits[:, -1:].argmax(-1), cache)
    held = {node for node in graphs[-1].graph.find_nodes(op="placeholder") if "past" in node.meta["source"]}
    joins = [
        node for node in graphs[-1].graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
        if node.args[0][0] in held
    ]  # fmt: skip
    assert len(joins) == 2 * len(cache.layers)
