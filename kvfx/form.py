"""The form in which a decoder written by hand keeps its past: its own tree, and what stands at each leaf."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfx import tree
from kvfx.errors import ArtifactError
from kvfx.passes.cache_leaf import Role
from kvfx.tree import Spec

BUFFERS = "buffers of the module"  # in place of an argument's name


@dataclass(frozen=True)
class Form:
    """What a decoder's past looks like, without its numbers.

    Attributes:
        spec: the tree.
        leaves: what stands at each leaf: ("slots", kind, layer, capacity, axes) as in `passes.cache_leaf.Role`; ("length",), a
            number that counts the tokens seen; ("tensor", i), the i-th tensor that is neither keys nor values; or ("value", what
            it is).
        places: where the decoder keeps its past if it does not return it: names of arguments that it writes to, and `BUFFERS`.
            The tree is then a dict with what stands at each; of buffers, a dict of them by name.
    """

    spec: Spec
    leaves: tuple[tuple[Any, ...], ...]
    places: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Layers whose keys and values stand in it."""
        return 1 + max(leaf[2] for leaf in self.leaves if leaf[0] == "slots")

    def fill(self, slots: Sequence[tuple[Tensor, Tensor]], others: Sequence[Tensor], length: Any) -> Any:
        """The past as the decoder returned it, with keys and values `[B, Hkv, L, D]` per layer. Also traced."""
        leaves = []
        for leaf in self.leaves:
            if leaf[0] == "slots":
                leaves.append(_arranged(slots[leaf[2]][0 if leaf[1] == "key" else 1], leaf[3], leaf[4]))
            elif leaf[0] == "length":
                leaves.append(length)
            elif leaf[0] == "tensor":
                leaves.append(others[leaf[1]])
            else:
                leaves.append(leaf[1])
        return tree.build(self.spec, leaves)

    def as_data(self) -> dict[str, Any]:
        """The form as JSON-ready data.

        Raises:
            ArtifactError: something in it has no plain description.
        """
        data = {"spec": _spec_data(self.spec), "leaves": [list(leaf) for leaf in self.leaves], "places": list(self.places)}
        for leaf in self.leaves:
            if leaf[0] == "value" and not (leaf[1] is None or isinstance(leaf[1], (bool, int, float, str))):
                raise ArtifactError(
                    f"the decoder's past holds a {type(leaf[1]).__name__}, which a file cannot describe. Expected tensors, "
                    "numbers, text or None beside keys and values."
                )
        return data

    @classmethod
    def of_data(cls, data: dict[str, Any]) -> Form:
        """The form that `as_data` described.

        Raises:
            ArtifactError: a class of the decoder's own is not there.
        """
        leaves = [tuple(tuple(part) if isinstance(part, list) else part for part in leaf) for leaf in data["leaves"]]
        return cls(_spec_of_data(data["spec"]), tuple(leaves), tuple(data.get("places", ())))


class Past(NamedTuple):
    """The slots held, as a traced step gets them.

    Attributes:
        form: how the decoder keeps its past.
        layers: keys, values and prefix of each layer.
        start: position of the first slot behind the prefix, [B].
        others: the tensors that are neither keys nor values.
        size: carries the number of tokens seen, see `passes.cache_read`.
    """

    form: Form
    layers: list[tuple[Tensor, Tensor, Tensor]]
    start: Tensor
    others: list[Tensor]
    size: Tensor


def form_of(
    spec: Spec, past: Sequence[Any], roles: Sequence[Role | None], length: int, places: tuple[str, ...] = ()
) -> tuple[Form, list[Tensor]]:
    """The form of a past, given by its leaves, after `length` tokens; and its tensors that are neither keys nor values."""
    leaves: list[tuple[Any, ...]] = []
    others: list[Tensor] = []
    for leaf, role in zip(past, roles, strict=True):
        if role is not None and role.is_slots:
            leaves.append(("slots", *role))
        elif isinstance(leaf, Tensor):
            leaves.append(("tensor", len(others)))
            others.append(leaf)
        elif type(leaf) is int and leaf == length:
            # A constant may equal the length once. It is then right once, and told apart when it is next returned.
            leaves.append(("length",))
        else:
            leaves.append(("value", leaf))
    return Form(spec, tuple(leaves), places), others


def _arranged(states: Tensor, capacity: int, axes: tuple[int, ...]) -> Tensor:
    """`[B, Hkv, L, D]` in the decoder's own order of axes, filled up to its capacity if it has one."""
    arranged = states.permute(axes)
    if not capacity:
        return arranged
    axis = axes.index(2)
    shape = list(arranged.shape)
    shape[axis] = capacity - shape[axis]
    return torch.cat([arranged, arranged.new_zeros(shape)], axis)


def _spec_data(spec: Spec) -> Any:
    if spec.kind == "leaf":
        return None
    name = f"{spec.type.__module__}:{spec.type.__qualname__}"
    keys = list(spec.keys) if isinstance(spec.keys, tuple) else spec.keys
    try:
        plain = json.loads(json.dumps(keys)) == keys
    except (TypeError, ValueError):
        plain = False
    if not plain or _class(name) is not spec.type:
        raise ArtifactError(
            f"the decoder keeps its past in a {name}, which a file cannot describe: "
            + ("the class cannot be imported by that name" if plain else f"its keys or context are {spec.keys!r}")
            + ". Expected tuples, lists, dicts with text keys, or named tuples and dataclasses of a module."
        )
    return {"kind": spec.kind, "type": name, "keys": keys, "children": [_spec_data(child) for child in spec.children]}


def _spec_of_data(data: Any) -> Spec:
    if data is None:
        return tree.LEAF
    found = _class(data["type"])
    children = tuple(_spec_of_data(child) for child in data["children"])
    if found is None or not tree.is_node_type(found, data["kind"]):
        raise ArtifactError(
            f"the cache was made by a decoder that keeps its past in {data['type']}, a {data['kind']}, which is not "
            "there. Import the module that defines it first."
        )
    keys = data["keys"] if data["kind"] in ("registered", "optree") else tuple(data["keys"])
    return Spec(data["kind"], found, keys, children)


def _class(name: str) -> Any:
    """The class of that name in a module that is already imported; nothing is imported for a file's sake."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
