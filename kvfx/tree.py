"""Trees of a user's own making: tuples, lists, dicts, named tuples, dataclasses, and classes registered as torch pytree nodes.

One walk serves outside a trace and, traced by Dynamo, inside it. What is none of these is a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvfx.cache import Cache
from kvfx.passes.capture import pytree


class Spec(NamedTuple):
    """The shape of a tree without its leaves.

    Attributes:
        kind: "leaf", "tuple", "list", "dict", "namedtuple", "dataclass" or "registered".
        type: the node's class; None for a leaf.
        keys: keys of a dict, fields of a dataclass, or the context of a registered class.
        children: one Spec per child.
    """

    kind: str
    type: Any
    keys: Any
    children: tuple[Spec, ...]


LEAF = Spec("leaf", None, (), ())


def open_node(node: Any) -> tuple[str, Any, list[Any]] | None:
    """Kind, keys and children of one node; None for a leaf."""
    if isinstance(node, (Tensor, Cache)) or node is None:
        return None
    if isinstance(node, tuple):
        return "namedtuple" if hasattr(type(node), "_fields") else "tuple", (), list(node)
    if type(node) is list:
        return "list", (), node
    if type(node) is dict:
        return "dict", tuple(node), list(node.values())
    if type(node) in pytree.SUPPORTED_NODES:
        children, context = pytree.SUPPORTED_NODES[type(node)].flatten_fn(node)
        return "registered", context, list(children)
    if hasattr(type(node), "__dataclass_fields__") and not isinstance(node, type):
        names = tuple(field.name for field in dataclasses.fields(node))
        return "dataclass", names, [getattr(node, name) for name in names]
    return None


def close_node(kind: str, cls: Any, keys: Any, children: list[Any]) -> Any:
    """The node of `children`; the inverse of `open_node`."""
    if kind == "tuple":
        return tuple(children)
    if kind == "list":
        return list(children)
    if kind == "dict":
        return dict(zip(keys, children, strict=True))
    if kind == "namedtuple":
        return cls(*children)
    if kind == "registered":
        return pytree.SUPPORTED_NODES[cls].unflatten_fn(children, keys)
    return cls(**dict(zip(keys, children, strict=True)))


def is_node_type(cls: Any, kind: str) -> bool:
    """Whether `cls` makes nodes of a kind."""
    plain = {"tuple": tuple, "list": list, "dict": dict}
    if kind in plain:
        return cls is plain[kind]
    if kind == "namedtuple":
        return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")
    if kind == "registered":
        return cls in pytree.SUPPORTED_NODES
    return kind == "dataclass" and isinstance(cls, type) and dataclasses.is_dataclass(cls)


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of a tree, left to right."""
    opened = open_node(tree)
    if opened is None:
        return [tree]
    found = []
    for child in opened[2]:
        found += leaves_of(child)
    return found


def spec_of(tree: Any) -> Spec:
    """The shape of a tree."""
    opened = open_node(tree)
    if opened is None:
        return LEAF
    kind, keys, children = opened
    return Spec(kind, type(tree), keys, tuple([spec_of(child) for child in children]))


def build(spec: Spec, leaves: list[Any]) -> Any:
    """The tree of a shape; takes its leaves from the front of `leaves`."""
    if spec.kind == "leaf":
        return leaves.pop(0)
    return close_node(spec.kind, spec.type, spec.keys, [build(child, leaves) for child in spec.children])


def count(spec: Spec) -> int:
    """Leaves of a tree of this shape."""
    return 1 if spec.kind == "leaf" else sum(count(child) for child in spec.children)


def element_with(spec: Spec, wanted: Sequence[int]) -> tuple[int, Spec] | None:
    """The child of the root that holds all `wanted` leaves, by its first leaf's index and shape; None if no one child does."""
    first = 0
    for child in spec.children:
        if first <= min(wanted) and max(wanted) < first + count(child):
            return first, child
        first += count(child)
    return None


def replace_element(spec: Spec, leaves: list[Any], first: int, new: Any) -> Any:
    """The tree with the child of the root that begins with leaf `first` replaced by the leaf `new`."""
    start, children, kept = 0, [], list[Any]()
    for child in spec.children:
        size = count(child)
        is_replaced = start == first and size > 0
        children.append(LEAF if is_replaced else child)
        kept += [new] if is_replaced else leaves[start : start + size]
        start += size
    return build(spec._replace(children=tuple(children)), kept)
