"""The layers of a cache as a traced forward sees them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx.cache_layer import CacheLayer
from kvfx.passes.cache_write import slots_of


class SlotCache(transformers.Cache):
    """The layers of a `Cache` as a traced forward sees them: as if nothing had been evicted. `update` may evict.

    Attributes:
        sizes: carry how many slots the new tokens get (see `passes.cache_write`), one for each layer or one for all; or None to
            keep them all.
        counts: slots that each row keeps, `[B]`, of each layer or of all; or None if all rows keep equally many.
        length: carries the number of tokens seen, padding included (see `passes.cache_read`); None if nothing is held.
        start: position of the first slot behind the prefix of each row, `[B]`, in layers without a window.
        empty: whether rows may hold empty slots.
        whole: layers that hold all tokens seen and are not to be touched.
        asked: layers that store all new tokens and note their scores, because the choice is made when all are known.
        seen: real tokens seen per row, `[B]`; set inside the graph, like the next two.
        positions: of the new tokens, `[B, S]` int32, -1 for padding.
        valid: which of them are real, `[B, S]`, or None if all are.
    """

    layers: list[CacheLayer]  # type: ignore[assignment]
    layout = "dense"
    is_compileable = False

    def __init__(
        self,
        layers: list[CacheLayer],
        sizes: list[Tensor] | None = None,
        counts: list[Tensor] | None = None,
        length: Tensor | None = None,
        start: Tensor | None = None,
        empty: bool = False,
        whole: frozenset[int] = frozenset(),
        asked: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.sizes, self.counts, self.length, self.start = sizes, counts, length, start
        self.empty, self.whole, self.asked = empty, whole, asked
        self.seen: Any = None
        self.positions: Tensor | None = None
        self.valid: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; what attention shall read: everything seen."""
        layer, key, value = self.layers[layer_idx], key_states, value_states
        stored_key, stored_value = key, value
        if layer.window is not None:
            key, value = stored_key, stored_value = torch.ops.kvfx.window_write(key, value, layer_idx, layer.window)
        elif self.sizes is not None:
            size = self.sizes[min(layer_idx, len(self.sizes) - 1)]
            counts = None if self.counts is None else self.counts[min(layer_idx, len(self.counts) - 1)]
            if layer_idx in self.asked:
                first, then, layer.finite = torch.ops.kvfx.cache_score(key, value, self.positions, counts, layer_idx)
                layer.scores = first, then
            else:
                stored_key, stored_value, layer.kept_positions, layer.finite = torch.ops.kvfx.cache_write(
                    key, value, self.positions, counts, size, layer_idx
                )
        if layer.keys is not None:
            past_key, past_value = self._read(layer, layer_idx)
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
            stored_key = torch.cat([layer.keys, stored_key], 2)
            stored_value = torch.cat([layer.values, stored_value], 2)
        if layer.window is not None and self.valid is None:
            stored_key, stored_value = stored_key[:, :, 1 - layer.window :], stored_value[:, :, 1 - layer.window :]
        # Own memory, because a view would keep all of it alive, and one layout, because another would be a new graph.
        stored_key, stored_value = stored_key.contiguous(), stored_value.contiguous()
        layer.keys, layer.values = stored_key, stored_value
        return key, value

    def _read(self, layer: CacheLayer, index: int) -> tuple[Tensor, Tensor]:
        start = self.start if layer.window is None else self.seen - layer.keys.shape[2]
        return torch.ops.kvfx.cache_read(
            layer.keys, layer.values, layer.prefix, start, self.seen, self.length, index, self.empty, index in self.whole
        )

    def token_mask(self, seen: Tensor, valid: Tensor | None, length: int) -> Tensor | None:
        """Which tokens are real, of all seen and `length` new ones, `[B, tokens]`; None if no padding need be known of."""
        held = self.get_seq_length()
        if not held or (valid is None and not self.empty):
            return valid
        past = torch.arange(held, device=seen.device) >= held - seen[:, None]  # padding stands on the left, in all of a row's past
        new = valid if valid is not None else torch.ones(seen.shape[0], length, dtype=torch.bool, device=seen.device)
        return torch.cat([past, new], -1)

    def end(self, seen: Tensor) -> None:
        """The forward is over; rows have seen `seen` real tokens, which it returns."""

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen."""
        return 0 if self.length is None else slots_of(self.length)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Tokens seen and new, none left out before them."""
        return self.get_seq_length() + query_length, 0
