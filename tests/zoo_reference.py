"""Eviction by the book for any decoder: what its attention reads, and its logits when some slots are out of sight.

The plain model runs eagerly, one row at a time as if it were alone, with a stock cache, under a mode that sees every torch function
that is called: `scaled_dot_product_attention`, or a softmax between two products. So nothing here knows a family by its class, nor
shares a line with what it checks. A cache that evicted is imitated by a full one whose evicted slots no query may see.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import reference

PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_emb")


@dataclass
class Read:
    """What one layer's attention read, `[B, H, S, D]` each, keys and values with one row per head of the cache.

    `pre_*` are those that RoPE was given; the ones attention read where there was no RoPE. `logits` and `output` are what was made
    of them, where attention is spelt out.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pre_query: Tensor
    pre_key: Tensor
    roped: bool = False
    logits: Tensor | None = None
    output: Tensor | None = None


def letters(equation: str, side: int) -> tuple[str, str, str, str]:
    """Of an einsum of two operands: the letters of one `side`, of the other, of the result, and the one that is summed."""
    sides, result = equation.replace(" ", "").split("->")
    labels, others = sides.split(",")[side], sides.split(",")[1 - side]
    return labels, others, result, next(label for label in labels if label in others and label not in result)


@dataclass
class Watch(TorchFunctionMode):
    """Records what attention reads, layer after layer; or hides slots from it.

    Attributes:
        rows: rows of the batch.
        kv_heads: heads of the cache.
        hidden: None to record; or per layer, slots that no query may see, `[B, Hkv, T]`, later slots are seen, None for all.
        done: layers that have attended.
        layers: what they read.
        rotated: what RoPE was given and gave since the last attention.
    """

    rows: int
    kv_heads: int
    hidden: list[Tensor | None] | None = None
    done: int = 0
    layers: list[Read] = field(default_factory=list)
    rotated: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.product: Any = None  # the last one: name, arguments, result
        self.waiting: tuple[Tensor, Tensor, Tensor] | None = None  # query, key, logits, between a softmax and the product behind it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if name == "softmax" and self.product is not None:
            args = (self.weigh(args[0]), *args[1:])
        out = func(*args, **kwargs)
        if name in PRODUCTS:
            if self.waiting is not None:
                query, key, logits = self.waiting
                value, head_last = self.second(name, args, kwargs)
                value = value if head_last else value.mT
                self.record(query, key, value, logits, self.split(out) if name != "einsum" else None)
                self.waiting = self.product = None
            else:
                self.product = (name, args, kwargs, out)
        return out

    # -- scaled_dot_product_attention --------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, **options: Any) -> Tensor:  # fmt: skip
        """Record and attend, evicted slots out of sight."""
        hidden = self.hidden_from(query.shape[1], key.shape[2])
        if hidden is not None:
            assert not is_causal, "slots are hidden from single tokens only"
            if attn_mask is None or attn_mask.dtype == torch.bool:
                attn_mask = ~hidden if attn_mask is None else attn_mask & ~hidden
            else:
                attn_mask = attn_mask.masked_fill(hidden, -torch.inf)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if attn_mask is not None and self.hidden is None:  # places that no query sees, of a preallocated cache, are not read
            seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
            seen = seen.expand(*seen.shape[:-1], key.shape[2]).flatten(0, -2).any(0)
            key, value = key[:, :, seen], value[:, :, seen]
        self.record(query, key, value, None, out)
        return out

    # -- softmax between two products --------------------------------------------------------------------------------------------

    def weigh(self, logits: Tensor) -> Tensor:
        """If `logits` are those of attention: remember what made them, and hide slots. Others are returned as they are."""
        name, args, kwargs, out = self.product
        more = logits.shape[-1] - out.shape[-1]  # a sink has a logit and no slot
        if logits.dim() < 3 or logits.shape[-2] != out.shape[-2] or more not in (0, 1):
            return logits
        query, _ = self.first(name, args, kwargs)
        key, head_last = self.second(name, args, kwargs)
        key = key if name == "einsum" or not head_last else key.mT
        hidden = self.hidden_from(query.shape[1], key.shape[2])
        if hidden is not None:
            hidden = F.pad(hidden, (0, more)).expand(-1, -1, logits.shape[-2], -1)
            logits = logits.masked_fill(hidden.reshape(logits.shape), -torch.inf)
        self.waiting = query, key, self.split(logits)
        return logits

    def first(self, name: str, args: Any, kwargs: Any) -> tuple[Tensor, bool]:
        """The left operand of a product, `[B, H, rows, columns]`."""
        if name == "einsum":
            labels, _, result, summed = letters(args[0], 0)
            order = [label for label in result[:-2] if label in labels] + [result[-2], summed]
            return self.split(args[1].permute([labels.index(label) for label in order])), True
        left = kwargs.get("batch1", args[1] if len(args) > 1 else None) if name == "baddbmm" else args[0]
        return self.split(left), True

    def second(self, name: str, args: Any, kwargs: Any) -> tuple[Tensor, bool]:
        """The right operand of a product, `[B, H, summed, columns]`; of einsum `[B, H, slots, channels]`."""
        if name == "einsum":
            labels, others, result, summed = letters(args[0], 1)
            inner = next(label for label in labels if label in result and label not in others)
            slots, channels = (inner, summed) if self.waiting is None else (summed, inner)
            order = [label for label in (result[:-2] if self.waiting is None else others) if label in labels and label != slots]
            return self.split(args[2].permute([labels.index(label) for label in (*order, slots, channels)])), True
        right = kwargs.get("batch2", args[2] if len(args) > 2 else None) if name == "baddbmm" else args[1]
        return self.split(right), True

    def split(self, tensor: Tensor) -> Tensor:
        """`[B, H, ., .]` of that, or of `[B*H, ., .]`, or of `[B, Hkv, G, ., .]`."""
        return tensor.reshape(self.rows, -1, *tensor.shape[-2:])

    # -- both --------------------------------------------------------------------------------------------------------------------

    def hidden_from(self, heads: int, slots: int) -> Tensor | None:
        """Slots out of sight of each query head of the layer that comes next, `[B, Hq, 1, T]`."""
        hidden = None if self.hidden is None else self.hidden[self.done]
        if hidden is None:
            return None
        return F.pad(hidden, (0, slots - hidden.shape[2])).repeat_interleave(heads // self.kv_heads, 1)[:, :, None]

    def record(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, output: Tensor | None) -> None:
        self.done += 1
        if self.hidden is not None:
            return
        each = key.shape[1] // self.kv_heads
        key, value = key[:, ::each], value[:, ::each]
        length = query.shape[2]
        before = [unroped(states, self.rotated) for states in (query, key[:, :, -length:])]
        self.layers.append(Read(query, key, value, *before, bool(self.rotated), logits, output))
        self.rotated.clear()


def unroped(states: Tensor, rotated: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What RoPE was given for `states`, `[B, H, S, D]`; what passes it by is put back.

    RoPE is found by what it gave, or, where a norm stands behind it, by its heads. It may see `[B, S, H, D]`.
    """
    given = [pair if pair[1].shape[1] == states.shape[1] and pair[1].shape[2] == states.shape[2] else
             tuple(part.transpose(1, 2) for part in pair) for pair in rotated]  # fmt: skip
    fitting = [pair for pair in given if pair[1].shape[:3] == states.shape[:3]]
    equal = [pair for pair in fitting if torch.equal(pair[1], states[..., : pair[1].shape[3]])]
    if not fitting:
        assert not rotated, "RoPE gave something else than attention reads"
        return states
    before = (equal or fitting)[0][0]
    return torch.cat([before, states[..., before.shape[3] :]], -1)


@contextlib.contextmanager
def watching(model: nn.Module, kv_heads: int, hidden: list[Tensor | None] | None = None, rows: int = 1) -> Iterator[Watch]:
    """Run what is inside under a `Watch` that also sees the RoPE function of the model's module."""
    watch = Watch(rows, kv_heads, hidden)
    module = sys.modules[type(model).__module__]
    real = {name: getattr(module, name) for name in ROTATIONS if hasattr(module, name)}

    def seen(rope: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            out = rope(*args, **kwargs)
            watch.rotated += zip(args, out, strict=False) if isinstance(out, tuple) else [(args[0], out)]
            return out

        return wrapper

    for name, rope in real.items():
        setattr(module, name, seen(rope))
    try:
        with watch:
            yield watch
    finally:
        for name, rope in real.items():
            setattr(module, name, rope)


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor, kv_heads: int) -> tuple[list[Read], Tensor]:
    """What every layer reads of a prompt, and the logits."""
    with watching(model, kv_heads, rows=ids.shape[0]) as watch:
        logits = model(input_ids=ids, use_cache=False).logits
    return watch.layers, logits


@torch.no_grad()
def continue_with(model: nn.Module, ids: Tensor, kv_heads: int, hidden: list[Tensor | None], tokens: Tensor) -> Tensor:
    """Logits of `tokens`, fed one by one after the prompt `ids`, with `hidden` slots out of sight."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    logits = []
    for index in range(tokens.shape[1]):
        with watching(model, kv_heads, hidden):
            out = model(input_ids=tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def taps(read: Read) -> reference.Taps:
    """As the scores of `reference` read them."""
    empty = torch.empty(0)
    return reference.Taps(read.query, read.key, read.value, read.pre_query, read.pre_key, empty)
