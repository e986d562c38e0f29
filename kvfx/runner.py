"""One forward of a compressed model: check what it is given, run its compiled step, and account for it in the cache."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx import hf, layers_step, ragged_step
from kvfx.block import Block, uneven_turn
from kvfx.cache import Cache
from kvfx.cache_layer import CacheLayer
from kvfx.cache_step import check_finite, note, push_empty_left, took
from kvfx.engine import Engine, refused
from kvfx.errors import CacheMismatch, InputError, UnsupportedModel
from kvfx.fingerprint import Owner, check_owner
from kvfx.lower import lower_step
from kvfx.passes.cache_write import size_of
from kvfx.passes.capture import CompileError, mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.passes.report import Stranded, Unscored
from kvfx.policy import Policy
from kvfx.pool import Pool
from kvfx.quota import Keep, Quota, quota
from kvfx.ragged_cache import RaggedCache
from kvfx.slot_cache import SlotCache
from kvfx.static_cache import StaticCache, adopt
from kvfx.static_slots import StaticSlots

Inputs = tuple[Tensor | None, dict[str, Tensor], dict[str, Any]]  # valid, tokens, options


@dataclass
class Runner:
    """One model, one policy, the memory of its caches if they share some, and the engine that runs them."""

    base: transformers.PreTrainedModel
    policy: Policy
    plan: Plan
    engine: Engine
    on_refuse: str
    pool: Pool | None = None
    accepted: tuple[Any, Owner | None] = (None, None)

    @functools.cached_property
    def takes_positions(self) -> bool:
        """Whether the model's forward has an argument `position_ids`."""
        return "position_ids" in hf.forward_signature(self.base).parameters

    @functools.cached_property
    def step_plan(self) -> Plan:
        """That of a forward that evicts nothing."""
        return lower_step(self.policy)

    def forward(self, arguments: dict[str, Any], *, compress: bool = False, keep: Keep = None) -> Any:
        """A forward of the model: evicts if the cache is empty or `compress` is set, else appends.

        Args:
            arguments: of the model's own forward.
            compress: evict from the new tokens, whatever the cache has seen.
            keep: fractions kept instead of the policy's, one for all rows or one for each.
        """
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
        block = Block.of(next(iter(tokens.values())), arguments.pop("attention_mask", None), cache)
        block.check_positions(arguments.pop("position_ids", None), cache)
        out = self._step(cache, block, tokens, arguments, compress or cache.is_empty, keep)
        return out.to_tuple() if as_tuple else out

    def own(self, cache: Any) -> Cache:
        """Return `cache`, or an empty one for None, if it is of kvfx and of this model; a static one of transformers becomes so."""
        if cache is None:
            return RaggedCache(pool=self.pool) if self.pool or self._pool(self.plan) in ("heads", "blocks") else Cache()
        if isinstance(cache, transformers.StaticCache) and not isinstance(cache, Cache):
            cache = adopt(cache)
        if not isinstance(cache, Cache):
            raise CacheMismatch(
                f"past_key_values is a {type(cache).__name__}, whose slots say nothing of the positions they stand for. Expected "
                "a kvfx.Cache: leave past_key_values out, use model.compress(ids), or build one with kvfx.Cache.from_layers."
            )
        if not cache.is_empty:
            check_owner(cache, self)
        return cache

    def _step(self, cache: Cache, block: Block, tokens: dict[str, Tensor], options: dict[str, Any], evict: bool, keep: Keep) -> Any:
        plan = self.plan if evict else self.step_plan
        phase = "prefill" if cache.is_empty else "decode" if block.length == 1 and not evict else "extend"
        windows = hf.windows(self.base) if phase == "prefill" else [layer.window for layer in cache.layers]
        if phase != "prefill" and block.valid is not None and any(windows):
            raise uneven_turn(block, "part of the sliding windows that this model has")
        budget = quota(self.policy, plan, block, len(windows), keep)
        for tensor in (block.valid, *tokens.values(), *(value for value in options.values() if isinstance(value, Tensor))):
            if tensor is not None and tensor.dim() > 1:
                mark_dynamic(tensor, *((0,) if phase == "decode" else (0, 1)))
        self._check_layout(cache, plan, budget)
        step = self._static if isinstance(cache, StaticCache) else self._ragged if isinstance(cache, RaggedCache) else self._dense
        out = step(phase, plan, cache, windows, block, budget, (block.valid, tokens, options))
        if phase != "decode":
            cache.owner, cache.fingerprint = Owner.of(self.base), None
            if evict:
                cache.policy = str(self.policy)
        out.past_key_values = cache
        return out

    def _dense(self, phase: str, plan: Plan, cache: Cache, windows: Any, block: Block, budget: Quota, inputs: Inputs) -> Any:
        # A step that may still fail works on a copy: nothing is lost, nothing half-written.
        work = cache.copy() if phase != "decode" else cache
        length_seen = None
        if phase == "extend":
            work.mark()  # again: a step may have made the tensors
        if phase == "prefill":
            work.layers = [CacheLayer(window) for window in windows]
            work.lengths_seen = torch.zeros(block.batch, dtype=torch.long, device=block.device)
            mark_dynamic(work.lengths_seen, 0)
        else:
            length_seen = size_of(work.get_seq_length(), block.device)
            mark_dynamic(length_seen, 0)
        held = [layer.slots for layer in work.layers]
        counts = budget.counts if block.valid is not None or not self._layers_compete(plan) else None
        out, seen = self._run(phase, plan, work, (budget.sizes, counts, length_seen), inputs)
        given = (plan, self.policy, budget, work.lengths_seen, block.valid)
        uneven = layers_step.share_out_and_cut(work.layers, held, *given) or counts is not None
        self._check_after(phase, plan, work, block)
        took(work, inputs[1].get("input_ids"), block.valid, seen, block.length, held, budget.whole)
        if phase != "decode":
            if uneven or block.valid is not None:
                push_empty_left(work, fixed=self.engine.whole)
            work.mark()
            cache.__dict__.update(work.__dict__)
        elif 1 in held:
            work.mark()  # a graph for one slot is specialised, and so are the marks of what it makes
        return out

    def _ragged(self, phase: str, plan: Plan, cache: Any, windows: Any, block: Block, budget: Quota, inputs: Inputs) -> Any:
        return ragged_step.run(self, phase, plan, cache, windows, block, budget, inputs)

    def _static(self, phase: str, plan: Plan, cache: Any, windows: Any, block: Block, budget: Quota, inputs: Inputs) -> Any:
        """A step in place: all that can fail is checked before, and what is written is undone if it fails all the same."""
        room, filled = budget.of_layers(windows, self.engine.whole, block)
        limit = hf.longest_text(self.base) if cache.tokens is None else cache.tokens
        if self._layers_compete(plan):  # all is stored first, for which there may be no room
            dense = cache.to_dense()
            out = self._dense(phase, plan, dense, windows, block, budget, inputs)
            layers_step.refill(cache, dense, block.length, limit)
            return out
        cache.check_room(block.length, room, limit)
        if not cache.layers:
            cache.allocate(self.engine.slots_like(self.base), windows, block.batch, limit)
        before = None if phase == "decode" else cache.snapshot()
        try:
            out = self._run_static(phase, plan, cache, budget, inputs)
            self._check_after(phase, plan, cache, block)
        except BaseException as error:
            cache.forget_new() if before is None else cache.restore(before)
            if not isinstance(error, Unscored):
                raise
            self.engine.whole |= frozenset(error.layers)
            return self._static(phase, plan, cache, windows, block, budget, inputs)
        for layer, count in zip(cache.layers, filled, strict=True):
            layer.account(block.length, count)
        note(cache, inputs[1].get("input_ids"), block.valid, block.length, budget.whole and not any(windows))
        if phase != "decode":
            cache.compare_rows()
        return out

    def _run_static(self, phase: str, plan: Plan, cache: Any, budget: Quota, inputs: Inputs) -> Any:
        """Run the step of the engine; show a mask of all tokens to models that would make one for as many as were seen."""
        longest = size_of(cache.tokens, cache.lengths_seen.device)
        mark_dynamic(longest, 0)
        shows_padding = cache._real is not None or not self.takes_positions or self.engine.counts_tokens
        lengths = (budget.sizes, budget.counts, longest)
        slots = StaticSlots(cache.layers, plan, *lengths, phase != "prefill", shows_padding, self.engine.whole)
        try:
            return self.engine.run(
                self.base, phase, plan, self.on_refuse, slots, cache.lengths_seen, *inputs, self.takes_positions
            )[0]
        except Stranded as stranded:
            raise refused(self.engine.name, stranded) from stranded
        except (CompileError, RuntimeError) as error:
            if phase == "prefill" or self.engine.has_run(phase, "static"):
                raise
            if not shows_padding:
                self.engine.counts_tokens = True
                cache.forget_new()
                return self._run_static(phase, plan, cache, budget, inputs)
            raise UnsupportedModel(
                f"{self.engine.name} cannot be traced with a static cache, most likely because it computes with the number of "
                f"tokens seen, which is in a tensor there: {str(error).splitlines()[0]}. Use a kvfx.Cache, which grows."
            ) from error

    def _pool(self, plan: Plan) -> str:
        """Who competes for slots under a plan, see `kvfx.budget`."""
        return "uniform" if plan.score is None or self.policy.budget is None else self.policy.budget.pool

    def _layers_compete(self, plan: Plan) -> bool:
        return self._pool(plan) == "layers"

    def _check_layout(self, cache: Cache, plan: Plan, budget: Quota) -> None:
        """Make sure that the layout of a cache can hold what the policy keeps."""
        pool, ragged = self._pool(plan), isinstance(cache, RaggedCache)
        if pool in ("heads", "blocks") and not ragged:
            raise InputError(
                f"budget={pool} gives the heads of a layer unequally many slots, which a {type(cache).__name__} cannot hold. Leave "
                "past_key_values out, or give a kvfx.RaggedCache; cache.to('ragged') makes one."
            )
        if ragged and (pool == "layers" or len(budget.sizes or ()) > 1):
            raise InputError(
                f"{self.policy.name} gives layers unequally many slots, which a kvfx.RaggedCache is not filled with. Compress "
                "into a kvfx.Cache; cache.to('ragged') makes a ragged one of it."
            )

    def _check_after(self, phase: str, plan: Plan, cache: Cache, block: Block) -> None:
        """What only the run of a step can tell."""
        if phase == "extend" and block.valid is not None and self.engine.counts_columns:
            raise uneven_turn(block, "distance in the bias that this model gives to each head, such as ALiBi")
        if plan.score is not None:
            check_finite(cache.layers, self.policy)

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
            asked = layers_step.competitors(work.layers, self.engine.whole) if self._layers_compete(plan) else frozenset()
            slots = SlotCache(work.layers, *lengths, start, padded, whole, asked)
            try:
                return self.engine.run(self.base, phase, plan, self.on_refuse, slots, *given)
            except Unscored as unscored:
                self.engine.whole |= frozenset(unscored.layers)
            except Stranded as stranded:
                evicted = [layer for layer in stranded.layers if work.layers[layer].evicted]
                if evicted or not stranded.layers.keys() - self.engine.whole:
                    raise refused(self.engine.name, stranded) from stranded
                self.engine.whole |= frozenset(stranded.layers)


def packed(tensor: Tensor) -> Tensor:
    """`tensor` with the strides of a fresh one: a slice of a longer row would be a new graph."""
    tensor = tensor.detach()  # nothing here has a gradient
    fresh = tuple(itertools.accumulate(tensor.shape[:0:-1], operator.mul, initial=1))[::-1]
    return tensor if tensor.stride() == fresh else tensor.clone(memory_format=torch.contiguous_format)
