"""The markers that a cache puts into a traced graph where it stores new keys and values.

`cache_write` says what is to be stored and how many slots the result shall hold; what is kept is the passes' business. It carries
sizes as the length of an empty tensor, which makes them inputs of the graph: one graph serves every share of the cache.
`cache_score` asks only what the new tokens are worth, for a cache that makes its choice itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

LIBRARY = torch.library.Library("kvfx", "FRAGMENT")
LIBRARY.define(
    "cache_write(Tensor key, Tensor value, Tensor positions, Tensor? counts, Tensor size, int layer)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("cache_score(Tensor key, Tensor value, Tensor positions, Tensor? counts, int layer) -> (Tensor, Tensor, Tensor)")


def cache_write(
    key: Tensor, value: Tensor, positions: Tensor, counts: Tensor | None, size: Tensor, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stand for the eviction of one layer's new tokens. Shapes only; the passes replace every call.

    Args:
        key: new keys as attention sees them, [B, Hkv, S, D].
        value: new values, [B, Hkv, S, Dv].
        positions: RoPE index of each token within its row, -1 for padding, [B, S], int32.
        counts: slots that each row keeps, [B], int64, or None if every row keeps all n and none is padded.
        size: an empty tensor [n + 1, 0]; n is the number of slots to hold. One more, because a graph specialises sizes 0 and 1.
        layer: index of the cache layer.

    Returns:
        kept keys [B, Hkv, n, D], values [B, Hkv, n, Dv], positions [B, Hkv, n] int32, and whether all scores were finite, [] bool.
    """
    slots = slots_of(size)
    batch, heads = key.shape[:2]
    return (
        key.new_empty(batch, heads, slots, key.shape[3]),
        value.new_empty(batch, heads, slots, value.shape[3]),
        positions.new_empty(batch, heads, slots),
        torch.empty((), dtype=torch.bool, device=key.device),
    )


def cache_score(key: Tensor, value: Tensor, positions: Tensor, counts: Tensor | None, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stand for the scores of one layer's new tokens, as `kvfx::protect` leaves them. Shapes only; the passes replace every call.

    The arguments are those of `cache_write`. Of `counts` it matters only whether there are any: then rows may be padded.

    Returns:
        the scores by which a splice ranks first, [B, Hkv, S] fp32; those by which it ranks then, or the one score there is, which
        both are where nothing is spliced; and whether all scores were finite, [] bool.

    Raises:
        Unscored: by the passes, where no attention is understood that reads what is stored.
    """
    scores = key.new_empty(key.shape[:3], dtype=torch.float32)
    return scores, torch.empty_like(scores), torch.empty((), dtype=torch.bool, device=key.device)


def writes_of(graph: fx.Graph) -> list[fx.Node]:
    """The markers of a graph, in its order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in (WRITE, SCORE)]


def layer_of(write: fx.Node) -> int:
    """The cache layer that a marker is of."""
    layer = write.args[-1]
    assert isinstance(layer, int)
    return layer


def size_of(slots: int, device: torch.device) -> Tensor:
    """The tensor whose length carries `slots`."""
    return torch.empty(slots + 1, 0, device=device)


def slots_of(size: Tensor) -> int:
    """The number of slots that `size` carries."""
    return size.shape[0] - 1


torch.library.register_fake("kvfx::cache_write", cache_write)
torch.library.register_fake("kvfx::cache_score", cache_score)
WRITE = torch.ops.kvfx.cache_write.default
SCORE = torch.ops.kvfx.cache_score.default
