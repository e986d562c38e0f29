"""One layer of a cache: its slots, and where their tokens stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvfx.errors import CacheMismatch
from kvfx.passes.capture import mark_dynamic

Rows = Callable[[Tensor], Tensor]
STATE = ("keys", "values", "positions")


class CacheLayer(DynamicLayer):
    """Keys, values and positions of one layer, layout `dense`.

    Attributes:
        keys, values: `[B, Hkv, T, D]`, the model's dtype; empty slots are zero and stand on the left.
        prefix: positions of the first slots, `[B, Hkv, P]` int32; -1 = empty. All that eviction or padding made irregular, and
            at least two, because a graph specialises sizes 0 and 1. None of a window's slots, which are consecutive.
        next_position: position of the first slot behind the prefix, per row, `[B]`; from there on slots are consecutive. Of a
            window: of the first token that comes next.
        evicted: logical minus physical length.
        window: tokens that a query sees of this layer, itself included, or None if it sees all. A window's last slots are held.
    """

    keys: Any  # Tensors, once something is stored
    values: Any

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.prefix: Any = None
        self.next_position: Any = None
        self.evicted = 0
        # Set by the traced forward that evicts, taken over by the cache when it is done.
        self.kept_positions: Tensor | None = None
        self.finite: Tensor | None = None
        self.scores: Any = None  # of the new tokens, where layers compete: what `cache_score` stands for

    @classmethod
    def of(cls, index: int, keys: Tensor, values: Tensor, positions: Tensor, seen: Tensor) -> CacheLayer:
        """Make layer `index` of given slots, checked; see `Cache.from_layers`."""
        where, shape, logical = f"layer {index}", keys.shape[:3], int(seen[0])
        if keys.dim() != 4 or values.dim() != 4 or values.shape[:3] != shape or shape[0] != seen.shape[0]:
            found = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
            raise CacheMismatch(f"{where}: {found}, expected [B, Hkv, T, D] with B = {seen.shape[0]}")
        if not 0 < shape[2] <= logical:
            what = "no slot; every layer needs at least one" if shape[2] == 0 else f"{shape[2]} slots of only {logical} tokens seen"
            raise CacheMismatch(f"{where} holds {what}")
        if positions.shape not in (shape, shape[2:]):
            raise CacheMismatch(
                f"{where}: positions {tuple(positions.shape)}, expected {tuple(shape)} or {tuple(shape[2:])} like the keys"
            )
        prefix = positions.to(device=keys.device, dtype=torch.int32).expand(shape).contiguous()
        if bool((prefix < 0).any() | (prefix >= logical).any() | (prefix.diff(dim=-1) <= 0).any()):
            raise CacheMismatch(f"{where}: positions must ascend within 0..{logical - 1}, the RoPE phase that the keys have")
        layer = cls()
        layer.store(keys.detach().contiguous(), values.detach().contiguous())
        layer.prefix, layer.next_position, layer.evicted = prefix, seen.clone(), logical - shape[2]
        return layer

    @classmethod
    def of_state(cls, index: int, tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> CacheLayer:
        """Put layer `index` together from the tensors of a cache and what `Cache.about` says of it."""
        layer = cls(facts["window"])
        keys, values, positions = (tensors[f"layers.{index}.{name}"] for name in STATE)
        layer.store(keys, values)
        layer.prefix, layer.next_position, layer.evicted = positions, tensors["lengths_seen"], facts["evicted"]
        if isinstance(positions, Tensor):  # a pytree may hold anything
            layer.next_position = layer.next_position.clone()
            layer.prefix = positions if layer.window is None else no_positions(keys)
        return layer

    @property
    def kind(self) -> str:
        """What the layer holds of the tokens seen: "full" = what a policy chose, "window" = the last ones."""
        return "full" if self.window is None else "window"

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Hold exactly these slots."""
        self.keys, self.values = keys, values
        if isinstance(keys, Tensor):  # a pytree may hold anything
            self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def state(self) -> dict[str, Tensor]:
        """The tensors by name: what a file stores."""
        return {"keys": self.keys, "values": self.values, "positions": self.positions}

    def memory(self) -> list[Tensor]:
        """The tensors that it keeps alive."""
        return [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)]

    def mark(self) -> None:
        """Let the number of slots and rows vary without a new graph."""
        for tensor in (self.keys, self.values, self.prefix):
            mark_dynamic(tensor, 0, 2)
        mark_dynamic(self.next_position, 0)

    @property
    def slots(self) -> int:
        """Physical length."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def positions(self) -> Tensor:
        """RoPE index of each slot's token within its row, `[B, Hkv, T]` int32; -1 = empty slot."""
        return self.positions_until(self.slots)

    def positions_until(self, slots: int) -> Tensor:
        """Positions of the first `slots` slots; of a window all, the last of which is that before `next_position`."""
        if self.prefix is None or self.next_position is None:
            return torch.empty(0, 0, 0, dtype=torch.int32)
        batch, heads, held = self.prefix.shape
        start = self.next_position if self.window is None else self.next_position - slots + held
        tail = torch.arange(slots - held, device=self.prefix.device) + start[:, None]
        return torch.cat([self.prefix, tail[:, None].expand(batch, heads, -1).clamp(min=-1).int()], -1)

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, padding included."""
        return self.slots + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length after `query_length` more tokens, and the logical index of the first slot."""
        return self.slots + query_length, self.evicted

    def take(self, length: int, held: int, before: Tensor, seen: Tensor, valid: Tensor | None) -> bool:
        """Account for `length` new tokens that a graph has stored, or what it kept of them; return whether all that was is held.

        Args:
            length: new tokens.
            held: slots before them.
            before: real tokens that each row had seen before them, `[B]`.
            seen: and has seen now.
            valid: which of them are real, `[B, length]`, or None if all are.
        """
        self.store(self.keys, self.values)
        heads, slots = self.keys.shape[1:3]
        new, self.kept_positions, self.finite = self.kept_positions, None, None
        self.evicted += length - (slots - held)
        if new is None and valid is not None:
            index = before[:, None] + valid.cumsum(-1) - 1
            new = index.masked_fill(~valid, -1).int()[:, None].expand(-1, heads, -1)
        if new is not None:
            if self.prefix is not None:
                new = torch.cat([self.positions_until(held), new], -1)
            self.prefix, self.next_position = new, seen.clone()  # its own, lest a graph takes two inputs for one
        elif self.window is not None:
            self.prefix = no_positions(self.keys) if self.prefix is None else self.prefix
            self.next_position = seen
        elif self.prefix is None:
            few = torch.arange(min(2, slots), device=self.keys.device)
            self.prefix = (before[:, None] + few).int()[:, None].expand(-1, heads, -1).contiguous()
            self.next_position = before + few.numel()
        elif self.prefix.shape[2] < 2 <= slots:
            self.prefix, self.next_position = self.positions_until(2), self.next_position + 1
        return slots - held == length

    def arrange(self, order: Tensor, blank: Tensor, seen: Tensor) -> None:
        """Put slot `order[b, h, t]` to place t, and blank the places where `blank[b, h, t]`; both `[B, Hkv, T]`."""
        positions = self.positions
        self.evicted += self.slots - order.shape[2]
        self.store(*(gather_slots(tensor, order).masked_fill(blank[..., None], 0) for tensor in (self.keys, self.values)))
        self.prefix = positions.gather(2, order).masked_fill(blank, -1)
        if self.window is not None:
            self.prefix = no_positions(self.prefix)
        self.next_position = seen.clone()

    def cut(self, tokens: int, seen: Tensor) -> None:
        """Forget the last `tokens` slots; rows have seen `seen` real tokens without them."""
        if self.window is None:
            self.prefix = self.positions[:, :, : self.slots - tokens]
        self.crop(-tokens)
        self.next_position = seen.clone()

    def map_rows(self, rows: Rows) -> None:
        """Apply `rows` to every tensor whose first axis is the batch."""
        if self.keys is not None:
            self.store(rows(self.keys), rows(self.values))
            self.prefix, self.next_position = rows(self.prefix), rows(self.next_position)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.window)  # type: ignore[misc]

    def copy(self) -> CacheLayer:
        """A layer that grows on its own; the tensors are shared, because slots are never written in place."""
        other = CacheLayer(self.window)
        other.__dict__.update(self.__dict__)
        return other


def no_positions(slots: Tensor) -> Tensor:
    """No positions for the heads of `slots`, `[B, Hkv, ...]`; always of the same strides, because others would be a new graph."""
    return torch.empty(*slots.shape[:2], 0, dtype=torch.int32, device=slots.device)


def gather_slots(states: Tensor, place: Tensor) -> Tensor:
    """Take slots `place`, `[B, Hkv, n]`, of `[B, Hkv, T, D]`."""
    return states.gather(2, place[..., None].expand(-1, -1, -1, states.shape[3]))
