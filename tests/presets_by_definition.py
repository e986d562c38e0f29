"""What each preset scores by its paper, or by kvpress's rules: one row, float64 loops over what the model's attention read.

`[Hkv, S]`, higher stays. What is protected is not part of a definition, except in kvpress, whose scores carry it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

import reference
from reference import Taps
from schedule_by_definition import squares


def weights(taps: Taps) -> Tensor:
    """Causal attention of all queries, `[Hkv, G, S, S]`."""
    query, key = taps.query[0].double(), taps.key[0].double()
    heads, length = key.shape[:2]
    logits = query.unflatten(0, (heads, -1)) @ key[:, None].transpose(-2, -1) / key.shape[-1] ** 0.5
    return logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def neighbours(score: Tensor, width: int) -> Tensor:
    """The mean of up to `width` neighbours that are there."""
    half = width // 2
    return torch.stack([score[:, max(0, i - half) : i + half + 1].mean(1) for i in range(score.shape[1])], 1)


def window(taps: Taps, size: int) -> Tensor:
    """Mean attention from the last `size` queries, `[Hkv, G, S]`."""
    return weights(taps)[:, :, -size:].mean(2)


def streaming_llm(taps: Taps) -> Tensor:
    return torch.arange(taps.key.shape[2]).double().expand(taps.key.shape[1], -1)


def keydiff(taps: Taps) -> Tensor:
    key = taps.key[0].double()
    unit = key / key.norm(dim=-1, keepdim=True)
    anchor = unit.mean(1, keepdim=True)
    return -(unit * anchor).sum(-1) / anchor.norm(dim=-1)


def snapkv(taps: Taps, size: int = 16, kernel: int = 5) -> Tensor:
    return neighbours(window(taps, size).mean(1), kernel)


def tova(taps: Taps) -> Tensor:
    return window(taps, 1).mean((0, 1)).expand(taps.key.shape[1], -1)


def h2o_prefill(taps: Taps) -> Tensor:
    received = weights(taps).sum(2).mean(1)
    return received / torch.arange(received.shape[1], 0, -1)


def lagkv(taps: Taps, lag: int = 8, sinks: int = 4) -> Tensor:
    heads, length = taps.key.shape[1:3]
    score = torch.empty(heads, length, dtype=torch.float64)
    blocks = max(0, (length - sinks) // lag)
    score[:, :sinks] = 3
    judged = sinks + max(0, blocks - 1) * lag
    score[:, judged:] = 1 + torch.arange(length)[judged:] / length
    for block in range(blocks - 1):
        here, behind = (
            slice(sinks + block * lag, sinks + (block + 1) * lag),
            slice(sinks + (block + 1) * lag, sinks + (block + 2) * lag),
        )
        spread = torch.zeros(heads, lag, dtype=torch.float64)
        for states in (taps.key[0].double(), taps.value[0].double()):
            low, high = states[:, behind].amin(1, keepdim=True), states[:, behind].amax(1, keepdim=True)
            spread += ((states[:, here] - low) / (high - low)).std(-1).softmax(-1)
        score[:, here] = spread.argsort(-1).argsort(-1) / lag
    return score


def chunks_of(score: Tensor, size: int, end: int) -> Tensor:
    """The mean over heads and the unprotected tokens of each chunk; `end` is where protection begins."""
    out = torch.zeros_like(score)
    for start in range(0, score.shape[1], size):
        inner = score[:, start : min(start + size, end)]
        out[:, start : start + size] = inner.mean() if inner.numel() else 0
    return out


def chunkkv(taps: Taps, size: int = 5, recent: int = 16) -> Tensor:
    return chunks_of(snapkv(taps, recent), size, taps.key.shape[2] - recent)


def quota(score: Tensor, size: int) -> Tensor:
    """Ranks inside chunks, as shares of the chunk."""
    out = torch.empty_like(score)
    for start in range(0, score.shape[1], size):
        part = score[:, start : start + size]
        better = [[sum((-row[j], j) < (-row[i], i) for j in range(len(row))) for i in range(len(row))] for row in part.tolist()]
        out[:, start : start + size] = -torch.tensor(better, dtype=torch.float64) / part.shape[1]
    return out


DEFINITIONS: dict[str, tuple[Callable[[Taps], Tensor], int, int]] = {  # score, sinks, recent
    "streaming_llm": (streaming_llm, 4, 0),
    "keydiff": (keydiff, 0, 0),
    "snapkv(window=16)": (snapkv, 0, 16),
    "pyramidkv(window=16)": (snapkv, 0, 16),
    "tova": (tova, 0, 1),
    "h2o_prefill": (h2o_prefill, 0, 0),
    "lagkv(lag=8)": (lagkv, 4, 0),
    "chunkkv(window=16, chunk=5)": (chunkkv, 0, 16),
}


def kv_compress(taps: Taps, size: int = 8) -> Tensor:
    """Squared attention from the last queries, the largest of seven neighbours, summed over a group."""
    return squares(weights(taps)[:, :, -size:], pool=7)


# -- heads of a layer that compete -------------------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """What decides among heads: the score, a second one for what a first share leaves over, protection, and the floor."""

    first: Callable[[Taps], Tensor]
    then: Callable[[Taps], Tensor] | None
    sinks: int
    recent: int
    floor: Fraction = Fraction(0)
    share: Fraction = Fraction(0)


def critical(taps: Taps, size: int = 16) -> Tensor:
    return (snapkv(taps, size) + 1e-4) * reference.projected(taps)


def compactor_engine(taps: Taps, sketch: Tensor) -> Tensor:
    """Attention inside chunks of 128, summed over queries and the heads of a group, and leverage."""
    query, key = taps.query[0].double(), taps.key[0].double()
    attention, group = torch.zeros(key.shape[:2], dtype=torch.float64), len(query) // len(key)
    for head, start in ((head, start) for head in range(len(query)) for start in range(0, key.shape[1], 128)):
        part = slice(start, start + 128)
        attention[head // group, part] += (query[head, part] @ key[head // group, part].T).softmax(-1).sum(0)
    outliers = reference._leverage(taps.pre_key[0].double(), sketch.double(), 512)
    return reference._standard(attention, 16, 64) + 0.5 * reference._standard(outliers, 16, 64)


HEADS: dict[str, Heads] = {
    "adakv(window=16)": Heads(snapkv, None, 0, 16, Fraction(1, 5)),
    "critical_adakv(window=16)": Heads(snapkv, critical, 0, 16, Fraction(1, 5), Fraction(1, 2)),
}


def among_heads(first: Tensor, then: Tensor | None, count: int, floor: Fraction, share: Fraction) -> list[list[int]]:
    """What each head keeps of one row, whose heads share `count` slots each in the mean; both scores with protected ends."""
    heads, sure = range(len(first)), floor.numerator * count // floor.denominator
    ranked = [sorted(range(first.shape[1]), key=lambda t, row=row: (-row[t], t)) for row in first.tolist()]
    pairs = sorted((r >= sure, -float(first[h, t]) if r >= sure else 0, t, h) for h in heads for r, t in enumerate(ranked[h]))
    numbers = [sum(winner == h for *_, winner in pairs[: len(first) * count]) for h in heads]
    if then is None:
        return [sorted(ranked[h][: numbers[h]]) for h in heads]
    kept = []
    for h in heads:
        taken = ranked[h][: max(sure, max(1, int(share * numbers[h])) if numbers[h] else 0)]
        rest = sorted(set(range(first.shape[1])) - set(taken), key=lambda t, h=h: (-float(then[h, t]), t))
        kept.append(sorted((taken + rest)[: numbers[h]]))
    return kept


# -- kvpress 0.5.5: scores carry what is protected, counts are floats --------------------------------------------------------------


def snapkv_press(taps: Taps, size: int = 64, kernel: int = 5) -> Tensor:
    received = window(taps, size)[..., :-size].flatten(0, 1)
    pooled = torch.nn.functional.avg_pool1d(received, kernel, 1, kernel // 2)
    score = pooled.unflatten(0, (taps.key.shape[1], -1)).mean(1)
    return torch.nn.functional.pad(score, (0, size), value=float(score.max()) + 1)


def tova_press(taps: Taps) -> Tensor:
    score = window(taps, 1)[..., :-1].mean((0, 1)).expand(taps.key.shape[1], -1)
    return torch.nn.functional.pad(score, (0, 1), value=float(score.max()) + 1)


def streaming_press(taps: Taps, keep: float, sinks: int = 4) -> Tensor:
    length = taps.key.shape[2]
    score = torch.ones(taps.key.shape[1:3], dtype=torch.float64)
    score[:, sinks : sinks + length - int(length * keep)] = 0
    return score


def chunk_press(taps: Taps, keep: float, size: int = 20) -> Tensor:
    """1 for the tokens of the chunks kept, 0 for the others."""
    score = snapkv_press(taps)
    parts = [range(start, min(start + size, score.shape[1])) for start in range(0, score.shape[1], size)]
    worth = torch.stack([score[:, part.start : part.stop].sum(0).mean() for part in parts])
    out = torch.zeros_like(score)
    for chunk in worth.topk(max(1, int(len(parts) * keep))).indices.tolist():
        out[:, parts[chunk].start : parts[chunk].stop] = 1
    return out


def pyramid_press(length: int, keep: float, layer: int, layers: int, beta: int = 20, size: int = 64) -> int:
    room = size + length * keep
    low = (room - size) / beta
    high = (room - size) * 2 - low
    if high >= length - size:
        high = length - size
        low = (room - size) * 2 - high
    if not length >= high >= low >= size:
        return max(1, round(length * keep))
    return round(high - layer * ((high - low) / (layers - 1)))


PRESSES: dict[str, Callable[[Taps, float], Tensor]] = {
    "knorm@kvpress": lambda taps, keep: -taps.key[0].double().norm(dim=-1),
    "keydiff@kvpress": lambda taps, keep: keydiff(taps),
    "streaming_llm@kvpress": streaming_press,
    "snapkv@kvpress": lambda taps, keep: snapkv_press(taps),
    "pyramidkv@kvpress": lambda taps, keep: snapkv_press(taps),
    "tova@kvpress": lambda taps, keep: tova_press(taps),
    "h2o_prefill@kvpress": lambda taps, keep: h2o_prefill(taps),
    "lagkv@kvpress": lambda taps, keep: lagkv(taps, 128, 4),
    "chunkkv@kvpress": chunk_press,
}


def heads_press(score: Tensor, then: Tensor | None, keep: float, safeguard: float = 0.2) -> list[list[int]]:
    """What AdaKVPress leaves of scores without ties, or with a second score CriticalAdaKVPress."""
    score, most = score.clone(), torch.finfo(torch.float64).max
    heads, length = score.shape
    kept = max(1, int(length * keep))
    safe = score.topk(max(1, int(kept * safeguard)), -1).indices
    score.scatter_(-1, safe, most)
    if then is None:
        gone = set((-score).flatten().topk(heads * (length - kept)).indices.tolist())
        return [[t for t in range(length) if head * length + t not in gone] for head in range(heads)]
    numbers = torch.bincount(score.flatten().topk(kept * heads).indices // length, minlength=heads).tolist()
    out = []
    for head, number in enumerate(numbers):
        taken = set(safe[head].tolist()) | set(score[head].topk(int(number * 0.5)).indices.tolist())
        second = then[head].clone()
        second[list(taken)] = most
        out.append(sorted(second.topk(number).indices.tolist()))
    return out


# Scores of presses whose heads compete: the first, and the second.
HEADS_PRESSES: dict[str, tuple[Callable[[Taps], Tensor], Callable[[Taps], Tensor] | None]] = {
    "adakv@kvpress": (snapkv_press, None),
    "critical_adakv@kvpress": (snapkv_press, lambda taps: (snapkv_press(taps) + 1e-4) * reference.projected(taps)),
}
