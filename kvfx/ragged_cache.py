"""Caches whose heads hold unequally many slots, in blocks of one pool: what is evicted is memory that is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvfx.block_pool import BLOCK, BlockPool
from kvfx.cache import STOCK_HINT, Cache
from kvfx.cache_layer import CacheLayer, Rows
from kvfx.errors import CacheMismatch, InputError
from kvfx.extents import Extents
from kvfx.layouts import ragged_to_dense
from kvfx.pool import Pool
from kvfx.ragged_layer import METRIC, STATE, RaggedLayer

NOT_STOCK = "the heads of this cache hold unequally many slots in blocks, which no stock model can read. "


class RaggedCache(Cache):
    """A cache, layout `ragged`: every KV head of a layer has a length of its own, and its slots lie in blocks of a pool.

    Policies with `budget=heads(...)` fill such caches, and `compress` and `generate` make one by themselves. Copies share blocks
    until one of them writes to them. A layer that no policy touches, because it holds a window or is not understood, is dense.

    Attributes:
        block_size: slots of a block.
        limit: the most blocks that the pool may have, or None.
        pool: memory that it shares with other caches, or None.
        since: tokens seen since blocks were last evicted.
    """

    layout = "ragged"

    def __init__(self, limit: int | None = None, block_size: int | None = None, pool: Pool | None = None) -> None:
        """Make an empty cache.

        Args:
            limit: blocks that it may fill, see `BlockPool`; by default as many as it needs.
            block_size: slots of a block, 16 by default. Larger ones waste more at the end of each head, smaller ones need larger
                tables.
            pool: memory that it shares with other caches, which says both; by default it has its own.
        """
        super().__init__()
        if pool is not None and (limit is not None or block_size not in (None, pool.block_size)):
            raise InputError(
                f"limit={limit}, block_size={block_size}: a cache in a shared pool takes what the pool has. Leave them out"
            )
        self.limit, self.pool = limit, pool
        self.block_size = block_size or (BLOCK if pool is None else pool.block_size)
        self.since = 0
        self.extents: list[Extents] = []

    # -- what it holds ---------------------------------------------------------------------------------------------------------

    def allocate(self, like: Mapping[int, Sequence[Tensor]], rows: int) -> dict[int, RaggedLayer]:
        """Make extents without slots.

        Args:
            like: keys and values of one token, `[1, Hkv, 1, D]`, of each of the layers.
            rows: of the batch.

        Returns:
            Layers by index, which the caller puts in their places.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, (key, value) in like.items():
            alike.setdefault((key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device), []).append(index)
        kinds: dict[tuple[Any, ...], tuple[Tensor, Tensor, int]] = {}
        for (heads, *kind), members in alike.items():
            before = kinds.get(tuple(kind), (None, None, 0))[2]
            key, value = like[members[0]]
            kinds[tuple(kind)] = key, value, before + heads * len(members)
        pools = self._pools(kinds)
        made = dict[int, RaggedLayer]()
        for (heads, *kind), members in alike.items():
            extents = Extents(pools[tuple(kind)], len(members), rows, heads)
            self.extents.append(extents)
            made |= {index: RaggedLayer(extents, place) for place, index in enumerate(members)}
        return made

    def _pools(self, kinds: Mapping[tuple[Any, ...], tuple[Tensor, Tensor, int]]) -> dict[tuple[Any, ...], BlockPool]:
        """The blocks for each kind of slot."""
        if self.pool is not None:
            return self.pool.of(kinds)
        return {kind: BlockPool(key, value, self.block_size, self.limit) for kind, (key, value, _) in kinds.items()}

    @property
    def ragged(self) -> dict[int, RaggedLayer]:
        """The layers that have a length for each head, by index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, RaggedLayer)}

    def about(self) -> dict[str, Any]:
        """What is held besides tensors, as plain data."""
        held = super().about()
        for index, layer in self.ragged.items():
            held["layers"][index] |= {"ragged": True, "tokens": layer.tokens}
        return held | {"block_size": self.block_size, "limit": self.limit, "since": self.since}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> RaggedCache:
        """Put a cache together, in a pool of its own, from what `tensors()` and `about()` returned."""
        cache = cls(about["limit"], about["block_size"])
        cache.since = about.get("since", 0)
        states: dict[int, dict[str, Any]] = {}
        for index, facts in enumerate(about["layers"]):
            if facts.get("ragged"):
                held = {name: tensors.get(f"layers.{index}.{name}") for name in (*STATE, METRIC)}
                states[index] = {name: tensor for name, tensor in held.items() if tensor is not None}
                cache.layers.append(Parts(states[index]))
            else:
                cache.layers.append(CacheLayer.of_state(index, tensors, facts))
        cache._take(tensors, about)
        if all(isinstance(part, Tensor) for state in states.values() for part in state.values()):  # a pytree may hold anything
            cache.fill(states, {index: about["layers"][index]["tokens"] for index in states})
        return cache

    def fill(self, states: Mapping[int, Mapping[str, Tensor]], tokens: Mapping[int, int]) -> None:
        """Put slots into an empty cache, in place of the layers that are there.

        Args:
            states: of ragged layers, by index, what `RaggedLayer.state` gives.
            tokens: that these layers have seen.

        Raises:
            PoolExhausted: they do not fit.
        """
        like = {
            index: [state[name].new_empty(1, state["lengths"].shape[1], 1, state[name].shape[1]) for name in STATE[:2]]
            for index, state in states.items()
        }
        made = self.allocate(like, self.batch_size)
        for extents in self.extents:
            mine = [index for index, layer in made.items() if layer.extents is extents]
            extents.fill(np.stack([states[index]["lengths"].cpu().numpy() for index in mine]))
            if all(METRIC in states[index] for index in mine):
                extents.measure([states[index][METRIC] for index in mine])
        for index, layer in made.items():
            layer.tokens = tokens[index]
            layer.write(*(states[index][name] for name in STATE[:3]))
            self.layers[index] = layer

    def to_dense(self) -> Cache:
        """The same slots in a cache that grows; heads that hold fewer have empty slots on their left."""
        return ragged_to_dense(self)

    def stored(self) -> RaggedCache:
        """Itself: a file holds each head's own slots."""
        return self

    def paged(self, layer: int) -> Paged:
        """A layer as engines with paged attention read one: blocks of the pool, not copied, and a table of them.

        Raises:
            CacheMismatch: it is not ragged, because it has a window or is not understood.
        """
        if layer not in self.ragged:
            raise CacheMismatch(f"layer {layer} is dense: only {sorted(self.ragged)} are in blocks. Read its keys and values")
        held = self.ragged[layer]
        return Paged(*held.extents.pool.tensors(), held.extents.device_table[held.index], held.lengths)

    # -- as a stock model uses it ----------------------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Never right: a stock model makes one mask for all heads.

        Raises:
            CacheMismatch: always.
        """
        raise CacheMismatch(NOT_STOCK + STOCK_HINT)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As `get_mask_sizes`.

        Raises:
            CacheMismatch: always.
        """
        raise CacheMismatch(NOT_STOCK + STOCK_HINT)

    # -- edits -----------------------------------------------------------------------------------------------------------------

    def view(self) -> RaggedCache:
        """This cache again, for a step that may fail: with layers of its own, but for what the extents hold of them."""
        other = RaggedCache.__new__(RaggedCache)
        other.__dict__.update(self.__dict__)
        other.layers = [layer.copy() for layer in self.layers]
        return other

    @staticmethod
    def join(caches: Sequence[RaggedCache]) -> RaggedCache:
        """The rows of several caches of one pool in one, see `kvfx.joined.join`; `batch_select_indices` lets rows leave."""
        from kvfx.joined import join  # which knows caches

        return join(caches)

    def copy(self) -> RaggedCache:
        """A cache that goes its own way from here. Cheap: blocks are shared until one of the two writes to them."""
        other = RaggedCache(self.limit, self.block_size, self.pool)
        other._inherit(self)
        other.lengths_seen, other.since = self.lengths_seen, self.since
        forks = {id(extents): extents.fork() for extents in self.extents}
        other.extents = list(forks.values())
        other.layers = [layer.copy() for layer in self.layers]
        for layer in other.ragged.values():
            layer.extents = forks[id(layer.extents)]
        return other

    def reset(self) -> None:
        """Forget everything; the pool goes with its last cache."""
        self.__init__(self.limit, self.block_size, self.pool)  # type: ignore[misc]

    def map_rows(self, rows: Rows) -> None:
        """Apply `rows` along the batch axis of everything held."""
        if self.lengths_seen is not None:
            index = rows(torch.arange(self.batch_size, device=self.lengths_seen.device)).tolist()
            super().map_rows(rows)
            for extents in self.extents:
                extents.rows(index)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; see `Cache.crop`.

        Raises:
            CacheMismatch: also where a policy goes by what attention has paid, of which their part is not known apart.
        """
        before = self.get_seq_length()
        if 0 < -tokens_to_remove < before and any(extents.metric is not None for extents in self.extents):
            raise CacheMismatch(
                f"cannot crop {-tokens_to_remove} tokens: {self.policy} evicts by what all tokens so far have paid to each "
                "slot, and their part of it is not known apart. Keep a cache.copy() from before them."
            )
        super().crop(tokens_to_remove)
        for extents in self.extents:  # none is left if all was forgotten
            extents.cut(before - self.get_seq_length())


class Paged(NamedTuple):
    """A layer in blocks, as engines read it.

    Attributes:
        keys: blocks of the pool, `[N, P, D]`; block 0 is nobody's.
        values: `[N, P, Dv]`.
        positions: `[N, P]` int32.
        table: blocks of each extent in order, `[B, Hkv, m]` int32, 0 behind those that it has.
        lengths: slots of each extent, `[B, Hkv]` int64.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    table: Tensor
    lengths: Tensor


class Parts(CacheLayer):
    """What a pytree has made of a ragged layer's tensors, whatever that is, until it is put together again."""

    def __init__(self, parts: dict[str, Any]) -> None:
        super().__init__()
        self.parts = parts

    def state(self) -> dict[str, Any]:
        """The parts."""
        return self.parts
