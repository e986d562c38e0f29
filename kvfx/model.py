"""The compressed model: an ordinary transformers model whose forward compresses the cache of a prompt."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from kvfx import hf
from kvfx.cache import Cache
from kvfx.engine import Engine
from kvfx.errors import CacheMismatch, InputError, UnsupportedModel
from kvfx.passes.plan import Plan
from kvfx.policy import Policy
from kvfx.pool import Pool
from kvfx.quota import Keep, slots_of_prompt
from kvfx.runner import Runner
from kvfx.static_cache import StaticCache


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
        return generate(self, ids, append, options)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers does it; only that assisted decoding, too, leaves out what the cache has seen."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("next_sequence_length") is None and cache is not None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        if isinstance(cache, StaticCache):
            # Of it transformers would make the mask of a stock model, instead of the one that was given.
            inputs = super().prepare_inputs_for_generation(input_ids, **{**kwargs, "past_key_values": None})  # type: ignore[misc]
            return {**inputs, "past_key_values": cache}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]

    def plain_generate(self, ids: Tensor | None, options: dict[str, Any]) -> Any:
        """`generate` of transformers, nothing checked."""
        return super().generate(ids, **options)  # type: ignore[misc]

    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        keep: Keep = None,
    ) -> Cache:
        """Compress a document once, to ask about it many times.

        Args:
            input_ids: the new tokens, `[B, S]`.
            attention_mask: which tokens are real, `[B, tokens seen + S]`; padding is never kept.
            past_key_values: a cache to go on from; only the new part is compressed, by its own budget and protection. Or an empty
                one to fill, such as a `StaticCache`.
            keep: the fraction kept, in (0, 1], in place of the policy's: one for all rows, or one for each. No new graph.

        Returns:
            The cache; `past_key_values` itself, grown, if it was given.

        Cost: one prefill, whose logits are computed for the last token only.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
        if "logits_to_keep" in hf.forward_signature(self._kvfx.base).parameters:
            arguments["logits_to_keep"] = 1
        return self._kvfx.forward(arguments, compress=True, keep=keep).past_key_values

    def train(self, mode: bool = True) -> Any:
        """Only `eval` is possible.

        Raises:
            UnsupportedModel: `mode` is True.
        """
        if mode:
            raise UnsupportedModel("a compressed model is for inference; train the model that was given to kvfx.compile")
        return super().train(mode)  # type: ignore[misc]


def generate(model: CompressedModel, ids: Tensor | None, append: bool, options: dict[str, Any]) -> Any:
    """`generate` with the identity of the cache checked, for full or question-only ids."""
    cache = options.get("past_key_values")
    config = options.get("generation_config") or model.generation_config  # type: ignore[attr-defined]
    setting = lambda name: options.get(name, getattr(config, name, None))  # noqa: E731
    if options.get("use_cache", True) is False:
        return model.plain_generate(ids, options)
    layout = setting("cache_implementation")
    if layout not in (None, "static"):
        raise InputError(
            f"cache_implementation={layout!r}: the cache is a kvfx.Cache, made by the policy. Leave it out, or 'static'"
        )
    if setting("prefill_chunk_size"):
        raise InputError("prefill_chunk_size would compress only the first chunk; call model.compress(part, past_key_values=cache)")
    if ids is None:
        raise InputError("generate needs input ids; for embeddings call the model itself")
    options["disable_compile"] = True  # of the forward, which is compiled
    if layout == "static":
        if cache is not None:
            raise InputError("cache_implementation='static' asks for a new cache, but past_key_values was given. Leave one out")
        cache = _static(model, ids, options, setting)
    options.pop("cache_implementation", None)
    if getattr(config, "cache_implementation", None):
        options["generation_config"] = copy.deepcopy(config)
        options["generation_config"].cache_implementation = None
    cache = model._kvfx.own(cache)
    skip = 0
    if append:
        skip, ids = cache.get_seq_length(), _append(cache, ids, options)
    _check_identity(cache, ids, options.get("attention_mask"), append)
    if any(setting(name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit")) or options.get("assistant_model"):
        # Candidates must come after the eviction, or they could not be cropped again.
        _feed(model, cache, ids, options, ids.shape[1] - 1)
    rows = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    if rows > 1 and not cache.is_empty:
        cache = cache.copy()
        cache.batch_repeat_interleave(rows)
    out = model.plain_generate(ids, {**options, "past_key_values": cache})
    if isinstance(out, Tensor):
        return out[:, skip:]
    out.sequences = out.sequences[:, skip:]
    return out


def _append(cache: Cache, ids: Tensor, options: dict[str, Any]) -> Tensor:
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


def _check_identity(cache: Cache, ids: Tensor, mask: Tensor | None, append: bool) -> None:
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


def _static(model: CompressedModel, ids: Tensor, options: dict[str, Any], setting: Callable[[str], Any]) -> StaticCache:
    """An empty cache with room for what is kept of the prompt and for what will be generated."""
    prompt, new = ids.shape[1], setting("max_new_tokens")
    new = max((setting("max_length") or prompt + 20) - prompt, 1) if new is None else new
    mask = options.get("attention_mask")
    lengths = [prompt] * ids.shape[0] if mask is None else mask.bool().sum(1).tolist()
    policy, layers = model._kvfx.policy, len(hf.windows(model._kvfx.base))
    return StaticCache(max(slots_of_prompt(policy, length, layers) for length in lengths) + new, prompt + new)


def _feed(model: CompressedModel, cache: Cache, ids: Tensor, options: dict[str, Any], until: int) -> None:
    """Forward the tokens that the cache has not seen, up to index `until`."""
    held, mask = cache.get_seq_length(), options.get("attention_mask")
    if held < until:
        mask = None if mask is None else mask[:, :until]
        model._kvfx.forward({"input_ids": ids[:, held:until], "attention_mask": mask, "past_key_values": cache})


def compressed(
    base: transformers.PreTrainedModel, policy: Policy, plan: Plan, engine: Engine, on_refuse: str, pool: Pool | None = None
) -> Any:
    """`base` with a compressed cache; parameters are shared."""
    twin = hf.clone(base, CompressedModel)
    twin.__dict__["_kvfx"] = Runner(base, policy, plan, engine, on_refuse, pool)
    return twin
