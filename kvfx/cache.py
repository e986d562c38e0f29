"""Caches: what a compressed model remembers, and how much of it.

A cache has a *logical* length (tokens seen, padding included) and per layer a *physical* one (slots held). To its user, and to any
stock transformers model, a `Cache` shows logical lengths; a traced forward sees the same layers through `SlotCache`, whose lengths
are physical, so that no length that the graph depends on is a Python number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfx.cache_layer import CacheLayer, Rows
from kvfx.cache_state import CacheState
from kvfx.errors import CacheMismatch, InputError
from kvfx.passes.capture import mark_dynamic

__all__ = ["Cache", "CacheLayer"]

LAYOUTS = ("dense", "static", "ragged")
STOCK_HINT = "Use the model that kvfx.compile returned."


class Cache(CacheState):
    """The KV cache of a compressed model: a transformers `Cache`, and a pytree for torch and optree; layout `dense`, which grows.

    What it holds is described at `CacheState`.
    """

    layout = "dense"

    @classmethod
    def from_layers(
        cls,
        layers: Sequence[tuple[Tensor, Tensor, Tensor]],
        lengths_seen: Tensor | int,
        ids: Tensor | None = None,
        policy: str = "none",
    ) -> Cache:
        """Make a cache of given slots.

        Args:
            layers: per layer keys `[B, Hkv, T, D]`, values `[B, Hkv, T, Dv]` and positions `[B, Hkv, T]` or `[T]`, ascending.
            lengths_seen: tokens that each row has seen, a number or `[B]`; the next token's position.
            ids: the tokens seen, `[B, lengths_seen]`. Without them `generate` takes only new tokens, with `append=True`.
            policy: what chose the slots.

        Raises:
            CacheMismatch: shapes disagree, a layer holds nothing, or a position lies outside the tokens seen.
        """
        if not layers:
            raise CacheMismatch("no layers were given; expected keys, values and positions of every attention layer")
        cache = cls()
        batch, device = layers[0][0].shape[0], layers[0][0].device
        seen = torch.as_tensor(lengths_seen, device=device).expand(batch).clone().long()
        logical = int(seen[0])
        if bool((seen != logical).any()):
            raise CacheMismatch("rows saw different numbers of tokens; make such a batch by model.compress with an attention mask")
        cache.layers = [CacheLayer.of(index, *layer, seen) for index, layer in enumerate(layers)]
        if ids is not None and tuple(ids.shape) != (batch, logical):
            raise CacheMismatch(f"ids are {tuple(ids.shape)}, expected {(batch, logical)}: all tokens seen")
        cache.lengths_seen, cache.policy = seen, policy
        cache._ids = None if ids is None else [ids]
        cache.mark()
        return cache

    # -- as a stock model uses it ----------------------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Slots after `query_length` more tokens, and the logical index of the first: what a stock model makes its one mask of.

        Raises:
            CacheMismatch: layers differ in length, so that one mask cannot be right.
        """
        if not self.is_uniform:
            raise CacheMismatch(f"{self.slots_text}, but a stock model makes one mask for all of them. {STOCK_HINT}")
        return super().get_mask_sizes(query_length, layer_idx)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to one layer, whole. Which tokens a stock model appends stays unknown.

        Raises:
            CacheMismatch: nothing was stored before, or rows hold empty slots.
        """
        if self.lengths_seen is None:
            raise CacheMismatch("an empty kvfx.Cache is filled only by the model that kvfx.compile returned: model.compress(ids)")
        if self.has_empty:
            raise CacheMismatch(f"this cache has empty slots from padded rows, which a stock model would attend to. {STOCK_HINT}")
        length = key_states.shape[2]
        if layer_idx == 0:
            self.lengths_seen, self.croppable, self._ids = self.lengths_seen + length, self.croppable + length, None
            if self._real is not None:
                self._real = [*self._real, self.all_real(length)]
        return super().update(key_states.detach(), value_states.detach(), layer_idx, *args, **kwargs)

    # -- edits -----------------------------------------------------------------------------------------------------------------

    def copy(self) -> Cache:
        """A cache that goes its own way from here. Cheap: held slots are shared until one of the two grows."""
        other = Cache()
        other._inherit(self)
        other.lengths_seen = self.lengths_seen
        other.layers = [layer.copy() for layer in self.layers]
        return other

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def to(self, layout: str, capacity: int | None = None, tokens: int | None = None) -> Cache:
        """This cache in another layout; itself where it has that already.

        Args:
            layout: "dense", which grows, "static", of fixed capacity, or "ragged", without a slot that a head does not fill.
            capacity: slots that each row of a static cache has room for.
            tokens: the longest text that a static cache may see, see `StaticCache`.

        Raises:
            PoolExhausted: the slots held do not fit.
            InputError: there is no such layout, or a static one was not given its room.
        """
        if layout not in LAYOUTS:
            raise InputError(f"unknown layout {layout!r}; known: {list(LAYOUTS)}")
        if layout == self.layout:
            return self
        if layout == "dense":
            return self.to_dense()
        if layout == "ragged":
            from kvfx.layouts import to_ragged  # knows all of them

            return to_ragged(self.to_dense())
        if capacity is None or tokens is None:
            raise InputError("to('static') needs capacity=, the slots to make room for, and tokens=, the longest text")
        from kvfx.layouts import fill_static  # both know Cache
        from kvfx.static_cache import StaticCache

        cache, dense = StaticCache(capacity, tokens), self.to_dense()
        if not dense.is_empty:
            fill_static(cache, dense)
        return cache

    def to_dense(self) -> Cache:
        """The same slots in a cache that grows."""
        return self

    def stored(self) -> Cache:
        """What a file holds of it: the slots alone, without room that is not filled."""
        return self.to_dense()

    def map_rows(self, rows: Rows) -> None:
        """Apply `rows` along the batch axis of everything held.

        Raises:
            CacheMismatch: a decoder's own tensors are held, whose axes only it knows.
        """
        if self.lengths_seen is None:
            return
        self._refuse_others("rows cannot be chosen")
        for layer in self.layers:
            layer.map_rows(rows)
        ids, real = self.ids, self.real
        self._set_seen(rows(self.lengths_seen))
        self._ids = None if ids is None else [rows(ids)]
        self._real = None if real is None else [rows(real)]
        self.mark()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i become row `beam_idx[i]`, as beam search does after every step."""
        self.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        self.map_rows(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (`tokens_to_remove` <= 0), exactly as if they had never been seen.

        Raises:
            CacheMismatch: slots were evicted, or rows padded, after the first of them.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negated number of tokens to forget, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self.lengths_seen is None:
            return
        self._refuse_others("tokens cannot be cropped")
        if -tokens_to_remove > self.croppable:
            raise CacheMismatch(
                f"cannot crop {-tokens_to_remove} tokens: {self.croppable} came after the last eviction or padding, and what was "
                "dropped there is gone. Crop no more than that, or keep a cache.copy() from before."
            )
        if -tokens_to_remove == self.get_seq_length():
            return self.reset()
        ids, real = self.ids, self.real
        self._set_seen(self.lengths_seen + tokens_to_remove)
        self.croppable += tokens_to_remove
        for layer in self.layers:
            layer.cut(-tokens_to_remove, self.lengths_seen)
        self._ids = None if ids is None else [ids[:, :tokens_to_remove]]
        self._real = None if real is None else [real[:, :tokens_to_remove]]
        self.mark()

    def _refuse_others(self, what: str) -> None:
        if self.others:
            shapes = [tuple(tensor.shape) for tensor in self.others]
            raise CacheMismatch(f"{what}: beside keys and values this cache holds a decoder's own tensors of shapes {shapes}")

    def _set_seen(self, seen: Tensor) -> None:
        self.lengths_seen = seen

    def mark(self) -> None:
        """Let the number of slots and rows vary without a new graph. Once, on tensors that no graph has made."""
        for layer in self.layers:
            layer.mark()
        if self.lengths_seen is not None:
            mark_dynamic(self.lengths_seen, 0)

    def all_real(self, length: int) -> Tensor:
        """Say of `length` tokens of every row that none is padding."""
        return torch.ones(self.batch_size, length, dtype=torch.bool, device=self.lengths_seen.device)

    def save(self, path: str) -> None:
        """Write the cache to one file, whole or not at all. See `kvfx.load_cache`."""
        from kvfx.cache_file import save_cache

        save_cache(self, path)
