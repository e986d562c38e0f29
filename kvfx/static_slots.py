"""A cache of fixed capacity as a traced forward sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfx.passes.cache_write import size_of, slots_of
from kvfx.passes.plan import Plan, Splice
from kvfx.slot_cache import SlotCache


class StaticSlots(SlotCache):
    """Layers of fixed capacity as a traced forward sees them: as if nothing had been evicted. `update` writes in place.

    Attributes:
        plan: what is evicted.
        has_past: whether tokens were seen before.
        longest: carries the number of tokens of the longest text that the cache may see, see `passes.cache_write`.
        empty: whether the model is to know which tokens of the text are padding.
    """

    layout = "static"
    is_compileable = True  # so that transformers makes masks for fixed lengths

    def __init__(
        self,
        layers: Any,
        plan: Plan,
        sizes: Any,
        counts: Any,
        longest: Tensor,
        has_past: bool,
        shows_padding: bool,
        whole: frozenset[int],
    ) -> None:
        super().__init__(layers, sizes, counts, empty=shows_padding, whole=whole)
        self.plan, self.longest, self.has_past = plan, longest, has_past
        self.valid: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; what attention shall read: everything seen."""
        layer: Any = self.layers[layer_idx]
        key, value = key_states, value_states
        if layer.window is not None:
            key, value = torch.ops.kvfx.window_write(key, value, layer_idx, layer.window)
        appends = self.valid is None and (self.sizes is None if layer.window is None else key.shape[2] == 1)
        read = (key, value)
        if self.has_past and not appends:
            read = self._read(layer, layer_idx, read)  # before what it reads is written to
        order, kept = self._order()
        if layer.window is None and self.sizes is not None and layer_idx not in self.whole:
            self._evict(layer, layer_idx, key, value)
        elif layer.window is None:
            if self.sizes is not None:  # so that the report of what is evicted lists this layer
                everything = size_of(key.shape[2], key.device)
                key, value, _, layer.finite = torch.ops.kvfx.cache_write(key, value, self.positions, None, everything, layer_idx)
            layer.append(key, value, self.positions, order, kept)
        elif self.has_past and appends:
            layer.replace_oldest(key, value, self.positions)
        else:
            layer.slide(key, value, self.seen, order, kept)
        return self._read(layer, layer_idx) if self.has_past and appends else read

    def _evict(self, layer: Any, index: int, key: Tensor, value: Tensor) -> None:
        """Append what is kept of new keys and values."""
        assert self.sizes is not None
        counts = None if self.counts is None else self.counts[min(index, len(self.counts) - 1)]
        count = slots_of(self.sizes[min(index, len(self.sizes) - 1)])
        first, scores, layer.finite = torch.ops.kvfx.cache_score(key, value, self.positions, counts, index)
        if isinstance(self.plan.score, Splice):
            scores = torch.ops.kvfx.splice(first, scores, count, counts, *self.plan.score.share.as_integer_ratio())
        layer.append_chosen(key, value, self.positions, torch.ops.kvfx.select(scores, count, counts), counts)

    @property
    def tokens(self) -> int:
        """Tokens of the longest text."""
        return slots_of(self.longest)

    def _order(self) -> tuple[Tensor | None, Tensor | None]:
        """The place of each new token among the real ones, padding behind them, [B, S]; and how many are real, [B]."""
        if self.valid is None:
            return None, None
        real = self.valid.long().cumsum(-1)
        return torch.where(self.valid, real, real[:, -1:] + (~self.valid).long().cumsum(-1)) - 1, real[:, -1]

    def _read(self, layer: Any, index: int, new: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """What attention shall read: slots, and `new` keys and values that they do not hold."""
        held = self.seen.amax()
        columns = (layer.prefix + (held - self.seen)[:, None, None]).where(layer.prefix >= 0, -1)
        if new is not None:
            behind = held + torch.arange(new[0].shape[2], device=held.device)[None]
            behind = behind.expand(columns.shape[0], -1) if self.valid is None else behind.where(self.valid, -1)
            columns = torch.cat([columns, behind[:, None].expand(-1, columns.shape[1], -1)], 2)
        return torch.ops.kvfx.static_read(layer.keys, layer.values, columns, *(new or (None, None)), self.tokens, index)

    def token_mask(self, seen: Tensor, valid: Tensor | None, length: int) -> Tensor | None:
        """Which tokens of the text are real, [B, tokens], where that is to be known."""
        if not self.has_past:
            return valid
        if valid is None and not self.empty:
            return None
        column, held = torch.arange(self.tokens, device=seen.device), seen.amax()
        real = (column >= held - seen[:, None]) & (column < held + length)
        if valid is None:
            return real
        new = valid.gather(1, (column - held).clamp(0, length - 1).expand(seen.shape[0], -1))
        return real & ((column < held) | new)

    def end(self, seen: Tensor) -> None:
        """Note in place how many tokens each row has seen now."""
        self.seen.copy_(seen)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen: of the longest row, on the device."""
        return self.seen.amax() if self.has_past else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All tokens that may be seen."""
        return (self.tokens if self.has_past else query_length), 0
