"""Which slots go so that blocks are freed where that costs least, by its definition; and what attention pays, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Row = list[list[tuple[float, int]]]  # of each head, the score and the position of each token


def schedule(row: Row, held: Sequence[int], evictions: int, block: int) -> list[set[int]]:
    """Tokens that each head loses, by trying the cheapest block again and again."""
    order = [sorted(range(len(head)), key=lambda i, head=head: (head[i][0], -head[i][1])) for head in row]
    lost = [0] * len(row)

    def next_price(head: int) -> tuple[float, int]:
        """What the next block of a head costs, and how many tokens it has then lost; infinity if it has none to give."""
        total = held[head] + len(row[head])
        count = lost[head] + ((total - lost[head] - 1) % block + 1 if total else 1)
        if count > len(row[head]) or count >= total:
            return math.inf, 0
        return row[head][order[head][count - 1]][0], count

    for _ in range(evictions):
        prices = [next_price(head) for head in range(len(row))]
        cheapest = min(range(len(row)), key=lambda head: prices[head][0])
        if prices[cheapest][0] == math.inf:
            break
        lost[cheapest] = prices[cheapest][1]
    return [set(order[head][: lost[head]]) for head in range(len(row))]


def squares(weights: Tensor, power: int = 2, buffer: int = 0, pool: int = 1) -> Tensor:
    """Powers of weights, `[Hkv, G, queries, keys]` of the last queries: summed over them, the largest neighbour, over the group."""
    queries, keys = weights.shape[2:]
    apart = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    received = (weights.double() ** power * (apart >= buffer)).sum(2)
    half = pool // 2
    return torch.stack([received[..., max(0, i - half) : i + half + 1].amax(-1) for i in range(keys)], -1).sum(1)


def protected(scores: Tensor, sinks: int, recent: int) -> Tensor:
    """Scores `[..., S]` of tokens in order, of which the first and the last may not be lost."""
    place = torch.arange(scores.shape[-1])
    return scores.masked_fill((place < sinks) | (place >= scores.shape[-1] - recent), math.inf)
