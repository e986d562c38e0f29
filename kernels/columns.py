"""From the columns of a softmax to scores: over the query heads of a group, by the values, over neighbours."""

import torch
from torch import Tensor

from .rows import from_front, places, pooled, ranks, to_front

HEADS = ("mean", "max", "sum", "layer")
WINDOW_REDUCE = ("mean", "sum", "max", "count", "squares")
COLUMN_REDUCE = ("sum", "count", "squares")
LONGEST = 1 << 24  # rows are shorter


def known(option: str, given: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError if an option of an operator is none of its choices."""
    if given not in choices:
        raise ValueError(f"{option}={given!r}: expected one of {', '.join(choices)}")


def distance(buffer: int) -> int:
    """Return how far behind a key the first query stands that counts, cut to what is as good as any more.

    Raises:
        ValueError: it is negative.
    """
    if buffer < 0:
        raise ValueError(f"buffer={buffer}: expected 0, or how many queries behind each key do not count")
    return min(buffer, LONGEST)


def joined(columns: Tensor, heads: str, value: Tensor | None, valid: Tensor | None, pool: int, pool_kind: str) -> Tensor:
    """Turn columns, [B, Hkv, G, S], into scores of the KV heads, [B, Hkv, S]: joined over heads, weighed, pooled, 0 at padding.

    A sum comes last: KV-Compress (Rehg, arXiv:2410.00161) pools each query head by itself, and the largest of neighbours is
    another one in each.

    Args:
        columns: what each key received from the queries of each query head; anything at padding.
        heads: `mean`, `max` or `sum` over the heads of the group, or `layer`: the mean over all query heads, the same for
            every KV head.
        value: [B, Hkv, S, Dv] or None; the norms of its tokens weigh their scores.
        valid: [B, S] bool, or None when every token is real.
        pool: odd number of real neighbours that are pooled.
        pool_kind: `avg` or `max`.
    """
    known("heads", heads, HEADS)
    norm = None if value is None else torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
    if heads != "sum":
        return _pooled(_reduced(columns, heads), norm, valid, pool, pool_kind)
    if norm is not None:
        norm = norm.repeat_interleave(columns.shape[2], 1)
    return _pooled(columns.flatten(1, 2), norm, valid, pool, pool_kind).unflatten(1, columns.shape[1:3]).sum(2)


def _reduced(columns: Tensor, heads: str) -> Tensor:
    """Reduce columns, [B, Hkv, G, S], to one per KV head, [B, Hkv, S]."""
    if heads == "mean":
        return columns.mean(2)
    if heads == "max":
        return columns.amax(2)
    return columns.mean((1, 2), keepdim=True).squeeze(2).expand(-1, columns.shape[1], -1)


def _pooled(score: Tensor, norm: Tensor | None, valid: Tensor | None, pool: int, pool_kind: str) -> Tensor:
    """Multiply scores, [B, H, S], by the norms of the values, pool them over real neighbours, clear padding."""
    if norm is not None:
        score = score * norm
    place, length = places(valid), ranks(valid, score.shape[2], score.device)[1]
    present = (torch.arange(score.shape[2], device=score.device) < length)[:, None].float()
    score = from_front(pooled(to_front(score, place), present, pool_kind, pool), place)
    return score if valid is None else score.masked_fill(~valid[:, None], 0)
