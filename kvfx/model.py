"""The compressed model: an ordinary transformers model whose forward compresses the cache of a prompt.

`Runner` does the work of one forward around its compiled step; `CompressedModel` is the face that users and `generate` see.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx import hf
from kvfx.cache import Cache, CacheLayer, SlotCache
from kvfx.engine import STORE_ALL, Engine
from kvfx.errors import CacheMismatch, InputError, UnsupportedModel
from kvfx.fingerprint import Owner, differences, fingerprint
from kvfx.passes.cache_write import size_of
from kvfx.passes.capture import mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.policy import Policy


@dataclass
class Runner:
    """One model, one policy, and the engine that runs them."""

    base: transformers.PreTrainedModel
    policy: Policy
    plan: Plan
    engine: Engine
    on_refuse: str

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
        cache = self._cache(arguments.pop("past_key_values", None))
        tokens = {name: _packed(arguments.pop(name)) for name in ("input_ids", "inputs_embeds") if name in arguments}
        if len(tokens) != 1:
            raise InputError(f"expected one of input_ids and inputs_embeds, got {sorted(tokens) or 'neither'}")
        block = _Block.of(next(iter(tokens.values())), arguments.pop("attention_mask", None), cache)
        block.check_positions(arguments.pop("position_ids", None), cache)
        out = self._step(cache, block, tokens, arguments, compress or not cache.layers)
        return out.to_tuple() if as_tuple else out

    def _cache(self, cache: Any) -> Cache:
        if cache is None:
            return Cache()
        if not isinstance(cache, Cache):
            raise CacheMismatch(
                f"past_key_values is a {type(cache).__name__}, whose slots say nothing of the positions they stand for. Expected "
                "a kvfx.Cache: leave past_key_values out, use model.compress(ids), or build one with kvfx.Cache.from_layers."
            )
        if cache.layers and cache.owner != Owner.of(self.base):
            self._check_fingerprint(cache)
        return cache

    def _check_fingerprint(self, cache: Cache) -> None:
        if cache.fingerprint is not None:
            different = differences(fingerprint(self.base), cache.fingerprint)
            if different:
                raise CacheMismatch("this cache was made by another model:\n  " + "\n  ".join(different))
        elif cache.owner is not None:
            raise CacheMismatch(
                f"this cache was made by another model than this {type(self.base).__name__}, or with other adapters active. "
                "Compress the context again with this one."
            )
        cache.owner = Owner.of(self.base)

    def _step(
        self, cache: Cache, block: _Block, tokens: dict[str, Tensor], options: dict[str, Any], evict: bool
    ) -> Any:
        batch, length, device = block.batch, block.length, block.device
        plan = self.plan if evict else STORE_ALL
        phase = "prefill" if not cache.layers else "decode" if length == 1 and not evict else "extend"
        # A step that may still fail works on a copy: nothing is lost, nothing half-written.
        work = cache.copy() if phase != "decode" else cache
        if phase == "prefill":
            work.layers = [CacheLayer() for _ in range(hf.layer_count(self.base))]
            work.lengths_seen = torch.zeros(batch, dtype=torch.long, device=device)
        elif not work.is_uniform and (phase == "extend" or work.empty is not None):
            raise CacheMismatch(
                f"{work.slots_text}; several new tokens at once, or padded rows, need as many in every layer. Feed one token "
                "at a time, as generate does, or use a policy that keeps equally many everywhere."
            )
        size = counts = None
        if plan.score is not None:
            if self.policy.batch_coupled and (batch > 1 or block.valid is not None):
                raise InputError(f"{self.policy.name} needs one row without padding, got {batch} rows: {self.policy.batch_coupled}")
            size, counts = self._sizes(block)
            mark_dynamic(size, 0)
        held = work.layers[0].slots
        for tensor in (block.valid, *tokens.values(), *(value for value in options.values() if isinstance(value, Tensor))):
            if tensor is not None and tensor.dim() > 1 and phase != "decode":
                mark_dynamic(tensor, 0, 1)
        slots = SlotCache(work.layers, size, counts)
        out, seen = self.engine.run(
            self.base, phase, plan, self.on_refuse, slots, work.lengths_seen, block.valid, work.empty, tokens, options
        )
        if plan.score is not None:
            self._check_finite(work)
        work.took(tokens.get("input_ids"), block.valid, seen, length, evicting=plan.score is not None)
        if phase != "decode":
            if counts is not None or block.valid is not None:
                self._settle(work, held, block, evicted=plan.score is not None)
            work.owner, work.fingerprint = Owner.of(self.base), None
            if evict:
                work.policy = str(self.policy)
            work.mark()
            cache.__dict__.update(work.__dict__)
        elif held == 1:
            work.mark()  # a graph for one slot is specialised, and so are the marks of what it makes
        out.past_key_values = cache
        return out

    def _sizes(self, block: _Block) -> tuple[Tensor, Tensor | None]:
        """How many slots the graph shall hold of the new tokens, and how many of them each row fills."""
        counts = [self.policy.budget.count(length, self.policy.protect.total) for length in block.lengths]
        slots = max(counts)
        if slots == 1 and block.length > 1:
            slots = 2  # one of them stays empty: a graph for exactly one slot would be one more
        if block.valid is None and slots == counts[0]:
            return size_of(slots, block.device), None
        return size_of(slots, block.device), torch.tensor(counts, device=block.device)

    def _check_finite(self, cache: Cache) -> None:
        """One host sync per eviction, so that a ranking by NaN is never used."""
        if not bool(torch.stack([layer.finite for layer in cache.layers]).all()):
            bad = [index for index, layer in enumerate(cache.layers) if not bool(layer.finite)]
            raise InputError(
                f"scores of {self.policy.name} are not finite in layers {bad}: the keys, queries or values there hold inf or nan. "
                "Nothing was stored. Check the weights and the dtype (float16 overflows where bfloat16 does not)."
            )

    def _settle(self, cache: Cache, held: int, block: _Block, evicted: bool) -> None:
        """Bring empty slots to the left after a forward that left some."""
        if not cache.is_uniform:
            raise UnsupportedModel("padded rows need every attention layer to be understood; see kvfx.explain(model)")
        new = cache.layers[0].slots - held
        filled = cache.layers[0].prefix[:, 0, -new:] >= 0 if evicted else block.valid
        if cache.empty is not None:
            past = torch.arange(held, device=block.device) >= cache.empty[:, None]
        else:
            past = torch.ones(block.batch, held, dtype=torch.bool, device=block.device)
        cache.push_empty_left(torch.cat([past, filled], 1))

    def generate(self, model: CompressedModel, ids: Tensor | None, append: bool, options: dict[str, Any]) -> Any:
        """`generate` with the identity of the cache checked, for full or question-only ids."""
        cache = options.get("past_key_values")
        config = options.get("generation_config") or model.generation_config
        setting = lambda name: options.get(name, getattr(config, name, None))  # noqa: E731
        if options.get("use_cache", True) is False:
            return model.plain_generate(ids, options)
        if setting("cache_implementation"):
            raise InputError(
                f"cache_implementation={setting('cache_implementation')!r}: the cache is a kvfx.Cache, made by the policy. Leave it out"
            )
        if setting("prefill_chunk_size"):
            raise InputError("prefill_chunk_size would compress only the first chunk; call model.compress(part, past_key_values=cache)")
        if ids is None:
            raise InputError("generate needs input ids; for embeddings call the model itself")
        cache = self._cache(cache)
        skip = 0
        if append:
            skip, ids = cache.get_seq_length(), self._append(cache, ids, options)
        self._check_identity(cache, ids, options.get("attention_mask"), append)
        if any(setting(name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit")) or options.get("assistant_model"):
            # Candidates must come after the eviction, or they could not be cropped again.
            self._feed(cache, ids, options, ids.shape[1] - 1)
        mask = options.get("attention_mask")
        if not cache.is_uniform and (mask is None or bool(mask.all())):
            for last in range(cache.get_seq_length() + 1, ids.shape[1]):
                self._feed(cache, ids, options, last)  # one by one: no single mask is right for several
        rows = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        if rows > 1 and cache.layers:
            cache = cache.copy()
            cache.batch_repeat_interleave(rows)
        out = model.plain_generate(ids, {**options, "past_key_values": cache})
        if isinstance(out, Tensor):
            return out[:, skip:]
        out.sequences = out.sequences[:, skip:]
        return out

    def _append(self, cache: Cache, ids: Tensor, options: dict[str, Any]) -> Tensor:
        """Put the context in front of question-only ids."""
        held = cache.get_seq_length()
        if not held:
            return ids
        context = cache.ids
        if context is None:
            context = torch.zeros(ids.shape[0], held, dtype=ids.dtype, device=ids.device)
        if context.shape[0] != ids.shape[0]:
            raise CacheMismatch(f"the cache has {context.shape[0]} rows, the ids have {ids.shape[0]}")
        mask = options.get("attention_mask")
        if mask is None or mask.shape[1] == ids.shape[1]:
            past = torch.ones_like(context) if cache.real is None else cache.real
            mask = torch.ones_like(ids) if mask is None else mask
            options["attention_mask"] = torch.cat([past.to(mask.dtype), mask], 1)
        return torch.cat([context.to(ids.dtype), ids], 1)

    def _check_identity(self, cache: Cache, ids: Tensor, mask: Tensor | None, append: bool) -> None:
        held = cache.get_seq_length()
        if ids.dim() != 2 or ids.numel() == 0:
            raise InputError(f"the prompt is {tuple(ids.shape)}, expected [B, S] with B, S > 0: empty, or no batch axis")
        if not held:
            return
        if cache.batch_size != ids.shape[0]:
            raise CacheMismatch(f"the cache has {cache.batch_size} rows, input_ids have {ids.shape[0]}")
        hint = "Pass context ids + question ids, or only the question with append=True."
        if cache.ids is None and not append:
            raise CacheMismatch(
                f"the cache does not know the ids of the {held} tokens it has seen (it was built from layers or embeddings, or grown "
                "by a stock model), so nothing tells where input_ids go on. Pass only the new tokens, with append=True."
            )
        if cache.ids is not None:
            width = min(held, ids.shape[1])
            same = cache.ids[:, :width] == ids[:, :width]
            if cache.real is not None:
                same |= ~cache.real[:, :width]
            if not bool(same.all()):
                row, column = (~same).nonzero()[0].tolist()
                raise CacheMismatch(
                    f"the cache holds another context: row {row} differs first at index {column} (token {int(cache.ids[row, column])} "
                    f"in the cache, {int(ids[row, column])} in input_ids). {hint}"
                )
        if ids.shape[1] <= held:
            raise CacheMismatch(
                f"input_ids hold {ids.shape[1]} tokens, the cache has already seen {held}: at least one new token is needed. {hint}"
            )
        if mask is not None and mask.shape[1] != ids.shape[1]:
            raise InputError(f"attention_mask is {tuple(mask.shape)}, expected {tuple(ids.shape)} like input_ids")

    def _feed(self, cache: Cache, ids: Tensor, options: dict[str, Any], until: int) -> None:
        """Forward the tokens that the cache has not seen, up to index `until`."""
        held, mask = cache.get_seq_length(), options.get("attention_mask")
        if held < until:
            mask = None if mask is None else mask[:, :until]
            self.forward({"input_ids": ids[:, held:until], "attention_mask": mask, "past_key_values": cache})


def _packed(tensor: Tensor) -> Tensor:
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
                f"attention_mask is {tuple(mask.shape)}, expected {(batch, held + length)}: the {held} tokens that the cache has seen "
                f"(not the slots it holds) and {length} new ones"
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


class CompressedModel:
    """What `kvfx.compile` puts in front of a model's own class."""

    _kvfx: Runner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; the prompt's cache is compressed when it is first built.

        An empty or missing cache is compressed; later tokens are appended whole. `use_cache=False` runs the plain model.
        """
        bound = hf.forward_signature(self._kvfx.base).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        return self._kvfx.forward(arguments)

    def generate(self, inputs: Tensor | None = None, *, append: bool = False, **options: Any) -> Any:
        """`transformers` generate on the compressed cache.

        Args:
            inputs: token ids `[B, S]`: the whole text, including what `past_key_values` has seen.
            append: `inputs` are only the new tokens; what the cache has seen is put in front, and left out of the result.
            options: everything that `generate` of transformers takes. `past_key_values` is a `kvfx.Cache`; it goes on growing,
                except under beam search and several return sequences, which work on a copy.

        Returns:
            As `generate` of transformers.

        Raises:
            CacheMismatch: the cache saw another text than `inputs` begin with, or belongs to another model.
            InputError: the prompt is empty, or an option has no meaning on a compressed cache.
        """
        ids = options.pop("input_ids", None) if inputs is None else inputs
        return self._kvfx.generate(self, ids, append, options)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers does it; only that assisted decoding, too, leaves out what the cache has seen."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("next_sequence_length") is None and cache is not None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]

    def plain_generate(self, ids: Tensor | None, options: dict[str, Any]) -> Any:
        """`generate` of transformers, nothing checked."""
        return super().generate(ids, **options)  # type: ignore[misc]

    def compress(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None
    ) -> Cache:
        """Compress a document once, to ask about it many times.

        Args:
            input_ids: the new tokens, `[B, S]`.
            attention_mask: which tokens are real, `[B, tokens seen + S]`; padding is never kept.
            past_key_values: a cache to go on from; only the new part is compressed, by its own budget and protection.

        Returns:
            The cache; `past_key_values` itself, grown, if it was given.

        Cost: one prefill, whose logits are computed for the last token only.
        """
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
        if "logits_to_keep" in hf.forward_signature(self._kvfx.base).parameters:
            arguments["logits_to_keep"] = 1
        return self._kvfx.forward(arguments, compress=True).past_key_values

    def train(self, mode: bool = True) -> Any:
        """Only `eval` is possible.

        Raises:
            UnsupportedModel: `mode` is True.
        """
        if mode:
            raise UnsupportedModel("a compressed model is for inference; train the model that was given to kvfx.compile")
        return super().train(mode)  # type: ignore[misc]


def compressed(base: transformers.PreTrainedModel, policy: Policy, plan: Plan, engine: Engine, on_refuse: str) -> Any:
    """`base` with a compressed cache; parameters are shared."""
    twin = hf.clone(base, CompressedModel)
    twin.__dict__["_kvfx"] = Runner(base, policy, plan, engine, on_refuse)
    return twin


