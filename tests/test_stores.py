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
    return cache


def shift(cache: Tensor, new: Tensor, pos: Tensor, start: int) -> Tensor:
    n = min(new.shape[2], WINDOW)
    return cache.copy_(torch.cat((cache[:, :, n:], new[:, :, -n:]), 2))


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
            place = place + start + S - WINDOW
            mask = (place >= 0) & (place <= pos[:, None])
        else:
            mask = place <= pos[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.feed(x + self.out(y.transpose(1, 2).reshape(B, S, -1)))


class Medley(Decoder):
    """Every layer writes its cache in another way, all of which are arguments that are not returned."""

    block, layers = SpeltBlock, len(SPELLINGS)
    spellings: tuple[Any, ...] = tuple(SPELLINGS)

    def caches(self, rows: int) -> list[Tensor]:
        last = (DIM, ROOM)
        return [
            torch.zeros(rows, KV_HEADS, *(last if spell is tokens_last else (ROOM, DIM)), dtype=self.head.weight.dtype)
            for spell in self.spellings
        ]

    def forward(self, idx: Tensor, pos: Tensor, k_caches: Any, v_caches: Any, start: int) -> Tensor:
        x = self.embed(idx)
        for block, spell, k, v in zip(self.blocks, self.spellings, k_caches, v_caches, strict=True):
            x = block(x, k, v, pos, start, spell)
        return self.head(self.norm(x))
