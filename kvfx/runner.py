"""One forward of a compressed model: check what it is given, run its compiled step, and account for it in the cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx import hf
from kvfx.cache import Cache, SlotCache
from kvfx.cache_layer import CacheLayer
from kvfx.cache_step import push_empty_left, took
from kvfx.engine import STORE_ALL, Engine
from kvfx.errors import CacheMismatch, InputError, SiteRefused, UnsupportedModel
from kvfx.fingerprint import Owner, differences, fingerprint
from kvfx.passes.cache_write import size_of
from kvfx.passes.capture import mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.passes.report import Stranded
from kvfx.policy import Policy


@dataclass
class Runner:
    """One model, one policy, and the engine that runs them."""

    base: transformers.PreTrainedModel
    policy: Policy
    plan: Plan
    engine: Engine
    on_refuse: str
    accepted: tuple[Any, Owner | None] = (None, None)

    @functools.cached_property
    def takes_positions(self) -> bool:
        """Whether the model's forward has an argument `position_ids`."""
        return "position_ids" in hf.forward_signature(self.base).parameters

    def forward(self, arguments: dict[str, Any], *, compress: bool = False) -> Any:
        """A forward of the model: evicts if the cache is empty or `compress` is set, else appends."""
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if self.base.training:
            raise UnsupportedModel("the model is in training mode; call model.eval() first")
        if arguments.pop("use_cache", True) is False:
            if "past_key_values" in arguments:
                raise InputError("use_cache=False with past_key_values: leave one of them out")
            with torch.no_grad():
                return self.base(**arguments, use_cache=False)
        if arguments.pop("output_attentions", False):
            raise InputError("output_attentions=True: scaled_dot_product_attention never makes the attention matrix")
        if arguments.get("output_hidden_states", getattr(self.base.config, "output_hidden_states", False)):
            hf.prepare_outputs(self.base)
        as_tuple = arguments.pop("return_dict", True) is False
        cache = self.own(arguments.pop("past_key_values", None))
        tokens: dict[str, Tensor] = {
            name: packed(arguments.pop(name)) for name in ("input_ids", "inputs_embeds") if name in arguments
        }
        if len(tokens) != 1:
            raise InputError(f"expected one of input_ids and inputs_embeds, got {sorted(tokens) or 'neither'}")
        block = _Block.of(next(iter(tokens.values())), arguments.pop("attention_mask", None), cache)
        block.check_positions(arguments.pop("position_ids", None), cache)
        out = self._step(cache, block, tokens, arguments, compress or not cache.layers)
        return out.to_tuple() if as_tuple else out

    def own(self, cache: Any) -> Cache:
        """Return `cache`, or an empty one for None, if it is of kvfx and of this model."""
        if cache is None:
            return Cache()
        if not isinstance(cache, Cache):
            raise CacheMismatch(
                f"past_key_values is a {type(cache).__name__}, whose slots say nothing of the positions they stand for. Expected "
                "a kvfx.Cache: leave past_key_values out, use model.compress(ids), or build one with kvfx.Cache.from_layers."
            )
        if cache.layers:
            check_owner(cache, self)
        return cache

    def _step(self, cache: Cache, block: _Block, tokens: dict[str, Tensor], options: dict[str, Any], evict: bool) -> Any:
        batch, length, device = block.batch, block.length, block.device
        plan = self.plan if evict else STORE_ALL
        phase = "prefill" if not cache.layers else "decode" if length == 1 and not evict else "extend"
        # A step that may still fail works on a copy: nothing is lost, nothing half-written.
        work = cache.copy() if phase != "decode" else cache
        if phase == "extend":
            work.mark()  # again: a step may have made the tensors
        if phase == "prefill":
            work.layers = [CacheLayer(window) for window in hf.windows(self.base)]
            work.lengths_seen = torch.zeros(batch, dtype=torch.long, device=device)
            mark_dynamic(work.lengths_seen, 0)
        elif block.valid is not None and any(layer.window for layer in work.layers):
            raise _uneven_turn(block, "part of the sliding windows that this model has")
        sizes = counts = None
        if plan.score is not None:
            if self.policy.batch_coupled and (batch > 1 or block.valid is not None):
                raise InputError(f"{self.policy.name} needs one row without padding, got {batch} rows: {self.policy.batch_coupled}")
            rows = {sketch.shape[0] for sketch in plan.sketches or () if sketch.dim() == 4}
            if rows - {batch}:
                raise InputError(f"the sketches given to kvfx.compile are for {sorted(rows)} rows, the prompt has {batch}")
            if length < self.policy.least_tokens:
                raise InputError(
                    f"{self.policy.name} scores prompts of at least {self.policy.least_tokens} tokens, as the library it follows; "
                    f"got {length}. Use the preset without @ for short ones."
                )
            sizes, counts = self._sizes(block)
            for size in sizes:
                mark_dynamic(size, 0)
            for count in counts or ():
                mark_dynamic(count, 0)
        held = [layer.slots for layer in work.layers]
        for tensor in (block.valid, *tokens.values(), *(value for value in options.values() if isinstance(value, Tensor))):
            if tensor is not None and tensor.dim() > 1:
                mark_dynamic(tensor, *((0,) if phase == "decode" else (0, 1)))
        length_seen = None
        if phase != "prefill":
            length_seen = size_of(work.get_seq_length(), device)
            mark_dynamic(length_seen, 0)
        out, seen = self._run(phase, plan, work, (sizes, counts, length_seen), (block.valid, tokens, options))
        if phase == "extend" and block.valid is not None and self.engine.counts_columns:
            raise _uneven_turn(block, "distance in the bias that this model gives to each head, such as ALiBi")
        if plan.score is not None:
            check_finite(work, self.policy)
        took(work, tokens.get("input_ids"), block.valid, seen, length, held)
        if phase != "decode":
            if counts is not None or block.valid is not None:
                push_empty_left(work, fixed=self.engine.whole)
            work.owner, work.fingerprint = Owner.of(self.base), None
            if evict:
                work.policy = str(self.policy)
            work.mark()
            cache.__dict__.update(work.__dict__)
        elif 1 in held:
            work.mark()  # a graph for one slot is specialised, and so are the marks of what it makes
        out.past_key_values = cache
        return out

    def _run(
        self, phase: str, plan: Plan, work: Cache, lengths: tuple[Any, Any, Any], inputs: tuple[Any, ...]
    ) -> tuple[Any, Tensor]:
        """Run the step of the engine; leave layers alone that turn out not to be understood, if they are whole."""
        start = next((layer.next_position for layer in work.layers if layer.window is None), None)
        valid, tokens, options = inputs
        given = (work.lengths_seen, valid, tokens, options, self.takes_positions)
        # Chunks of attention begin behind the padding: a model with windows must know of it even where no slot is empty.
        padded = work.has_empty or (work._real is not None and any(layer.window for layer in work.layers))
        while True:
            whole = self.engine.whole if work.get_seq_length() else frozenset()
            slots = SlotCache(work.layers, *lengths, start, padded, whole)
            try:
                return self.engine.run(self.base, phase, plan, self.on_refuse, slots, *given)
            except Stranded as stranded:
                evicted = [layer for layer in stranded.layers if work.layers[layer].evicted]
                if evicted or not stranded.layers.keys() - self.engine.whole:
                    raise SiteRefused(
                        f"slots were evicted from the cache of {self.engine.name}, but what reads the cache is not understood, so "
                        f"that the next tokens cannot be computed:\n  {stranded}\nCompress with another policy, or with none."
                    ) from stranded
                self.engine.whole |= frozenset(stranded.layers)

    def _sizes(self, block: _Block) -> tuple[list[Tensor], list[Tensor] | None]:
        """How many slots the graph shall hold of the new tokens, per layer or for all, and how many of them each row fills."""
        layers = len(hf.windows(self.base))
        per_layer = list(zip(*(self.policy.counts(length, layers) for length in block.lengths), strict=True))
        if len(set(per_layer)) == 1:
            per_layer = per_layer[:1]
        slots = [max(counts) for counts in per_layer]
        if block.length > 1:
            slots = [max(2, most) for most in slots]  # with one empty: a graph for exactly one slot would be one more
        sizes = [size_of(most, block.device) for most in slots]
        if block.valid is None and slots == [counts[0] for counts in per_layer]:
            return sizes, None
        return sizes, [torch.tensor(counts, device=block.device) for counts in per_layer]


def check_owner(cache: Cache, runner: Any) -> None:
    """Make sure that a cache was made by the model of a runner, which remembers the fingerprint that it last accepted.

    Raises:
        CacheMismatch: it was made by another one.
    """
    owner = Owner.of(runner.base)
    if cache.owner == owner:
        return
    if cache.fingerprint is None and cache.owner is not None:
        raise CacheMismatch(
            f"this cache was made by another model than this {type(runner.base).__name__}, or with other adapters active. "
            "Compress the context again with this one."
        )
    if cache.fingerprint is not None and (cache.fingerprint is not runner.accepted[0] or owner != runner.accepted[1]):
        different = differences(fingerprint(runner.base), cache.fingerprint)
        if different:
            raise CacheMismatch("this cache was made by another model:\n  " + "\n  ".join(different))
        runner.accepted = cache.fingerprint, owner  # which the copies of a loaded cache share: compared once
    cache.owner = owner


def check_finite(cache: Cache, policy: Policy) -> None:
    """One host sync per eviction, so that a ranking by NaN is never used.

    Raises:
        InputError: a score is not finite.
    """
    checked = [layer.finite for layer in cache.layers if layer.finite is not None]
    finite = torch.stack(checked).tolist() if checked else []
    if not all(finite):
        bad = [index for index, fine in enumerate(finite) if not fine]
        raise InputError(
            f"scores of {policy.name} are not finite in layers {bad}: the keys, queries or values there hold inf or nan. "
            "Nothing was stored. Check the weights and the dtype (float16 overflows where bfloat16 does not)."
        )


def _uneven_turn(block: _Block, part: str) -> InputError:
    return InputError(
        f"rows of different lengths, {list(block.lengths)}, after the first turn: padding would count as {part}. Feed the rows one "
        "by one, or with equally many new tokens."
    )


def packed(tensor: Tensor) -> Tensor:
    """`tensor` with the strides of a fresh one: a slice of a longer row would be a new graph."""
    tensor = tensor.detach()  # nothing here has a gradient
    fresh = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == fresh else tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Block:
    """The new tokens of a forward: their shape, and which are real."""

    batch: int
    length: int
    device: torch.device
    valid: Tensor | None
    lengths: Sequence[int]

    @classmethod
    def of(cls, tokens: Tensor, mask: Any, cache: Cache) -> _Block:
        if tokens.dim() < 2 or tokens.numel() == 0:
            raise InputError(f"the prompt is {tuple(tokens.shape)}, expected [B, S] with B, S > 0: empty, or no batch axis")
        batch, length = tokens.shape[:2]
        held = cache.get_seq_length()
        if cache.layers and cache.batch_size != batch:
            raise CacheMismatch(f"the cache has {cache.batch_size} rows, the new tokens {batch}")
        if mask is None:
            return cls(batch, length, tokens.device, None, [length] * batch)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"attention_mask is {shape}, expected [B, S]: which tokens are padding. Causality is the model's own")
        if tuple(mask.shape) != (batch, held + length):
            raise InputError(
                f"attention_mask is {tuple(mask.shape)}, expected {(batch, held + length)}: the {held} tokens that the cache has "
                f"seen (not the slots it holds) and {length} new ones"
            )
        past, valid = mask[:, :held].bool(), mask[:, held:].bool().contiguous()
        if not bool((past if cache.real is None else past == cache.real).all()):
            raise CacheMismatch(
                "attention_mask differs from the one that the cache was built with; padding cannot change afterwards. Pass "
                "the mask of the context, followed by that of the new tokens."
            )
        if bool(valid.all()):
            return cls(batch, length, tokens.device, None, [length] * batch)
        lengths = valid.sum(1).tolist()
        if min(lengths) == 0:
            raise InputError(f"row {lengths.index(0)} of the batch is all padding; leave it out")
        return cls(batch, length, tokens.device, valid, lengths)

    def check_positions(self, position_ids: Tensor | None, cache: Cache) -> None:
        """Positions count a row's real tokens; others would be recorded wrongly, so they are refused."""
        if position_ids is None:
            return
        start = 0 if cache.lengths_seen is None else cache.lengths_seen[:, None]
        valid = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device) if self.valid is None else self.valid
        expected = start + valid.long().cumsum(-1) - 1
        if not bool(((position_ids == expected) | ~valid).all()):
            raise InputError(
                "position_ids do not count on from the tokens that each row has seen, padding left out. Leave them out: the cache "
                "knows the positions."
            )
