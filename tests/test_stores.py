"""Caches written in every spelling: what is found, what is kept, what the text is that follows; and what is refused, and why."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import kvfx
import reference
import zoo_reference
from kvfx.passes.find_attention import find_attention
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report
from kvfx.passes.shorten_reads import shorten_reads
from kvfx.passes.stores import forward_stores
from test_plain import tokens
from yardstick import assert_within_rounding
from zoo_plain import DIM, HEADS, KV_HEADS, Block, Decoder, apply_rotary_pos_emb, heads_first, make, rope

ROOM, WINDOW, PROMPT = 96, 16, 37


def index_put(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    cache[:, :, pos] = new
    return cache


def index_copy(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    cache.index_copy_(2, torch.arange(start, start + new.shape[2]), new)
    return cache[:, :, : start + new.shape[2]]


def index_copy_of_argument(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    return cache.index_copy_(2, pos, new)[:, :, : start + new.shape[2]]


def slice_scatter(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    return cache.copy_(torch.slice_scatter(cache, new, 2, start, start + new.shape[2]))


def narrow(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    cache.narrow(2, start, new.shape[2]).copy_(new)
    return cache.narrow(2, 0, start + new.shape[2])


def cat(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    cache.copy_(torch.cat((cache[:, :, :start], new, cache[:, :, start + new.shape[2] :]), 2))
    return cache[:, :, : start + new.shape[2]]


def tokens_last(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    cache[..., pos] = new.transpose(2, 3)
    return cache.transpose(2, 3)


def roll(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    n = min(new.shape[2], WINDOW)
    cache.copy_(cache.roll(-n, 2))
    cache[:, :, -n:] = new[:, :, -n:]
    return cache if start else new


def shift(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    n = min(new.shape[2], WINDOW)
    cache.copy_(torch.cat((cache[:, :, n:], new[:, :, -n:]), 2))
    return cache if start else new


SPELLINGS: dict[Any, str] = {
    index_put: "index_put",
    index_copy: "index_copy",
    index_copy_of_argument: "index_copy",
    slice_scatter: "slice_scatter",
    narrow: "copy",
    cat: "cat",
    tokens_last: "index_put",
}


class SpeltBlock(Block):
    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, start: int, spell: Any) -> Tensor:
        B, S, _ = x.shape
        h = self.norm_1(x)
        q, k, v = heads_first(self.q(h), HEADS), heads_first(self.k(h), KV_HEADS), heads_first(self.v(h), KV_HEADS)
        angles = rope(pos)
        q, k = apply_rotary_pos_emb(q, *angles), apply_rotary_pos_emb(k, *angles)
        k, v = spell(k_cache, k, pos, start), spell(v_cache, v, pos, start)
        place = torch.arange(k.shape[2])
        if spell in (roll, shift):
            place = place + start + S - k.shape[2]
            mask = (place >= 0) & (place <= pos[:, None]) & (place > pos[:, None] - WINDOW)
        else:
            mask = place <= pos[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.feed(x + self.out(y.transpose(1, 2).reshape(B, S, -1)))


class Medley(Decoder):
    """Every layer writes its cache in another way, all of which are arguments that are not returned."""

    block, layers = SpeltBlock, len(SPELLINGS)
    spellings: tuple[Any, ...] = tuple(SPELLINGS)

    def caches(self, rows: int) -> list[Tensor]:
        rooms = [WINDOW if spell in (roll, shift) else ROOM for spell in self.spellings]
        shapes = [(DIM, room) if spell is tokens_last else (room, DIM) for spell, room in zip(self.spellings, rooms, strict=True)]
        return [torch.zeros(rows, KV_HEADS, *shape, dtype=self.head.weight.dtype) for shape in shapes]

    def forward(self, idx: Tensor, pos: Tensor, k_caches: Any, v_caches: Any, start: int) -> Tensor:
        x = self.embed(idx)
        for block, spell, k, v in zip(self.blocks, self.spellings, k_caches, v_caches, strict=True):
            x = block(x, k, v, pos, start, spell)
        return self.head(self.norm(x))


class Rolling(Medley):
    layers, spellings = 2, (roll, index_copy_of_argument)


def run(model: Any, parts: list[Tensor], caches: Any, hidden: Any = None) -> list[Tensor]:
    """Logits of the decoder itself, fed `parts` in turn; behind the first, slots of each layer out of sight."""
    out, start = [], 0
    for part in parts:
        end = start + part.shape[1]
        with zoo_reference.watching(model, KV_HEADS, hidden if start else None, rows=part.shape[0]), torch.no_grad():
            out.append(model(part, torch.arange(start, end), *caches, start))
        start = end
    return out


def follows(cls: type[Medley], policy: str, evicting: list[int]) -> tuple[Any, Any]:
    """Assert that what is kept in the layers `evicting`, and the logits of two turns behind it, are the reference's."""
    torch.manual_seed(0)
    model = cls().eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in part else parameter.normal_(std=0.3)
    twin = kvfx.compile(model, f"{policy}:0.5", backend="eager", on_refuse="error")
    parts = [tokens(), tokens(2, 3, 2), tokens(2, 1, 3)]
    given = model.caches(2), model.caches(2)
    logits, cache = twin.prefill(parts[0], torch.arange(PROMPT), *given, 0)
    assert not any(tensor.any() for caches in given for tensor in caches)
    out, before = [logits], cache
    for part in parts[1:]:
        start = cache.get_seq_length()
        logits, cache = twin(part, torch.arange(start, start + part.shape[1]), cache, cache, start)
        out.append(logits)
    for row in range(2):
        alone = [part[row : row + 1] for part in parts]
        with zoo_reference.watching(model, KV_HEADS) as watch, torch.no_grad():
            model(alone[0], torch.arange(PROMPT), model.caches(1), model.caches(1), 0)
        hidden: list[Any] = [None] * cls.layers
        for layer, site in enumerate(evicting):
            score = getattr(reference, policy)(zoo_reference.taps(watch.layers[site]))
            positions = reference.best(reference.protected(score, 0, 0), PROMPT // 2)
            assert before.layers[layer].positions[row].tolist() == positions
            hidden[site] = torch.ones(1, KV_HEADS, PROMPT, dtype=torch.bool)
            for head, kept in enumerate(positions):
                hidden[site][0, head, kept] = False
        exact = copy.deepcopy(model).double()
        low, high = (run(m, alone, (m.caches(1), m.caches(1)), hidden) for m in (model, exact))
        assert_within_rounding(torch.cat(out, 1)[row : row + 1], torch.cat(low, 1), torch.cat(high, 1))
    return twin, cache


@pytest.mark.slow
def test_each_spelling_keeps_and_reads_what_the_reference_does():
    twin, _ = follows(Medley, "knorm", list(range(Medley.layers)))
    for reports in twin._kvfx.engine.reports.values():
        assert [site.cache for site in reports[-1].sites] == list(SPELLINGS.values())


def test_a_window_that_is_rolled_stays_whole_beside_a_cache_that_evicts():
    twin, cache = follows(Rolling, "knorm", [1])
    for reports in twin._kvfx.engine.reports.values():
        assert [(site.cache, site.window) for site in reports[-1].sites] == [("roll", 16), ("index_copy", None)]
    assert [tuple(tensor.shape) for tensor in cache.others] == [(2, KV_HEADS, WINDOW, DIM)] * 2


# -- graph by graph ----------------------------------------------------------------------------------------------------------------


def attend(query: Tensor, keys: Tensor, values: Tensor, hide: bool = True) -> Tensor:
    mask = (torch.arange(keys.shape[2]) <= torch.arange(query.shape[2])[:, None]) if hide else None
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def rewritten(function: Any, *inputs: Tensor) -> tuple[Any, Report]:
    """The graph of `function` with its reads shortened, and what is said of its attention."""
    module, report = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs), Report()
    for apply in (forward_stores, find_attention, shorten_reads):
        apply(module, Plan(None), report)
    module.graph.lint()
    module.recompile()
    return module, report


def given() -> list[Tensor]:
    """A prompt of five, caches with room for nine, and where to write."""
    states = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    return [*states, torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 4), torch.arange(5)]


def writing(write: Any, read: Any = lambda cache: cache, hide: bool = True) -> Any:
    """A forward that writes keys and values by `write(cache, new, pos)`, which may return what stands for the cache."""

    def forward(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        written = [write(cache, new, pos) for cache, new in ((k_cache, k), (v_cache, v))]
        keys, values = (cache if made is None else made for cache, made in zip((k_cache, v_cache), written, strict=True))
        return attend(q, read(keys), read(values), hide), keys, values

    return forward


def at_slice(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :, : new.shape[2]] = new


def in_two(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :, :3] = new[:, :, :3]
    cache[:, :, 3:5] = new[:, :, 3:]


FOUND = {
    "slice": (writing(at_slice), "slice"),
    "slice, in two": (writing(in_two), "slice"),
    "index_put": (writing(lambda cache, new, pos: index_put(cache, new, pos, 0)), "index_put"),
    "index_put, functional": (
        writing(lambda cache, new, pos: torch.ops.aten.index_put(cache, [None, None, pos], new)),
        "index_put",
    ),
    "index_copy": (writing(lambda cache, new, pos: cache.index_copy_(2, pos, new)), "index_copy"),
    "index_copy, functional": (writing(lambda cache, new, pos: torch.index_copy(cache, 2, pos, new)), "index_copy"),
    "slice_scatter": (writing(lambda cache, new, pos: torch.slice_scatter(cache, new, 2, 0, 5)), "slice_scatter"),
    "narrow": (writing(lambda cache, new, pos: narrow(cache, new, pos, 0)), "copy"),
    "cat": (writing(lambda cache, new, pos: cache.copy_(torch.cat((new, cache[:, :, 5:]), 2))), "cat"),
    "arange": (writing(lambda cache, new, pos: cache.index_copy_(2, torch.arange(5) + 0, new)), "index_copy"),
    "the filled places": (writing(at_slice, lambda cache: cache[:, :, :5]), "slice"),
}


@pytest.mark.parametrize("what", FOUND)
def test_attention_reads_what_was_written_and_not_the_cache(what):
    function, spelling = FOUND[what]
    module, report = rewritten(function, *given())
    (site,) = report.sites
    assert (site.refusal, site.cache) == ("", spelling)
    key, value, mask = (site.nodes["attention"].args[index].meta["val"].shape for index in (1, 2, 3))
    assert key[2] == value[2] == 5
    assert mask[-1] == 5
    for mine, plain in zip(module(*given()), function(*given()), strict=True):
        torch.testing.assert_close(mine, plain)


def rolled(amount: int) -> Any:
    def write(cache: Tensor, new: Tensor, pos: Tensor) -> None:
        cache.copy_(cache.roll(-amount, 2))
        cache[:, :, -5:] = new

    return write


@pytest.mark.parametrize("write", [rolled(5), lambda cache, new, pos: torch.cat((cache[:, :, 5:], new), 2)], ids=["roll", "cat"])
def test_a_window_that_is_moved_along_is_found(write):
    _, report = rewritten(writing(write), *given())
    assert [(site.refusal, site.window) for site in report.sites] == [("", 9)]


def reversed_(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache.index_copy_(2, torch.arange(5).flip(0), new)


def strided(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache.index_copy_(2, torch.arange(0, 9, 2), new)


def of_data(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache.index_copy_(2, new[0, 0, :, 0].argsort(), new)


def over_heads(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :1, :5] = new[:, :1]


def overlapping(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :, :5] = new
    cache[:, :, 3:8] = new


def with_a_gap(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :, 2:7] = new


def cast(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :, :5] = new.half()


def added(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    torch.ops.aten.index_put_(cache, [None, None, pos], new, True)


def changed(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :, :5] = new
    cache.mul_(2)


def broadcast(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache[:, :, :5].copy_(new[:, :1])


REFUSED = {
    "reversed": (writing(reversed_), "`index_copy_` writes at an index in reverse, expected start, start + 1, ..."),
    "strided": (writing(strided), "`index_copy_` writes at every 2th place, expected consecutive ones"),
    "of data": (
        writing(of_data),
        "`index_copy_` writes at an index that is computed from data, `argsort`; expected an argument, or arange",
    ),
    "another axis too": (writing(over_heads), "`copy_` writes to a part of `clone` that is not consecutive places along one axis"),
    "overlapping": (writing(overlapping), "`copy__1` writes to `clone` from place 3 on, where 5 are filled: expected the next one"),
    "with a gap": (writing(with_a_gap), "`copy_` writes to `clone` from place 2 on, where 0 are filled: expected the next one"),
    "cast": (
        writing(cast),
        "`copy_` casts torch.float16 to torch.float32 on the write, so that a cache holds other numbers than attention is given",
    ),
    "added": (writing(added), "`index_put_` adds to what is there, expected that it replaces it"),
    "changed": (writing(changed), "`clone` is changed by `mul_`, which is no known way to write a cache"),
    "broadcast": (writing(broadcast), "`copy_` repeats what it writes, [1, 1, 5, 4], to fill [1, 2, 5, 4]"),
    "no mask": (writing(at_slice, hide=False), "no mask hides the places of `clone` that nothing was written to"),
    "another roll": (
        writing(rolled(4)),
        "`copy__1` writes 5 places from -5 on along axis 2 of a tensor that was rolled by -4 along 2; expected as many, at its end",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_write_that_is_not_understood_is_refused_with_its_reason_and_nothing_changes(what):
    function, reason = REFUSED[what]
    module, report = rewritten(function, *given())
    assert [site.refusal for site in report.sites] == [reason]
    for mine, plain in zip(module(*given()), function(*given()), strict=True):
        torch.testing.assert_close(mine, plain)


def test_what_is_written_behind_a_read_is_not_read():
    def forward(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        k_cache[:, :, :5], v_cache[:, :, :5] = k, v
        keys, values = k_cache[:, :, :5], v_cache[:, :, :5]
        k_cache[:, :, :5], v_cache[:, :, :5] = -k, 2 * v
        return attend(q, keys, values), k_cache, v_cache

    module, report = rewritten(forward, *given())
    assert [site.refusal for site in report.sites] == [
        "`copy__2` writes to `clone` from place 0 on, where 5 are filled: expected the next one"
    ]
    for mine, plain in zip(module(*given()), forward(*given()), strict=True):
        torch.testing.assert_close(mine, plain)


def test_keys_filled_along_another_axis_than_attention_reads_are_refused():
    def forward(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        k_cache[:, :, :5], v_cache[:, :, :5] = k, v
        return (
            F.scaled_dot_product_attention(q[..., :1].expand(1, 2, 5, 9), k_cache.transpose(2, 3), v_cache.transpose(2, 3)),
            k_cache,
            v_cache,
        )

    _, report = rewritten(forward, *given())
    assert [site.refusal for site in report.sites] == ["`clone` is filled along axis 2, which is not attention's axis of keys"]


# -- what only a run can tell ------------------------------------------------------------------------------------------------------


@functools.cache
def gpt_fast() -> Any:
    model = make("gpt-fast")
    model.setup(2)
    return kvfx.compile(model, "knorm:0.5", backend="eager", on_refuse="error")


def test_two_caches_of_a_decoder_with_buffers_are_independent_and_its_buffers_stay_as_they_are():
    model = gpt_fast()
    for name, buffer in model.base.named_buffers():
        if "cache" in name:
            buffer.fill_(7)
    (_, one), (_, two) = (model.prefill(tokens(seed=seed), torch.arange(PROMPT)) for seed in (1, 2))
    places = torch.arange(PROMPT, PROMPT + 1)
    alone, _ = model(tokens(2, 1, 5), places, past=one)
    model(tokens(2, 1, 6), places, past=two)
    again, grown = model(tokens(2, 1, 5), places, past=one)
    assert torch.equal(alone, again)
    assert (one.get_seq_length(), grown.get_seq_length()) == (PROMPT, PROMPT + 1)
    assert all(bool((buffer == 7).all()) for name, buffer in model.base.named_buffers() if "cache" in name)


def test_places_that_are_not_the_next_ones_are_refused_when_the_graph_runs():
    model = gpt_fast()
    with pytest.raises(kvfx.InputError, match="an argument says at which places of its cache the decoder writes, and they are not"):
        model.prefill(tokens(), torch.arange(1, PROMPT + 1))
    _, cache = model.prefill(tokens(), torch.arange(PROMPT))
    with pytest.raises(kvfx.InputError, match="Expected start, start"):
        model(tokens(2, 1), torch.tensor([PROMPT // 2]), past=cache)
    assert cache.get_seq_length() == PROMPT


def test_a_mask_that_shows_unwritten_places_is_refused_when_the_graph_runs():
    model = gpt_fast()
    mask = model.base.causal_mask
    try:
        model.base.causal_mask = torch.ones_like(mask)
        with pytest.raises(kvfx.InputError, match="the mask lets a query see places of the cache that nothing was written to yet"):
            model.prefill(tokens(), torch.arange(PROMPT))
    finally:
        model.base.causal_mask = mask


def test_a_cache_stands_where_the_decoder_keeps_its_past():
    model = gpt_fast()
    _, cache = model.prefill(tokens(), torch.arange(PROMPT))
    with pytest.raises(kvfx.CacheMismatch, match="expected it as past=cache"):
        model(tokens(2, 1), cache)
