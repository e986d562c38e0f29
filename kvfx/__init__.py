"""kvfx: KV-cache compression as a graph-rewriting pass for torch.compile.

`compile` returns a model whose KV caches keep only what a declarative policy chooses; see the README for the tour.
"""

import kvfx.pytree  # noqa: F401 - makes Cache a pytree node
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
from kvfx.policy import Policy
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
    "PoolExhausted",
    "RaggedCache",
    "SiteRefused",
    "StaticCache",
    "UnsupportedModel",
    "compile",
    "explain",
    "load_cache",
]
