"""transformers: what a model is made of, and its private parts. No other file reaches into transformers beyond its public names."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import output_capturing

from kvfx.errors import InputError, UnsupportedModel


def unwrap(model: nn.Module) -> Any:
    """The plain decoder inside a compiled, adapted or already compressed model.

    Raises:
        UnsupportedModel: it is no decoder, or in a state that is not supported; the message says which.
    """
    seen: Any = model
    while True:
        if hasattr(seen, "_kvfx"):
            seen = seen._kvfx.base
        elif hasattr(seen, "_orig_mod"):
            seen = seen._orig_mod
        elif hasattr(seen, "peft_config") and hasattr(seen, "get_base_model"):
            if getattr(seen.active_peft_config, "is_prompt_learning", False):
                raise UnsupportedModel(
                    f"{type(seen).__name__} learns prompts ({seen.active_peft_config.peft_type}), which are slots that no "
                    "token stands for. Use an adapter that changes weights (LoRA), or merge it."
                )
            seen = seen.get_base_model()
        else:
            break
    _check(seen)
    return seen


def _check(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"{name} is no model. Expected a causal decoder such as AutoModelForCausalLM.from_pretrained(...), or an nn.Module "
            "that takes its past keys and values and returns them grown."
        )
    if not is_transformers(model):
        inner = next((part for part in model.modules() if is_transformers(part)), None)
        if inner is not None:
            raise UnsupportedModel(f"{name} holds a transformers model; give kvfx.compile that {type(inner).__name__} itself.")
    if model.training:
        raise UnsupportedModel(f"{name} is in training mode; compression is for inference. Call model.eval() first.")
    if not is_transformers(model):
        return
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UnsupportedModel(
            f"{name} is no causal decoder: it {'is an encoder-decoder' if model.config.is_encoder_decoder else 'cannot generate'}, "
            "so there is no KV cache of a prompt to compress. Expected a model of AutoModelForCausalLM."
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise UnsupportedModel(
            f"{name} is spread over devices {sorted(map(str, devices))}, which is not tested. Load it on one device "
            "(device_map={'': 0})."
        )
    hooked = next((path for path, module in model.named_modules() if hasattr(module, "_hf_hook")), None)
    if hooked is not None and len(devices) != 1:
        raise UnsupportedModel(
            f"{name} has offloading hooks (at `{hooked or 'the model'}`), which are not supported. Load it without."
        )
    windows(model)


def is_transformers(model: Any) -> TypeGuard[transformers.PreTrainedModel]:
    """Whether `model` is a model of transformers."""
    return isinstance(model, transformers.PreTrainedModel)


def clone(model: transformers.PreTrainedModel, mixin: type) -> Any:
    """A model of the same class with `mixin` in front, sharing all parameters, buffers and submodules with `model`."""
    twin = copy.copy(model)
    twin.__dict__.pop("forward", None)  # model.forward = torch.compile(...) stays with the original
    twin.__dict__.pop("_compiled_call_impl", None)  # as does model.compile()
    base = type(model)

    @functools.wraps(base.forward)  # generate reads its signature to know what the model takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    about = {"__module__": base.__module__, "__doc__": base.__doc__, "forward": forward}
    twin.__class__ = type(base.__name__, (mixin, base), about)
    return twin


def forward_signature(model: nn.Module) -> inspect.Signature:
    """Parameters of the model's own forward, without `self`."""
    return _signature(type(model).forward)


@functools.lru_cache(maxsize=64)  # every step asks, and reading one takes longer than the rest of what it does before the graph
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def windows(model: transformers.PreTrainedModel) -> tuple[int | None, ...]:
    """For each layer of the model's cache, the tokens that a query sees, itself included; None where it sees all.

    Raises:
        UnsupportedModel: a layer holds something else than keys and values of tokens.
    """
    layers = transformers.DynamicCache(config=model.config).layers
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModel(
                f"layer {index} of {type(model).__name__} keeps a {type(layer).__name__}, which is no cache of keys and values "
                "alone; models with recurrent or indexed layers are not supported yet."
            )
    return tuple(getattr(layer, "sliding_window", None) for layer in layers)


@contextlib.contextmanager
def first_tokens_need_no_mask(model: transformers.PreTrainedModel) -> Iterator[None]:
    """While a forward on the first tokens of whole rows is exported: let attention be causal by a flag, without a mask.

    Transformers leaves that to `torch.compile` and gives exported programs a mask, because theirs may be run behind a cache later.
    With a mask attention computes twice as much on a CPU. Where a version makes masks in another way, the mask stays.
    """
    plain = getattr(masking_utils, "_ignore_causal_mask_sdpa", None)
    if plain is None or any(windows(model)):
        yield
        return

    def ignore(padding_mask: Any, q_length: Any, kv_length: Any, *args: Any, **options: Any) -> bool:
        if padding_mask is None and bool(q_length == kv_length):
            return True
        return plain(padding_mask, q_length, kv_length, *args, **options)

    with mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", ignore):
        yield


def prepare_outputs(model: transformers.PreTrainedModel) -> None:
    """Install the hooks that collect hidden states, as the model itself would on its first call: a trace cannot."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and getattr(module, "_can_record_outputs", None):
            output_capturing.maybe_install_capturing_hooks(module)


def text_limit(model: transformers.PreTrainedModel) -> int | None:
    """Tokens of the longest text that the model was made for, if its configuration says."""
    config = model.config.get_text_config(decoder=True)
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length"))
    return next((length for length in lengths if isinstance(length, int)), None)


def longest_text(model: transformers.PreTrainedModel) -> int:
    """Tokens of the longest text that the model was made for.

    Raises:
        InputError: its configuration does not say.
    """
    length = text_limit(model)
    if length is None:
        raise InputError(
            f"the configuration of {type(model).__name__} does not say how long a text may be: give StaticCache tokens="
        )
    return length


def one_token(model: transformers.PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of one token in each layer of the cache, `[1, Hkv, 1, D]`: what their shapes and types are."""
    cache: Any = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def kv_shape(model: transformers.PreTrainedModel) -> tuple[int, int]:
    """KV heads of a layer, and channels of each."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that change the model's output now."""
    if not (hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)):
        return ()  # at every forward, so without a walk over the modules
    active: set[str] = set()
    module: Any
    for module in model.modules():
        names = getattr(module, "active_adapters", None)
        if isinstance(names, (list, tuple)) and hasattr(module, "lora_A") and not module.disable_adapters:
            active |= {name for name in names if name in module.lora_A}
    return tuple(sorted(active))
