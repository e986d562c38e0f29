"""Decoding by hand, layer by layer on a hand-made cache: what the caches of kvfx are checked against, and tiny models for it."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvfx

VOCABULARY = 64
GREEDY = {"do_sample": False, "max_new_tokens": 12}
KeysValues = list[tuple[Tensor, Tensor]]


def fresh_llama(seed: int = 0, attention: str = "sdpa", **changes: Any) -> LlamaForCausalLM:
    """A random Llama, of weights large enough that every slot matters."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None, "attn_implementation": attention,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@functools.cache
def llama() -> LlamaForCausalLM:
    """The model that tests share, so that they share its graphs."""
    return fresh_llama()


@functools.cache
def eager_llama() -> LlamaForCausalLM:
    """The same weights with attention spelt out."""
    model = fresh_llama(attention="eager")
    model.load_state_dict(llama().state_dict())
    return model


@functools.cache
def compiled(policy: str = "none") -> Any:
    """The shared model under `policy`."""
    return kvfx.compile(llama(), policy, backend="eager")


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random ids without special tokens, `[rows, length]`, none twice in a row: the first layer's keys would have equal norms."""
    order = torch.rand(rows, VOCABULARY - 3, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order[:, :length] + 3


def ones(*shape: int) -> Tensor:
    """A mask without padding."""
    return torch.ones(shape, dtype=torch.long)


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> KeysValues:
    """Keys and values of every token, per layer."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def rotate(model: Any, states: Tensor, by: Tensor) -> Tensor:
    """RoPE `states`, `[B, H, S, D]`, on by `by` positions, `[S]`."""
    cos, sin = (part[:, None] for part in model.model.rotary_emb(states, by[None]))
    left, right = states.chunk(2, -1)
    return states * cos + torch.cat([-right, left], -1) * sin


def positions_kept(slots: int, of: int, seed: int) -> Tensor:
    """`slots` random positions below `of`, ascending."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:slots].sort().values


@torch.no_grad()
def decode(
    model: Any, held: KeysValues, position: int, new: Tensor, count: int = 12, forced: Tensor | None = None
) -> tuple[list[int], Tensor]:
    """Greedy tokens after `new`, `[1, q]`, whose first stands at `position`, and the logits of each, `[count, V]`.

    Every new token attends to all slots held of its own layer, and causally to the new ones. `forced` replaces the tokens chosen.
    """
    held = [(keys.clone(), values.clone()) for keys, values in held]
    chosen, logits = [], []
    while len(chosen) < count:
        hidden, length = model.model.embed_tokens(new), new.shape[1]
        at = torch.arange(position, position + length)
        for index, layer in enumerate(model.model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            split = (1, length, -1, attention.head_dim)
            query, key, value = (
                projection(normed).view(split).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys = torch.cat([held[index][0], rotate(model, key, at)], 2)
            values = torch.cat([held[index][1], value], 2)
            held[index] = keys, values
            group = query.shape[1] // keys.shape[1]
            scores = rotate(model, query, at) @ keys.repeat_interleave(group, 1).mT / math.sqrt(attention.head_dim)
            slots = keys.shape[2] - length
            future = torch.arange(slots + length) > slots + torch.arange(length)[:, None]
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            mixed = (weights @ values.repeat_interleave(group, 1)).transpose(1, 2).reshape(1, length, -1)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden))[:, -1])
        new = logits[-1].argmax(-1, keepdim=True) if forced is None else forced[:, len(chosen), None]
        chosen.append(int(new))
        position += length
    return chosen, torch.cat(logits)
