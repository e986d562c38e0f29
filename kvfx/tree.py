"""Trees of a user's own making: tuples, lists, dicts, named tuples, dataclasses, and classes registered with torch or optree.

One walk serves outside a trace and, traced by Dynamo, inside it. What is none of these is a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvfx.cache import Cache
from kvfx.passes.capture import pytree
from kvfx.pytree import optree


class Spec(NamedTuple):
    """The shape of a tree without its leaves.

    Attributes:
        kind: "leaf", "tuple", "list", "dict", "namedtuple", "dataclass", "registered" (with torch) or "optree".
        type: the node's class; None for a leaf.
        keys: keys of a dict, fields of a dataclass, or the context of a registered class.
        children: one Spec per child.
    """

    kind: str
    type: Any
    keys: Any
    children: tuple[Spec, ...]


Flatten = Callable[[Any], tuple[Any, ...]]
Unflatten = Callable[[Any, Any], Any]
# How to take nodes of optree's own classes apart and put them together; a plain dict, which Dynamo can look into.
OPTREE: dict[type, tuple[Flatten, Unflatten]] = {}


def learn_optree() -> None:
    """Note the classes that are registered with optree by now, in its global namespace."""
    if optree is not None:
        for cls, entry in optree.register_pytree_node.get().items():
            if entry.kind == optree.PyTreeKind.CUSTOM and cls not in pytree.SUPPORTED_NODES:
                OPTREE[cls] = entry.flatten_func, entry.unflatten_func


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
    if type(node) in OPTREE:
        children, context = OPTREE[type(node)][0](node)[:2]
        return "optree", context, list(children)
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
    if kind == "optree":
        return OPTREE[cls][1](keys, children)
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
    if kind == "optree":
        return cls in OPTREE
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


def element_with(spec: Spec, wanted: Sequence[int], others: Sequence[int]) -> tuple[list[int], int] | None:
    """The largest subtree that holds all `wanted` leaves and not all of `others`, by the way to it and its first leaf's index.

    None if there is none, because the smallest that holds the wanted ones holds all the others too.
    """
    path, first = list[int](), 0
    while set(others) and all(first <= other < first + count(spec) for other in others):
        start = first
        for place, child in enumerate(spec.children):
            if start <= min(wanted) and max(wanted) < start + count(child):
                path, first, spec = [*path, place], start, child
                break
            start += count(child)
        else:
            return None
    return path, first


def at(spec: Spec, path: Sequence[int]) -> Spec:
    """The shape of the subtree that a way leads to."""
    for place in path:
        spec = spec.children[place]
    return spec


def without(spec: Spec, path: Sequence[int]) -> Spec:
    """The shape with a leaf in place of the subtree that a way leads to."""
    if not path:
        return LEAF
    children = list(spec.children)
    children[path[0]] = without(children[path[0]], path[1:])
    return spec._replace(children=tuple(children))


def attribute(module: Any, name: str) -> Any:
    """The attribute of a dotted name."""
    for part in name.split("."):
        module = getattr(module, part)
    return module


def set_attribute(module: Any, name: str, value: Any) -> None:
    """Set the attribute of a dotted name."""
    *owners, last = name.split(".")
    for part in owners:
        module = getattr(module, part)
    setattr(module, last, value)
