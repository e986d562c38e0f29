"""Decoding with blocks evicted again and again, by its definition: every token's key stays, and what is evicted is masked.

One row, token by token, in loops over layers and heads; nothing of kvfx. The model is any of transformers whose attention is looked
up by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from schedule_by_definition import protected, schedule, squares


class Simulation:
    """A row of a model, and which tokens each head still has.

    Attributes:
        kept: of each layer, `[Hkv, T]` bool.
        metric: of each layer, `[Hkv, T]` float64, what attention has paid to each token.
    """

    def __init__(
        self, model: Any, granted: Any, every: int, *, window: int = 8, pool: int = 7, power: int = 2, buffer: int = 0,
        sinks: int = 4, recent: int = 8, block: int = 16,
    ) -> None:  # fmt: skip
        """`granted(tokens seen)` is what a head keeps in the mean; after the prompt blocks are evicted every so many tokens."""
        self.model, self.granted, self.every, self.block = model, granted, every, block
        self.window, self.pool, self.power, self.buffer = window, pool, power, buffer
        self.sinks, self.recent = sinks, recent
        self.kept: list[Tensor] = []
        self.metric: list[Tensor] = []
        self.cache, self.seen, self.since = DynamicCache(), 0, 0
        AttentionInterface.register("simulated", self._attend)
        model.set_attn_implementation("simulated")

    def forward(self, ids: Tensor) -> Tensor:
        """Logits behind new tokens `[1, S]`: a prompt, or one token."""
        if self.seen and self.since >= self.every:
            self.evict()
        with torch.no_grad():
            out = self.model(ids, past_key_values=self.cache).logits[:, -1]
        self.seen += ids.shape[1]
        self.since += ids.shape[1]
        if self.seen == ids.shape[1]:
            self.evict()
        return out

    def evict(self) -> None:
        """Let the row go down to the blocks that it is granted."""
        metric, kept = torch.cat(self.metric), torch.cat(self.kept)
        safe = protected(metric, self.sinks, self.recent)
        tokens = [head.nonzero().flatten().tolist() for head in kept]
        heads = [[(float(safe[number, token]), token) for token in each] for number, each in enumerate(tokens)]
        held = sum(-(-len(each) // self.block) for each in heads)
        gone = schedule(heads, [0] * len(heads), held - -(-len(heads) * self.granted(self.seen) // self.block), self.block)
        first = 0
        for layer in self.kept:
            for head in range(len(layer)):
                layer[head, [tokens[first + head][slot] for slot in gone[first + head]]] = False
            first += len(layer)
        self.since = 0

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        index, (heads, tokens), new = module.layer_idx, key.shape[1:3], query.shape[2]
        if index == len(self.kept):
            self.kept.append(torch.zeros(heads, 0, dtype=torch.bool))
            self.metric.append(torch.zeros(heads, 0, dtype=torch.float64))
        more = tokens - self.kept[index].shape[1]
        self.kept[index] = torch.nn.functional.pad(self.kept[index], (0, more), value=True)
        self.metric[index] = torch.nn.functional.pad(self.metric[index], (0, more))
        query = query[0].unflatten(0, (heads, -1))  # [Hkv, G, S, D]
        logits = (query @ key[0, :, None].transpose(-2, -1)) * scaling
        seen = self.kept[index][:, None, None] & torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        if tokens == new:
            self.metric[index] = squares(weights[:, :, -self.window :], self.power, self.buffer, self.pool)
        else:
            self.metric[index] += squares(weights, self.power, self.buffer)
        return (weights @ value[0, :, None]).flatten(0, 1).transpose(0, 1)[None], None
