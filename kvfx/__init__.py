"""kvfx: KV-cache compression as a graph-rewriting pass for torch.compile.

`compile` returns a model whose KV caches keep only what a declarative policy chooses; see the README for the tour.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfx.api import compile, explain
    from kvfx.cache import Cache
    from kvfx.cache_file import load_cache
    from kvfx.errors import (
        ArtifactError,
        CacheMismatch,
        InputError,
        KernelUnavailable,
        KvfxError,
        PolicyError,
        PoolExhausted,
        SiteRefused,
        UnsupportedModel,
    )
    from kvfx.exporting import export
    from kvfx.packaged import load
    from kvfx.policy import Policy
    from kvfx.pool import Pool
    from kvfx.ragged_cache import RaggedCache
    from kvfx.static_cache import StaticCache

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Cache",
    "CacheMismatch",
    "InputError",
    "KernelUnavailable",
    "KvfxError",
    "Policy",
    "PolicyError",
    "Pool",
    "PoolExhausted",
    "RaggedCache",
    "SiteRefused",
    "StaticCache",
    "UnsupportedModel",
    "compile",
    "explain",
    "export",
    "load",
    "load_cache",
]

# Read when they are asked for, because a package runs without transformers, which all others import.
_HOME = {
    "Cache": "cache",
    "Policy": "policy",
    "Pool": "pool",
    "RaggedCache": "ragged_cache",
    "StaticCache": "static_cache",
    "compile": "api",
    "explain": "api",
    "export": "exporting",
    "load": "packaged",
    "load_cache": "cache_file",
}


def __getattr__(name: str) -> Any:
    if name in _HOME and name != "load":
        importlib.import_module("kvfx.pytree")  # makes caches nodes of trees
    if name in __all__:
        value = getattr(importlib.import_module(f"kvfx.{_HOME.get(name, 'errors')}"), name)
        globals()[name] = value
        return value
    try:
        return importlib.import_module(f"kvfx.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"kvfx.{name}":
            raise
        raise AttributeError(f"module 'kvfx' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
