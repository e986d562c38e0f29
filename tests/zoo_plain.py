"""Decoders written by hand, as people write them: each keeps its past in its own form and spells attention in its own way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, DIM = 61, 32, 2, 4, 2, 8


class Block(nn.Module):
    """One layer: attention by a subclass, and a small MLP."""

    kv_heads = KV_HEADS

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.v = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def feed(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """Embedding, blocks and head; a subclass says what stands between."""

    block: type[Block] = Block
    layers = LAYERS

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(self.layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)


def heads_first(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, DIM).transpose(1, 2)


def rope(positions: Tensor) -> tuple[Tensor, Tensor]:
    angle = positions[:, None].float() / 100 ** (torch.arange(0, DIM, 2) / DIM)
    return angle.cos(), angle.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs, heads behind tokens: [B, S, H, D]."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Two halves, heads in front of tokens: [B, H, S, D]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)


# -- nanoGPT: fused projection, learned positions counted from the past, a tuple of tuples -----------------------------------------


class FusedBlock(Block):
    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        B, S, C = x.shape
        q, k, v = self.c_attn(self.norm_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, S, HEADS, DIM).transpose(1, 2) for part in (q, k, v))
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = torch.cat((past[0], k), dim=-2), torch.cat((past[1], v), dim=-2)
            seen = torch.ones(S, k.size(-2), dtype=torch.bool, device=x.device).tril(k.size(-2) - S)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.feed(x + self.out(y.transpose(1, 2).contiguous().view(B, S, C))), (k, v)


class NanoGPT(Decoder):
    block = FusedBlock

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(512, WIDTH)

    def forward(self, idx: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        start = 0 if past is None else past[0][0].size(-2)
        x = self.embed(idx) + self.positions(torch.arange(start, start + idx.size(1), device=idx.device))
        present = []
        for index, block in enumerate(self.blocks):
            x, kept = block(x, None if past is None else past[index])
            present.append(kept)
        return self.head(self.norm(x)), tuple(present)


# -- einsum: interleaved RoPE, axes [B, S, H, D], a group axis instead of repeated keys, the mask a triangle -----------------------


class EinsumBlock(Block):
    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        B, S, _ = x.shape
        h = self.norm_1(x)
        q, k, v = (part(h).view(B, S, -1, DIM) for part in (self.q, self.k, self.v))
        start = 0 if past is None else past["k"].shape[1]
        angles = rope(torch.arange(start, start + S))
        q, k = apply_rotary_emb(q, *angles), apply_rotary_emb(k, *angles)
        if past is not None:
            k, v = torch.cat([past["k"], k], 1), torch.cat([past["v"], v], 1)
        T = k.shape[1]
        logits = torch.einsum("bskgd,btkd->bkgst", q.view(B, S, KV_HEADS, -1, DIM), k) / math.sqrt(DIM)
        hidden = ~torch.ones(S, T, dtype=torch.bool).tril(T - S)
        weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1)
        y = torch.einsum("bkgst,btkd->bskgd", weights, v)
        return self.feed(x + self.out(y.reshape(B, S, -1))), {"k": k, "v": v}


class Einsum(Decoder):
    block = EinsumBlock

    def forward(self, tokens: Tensor, state: Any = None) -> dict[str, Any]:
        x, kept = self.embed(tokens), {}
        for index, block in enumerate(self.blocks):
            x, kept[f"layer{index}"] = block(x, None if state is None else state[f"layer{index}"])
        return {"logits": self.head(self.norm(x)), "state": kept}


# -- ALiBi: biases from the number of keys, softmax spelt out ----------------------------------------------------------------------


class AlibiBlock(Block):
    kv_heads = HEADS

    def forward(self, x: Tensor, bias: Tensor, past: Any) -> tuple[Tensor, Any]:
        B, S, _ = x.shape
        h = self.norm_1(x)
        q, k, v = (heads_first(part(h), HEADS) for part in (self.q, self.k, self.v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        scores = q @ k.transpose(-1, -2) * DIM**-0.5 + bias
        y = scores.softmax(-1) @ v
        return self.feed(x + self.out(y.transpose(1, 2).reshape(B, S, -1))), [k, v]


class Alibi(Decoder):
    block = AlibiBlock

    def forward(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        S, x = tokens.shape[1], self.embed(tokens)
        T = S if past is None else S + past[0][0].shape[2]
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        bias = slopes[:, None, None] * torch.arange(1 - T, 1)
        bias = bias + torch.full((S, T), -torch.inf).triu(T - S + 1)
        kept = []
        for index, block in enumerate(self.blocks):
            x, grown = block(x, bias, None if past is None else past[index])
            kept.append(grown)
        return self.head(self.norm(x)), kept


# -- a flat tuple (k0, v0, k1, v1), RoPE by halves from the length of the past, repeated keys --------------------------------------


class FlatBlock(Block):
    def forward(self, x: Tensor, k_past: Any, v_past: Any) -> tuple[Tensor, Tensor, Tensor]:
        B, S, _ = x.shape
        h = self.norm_1(x)
        q, k, v = heads_first(self.q(h), HEADS), heads_first(self.k(h), KV_HEADS), heads_first(self.v(h), KV_HEADS)
        start = 0 if k_past is None else k_past.shape[2]
        angles = rope(torch.arange(start, start + S))
        q, k = apply_rotary_pos_emb(q, *angles), apply_rotary_pos_emb(k, *angles)
        if k_past is not None:
            k, v = torch.cat([k_past, k], 2), torch.cat([v_past, v], 2)
        mask = None if S == 1 else torch.full((S, k.shape[2]), -torch.inf, dtype=x.dtype).triu(k.shape[2] - S + 1)
        full = [part[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(B, HEADS, -1, DIM) for part in (k, v)]
        y = F.scaled_dot_product_attention(q, *full, attn_mask=mask)
        return self.feed(x + self.out(y.transpose(1, 2).reshape(B, S, -1))), k, v


class Flat(Decoder):
    block = FlatBlock

    def forward(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, kept = self.embed(tokens), ()
        for index, block in enumerate(self.blocks):
            x, k, v = block(x, *(cache[2 * index : 2 * index + 2] if cache is not None else (None, None)))
            kept += (k, v)
        return self.head(self.norm(x)), kept


# -- a dataclass that is passed and returned, with what was counted beside it ------------------------------------------------------


class KeysValues(NamedTuple):
    keys: Tensor
    values: Tensor


@dataclass
class State:
    layers: list[KeysValues]
    seen: Tensor
    name: str = "state"


@dataclass(frozen=True)
class Output:
    logits: Tensor
    state: State | None = None


class StateBlock(FlatBlock):
    def step(self, x: Tensor, held: KeysValues | None) -> tuple[Tensor, KeysValues]:
        x, k, v = self(x, *(held or (None, None)))
        return x, KeysValues(k, v)


class Stateful(Decoder):
    block = StateBlock

    def forward(self, tokens: Tensor, *, state: State | None = None) -> Output:
        x, layers = self.embed(tokens), []
        for index, block in enumerate(self.blocks):
            x, held = block.step(x, None if state is None else state.layers[index])
            layers.append(held)
        seen = torch.full((tokens.shape[0],), tokens.shape[1]) + (0 if state is None else state.seen)
        return Output(self.head(self.norm(x)), State(layers, seen))


# -- a preallocated cache with a Python length -------------------------------------------------------------------------------------


@dataclass
class Buffers:
    k: list[Tensor]
    v: list[Tensor]
    length: int = 0


class BufferBlock(Block):
    def forward(self, x: Tensor, k_buffer: Tensor, v_buffer: Tensor, start: int) -> Tensor:
        B, S, _ = x.shape
        h, end = self.norm_1(x), start + S
        q, k, v = heads_first(self.q(h), HEADS), heads_first(self.k(h), KV_HEADS), heads_first(self.v(h), KV_HEADS)
        angles = rope(torch.arange(start, end))
        q, k = apply_rotary_pos_emb(q, *angles), apply_rotary_pos_emb(k, *angles)
        k_buffer[:, :, start:end], v_buffer[:, :, start:end] = k, v
        mask = torch.ones(S, end, dtype=torch.bool).tril(start)
        y = F.scaled_dot_product_attention(q, k_buffer[:, :, :end], v_buffer[:, :, :end], attn_mask=mask, enable_gqa=True)
        return self.feed(x + self.out(y.transpose(1, 2).reshape(B, S, -1)))


class Preallocated(Decoder):
    block = BufferBlock
    room = 96

    def forward(self, tokens: Tensor, cache: Buffers | None = None) -> tuple[Tensor, Buffers]:
        B, S = tokens.shape
        if cache is None:
            shape = (B, KV_HEADS, self.room, DIM)
            dtype = self.embed.weight.dtype
            cache = Buffers(*([torch.zeros(shape, dtype=dtype) for _ in self.blocks] for _ in range(2)))
        x = self.embed(tokens)
        for block, k, v in zip(self.blocks, cache.k, cache.v, strict=True):
            x = block(x, k, v, cache.length)
        return self.head(self.norm(x)), Buffers(cache.k, cache.v, cache.length + S)


# -- gpt-fast: caches are buffers, written at places that an argument says, and read whole behind rows of a table ------------------


class BufferedBlock(Block):
    def setup(self, rows: int, room: int) -> None:
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(rows, KV_HEADS, room, DIM, dtype=self.out.weight.dtype), persistent=False)

    def forward(self, x: Tensor, input_pos: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        h = self.norm_1(x)
        q, k, v = heads_first(self.q(h), HEADS), heads_first(self.k(h), KV_HEADS), heads_first(self.v(h), KV_HEADS)
        angles = rope(input_pos)
        q, k = apply_rotary_pos_emb(q, *angles), apply_rotary_pos_emb(k, *angles)
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        k, v = (cache.repeat_interleave(HEADS // KV_HEADS, dim=1) for cache in (self.k_cache, self.v_cache))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.feed(x + self.out(y.transpose(1, 2).contiguous().view(B, S, -1)))


class GptFast(Decoder):
    block = BufferedBlock
    room = 96

    def setup(self, rows: int) -> None:
        for block in self.blocks:
            block.setup(rows, self.room)
        self.register_buffer("causal_mask", torch.ones(self.room, self.room, dtype=torch.bool).tril(), persistent=False)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask, x = self.causal_mask[None, None, input_pos], self.embed(idx)
        for block in self.blocks:
            x = block(x, input_pos, mask)
        return self.head(self.norm(x))


# -- layers that read the keys and values of the layer before them -----------------------------------------------------------------


class SharedBlock(FlatBlock):
    def reuse(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        S, T = x.shape[1], k.shape[2]
        q = heads_first(self.q(self.norm_1(x)), HEADS)
        mask = torch.ones(S, T, dtype=torch.bool).tril(T - S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.feed(x + self.out(y.transpose(1, 2).reshape(x.shape[0], S, -1)))


class Shared(Decoder):
    block = SharedBlock
    layers = 4

    def forward(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        x, kept = self.embed(tokens), []
        for index in range(0, self.layers, 2):
            x, k, v = self.blocks[index](x, *((None, None) if past is None else past[index // 2]))
            x = self.blocks[index + 1].reuse(x, k, v)
            kept.append((k, v))
        return self.head(self.norm(x)), kept


@dataclass(frozen=True)
class Plain:
    """A decoder of the table: its class, how its forward calls the past, where its output holds logits and past, and its sites."""

    model: type[Decoder]
    past: str
    logits: Any = 0
    state: Any = 1
    layer_of_site: tuple[int, ...] = (0, 1)

    @property
    def kv_heads(self) -> int:
        """Heads of its cache."""
        return self.model.block.kv_heads

    def parts(self, out: Any) -> tuple[Tensor, Any]:
        """Logits and past of an output."""
        if isinstance(out, (tuple, dict)):
            return out[self.logits], out[self.state]
        return getattr(out, self.logits), getattr(out, self.state)

    def run(self, model: Any, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Logits and past of a forward, of the decoder itself or of what kvfx made of it."""
        return self.parts(model(tokens, **({} if past is None else {self.past: past})))


class Buffered(Plain):
    """A decoder that holds its caches in buffers and is told the places to write to; its past is here the number of tokens seen."""

    def run(self, model: Any, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        B, S = tokens.shape
        is_own = isinstance(model, Decoder)
        if past is None:
            (model if is_own else model.base).setup(B)
        start = 0 if past is None else past if is_own else past.get_seq_length()
        places = torch.arange(start, start + S)
        if is_own:
            return model(tokens, places), start + S
        return model(tokens, places, **({} if past is None else {"past": past}))


PLAIN = {
    "nanoGPT": Plain(NanoGPT, "past"),
    "einsum": Plain(Einsum, "state", "logits", "state"),
    "alibi": Plain(Alibi, "past"),
    "flat tuple": Plain(Flat, "cache"),
    "dataclass": Plain(Stateful, "state", "logits", "state"),
    "preallocated": Plain(Preallocated, "cache"),
    "gpt-fast": Buffered(GptFast, "input_pos"),
    "shared": Plain(Shared, "past", layer_of_site=(0, 0, 1, 1)),
}


def make(name: str, seed: int = 0) -> Decoder:
    """A random decoder of the table, whose norms and biases are not trivial, so that a wrong tap shows."""
    torch.manual_seed(seed)
    model = PLAIN[name].model().eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "norm" in part:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    return model
