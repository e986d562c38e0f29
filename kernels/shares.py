"""What forms of an operator share that split a budget: numbers of slots, and the list of what they hold."""

import torch
from torch import Tensor


def sure(scores: Tensor, count: int, counts: Tensor | None, floor_numerator: int, floor_denominator: int, least: int) -> Tensor:
    """Say how many slots every unit of a row is sure of, [B] int64; see `allocate`."""
    counts = counts_of(scores, count, counts)
    return (counts * floor_numerator // floor_denominator).clamp(min=least).minimum(counts)


def counts_of(scores: Tensor, count: int, counts: Tensor | None) -> Tensor:
    """How many slots each row of scores, [B, ...], keeps, [B] int64: `count` of every row where nothing else is said."""
    return torch.full((scores.shape[0],), count, dtype=torch.int64, device=scores.device) if counts is None else counts


def share_of(counts: Tensor, numerator: int, denominator: int) -> Tensor:
    """A share of each count, rounded down: at least one, as kvpress does, unless the share is 0."""
    return (counts * numerator // denominator).clamp(min=min(numerator, 1))


def listed(chosen: Tensor, places: int) -> Tensor:
    """List what is marked in each row of heads, [B, Hkv, S] bool: [B, places] int64, head*S + token, ascending, -1 behind them."""
    flat = chosen.flatten(1)
    target = torch.where(flat, flat.cumsum(-1) - 1, places)  # the last place is thrown away
    slot = torch.arange(flat.shape[1], device=chosen.device)
    slots = torch.full((chosen.shape[0], places + 1), -1, dtype=torch.int64, device=chosen.device)
    return slots.scatter(-1, target, slot.expand_as(target))[:, :places]
