"""One layer of a cache of fixed capacity, filled in place, its lengths in tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvfx.cache_layer import CacheLayer, Rows
from kvfx.errors import CacheMismatch, PoolExhausted
from kvfx.passes.capture import mark_dynamic

STATE = ("keys", "values", "positions", "length")


class StaticLayer(CacheLayer):
    """Keys, values and positions of one layer, layout `static`.

    A row's slots stand at its beginning, in the order of their tokens; behind them is room. Of a window, the token at position p
    stands in slot p modulo the window, so that a new one takes the place of that which no query sees any more.

    Attributes:
        keys, values: `[B, Hkv, C, D]`, the model's dtype.
        prefix: positions of all slots, `[B, Hkv, C]` int32, of a window `[B, 1, C]`; -1 = empty.
        length: slots that each row holds, `[B]` int64; None for a window.
        filled: the most slots that a row holds, known without looking at the device; an upper bound where rows grew unequally.
        tokens: logical length: tokens seen, padding included.
        alike: whether all rows and layers of the cache hold equally many slots, and none is a window.
    """

    is_compileable = True  # so that a stock model always makes a mask

    def __init__(self, window: int | None, capacity: int, batch: int, key: Tensor, value: Tensor) -> None:
        """Make room for `capacity` slots like those of `key` and `value`, `[1, Hkv, 1, D]`, in `batch` rows."""
        super().__init__(window)
        heads, device = key.shape[1], key.device
        self.store(*(like.new_zeros(batch, heads, capacity, like.shape[3]) for like in (key, value)))
        self.prefix = torch.full((batch, heads if window is None else 1, capacity), -1, dtype=torch.int32, device=device)
        self.length: Any = None if window is not None else torch.zeros(batch, dtype=torch.long, device=device)
        self.filled = self.tokens = 0
        self.alike = True

    @property
    def slots(self) -> int:
        """Physical length."""
        return self.filled

    @property
    def capacity(self) -> int:
        """Slots that there is room for."""
        return int(self.keys.shape[2])

    @property
    def positions(self) -> Tensor:
        """RoPE index of each slot's token within its row, `[B, Hkv, C]` int32; -1 = empty."""
        return self.prefix.expand(-1, self.keys.shape[1], -1)

    def state(self) -> dict[str, Tensor]:
        """The tensors by name: all that a forward changes."""
        held = zip(STATE, (self.keys, self.values, self.prefix, self.length), strict=True)
        return {name: tensor for name, tensor in held if tensor is not None}

    def mark(self) -> None:
        """Let caches of other rows and capacities share graphs."""
        for tensor in (self.keys, self.values, self.prefix):
            mark_dynamic(tensor, *((0, 2) if self.window is None else (0,)))
        if self.length is not None:
            mark_dynamic(self.length, 0)

    def edges(self) -> list[Tensor]:
        """Of its tensors those that tell slots from room; of a window all, whose slots are overwritten."""
        return [tensor for name, tensor in self.state().items() if self.window is not None or name in ("positions", "length")]

    @classmethod
    def of_state(cls, index: int, tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> StaticLayer:
        """Put layer `index` together from the tensors of a cache and what `StaticCache.about` says of it."""
        state: dict[str, Any] = {name: tensors.get(f"layers.{index}.{name}") for name in STATE}
        layer = cls.__new__(cls)
        CacheLayer.__init__(layer, facts["window"])
        layer.store(state["keys"], state["values"])
        layer.prefix, layer.length = state["positions"], state["length"]
        layer.alike = facts["alike"]
        layer.filled, layer.tokens, layer.evicted = facts["filled"], facts["tokens"], facts["evicted"]
        return layer

    def get_seq_length(self) -> int:
        """Logical length."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots, and the logical index of the first, such that a stock model's causal mask hides those not yet filled.

        Raises:
            CacheMismatch: rows or layers differ, or some have windows, so that no one mask can be right.
        """
        if not self.alike:
            raise CacheMismatch(
                "a stock model makes one mask for all rows and layers, but those of this static cache hold unequally many slots, "
                "or have windows. Use the model that kvfx.compile returned."
            )
        return self.capacity, self.tokens - self.filled

    def account(self, new: int, stored: int) -> None:
        """Note that `new` tokens were seen and that at most `stored` of each row are held."""
        self.tokens += new
        self.filled = self.filled + stored if self.window is None else min(self.tokens, self.capacity)
        self.evicted = self.tokens - self.filled
        self.finite = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to rows of equal lengths, as a stock model does."""
        new = key_states.shape[2]
        if self.filled + new > self.capacity:
            raise PoolExhausted(f"a layer holds {self.filled} of {self.capacity} slots; {new} more do not fit. Nothing was written")
        positions = torch.arange(self.tokens, self.tokens + new, device=self.keys.device).int().expand(key_states.shape[0], -1)
        self.append(key_states.detach(), value_states.detach(), positions, None)
        self.account(new, new)
        return self.keys, self.values

    def append(self, key: Tensor, value: Tensor, positions: Tensor, order: Tensor | None, kept: Tensor | None = None) -> None:
        """Put new slots behind those held, in place.

        Args:
            key: `[B, Hkv, n, D]`.
            value: `[B, Hkv, n, Dv]`.
            positions: of the new slots, `[B, n]` or `[B, Hkv, n]` int32, -1 for what is empty.
            order: the place of each among the new ones, `[B, n]`: empty ones come last; None if they are in order.
            kept: how many of each row are not empty, `[B]`; None if all are.
        """
        new = key.shape[2]
        place = torch.arange(new, device=key.device)[None] if order is None else order
        self._put(place + self.length[:, None], key, value, positions if positions.dim() == 3 else positions[:, None])
        self.length.add_(new if kept is None else kept)

    def append_chosen(self, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, counts: Tensor | None) -> None:
        """Put chosen new tokens behind the slots held, in place.

        Args:
            key: `[B, Hkv, S, D]`.
            value: `[B, Hkv, S, Dv]`.
            positions: of the new tokens, `[B, S]` int32.
            slots: what is chosen, in order, `[B, Hkv, n]`; -1 at the left where a row keeps less.
            counts: how many each row keeps, `[B]`; None if all keep n.
        """
        buffers = self.keys, self.values, self.prefix
        torch.ops.kvfx.compact_into(*buffers, key, value, positions, slots, counts, self.length)
        self.length.add_(slots.shape[2] if counts is None else counts)

    def replace_oldest(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Put one new token of each row, at `positions` `[B, 1]`, in place of the one that leaves the window."""
        self._put(positions.long() % self.keys.shape[2], key, value, positions[:, None])

    def _put(self, place: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        batch, heads = key.shape[:2]
        row = torch.arange(batch, device=key.device)[:, None, None]
        head, place = torch.arange(heads, device=key.device)[:, None], place[:, None]
        self.keys.index_put_((row, head, place), key)
        self.values.index_put_((row, head, place), value)
        head = head[: self.prefix.shape[1]]
        self.prefix.index_put_((row, head, place), positions)

    def slide(self, key: Tensor, value: Tensor, seen: Tensor, order: Tensor | None, kept: Tensor | None) -> None:
        """Let a window move over new tokens, in place.

        Args:
            key: `[B, Hkv, n, D]`.
            value: `[B, Hkv, n, Dv]`.
            seen: real tokens of each row before them, `[B]`.
            order: the place of each among the new ones, `[B, n]`: padding comes last; None if they are in order.
            kept: how many of each row are real, `[B]`; None if all are.
        """
        new, window = key.shape[2], self.keys.shape[2]
        last = (seen + (new if kept is None else kept) - 1)[:, None]
        position = last - (last - torch.arange(window, device=key.device)) % window  # of what each slot holds afterwards
        source = position - seen[:, None]
        if order is not None:
            listed = torch.empty_like(order).scatter(1, order, torch.arange(new, device=key.device).expand_as(order))
            source = listed.gather(1, source.clamp(0, new - 1)).where(source >= 0, source)
        fresh, source = (source >= 0)[:, None, :, None], source.clamp(min=0)[:, None, :, None]
        for held, states in ((self.keys, key), (self.values, value)):
            taken = states.gather(2, source.expand(-1, states.shape[1], -1, states.shape[3]))
            held.copy_(torch.where(fresh, taken, held))
        self.prefix.copy_(position.clamp(min=-1).int()[:, None])

    def clear(self) -> None:
        """Forget everything, in place."""
        self.prefix.fill_(-1)
        if self.length is not None:
            self.length.zero_()
        self.filled = self.tokens = self.evicted = 0

    def map_rows(self, rows: Rows) -> None:
        """Apply `rows` to every tensor whose first axis is the batch; in place where the number of rows stays."""
        keys, values, self.prefix = (in_place(tensor, rows) for tensor in (self.keys, self.values, self.prefix))
        self.store(keys, values)
        if self.length is not None:
            self.length = in_place(self.length, rows)

    def copy(self) -> StaticLayer:
        """A layer with slots of its own."""
        other = StaticLayer.__new__(StaticLayer)
        other.__dict__.update(self.__dict__)
        other.store(self.keys.clone(), self.values.clone())
        other.prefix, other.length = self.prefix.clone(), None if self.length is None else self.length.clone()
        return other

    def forget_from(self, seen: Tensor) -> None:
        """Empty the slots of tokens from position `seen` on, `[B]`, in place."""
        self.prefix.masked_fill_(self.prefix >= seen[:, None, None], -1)
        if self.length is not None:
            self.length.copy_((self.prefix[:, 0] >= 0).sum(-1))

    def cut(self, tokens: int, seen: Tensor) -> None:
        """Forget the last `tokens` slots, in place; rows have seen `seen` real tokens without them."""
        self.forget_from(seen)
        self.filled, self.tokens = self.filled - tokens, self.tokens - tokens


def in_place(tensor: Tensor, rows: Rows) -> Tensor:
    """`rows(tensor)`, in the memory of `tensor` if it has that shape."""
    chosen = rows(tensor)
    return tensor.copy_(chosen) if chosen.shape == tensor.shape else chosen
