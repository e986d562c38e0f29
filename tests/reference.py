"""An independent reference: eviction by the book, on a model that knows nothing of kvfx.

Queries, keys and values are captured from an eager run of the model, one row at a time as if it were alone. Scores are computed in
float64 by loops. A cache that evicted is imitated by a full cache and a mask that hides what was evicted, so that nothing here
shares a line with what it checks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache


@dataclass
class Taps:
    """What one layer's attention read, `[B, H, S, D]` each, `pre_*` before RoPE; `output` is the weight behind it."""

    query: Tensor
    key: Tensor
    value: Tensor
    pre_query: Tensor
    pre_key: Tensor
    output: Tensor


@dataclass
class Recorder:
    """Stands in for scaled_dot_product_attention: records what it is given and hides evicted slots."""

    layers: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    before_rope: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    hidden: list[Tensor] | None = None  # per layer, slots that no query may see, [B, Hkv, T] bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        kv_heads = self.kv_heads
        each = key.shape[1] // kv_heads
        self.layers.append((query, key[:, ::each], value[:, ::each]))
        if self.hidden is not None:
            seen = ~self.hidden[len(self.layers) - 1]
            seen = F.pad(seen, (0, key.shape[2] - seen.shape[2]), value=True)
            seen = seen.repeat_interleave(query.shape[1] // kv_heads, 1)[:, :, None]
            new, held = query.shape[2], key.shape[2]
            causal = torch.ones(new, held, dtype=torch.bool).tril(held - new)
            attn_mask, is_causal = seen & causal if attn_mask is None else seen & attn_mask, False
        kwargs["enable_gqa"] = query.shape[1] != key.shape[1]
        return REAL_ATTENTION(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    kv_heads: int = 1


REAL_ATTENTION = F.scaled_dot_product_attention


@contextlib.contextmanager
def recording(model, hidden: list[Tensor] | None = None) -> Iterator[Recorder]:
    """Run the model's attention through a Recorder."""
    recorder = Recorder(hidden=hidden, kv_heads=model.config.num_key_value_heads)
    module = sys.modules[type(model).__module__]
    rope = module.apply_rotary_pos_emb

    def roped(query: Tensor, key: Tensor, *args, **kwargs):
        recorder.before_rope.append((query, key))
        return rope(query, key, *args, **kwargs)

    module.apply_rotary_pos_emb = roped
    F.scaled_dot_product_attention = recorder.attend
    try:
        yield recorder
    finally:
        module.apply_rotary_pos_emb = rope
        F.scaled_dot_product_attention = REAL_ATTENTION


@torch.no_grad()
def capture(model, ids: Tensor, mask: Tensor | None = None) -> tuple[list[Taps], Tensor]:
    """Taps of every layer over a prompt, and its logits."""
    positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
    with recording(model) as recorder:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    outputs = [layer.self_attn.o_proj.weight.detach() for layer in model.model.layers]
    read = zip(recorder.layers, recorder.before_rope, outputs, strict=True)
    return [Taps(*roped, *before, output) for roped, before, output in read], logits


@torch.no_grad()
def rotation(model, start: int, future: int) -> Tensor:
    """What RoPE does on average over `future` positions from `start`: a matrix [D, D], float64, from the right onto rows."""
    rows = torch.eye(model.config.head_dim, dtype=torch.float64)[None, None]
    factors = model.model.rotary_emb(torch.empty(0, dtype=model.dtype), torch.arange(start, start + future)[None])
    mean = torch.zeros_like(rows)
    for cos, sin in zip(*(factor[0].double() for factor in factors), strict=True):
        mean += sys.modules[type(model).__module__].apply_rotary_pos_emb(rows, rows, cos[None, None], sin[None, None])[0] / future
    return mean[0, 0]


@torch.no_grad()
def continue_with(model, prompt: Tensor, hidden: list[Tensor], tokens: Tensor) -> Tensor:
    """Logits of `tokens`, fed one by one after `prompt`, with `hidden` slots out of sight. Row alone, no padding."""
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    logits = []
    for index in range(tokens.shape[1]):
        with recording(model, hidden):
            out = model(input_ids=tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


# -- scores of one row, float64, [Hkv, S] ------------------------------------------------------------------------------------------


def knorm(taps: Taps, **_: object) -> Tensor:
    return -taps.key[0].double().norm(dim=-1)


def compactor(taps: Taps, sketch: Tensor, sinks: int = 8, recent: int = 4, blend: float = 0.3, **_: object) -> Tensor:
    attention = _pooled(_chunk_attention(taps, 256))
    outliers = _leverage(taps.pre_key[0].double(), sketch.double(), 512)
    return _standard(attention, sinks, recent) + blend * _standard(outliers, sinks, recent)


def expected_attention(taps: Taps, model, sinks: int = 4, start: int | None = None, **_: object) -> Tensor:
    """In units of an equal share, so that long rows are compared as closely as short ones."""
    query, key, value = (tensor[0].double() for tensor in (taps.pre_query, taps.key, taps.value))
    heads, length, dim = key.shape
    score = torch.zeros(heads, length, dtype=torch.float64)
    if length <= sinks:
        return score
    turn, scale = rotation(model, start or length, 512), dim**-0.5
    group = query.shape[0] // heads
    for head in range(query.shape[0]):
        seen, keys = query[head, sinks:], key[head // group, sinks:]
        mean, spread = seen.mean(0) @ turn, turn.T @ torch.cov(seen.T, correction=0).reshape(dim, dim) @ turn
        logits = torch.stack([scale * mean @ k + scale**2 * (k @ spread @ k) / 2 for k in keys])
        score[head // group, sinks:] += torch.softmax(logits, 0) * (length - sinks) / group
    return score * value.norm(dim=-1)


def _chunk_attention(taps: Taps, chunk: int) -> Tensor:
    query, key, value = (tensor[0].double() for tensor in (taps.query, taps.key, taps.value))
    score = torch.zeros(key.shape[:2], dtype=torch.float64)
    group = query.shape[0] // key.shape[0]
    for head in range(query.shape[0]):
        for start in range(0, key.shape[1], chunk):
            part = slice(start, min(start + chunk, key.shape[1]))
            score[head // group, part] += torch.softmax(query[head, part] @ key[head // group, part].T, -1).sum(0)
    return score * value.norm(dim=-1)


def snapkv(taps: Taps, window: int = 64, kernel: int = 5, **_: object) -> Tensor:
    query, key = (tensor[0].double() for tensor in (taps.query, taps.key))
    length, group = key.shape[1], query.shape[0] // key.shape[0]
    score = torch.zeros(key.shape[:2], dtype=torch.float64)
    asking = range(max(0, length - window), length)
    for head in range(query.shape[0]):
        for index in asking:
            logits = key[head // group, : index + 1] @ query[head, index] / key.shape[2] ** 0.5
            score[head // group, : index + 1] += torch.softmax(logits, 0) / (group * len(asking))
    return _pooled(score, kernel)


def projected(taps: Taps) -> Tensor:
    value, output = taps.value[0].double(), taps.output.double()
    group = taps.query.shape[1] // value.shape[0]
    norms = [(value[h // group] @ part.T).abs().sum(-1) for h, part in enumerate(output.split(value.shape[2], 1))]
    return torch.stack(norms).unflatten(0, (-1, group)).mean(1)


def criticalkv(taps: Taps, count: int, recent: int = 64, **_: object) -> Tensor:
    first = protected(snapkv(taps), 0, recent)
    score = (snapkv(taps) + 1e-4) * projected(taps)
    for head, positions in enumerate(best(first, max(1, count // 2))):
        score[head, positions] = torch.inf
    return score


def _pooled(score: Tensor, width: int = 3) -> Tensor:
    out = torch.empty_like(score)
    for index in range(score.shape[1]):
        out[:, index] = score[:, max(0, index - width // 2) : index + width // 2 + 1].mean(1)
    return out


def _leverage(key: Tensor, sketch: Tensor, chunk: int) -> Tensor:
    length, score = key.shape[1], torch.empty(key.shape[:2], dtype=torch.float64)
    starts = list(range(0, length - length % chunk, chunk)) or [0]
    for head in range(key.shape[0]):
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            x = key[head, start:end]
            x = (x - x.mean(0)) @ sketch[head]
            gram = x.T @ x
            gram += (1e-4 * gram.trace() / len(gram) + 1e-6) * torch.eye(len(gram), dtype=torch.float64)
            score[head, start:end] = (x * torch.linalg.solve(gram, x.T).T).sum(1).clamp(0, 1)
    return score


def _standard(score: Tensor, sinks: int, recent: int) -> Tensor:
    inner = score[:, sinks : max(sinks, score.shape[1] - recent)]
    if inner.numel() == 0 or inner.std(correction=0) < 1e-6:
        return torch.zeros_like(score)
    return (score - inner.mean()) / inner.std(correction=0)


# -- what is kept ------------------------------------------------------------------------------------------------------------------


def count_kept(length: int, keep: str, protected: int) -> int:
    """`min(len, max(1, protected, len * num // den))` from the decimal text."""
    from fractions import Fraction

    share = Fraction(keep)
    return min(length, max(1, protected, length * share.numerator // share.denominator))


def protected(score: Tensor, sinks: int, recent: int) -> Tensor:
    """Scores in which both ends win."""
    score = score.clone()
    score[:, :sinks] = torch.inf
    score[:, max(0, score.shape[1] - recent) :] = torch.inf
    return score


def best(score: Tensor, count: int) -> list[list[int]]:
    """Per head, the positions of the `count` best, the earlier of equals first."""
    length = score.shape[1]
    return [sorted(sorted(range(length), key=lambda i: (-row[i], i))[:count]) for row in score.tolist()]


def swapped(score: Tensor, ours: list[int], theirs: list[int]) -> tuple[list[float], list[float]]:
    """Scores of what only `ours` kept, and of what only `theirs` kept, of one head."""
    a, b = set(ours), set(theirs)
    return [float(score[i]) for i in sorted(a - b)], [float(score[i]) for i in sorted(b - a)]
