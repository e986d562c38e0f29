"""What follows a forward after which layers compete for slots: how many each wins, and the cut.

Nothing can be cut before the last layer has been scored. So the graph stores all new tokens and gives their scores; here the slots
are shared out, the numbers are read by the host, once, and layer by layer the best tokens take the place of all. A layer's whole
keys and values are free before the next is cut.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kvfx.budget import Budget
from kvfx.cache import Cache
from kvfx.cache_layer import CacheLayer
from kvfx.cache_step import check_finite
from kvfx.layouts import fill_static
from kvfx.passes.cache_write import slots_of
from kvfx.passes.plan import Plan, Splice
from kvfx.policy import Policy
from kvfx.quota import Quota
from kvfx.static_cache import StaticCache

ops = torch.ops.kvfx


def competitors(layers: Sequence[CacheLayer], whole: Collection[int]) -> frozenset[int]:
    """The layers that take part: not those of sliding windows, nor those that have to stay whole."""
    return frozenset(index for index, layer in enumerate(layers) if layer.window is None and index not in whole)


def share_out_and_cut(
    layers: Sequence[CacheLayer],
    held: Sequence[int],
    plan: Plan,
    policy: Policy,
    quota: Quota,
    before: Tensor,
    valid: Tensor | None,
) -> bool:
    """Leave of the new tokens of each layer what it won; what is written is new, so the layers of another cache stay as they are.

    Args:
        layers: of the cache, after a forward that stored all; those that compete hold scores.
        held: slots of each layer before it.
        plan: of the forward.
        policy: that of the model.
        quota: what each row keeps in the mean.
        before: real tokens that each row had seen, `[B]`.
        valid: which new tokens are real, `[B, S]`, or None if all are.

    Returns:
        Whether slots stand empty, because rows keep unequally many.

    Raises:
        InputError: a score is not finite.
    """
    scored = [index for index, layer in enumerate(layers) if layer.scores is not None]
    if not scored or policy.budget is None:
        return False
    won = _share_out([layers[index] for index in scored], policy.budget, quota)
    check_finite(layers, policy)
    tokens, device = layers[scored[0]].scores[0].shape[2], before.device
    if valid is None:
        positions = before[:, None] + torch.arange(tokens, device=device)
    else:
        positions = (before[:, None] + valid.cumsum(-1) - 1).masked_fill(~valid, -1)
    uneven = False
    for index, numbers in zip(scored, won, strict=True):
        count = max(*numbers, min(2, tokens))  # as of any budget: a graph for exactly one slot would be one more
        counts = torch.tensor(numbers, device=device) if valid is not None or set(numbers) != {count} else None
        _cut(layers[index], held[index], plan, positions.int(), count, counts)
        uneven |= counts is not None
    return uneven


def _share_out(layers: Sequence[CacheLayer], budget: Budget, quota: Quota) -> list[list[int]]:
    """How many slots each layer wins in each row. One host sync, which tells also whether scores were finite."""
    assert quota.sizes is not None
    curves = torch.stack([ops.rank_curve(layer.scores[0]) for layer in layers], 1)
    counts = None if quota.counts is None else quota.counts[0]
    floor = budget.floor.as_integer_ratio()
    won = ops.allocate(curves, slots_of(quota.sizes[0]), counts, *floor, budget.sure, budget.most or 0)
    finite = torch.stack([layer.finite for layer in layers if layer.finite is not None])
    fine, *rows = torch.cat([finite[None], won]).tolist()
    for layer, flag in zip(layers, fine, strict=True):
        layer.finite = torch.tensor(bool(flag))
    return [list(numbers) for numbers in zip(*rows, strict=True)]


def _cut(layer: CacheLayer, held: int, plan: Plan, positions: Tensor, count: int, counts: Tensor | None) -> None:
    first, scores = layer.scores
    if isinstance(plan.score, Splice):
        scores = ops.splice(first, scores, count, counts, *plan.score.share.as_integer_ratio())
    slots = ops.select(scores, count, counts)
    new = layer.keys[:, :, held:], layer.values[:, :, held:]
    keys, values, layer.kept_positions = ops.compact(*new, positions, slots, counts is not None)
    if held:
        keys, values = torch.cat([layer.keys[:, :, :held], keys], 2), torch.cat([layer.values[:, :, :held], values], 2)
    layer.store(keys, values)
    layer.scores = layer.finite = None


def refill(cache: StaticCache, dense: Cache, new: int, limit: int) -> None:
    """Put what a forward over `new` tokens left of a growing copy into the static cache that it was a copy of, in place.

    Args:
        cache: as it was before the forward.
        dense: what it shall hold.
        new: tokens of each row, padding included.
        limit: the longest text, where the cache does not say.

    Raises:
        PoolExhausted: it does not fit. Nothing was written.
    """
    before = [0 if layer.length is None else int(layer.length.max()) for layer in cache.layers] or [0] * len(dense.layers)
    windows = [layer.window for layer in dense.layers]
    more = [0 if window else layer.slots - held for layer, held, window in zip(dense.layers, before, windows, strict=True)]
    cache.check_room(new, more, limit)
    seen, cache.tokens = cache.lengths_seen, cache.tokens or limit
    cache.reset()
    fill_static(cache, dense)
    if seen is not None:
        cache.lengths_seen = seen.copy_(cache.lengths_seen)
    cache.mark()
