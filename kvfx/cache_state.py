"""What a cache holds: its layers, and what is known of the tokens seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx.cache_layer import CacheLayer


class CacheState(transformers.Cache):
    """What every `Cache` holds, whatever its layout.

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

    layers: list[CacheLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        transformers.Cache.__init__(self, layers=[])  # which a subclass that is also of transformers has in another form
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
    def of_tensors(cls, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> Any:
        """Put a cache together from what `tensors()` and `about()` returned."""
        cache = cls()
        for index, facts in enumerate(about["layers"]):
            cache.layers.append(CacheLayer.of_state(index, tensors, facts))
        cache._take(tensors, about)
        return cache

    def _take(self, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """What stands beside the layers."""
        self.lengths_seen = tensors.get("lengths_seen")
        self.policy, self.croppable, self.has_empty = about["policy"], about["croppable"], about["has_empty"]
        self._ids = [tensors["ids"]] if "ids" in tensors else None if self.layers else []
        self._real = [tensors["real"]] if "real" in tensors else None
        self.others = [tensors[name] for name in tensors if name.startswith("others.")]

    def _inherit(self, other: CacheState) -> None:
        """Take over everything of `other` but its layers."""
        self.policy, self.croppable, self.has_empty = other.policy, other.croppable, other.has_empty
        self.lengths_seen = None if other.lengths_seen is None else other.lengths_seen.clone()
        self.fingerprint, self.owner, self.form, self.others = other.fingerprint, other.owner, other.form, other.others
        self._ids = None if other._ids is None else list(other._ids)
        self._real = None if other._real is None else list(other._real)

    def about(self) -> dict[str, Any]:
        """What is held besides tensors, as plain data."""
        layers = [{"kind": layer.kind, "evicted": layer.evicted, "window": layer.window} for layer in self.layers]
        return {"layers": layers, "croppable": self.croppable, "has_empty": self.has_empty, "policy": self.policy}

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
            held |= {f"layers.{index}.{name}": tensor for name, tensor in layer.state().items()}
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
            held += layer.memory()
        storages = [tensor.untyped_storage() for tensor in held if tensor is not None]
        return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())

    @property
    def is_empty(self) -> bool:
        """Whether no token has been seen."""
        return not self.layers

    @property
    def batch_size(self) -> int:
        """Rows; -1 while nothing is held."""
        return -1 if self.lengths_seen is None else self.lengths_seen.shape[0]
