"""From the columns of a softmax to scores: over the query heads of a group, by the values, over neighbours."""

import torch
from torch import Tensor

from .rows import from_front, places, pooled, ranks, to_front

HEADS = ("mean", "max", "layer")
WINDOW_REDUCE = ("mean", "sum", "max", "count", "squares")
COLUMN_REDUCE = ("sum", "count", "squares")


def known(option: str, given: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError if an option of an operator is none of its choices."""
    if given not in choices:
        raise ValueError(f"{option}={given!r}: expected one of {', '.join(choices)}")


def join_heads(columns: Tensor, heads: str) -> Tensor:
    """Reduce columns, [B, Hkv, G, S], to one per KV head, [B, Hkv, S].

    Args:
        columns: what each key received from the queries of each query head.
        heads: `mean` or `max` over the heads of the group, or `layer`: the mean over all query heads, the same for
            every KV head.
    """
    known("heads", heads, HEADS)
    if heads == "mean":
        return columns.mean(2)
    if heads == "max":
        return columns.amax(2)
    return columns.mean((1, 2), keepdim=True).squeeze(2).expand(-1, columns.shape[1], -1)


def weigh(score: Tensor, value: Tensor | None, valid: Tensor | None, pool: int, pool_kind: str) -> Tensor:
    """Multiply scores, [B, Hkv, S], by the L2 norms of the values, pool them over real neighbours, clear padding."""
    if value is not None:
        score = score * torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
    place, length = places(valid), ranks(valid, score.shape[2], score.device)[1]
    present = (torch.arange(score.shape[2], device=score.device) < length)[:, None].float()
    score = from_front(pooled(to_front(score, place), present, pool_kind, pool), place)
    return score if valid is None else score.masked_fill(~valid[:, None], 0)
