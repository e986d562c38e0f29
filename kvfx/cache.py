"""Caches: what a compressed model remembers, and how much of it.

A cache has a *logical* length (tokens seen, padding included) and per layer a *physical* one (slots held). To its user, and to any
stock transformers model, a `Cache` shows logical lengths; a traced forward sees the same layers through `SlotCache`, whose lengths
are physical, so that no length that the graph depends on is a Python number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx.cache_layer import CacheLayer, Rows, SlotCache, no_positions
from kvfx.errors import CacheMismatch
from kvfx.passes.capture import mark_dynamic

__all__ = ["Cache", "CacheLayer", "SlotCache"]

LAYER_TENSORS = ("keys", "values", "positions")
STOCK_HINT = "Use the model that kvfx.compile returned."


class Cache(transformers.Cache):
    """The KV cache of a compressed model: a transformers `Cache`, and a pytree for torch and optree.

    Attributes:
        layers: one `CacheLayer` per attention layer.
        policy: canonical text of the policy that evicted, or "none".
        lengths_seen: real tokens seen per row, `[B]` int64; also the position of each row's next token.
        has_empty: whether a row may hold empty slots, which stand on its left.
        croppable: last tokens of which every layer holds a slot in every row, so that `crop` is exact.
        fingerprint: what identifies the model, or None until the cache is saved or compared.
        owner: the model that made the cache, or None if only its fingerprint is known.
        form: how a decoder that is no transformers model keeps its past (see `kvfx.form`), or None.
        others: the tensors of such a past that are neither keys nor values.
    """

    layout = "dense"
    layers: list[CacheLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.policy = "none"
        self.lengths_seen: Any = None
        self.has_empty = False
        self.croppable = 0
        self.fingerprint: dict[str, Any] | None = None
        self.owner: Any = None
        self.form: Any = None
        self.others: list[Tensor] = []
        # What the forwards saw, joined when it is read. None: the ids are not known; no token was padding.
        self._ids: list[Tensor] | None = []
        self._real: list[Tensor] | None = None

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

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> Cache:
        """Put a cache together from what `tensors()` and `about()` returned."""
        cache = cls()
        for index, facts in enumerate(about["layers"]):
            layer = CacheLayer(facts["window"])
            keys, values, positions = (tensors[f"layers.{index}.{name}"] for name in LAYER_TENSORS)
            layer.store(keys, values)
            layer.prefix, layer.next_position, layer.evicted = positions, tensors["lengths_seen"], facts["evicted"]
            if isinstance(positions, Tensor):  # a pytree may hold anything
                layer.next_position = layer.next_position.clone()
                layer.prefix = positions if layer.window is None else no_positions(keys)
            cache.layers.append(layer)
        cache.lengths_seen = tensors.get("lengths_seen")
        cache.policy, cache.croppable, cache.has_empty = about["policy"], about["croppable"], about["has_empty"]
        cache._ids = [tensors["ids"]] if "ids" in tensors else None if cache.layers else []
        cache._real = [tensors["real"]] if "real" in tensors else None
        cache.others = [tensors[name] for name in tensors if name.startswith("others.")]
        return cache

    def about(self) -> dict[str, Any]:
        """What is held besides tensors, as plain data."""
        layers = [{"kind": layer.kind, "evicted": layer.evicted, "window": layer.window} for layer in self.layers]
        return {"layers": layers, "croppable": self.croppable, "has_empty": self.has_empty, "policy": self.policy}

    # -- what it holds ---------------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> Tensor | None:
        """The tokens seen, `[B, logical length]`, padding included; None if they are not known."""
        if self._ids is None:
            return None
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids, 1)]
        return self._ids[0] if self._ids else None

    @property
    def real(self) -> Tensor | None:
        """Which of the tokens seen are no padding, `[B, logical length]` bool; None if all are."""
        if self._real is not None:
            self._real = [torch.cat(self._real, 1)]
        return None if self._real is None else self._real[0]

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name: the leaves of the pytree, and what a file stores."""
        held = {"lengths_seen": self.lengths_seen, "ids": self.ids, "real": self.real}
        for index, layer in enumerate(self.layers):
            held |= {f"layers.{index}.{name}": getattr(layer, name) for name in LAYER_TENSORS}
        held |= {f"others.{index}": tensor for index, tensor in enumerate(self.others)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def is_uniform(self) -> bool:
        """Whether all layers hold the same number of slots."""
        return len({layer.slots for layer in self.layers}) <= 1

    @property
    def slots_text(self) -> str:
        """How many slots the layers hold, for messages."""
        return f"layers hold {[layer.slots for layer in self.layers]} slots"

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that this cache keeps alive."""
        held = [self.lengths_seen, *(self._ids or []), *(self._real or []), *self.others]
        for layer in self.layers:
            held += [layer.keys, layer.values, layer.prefix, layer.next_position]
        storages = [tensor.untyped_storage() for tensor in held if tensor is not None]
        return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())

    @property
    def batch_size(self) -> int:
        """Rows; -1 while nothing is held."""
        return -1 if self.lengths_seen is None else self.lengths_seen.shape[0]

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
                self._real = [*self._real, self._all_real(length)]
        return super().update(key_states.detach(), value_states.detach(), layer_idx, *args, **kwargs)

    # -- edits -----------------------------------------------------------------------------------------------------------------

    def copy(self) -> Cache:
        """A cache that goes its own way from here. Cheap: held slots are shared until one of the two grows."""
        other = Cache()
        other.__dict__.update(self.__dict__)
        other.layers = [layer.copy() for layer in self.layers]
        other._ids = None if self._ids is None else list(self._ids)
        other._real = None if self._real is None else list(self._real)
        return other

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def to(self, layout: str) -> Cache:
        """This cache in another layout. Only `dense` exists so far."""
        if layout != self.layout:
            raise NotImplementedError(f"layout {layout!r} is not built; known: ['dense']")
        return self

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
        self.lengths_seen = rows(self.lengths_seen)
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
        self.lengths_seen = self.lengths_seen + tokens_to_remove
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

    def mark(self) -> None:
        """Let the number of slots and rows vary without a new graph. Once, on tensors that no graph has made."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values, layer.prefix):
                mark_dynamic(tensor, 0, 2)
            mark_dynamic(layer.next_position, 0)
        if self.lengths_seen is not None:
            mark_dynamic(self.lengths_seen, 0)

    # -- steps of a forward ----------------------------------------------------------------------------------------------------

    def took(self, ids: Tensor | None, valid: Tensor | None, seen: Tensor, length: int, held: Sequence[int]) -> None:
        """Account for a forward over `length` new tokens, after its graph stored them in the layers, which held `held` slots."""
        all_held = [
            layer.take(length, slots, self.lengths_seen, seen, valid) for layer, slots in zip(self.layers, held, strict=True)
        ]
        self.lengths_seen, whole = seen, all(all_held)
        if self._ids is not None:
            self._ids = None if ids is None else [*self._ids, ids]
        if valid is None:
            self.croppable = self.croppable + length if whole else 0
            if self._real is not None:
                self._real = [*self._real, self._all_real(length)]
        else:
            trailing = valid.all(0).flip(0).long().cumprod(0).sum()  # tokens that are real in every row
            self.croppable = int(trailing) if whole else 0
            self._real = [*(self._real or [self._all_real(self.get_seq_length() - length)]), valid]

    def _all_real(self, length: int) -> Tensor:
        return torch.ones(self.batch_size, length, dtype=torch.bool, device=self.lengths_seen.device)

    def push_empty_left(self, fixed: Collection[int] = ()) -> None:
        """Move empty slots to the left of each row, and drop those that are empty in all rows; of a window, keep the last slots.

        Args:
            fixed: layers whose slots have to stay where they are.

        Raises:
            CacheMismatch: a row of a fixed layer has empty slots elsewhere than on the left.
        """
        there = [layer.positions[:, 0] >= 0 for layer in self.layers]
        filled = torch.stack([slots.sum(-1) for slots in there]).tolist()
        self.has_empty = False
        for index, (layer, slots, counts) in enumerate(zip(self.layers, there, filled, strict=True)):
            width = layer.slots
            if index not in fixed:
                width = max(counts) if layer.window is None else min(max(counts), layer.window - 1)
            elif bool((slots[:, 1:] < slots[:, :-1]).any()):
                raise CacheMismatch(
                    f"rows have padding between their tokens or on the right, and layer {index} was left alone, so that its slots "
                    "cannot be moved. Pad on the left; kvfx.explain(model) says why the layer was left alone."
                )
            order = slots.long().argsort(dim=-1, stable=True)[:, layer.slots - width :]
            layer.arrange(order, ~slots.gather(1, order), self.lengths_seen)
            self.has_empty |= min(counts) < width
        self.mark()

    def save(self, path: str) -> None:
        """Write the cache to one file, whole or not at all. See `kvfx.load_cache`."""
        from kvfx.cache_file import save_cache

        save_cache(self, path)
