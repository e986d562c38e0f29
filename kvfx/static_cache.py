"""Caches of fixed capacity, filled in place: for CUDA graphs, exported programs, and serving without allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx.cache import Cache
from kvfx.cache_step import note
from kvfx.errors import CacheMismatch, PoolExhausted
from kvfx.layouts import to_dense
from kvfx.static_layer import StaticLayer


class StaticCache(Cache):
    """A cache, layout `static`, whose tensors keep their shapes and addresses whatever is stored in them.

    It goes where `past_key_values` goes. The first prompt makes the tensors, for as many rows as it has; only the slots that the
    policy keeps are written. `reset()` empties them for the next prompt. A step is one graph of fixed shapes: lengths are tensors
    that it updates in place.

    Attributes:
        capacity: slots of a row in each layer without a window; a window's layer has as many as the window.
        tokens: the longest text, evicted tokens included, that a row may see; masks are computed for so many columns.
    """

    layout = "static"
    layers: list[StaticLayer]  # type: ignore[assignment]

    def __init__(self, capacity: int, tokens: int | None = None) -> None:
        """Make an empty cache.

        Args:
            capacity: slots of a row: what the policy keeps of the prompt, and all that follows.
            tokens: the longest text; the default is what the model was made for (`max_position_embeddings`).
        """
        if capacity < 1 or (tokens is not None and tokens < 1):
            raise CacheMismatch(f"capacity={capacity}, tokens={tokens}: a static cache needs room for at least one")
        super().__init__()
        self.capacity = capacity
        self.tokens = tokens

    # -- room ------------------------------------------------------------------------------------------------------------------

    def allocate(self, like: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int | None], batch: int, tokens: int) -> None:
        """Make the tensors, if there are none yet: for keys and values like those given, `[1, Hkv, 1, D]` of each layer.

        Args:
            like: keys and values of one token.
            windows: of each layer, as of `CacheLayer.window`.
            batch: rows.
            tokens: the longest text, where the cache does not say.
        """
        self.tokens = tokens if self.tokens is None else self.tokens
        if not self.layers:
            room = [self.capacity if window is None else window for window in windows]
            pairs = zip(windows, room, like, strict=True)
            self.layers += [StaticLayer(window, capacity, batch, *pair) for window, capacity, pair in pairs]
            self.lengths_seen = torch.zeros(batch, dtype=torch.long, device=like[0][0].device)
            self.mark()

    def check_room(self, new: int, stored: Sequence[int], tokens: int) -> None:
        """Make sure that there is room, before anything is written.

        Args:
            new: new tokens of each row, padding included.
            stored: at most so many slots of a row each layer will store, 0 those with windows.
            tokens: the longest text, where the cache does not say.

        Raises:
            PoolExhausted: there is not.
        """
        limit, seen = self.tokens or tokens, self.get_seq_length()
        if seen + new > limit:
            raise PoolExhausted(
                f"the cache has seen {seen} tokens and {new} are to follow, but it was made for texts of {limit}. Nothing was "
                f"written. Make it longer, StaticCache({self.capacity}, tokens={seen + new}), or reset it."
            )
        for index, more in enumerate(stored):
            held = self.layers[index].filled if self.layers and more else 0
            if held + more <= self.capacity:
                continue
            if self.layers:  # rows may have grown unequally, so look
                held = self.layers[index].filled = int(self.layers[index].length.max())
            if held + more > self.capacity:
                raise PoolExhausted(
                    f"layer {index} holds {held} of {self.capacity} slots and {more} are to be stored. Nothing was written. "
                    f"Make the cache larger, StaticCache({held + more}), keep less, or reset it."
                )

    def snapshot(self) -> list[list[Tensor]]:
        """What tells slots from room, and the slots of windows: enough for `restore`."""
        return [[self.lengths_seen.clone()], *([tensor.clone() for tensor in layer.edges()] for layer in self.layers)]

    def restore(self, before: list[list[Tensor]]) -> None:
        """Undo a forward: what it wrote is room again."""
        for now, then in zip([[self.lengths_seen], *(layer.edges() for layer in self.layers)], before, strict=True):
            for tensor, held in zip(now, then, strict=True):
                tensor.copy_(held)

    def forget_new(self) -> None:
        """Undo a forward over one token of each row that broke off: what it overwrote of windows, no query sees any more."""
        for layer in self.layers:
            layer.forget_from(self.lengths_seen)

    def compare_rows(self) -> None:
        """Note whether rows and layers hold equally many tokens, so that a stock model's one mask is right for them."""
        lengths = [layer.length for layer in self.layers if layer.length is not None]
        self.has_empty = bool((torch.stack(lengths) != lengths[0][0]).any()) if lengths else False
        for layer in self.layers:
            layer.alike = not self.has_empty and len(lengths) == len(self.layers)

    # -- what it holds ---------------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What is held besides tensors, as plain data."""
        held = super().about()
        for facts, layer in zip(held["layers"], self.layers, strict=True):
            facts |= {"filled": layer.filled, "tokens": layer.tokens, "alike": layer.alike}
        return held | {"capacity": self.capacity, "tokens": self.tokens}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> StaticCache:
        """Put a cache together from what `tensors()` and `about()` returned."""
        cache = cls(about["capacity"], about["tokens"])
        for index, facts in enumerate(about["layers"]):
            cache.layers.append(StaticLayer.of_state(index, tensors, facts))
        cache._take(tensors, about)
        if isinstance(cache.lengths_seen, Tensor):  # a pytree may hold anything
            cache.mark()
        return cache

    @property
    def is_empty(self) -> bool:
        """Whether no token has been seen."""
        return not self.layers or self.layers[0].tokens == 0

    def to_dense(self) -> Cache:
        """The same slots in a cache that grows."""
        return to_dense(self)

    # -- as a stock model uses it ----------------------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Slots, and the logical index of the first, such that a causal mask hides those not yet filled."""
        self._check_filled()
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to one layer, whole, in place. Which tokens a stock model appends stays unknown.

        Raises:
            CacheMismatch: nothing was stored before, or a stock model would attend wrongly.
            PoolExhausted: there is no room.
        """
        self._check_filled()
        length = key_states.shape[2]
        updated = self.layers[layer_idx].update(key_states, value_states)
        if layer_idx == 0:
            self.lengths_seen.add_(length)
            note(self, None, None, length, True)
        return updated

    def _check_filled(self) -> None:
        if self.is_empty:
            raise CacheMismatch("an empty kvfx.StaticCache is filled only by the model that kvfx.compile returned")

    # -- edits -----------------------------------------------------------------------------------------------------------------

    def copy(self) -> StaticCache:
        """A cache that goes its own way from here, with tensors of its own."""
        other = StaticCache(self.capacity, self.tokens)
        other._inherit(self)
        other.layers = [layer.copy() for layer in self.layers]
        other.mark()
        return other

    def reset(self) -> None:
        """Forget everything; the tensors stay, for the next prompt."""
        layers, seen = self.layers, self.lengths_seen
        self.__init__(self.capacity, self.tokens)  # type: ignore[misc]
        self.layers, self.lengths_seen = layers, seen
        for layer in layers:
            layer.clear()
        if seen is not None:
            seen.zero_()

    def _set_seen(self, seen: Tensor) -> None:
        same = self.lengths_seen is not None and self.lengths_seen.shape == seen.shape
        self.lengths_seen = self.lengths_seen.copy_(seen) if same else seen


class StockStaticCache(StaticCache, transformers.StaticCache):
    """What an empty static cache of transformers becomes when it is given to a compressed model: one of both classes."""


def adopt(cache: Any) -> StaticCache:
    """Make an empty static cache of transformers one of kvfx, of the same capacity, in place.

    Raises:
        CacheMismatch: it holds tokens already, of unknown positions.
    """
    if any(layer.is_initialized and bool(layer.cumulative_length) for layer in cache.layers):
        raise CacheMismatch(
            "this transformers.StaticCache holds tokens that kvfx has not seen. Give an empty one, or a kvfx.StaticCache"
        )
    capacity = max(layer.max_cache_len for layer in cache.layers)
    cache.__class__ = StockStaticCache
    StaticCache.__init__(cache, capacity)
    adopted: StaticCache = cache
    return adopted
