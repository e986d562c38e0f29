"""Rows of tokens: which are real, which come first, and where chunks begin.

Padding may stand anywhere in a row. An op that counts tokens moves the real ones to the front, works there, and moves
its answer back; hence a padded row gives what the row alone gives. Nothing here branches on a length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ranks(valid: Tensor | None, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number each row's real tokens from 0.

    Args:
        valid: [B, S] bool, or None when every token is real.
        tokens: S.
        device: where the ranks are made.

    Returns:
        Ranks, [B or 1, S] int64 (meaningless at padding), and row lengths, [B or 1, 1] int64.
    """
    if valid is None:
        return torch.arange(tokens, device=device)[None], torch.full((1, 1), tokens, dtype=torch.int64, device=device)
    real = valid.cumsum(-1)
    return real - 1, real[:, -1:]


def protected(valid: Tensor | None, tokens: int, device: torch.device, sinks: int, recent: int) -> Tensor:
    """Mark the first `sinks` and the last `recent` real tokens of each row; [B or 1, S] bool, any value at padding."""
    rank, length = ranks(valid, tokens, device)
    return (rank < sinks) | (rank >= length - recent)


def places(valid: Tensor | None) -> Tensor | None:
    """Say where each token goes when real tokens move to the front in order: [B, S] int64; None without padding."""
    if valid is None:
        return None
    real = valid.cumsum(-1)
    return torch.where(valid, real, real[:, -1:] + (~valid).cumsum(-1)) - 1


def sources(place: Tensor) -> Tensor:
    """List the slots of each row's tokens, real ones first: [B, S] int64, the inverse of `places`."""
    slot = torch.arange(place.shape[-1], device=place.device)
    return torch.empty_like(place).scatter(-1, place, slot.expand_as(place))


def to_front(x: Tensor, place: Tensor | None) -> Tensor:
    """Move the tokens of x, [B, H, S, ...], to their places; without padding x itself."""
    return x if place is None else x.gather(2, spread(sources(place), x))


def from_front(x: Tensor, place: Tensor | None) -> Tensor:
    """Undo `to_front`."""
    return x if place is None else x.gather(2, spread(place, x))


def spread(index: Tensor, x: Tensor) -> Tensor:
    """Repeat an index of axis 2, [B or 1, N], over the other axes of x, [B, H, S, ...]: [B, H, N, ...]; a view."""
    return index.reshape(index.shape[0], 1, -1, *[1] * (x.dim() - 3)).expand(*x.shape[:2], -1, *x.shape[3:])


def stored(x: Tensor) -> Tensor:
    """Return x, [..., N], from memory: through a scatter, which a compiler does not fuse into what reads it.

    For masks of large tensors. Comparing indices again for each element costs more than the exponential beside it.
    """
    return torch.zeros_like(x).scatter(-1, torch.arange(x.shape[-1], device=x.device).expand_as(x), x)


def chunk_slots(tokens: int, chunk: int, device: torch.device) -> Tensor:
    """List the slots of each chunk, [N, chunk] int64; those of a short last chunk run past the row.

    N >= 2, although one chunk may hold the row: tracing specialises sizes of 1, and one graph shall serve all lengths.
    """
    first = torch.arange(torch.sym_max(2, -(-tokens // chunk)), device=device) * chunk
    return first[:, None] + torch.arange(chunk, device=device)


def unchunk(x: Tensor, tokens: int) -> Tensor:
    """Lay chunks, [B, H, N, C], end to end and cut to [B, H, S].

    A gather, not a slice: a slice is contiguous exactly when C divides S, and tracing would guard on that.
    """
    slot = torch.arange(tokens, device=x.device)
    return x.flatten(2).gather(2, slot.expand(x.shape[0], x.shape[1], -1))


def pooled(score: Tensor, present: Tensor, kind: str, width: int) -> Tensor:
    """Replace each score by the mean (`avg`) or the largest (`max`) of its real neighbours.

    Args:
        score: [B, H, S], real tokens at the front; anything elsewhere.
        present: [B or 1, 1, S] float, 1 where a token is real.
        kind: `avg` or `max`.
        width: odd number of neighbours, the token itself among them; those beyond the row's ends do not count.

    Returns:
        [B, H, S]; meaningless where no token is real.
    """
    if kind not in ("avg", "max"):
        raise ValueError(f"pool_kind={kind!r}: expected avg or max")
    if width == 1:
        return score
    if kind == "max":
        score = torch.where(present > 0, score, torch.finfo(torch.float32).min)
        # Two axes, because one-dimensional max pooling asks for the length's sign of contiguity when traced.
        return F.max_pool2d(score, (1, width), 1, (0, width // 2))
    score = torch.where(present > 0, score, 0)
    return F.avg_pool1d(score, width, 1, width // 2) / F.avg_pool1d(present, width, 1, width // 2)
