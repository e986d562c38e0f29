"""How much of the new tokens each row and layer keeps, as the numbers that a graph takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from kvfx.block import Block
from kvfx.errors import InputError
from kvfx.lower import lower
from kvfx.passes.cache_write import size_of, slots_of
from kvfx.passes.capture import mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.policy import Policy

Keep = float | Fraction | Sequence[float | Fraction] | None


class Quota(NamedTuple):
    """What is kept of the new tokens.

    Attributes:
        sizes: as of `SlotCache`, marked dynamic; None if all is stored.
        counts: as of `SlotCache`, marked dynamic.
        most: the most slots that a row fills, per layer or for all.
        whole: whether every real token is kept.
        rows: how many slots each row keeps in a layer, or in the first of them.
    """

    sizes: list[Tensor] | None
    counts: list[Tensor] | None
    most: list[int]
    whole: bool
    rows: list[int]

    def of_layers(self, windows: Sequence[int | None], whole: Collection[int], block: Block) -> tuple[list[int], list[int]]:
        """Slots of a row that each layer of a cache of fixed capacity needs room for, and those that the longest row fills.

        Args:
            windows: of each layer; one with a window has its room, which counts for 0.
            whole: layers that store everything, whatever others evict.
            block: the new tokens.
        """
        sizes = [block.length] if self.sizes is None else [slots_of(size) for size in self.sizes]
        room, filled = (
            [0 if window else tokens if index in whole else kept[min(index, len(kept) - 1)] for index, window in enumerate(windows)]
            for kept, tokens in ((sizes, block.length), (self.most, max(block.lengths)))
        )
        return room, filled


def quota(policy: Policy, plan: Plan, block: Block, layers: int, keep: Keep) -> Quota:
    """How many slots a graph shall hold of the new tokens, per layer or for all, and how many of them each row fills.

    Args:
        policy: what is kept.
        plan: of the forward: that of the policy, or one that stores all.
        block: the new tokens.
        layers: of the cache.
        keep: fractions kept instead of the policy's, one for all rows or one for each.

    Raises:
        InputError: the policy does not take such a block, or no other fraction.
    """
    if plan.score is None:
        if keep is not None:
            raise InputError(f"keep={keep}: the policy {policy} keeps everything. Compile with one that scores")
        return Quota(None, None, [max(block.lengths)], True, list(block.lengths))
    batch, length = block.batch, block.length
    if policy.batch_coupled and (batch > 1 or block.valid is not None):
        raise InputError(f"{policy.name} needs one row without padding, got {batch} rows: {policy.batch_coupled}")
    rows = {sketch.shape[0] for sketch in plan.sketches or () if sketch.dim() == 4}
    if rows - {batch}:
        raise InputError(f"the sketches given to kvfx.compile are for {sorted(rows)} rows, the prompt has {batch}")
    if length < policy.least_tokens:
        raise InputError(
            f"{policy.name} scores prompts of at least {policy.least_tokens} tokens, as the library it follows; got {length}. "
            "Use the preset without @ for short ones."
        )
    pairs = zip(_policies(policy, batch, keep), block.lengths, strict=True)
    per_layer = list(zip(*(each.counts(real, layers) for each, real in pairs), strict=True))
    if len(set(per_layer)) == 1:
        per_layer = per_layer[:1]
    most = [max(counts) for counts in per_layer]
    slots = (
        [max(2, count) for count in most] if length > 1 else most
    )  # with one empty: a graph for exactly one slot would be one more
    sizes, counts = [size_of(count, block.device) for count in slots], None
    if block.valid is not None or any(slot != count for slot, row in zip(slots, per_layer, strict=True) for count in row):
        counts = [torch.tensor(counts, device=block.device) for counts in per_layer]
    for tensor in [*sizes, *(counts or ())]:
        mark_dynamic(tensor, 0)
    return Quota(sizes, counts, most, all(row == tuple(block.lengths) for row in per_layer), list(per_layer[0]))


def slots_of_prompt(policy: Policy, length: int, layers: int) -> int:
    """The most slots that a layer without a window is given of a prompt of `length` tokens."""
    if policy.score is None or policy.budget is None:
        return length
    counts = policy.counts(length, layers)
    if policy.budget.pool == "layers":  # one may win what all others leave over
        return min(length, sum(counts), policy.budget.most or length)
    return max(2, *counts)


def _policies(policy: Policy, rows: int, keep: Keep) -> list[Policy]:
    """The policy of each row."""
    if keep is None:
        return [policy] * rows
    keeps = [keep] * rows if isinstance(keep, (int, float, Fraction)) else list(keep)
    if len(keeps) != rows:
        raise InputError(f"keep has {len(keeps)} fractions for {rows} rows; expected one for all, or one for each")
    policies = [policy.with_keep(each) for each in keeps]
    if any(lower(each) != lower(policy) for each in policies):
        raise InputError(f"keep={keep}: scores of {policy.name} depend on the fraction kept. Compile a model for each")
    return policies
