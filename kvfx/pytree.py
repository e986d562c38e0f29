"""A `kvfx.Cache` as a node of torch's and optree's trees: its tensors are the leaves, all else is the node's own."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kvfx.cache import Cache
from kvfx.passes.capture import pytree
from kvfx.ragged_cache import RaggedCache
from kvfx.static_cache import StaticCache

optree: Any
try:
    import optree
except ImportError:  # then nobody has optree's trees either
    optree = None

Node = tuple[Any, ...]


def flatten(cache: Cache) -> tuple[list[Tensor], Node]:
    """Take a cache apart; what is no tensor can be hashed and compared."""
    tensors = cache.tensors()
    about, fingerprint = (json.dumps(data, sort_keys=True) for data in (cache.about(), cache.fingerprint))
    return list(tensors.values()), (tuple(tensors), about, cache.form, cache.owner, fingerprint)


def unflatten(kind: type[Cache], leaves: Iterable[Any], node: Node) -> Cache:
    """Put a cache together again, of whatever the leaves have become."""
    names, about, form, owner, fingerprint = node
    cache = kind.of_tensors(dict(zip(names, leaves, strict=True)), json.loads(about))
    cache.form, cache.owner, cache.fingerprint = form, owner, json.loads(fingerprint)
    return cache


for kind in (Cache, StaticCache, RaggedCache):
    build = functools.partial(unflatten, kind)
    pytree.register_pytree_node(kind, flatten, build, serialized_type_name=f"kvfx.{kind.__name__}")
    if optree is not None:
        optree.register_pytree_node(
            kind, flatten, lambda node, leaves, build=build: build(leaves, node), namespace=optree.registry.__GLOBAL_NAMESPACE
        )
