"""A queue served without kvfx: `torch.compile` of the transformers model, and caches that grow by concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from offline_queue import Request
from torch import Tensor
from transformers import DynamicCache


class GrowingServer:
    """The transformers model under torch.compile, in as many bytes of keys and values as a pool has.

    What a row will hold at its end counts from the start, as for blocks. The copy that each step makes of the cache does not.
    """

    def __init__(self, model: Any, bytes: int, backend: str = "inductor") -> None:
        def forward(**inputs: Any) -> Any:  # of its own, because Dynamo keeps graphs by code object
            return model(**inputs)

        def prefill(**inputs: Any) -> Any:
            return model(**inputs)

        self.config, self.bytes = model.config, bytes
        self._step, self._prefill = (torch.compile(each, fullgraph=True, backend=backend) for each in (forward, prefill))
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        self.token_bytes = 2 * self.config.num_hidden_layers * heads * dim * model.dtype.itemsize

    def check(self, request: Request) -> None:
        """See `offline_queue.Server`."""
        if self._needs(request) > self.bytes:
            raise ValueError(f"a row of {self._needs(request)} bytes does not fit into {self.bytes}. Give more")

    def _needs(self, request: Request) -> int:
        return (request.ids.shape[1] + request.output - 1) * self.token_bytes

    def has_room(self, cache: Any, running: Sequence[Request], waiting: Sequence[Any], request: Request) -> bool:
        """Whether there is, and rows that run are as long: what is here makes no masks for padding."""
        admitted = [*running, *(each for _, each in waiting)]
        if running:
            return False
        if any(each.ids.shape[1] != request.ids.shape[1] for each in admitted):
            raise ValueError("prompts of one length are served here")
        return sum(map(self._needs, [*admitted, request])) <= self.bytes

    def prefill(self, ids: Tensor) -> tuple[Any, Tensor]:
        """See `offline_queue.Server`."""
        cache = DynamicCache(config=self.config)
        torch._dynamo.mark_dynamic(ids, 1)
        return cache, self._prefill(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def join(self, caches: list[Any]) -> Any:
        """See `offline_queue.Server`."""
        joined = caches[0]
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            for name in ("keys", "values"):
                tensor = torch.cat([getattr(layer, name) for layer in layers]).contiguous()
                torch._dynamo.mark_dynamic(tensor, 2)
                if len(tensor) > 1:  # a graph for one row is another
                    torch._dynamo.mark_dynamic(tensor, 0)
                setattr(layers[0], name, tensor)
        return joined

    def step(self, cache: Any, tokens: Tensor) -> tuple[Any, Tensor]:
        """See `offline_queue.Server`."""
        if len(tokens) > 1:
            torch._dynamo.mark_dynamic(tokens, 0)
        return cache, self._step(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]

    def select(self, cache: Any, rows: list[int]) -> Any:
        """See `offline_queue.Server`."""
        if len(rows) < len(cache.layers[0].keys):
            cache.batch_select_indices(torch.tensor(rows))
        return cache
