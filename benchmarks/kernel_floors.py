"""What each kernel must at least read, write and multiply, and how long that takes at given ceilings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernel_cases import CHUNK, COLUMNS, KEEP, WINDOW, Sizes

Count = Callable[[Sizes], float]


@dataclass(frozen=True)
class Ceilings:
    """Of a device.

    Attributes:
        name: what it is.
        bandwidth: bytes per second, read and written.
        matmul: flops per second of bf16 matrix products.
    """

    name: str
    bandwidth: float
    matmul: float


# By the datasheets, dense; for times that are predicted where nothing can be measured.
DATASHEETS = (Ceilings("H100 SXM", 3.35e12, 989e12), Ceilings("H200", 4.8e12, 989e12))


@dataclass(frozen=True)
class Floor:
    """Of one operator.

    Attributes:
        read: bytes read and written, each as often as its form must.
        flops: of matrix products; others hide behind the bytes.
        goal: share of the ceiling that the kernel is to reach at 32k, or None.
    """

    read: Count
    flops: Count
    goal: float | None = None

    def seconds(self, sizes: Sizes, ceilings: Ceilings) -> float:
        """The longer of the two."""
        return max(self.read(sizes) / ceilings.bandwidth, self.flops(sizes) / ceilings.matmul)

    def is_memory_bound(self, sizes: Sizes, ceilings: Ceilings) -> bool:
        """Which of the two that is."""
        return self.read(sizes) / ceilings.bandwidth >= self.flops(sizes) / ceilings.matmul


def _rows(sizes: Sizes) -> float:
    return sizes.dims.B * sizes.dims.Hkv * sizes.dims.S


def _keys(sizes: Sizes) -> float:
    return _rows(sizes) * sizes.dims.D * sizes.dtype.itemsize


def _queries(sizes: Sizes) -> float:
    return _keys(sizes) * sizes.dims.G


def _nothing(sizes: Sizes) -> float:
    return 0.0


def _products(queries: Count) -> Count:
    """Flops of the products of every key with so many queries of each query head."""
    return lambda sizes: 2 * _rows(sizes) * sizes.dims.G * queries(sizes) * sizes.dims.D


FLOORS: dict[str, Floor] = {
    "key_norm": Floor(lambda s: _keys(s) + 4 * _rows(s), _nothing, 0.85),
    "key_diff": Floor(lambda s: 2 * _keys(s) + 4 * _rows(s), _nothing, 0.85),
    "redundancy": Floor(lambda s: 2 * _keys(s) + 4 * _rows(s), _nothing, 0.85),
    "leverage": Floor(
        lambda s: 2 * _keys(s) + 4 * _rows(s), lambda s: _rows(s) * (4 * s.dims.D * COLUMNS + 4 * COLUMNS * COLUMNS), 0.85
    ),
    "chunk_attention": Floor(lambda s: _queries(s) + 2 * _keys(s) + 4 * _rows(s), _products(lambda s: CHUNK), 0.6),
    "window_attention": Floor(lambda s: 2 * _keys(s) + 4 * _rows(s), _products(lambda s: 2 * WINDOW), 0.85),
    # Two causal products: the log-sum-exp of the rows, and the columns.
    "column_attention": Floor(lambda s: _queries(s) + _keys(s) + 4 * _rows(s), _products(lambda s: s.dims.S), 0.6),
    # The moments twice in TF32, which takes as long as four products of 16 bits, and the logits three times in those or in TF32.
    "expected_attention": Floor(
        lambda s: _queries(s) + 2 * _keys(s) + 4 * s.dims.G * _rows(s),
        lambda s: (4 + (3 if s.dtype.itemsize == 2 else 6)) * _products(lambda s: s.dims.D)(s),
    ),
    "zscore": Floor(lambda s: 12 * _rows(s), _nothing, 0.85),
    "select": Floor(lambda s: 5 * 4 * _rows(s) + 8 * KEEP * _rows(s), _nothing, 0.85),
    "compact": Floor(lambda s: 2 * KEEP * (2 * _keys(s) + 4 * _rows(s)) + 8 * KEEP * _rows(s), _nothing, 0.85),
    "compact_into": Floor(lambda s: 2 * KEEP * (2 * _keys(s) + 4 * _rows(s)) + 8 * KEEP * _rows(s), _nothing, 0.85),
    "compact_cast": Floor(
        lambda s: KEEP * (2 * _keys(s) + 2 * _rows(s) * s.dims.D + 24 * _rows(s)) + 4 * s.dims.S * s.dims.D, _nothing, 0.85
    ),
    "select_heads": Floor(lambda s: 2 * 5 * 4 * _rows(s) + 8 * KEEP * _rows(s), _nothing, 0.85),
    "splice": Floor(lambda s: 5 * 4 * _rows(s) + 4 * _rows(s), _nothing, 0.85),
    "pack": Floor(lambda s: 2 * KEEP * (2 * _keys(s) + 4 * _rows(s)) + 16 * KEEP * _rows(s), _nothing, 0.85),
    "ragged_attention": Floor(lambda s: 2 * KEEP * _keys(s), _nothing, 0.85),
    "ragged_probabilities": Floor(lambda s: KEEP * (2 * _keys(s) + 8 * s.dims.G * _rows(s) + 4 * _rows(s)), _nothing, 0.85),
}

# What a prefill under a policy runs in each layer, besides choosing and moving; in the order of their cost.
POLICIES = {
    "knorm": ("key_norm",),
    "keydiff": ("key_diff",),
    "snapkv": ("window_attention",),
    "compactor": ("chunk_attention", "leverage", "zscore", "zscore"),
    "h2o_prefill": ("column_attention",),
}
GOALS = {"compactor": 0.01, "snapkv": 0.002}  # what they are to add to a prefill of 32k at most
WEIGHTS = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336  # of a layer of Llama-3.1-8B that multiply each token


def prefill_seconds(sizes: Sizes, ceilings: Ceilings) -> float:
    """One layer's projections and causal attention, at the rate of matrix products."""
    heads, tokens = sizes.dims.Hkv * sizes.dims.G, sizes.dims.S
    return (2 * WEIGHTS * tokens + 2 * heads * sizes.dims.D * tokens * tokens) / ceilings.matmul


def policy_seconds(policy: str, sizes: Sizes, ceilings: Ceilings) -> float:
    """What scoring, choosing and moving add to it."""
    return sum(FLOORS[op].seconds(sizes, ceilings) for op in (*POLICIES[policy], "select", "compact"))
