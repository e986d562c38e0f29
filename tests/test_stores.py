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
from zoo_plain import DIM, HEADS, KV_HEADS, PLAIN, Block, Decoder, apply_rotary_pos_emb, heads_first, make, rope

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
    layers, spellings = 3, (roll, index_copy_of_argument, shift)


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
    """Assert that what is kept in the layers `evicting`, and the logits of three turns behind it, are the reference's."""
    torch.manual_seed(0)
    model = cls().eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in part else parameter.normal_(std=0.3)
    twin = kvfx.compile(model, f"{policy}:0.5", backend="eager", on_refuse="error")
    parts = [tokens(), tokens(2, 3, 2), tokens(2, 1, 3), tokens(2, 1, 4)]
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
        assert [(site.cache, site.window) for site in reports[-1].sites] == [("roll", 16), ("index_copy", None), ("cat", 16)]
    assert [tuple(tensor.shape) for tensor in cache.others] == [(2, KV_HEADS, WINDOW, DIM)] * 4
