"""An entry point of the package of a decoder written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfx.entry_point import EntryPoint
from kvfx.errors import UnsupportedModel
from kvfx.form import Form
from kvfx.passes.cache_write import size_of, slots_of
from kvfx.passes.plan import Keep, Plan
from kvfx.static_cache import StaticCache
from kvfx.static_layer import StaticLayer
from kvfx.static_slots import StaticSlots
from kvfx.written import Written

COUNTED = ("extend", "decode", "second")  # entry points that have a past
OTHERS = "others"  # what is called so in the state of a package: tensors of a past that are neither keys nor values


class WrittenEntryPoint(EntryPoint):
    """The forward of a decoder written by hand over slots of fixed capacity, which are arguments here.

    Called as `(ids, held)`, as an `EntryPoint` without a mask. Behind a past `held` begins with an empty tensor [L + 1, 0], whose
    length carries the number of tokens seen: such decoders count them from a shape, and so no number in a tensor would do.
    """

    def __init__(self, written: Written, kind: str, cache: StaticCache, plan: Plan, keep: Keep | None, most: int) -> None:
        """Make one, see `EntryPoint`; `kind` may also be "first", a prompt of one token, or "second", a token behind it."""
        super().__init__(written.base, kind, cache, plan, keep, most, False, False)
        self.written = written
        self.counted = kind in COUNTED
        self.names += tuple(f"{OTHERS}.{index}" for index in range(len(written.others)))

    def forward(self, ids: Tensor, held: list[Tensor]) -> tuple[Tensor, ...]:
        """One forward."""
        size, state = (held[0], held[1:]) if self.counted else (None, held)
        tensors = dict(zip(self.names, state, strict=True))
        layers = [StaticLayer.of_state(index, tensors, facts) for index, facts in enumerate(self._layers)]
        seen, others = tensors["lengths_seen"], [tensors[name] for name in self.names if name.startswith(OTHERS)]
        start = 0 if size is None else slots_of(size)
        past = None
        if size is not None:
            read = [
                torch.ops.kvfx.cache_read(layer.keys, layer.values, layer.prefix, seen, seen, size, index, True, False)
                for index, layer in enumerate(layers)
            ]
            past = self.written.form.fill(read, [other.clone() for other in others], start)
        returned = self.written.run(ids, past, start)
        new, after = self._new(returned.past, start, ids.shape[1])
        sizes, counts = self._quota(ids, None)
        slots = StaticSlots(layers, self.plan, sizes, counts, size_of(self.tokens, ids.device), False, False, frozenset())
        slots.seen, slots.positions = seen, (seen[:, None] + torch.arange(ids.shape[1], device=ids.device)).int()
        for index, pair in enumerate(new):
            slots.update(*pair, index)
        slots.end(seen + ids.shape[1])
        for other, value in zip(others, after, strict=True):
            other.copy_(value)
        return self._answer(returned.logits, layers)

    def _new(self, leaves: list[Any], start: Any, length: Any) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Of the leaves of a past the new keys and values `[B, Hkv, S, D]` of each layer, and the tensors that are neither."""
        form: Form = self.written.form
        keys, values, others = dict[int, Tensor](), dict[int, Tensor](), list[Tensor]()
        if len(leaves) != len(form.leaves):
            raise self._differs(f"{len(leaves)} parts", f"{len(form.leaves)}")
        for leaf, (what, *facts) in zip(leaves, form.leaves, strict=True):
            if what == "slots":
                kind, layer, _, axes = facts
                new = torch.ops.kvfx.new_states(leaf, axes.index(2), start, length, layer)
                (keys if kind == "key" else values).setdefault(layer, new.permute([axes.index(axis) for axis in range(4)]))
            elif what == "tensor":
                expected = self.written.others[facts[0]]
                if not isinstance(leaf, Tensor) or _text(leaf) != _text(expected):
                    raise self._differs(_text(leaf), f"{_text(expected)} whatever the length")
                others.append(leaf)
            else:
                expected, which = (start + length, "the tokens seen") if what == "length" else (facts[0], "as of the prompt")
                if isinstance(leaf, Tensor) or str(leaf) != str(expected):
                    raise self._differs(_text(leaf), f"{expected}, {which}")
        return [(keys[layer], values[layer]) for layer in range(form.layers)], others

    def _differs(self, found: str, expected: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"the past of {type(self.model).__name__} holds, beside keys and values, {found} in its {self.kind}, expected "
            f"{expected}. A package can follow the number of tokens seen, and tensors of a fixed shape"
        )


def _text(leaf: Any) -> str:
    return f"a tensor {list(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else f"{leaf!r}"
