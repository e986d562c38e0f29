"""What tells one model from another: its configuration and a hash over a few of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvfx import hf
from kvfx.errors import CacheMismatch


@dataclass(frozen=True)
class Owner:
    """The weights that made a cache, in this process: a model, and the adapters that were active in it."""

    model: Any = field(compare=False, repr=False)
    model_id: int
    adapters: tuple[str, ...]

    def __deepcopy__(self, memo: Any) -> Owner:
        return self  # a copied cache belongs to the same model

    @classmethod
    def of(cls, model: Any) -> Owner:
        """The owner of what `model` computes now."""
        return cls(model, id(model), hf.adapters(model))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the owner elsewhere.

        Raises:
            CacheMismatch: other adapters are active by now.
        """
        if hf.adapters(self.model) != self.adapters:
            raise CacheMismatch(
                f"the cache was made with adapters {list(self.adapters)}, active now are {list(hf.adapters(self.model))}; "
                "activate the former before saving or comparing"
            )
        return fingerprint(self.model)


# Differences here do not change what a cache means.
IRRELEVANT = {
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
    "_attn_implementation",
}
KEY_PROJECTION = ("k_proj", "key", "qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wk", "kv_a_proj")


def fingerprint(model: Any) -> dict[str, Any]:
    """Config, active adapters, and sha256 of embedding, first and last key projection, and norms.

    Cost: reads those weights once, about the size of the embedding. Of a decoder that is no transformers model: see `_plain`.
    """
    if not hf.is_transformers(model):
        return _plain(model)
    config = {name: value for name, value in model.config.to_dict().items() if name not in IRRELEVANT}
    return {
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        "weights": {name: _digest(parts) for name, parts in _groups(model).items()},
        "adapters": list(hf.adapters(model)),
    }


def _plain(model: nn.Module) -> dict[str, Any]:
    """Class, names and shapes of all weights, and sha256 of some numbers of each: nothing says which of them make the keys."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in named.items()}
    few = [tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)] for tensor in named.values()]
    about = {"class": f"{type(model).__module__}.{type(model).__qualname__}", **shapes}
    return {"config": about, "weights": {"module": _digest(few)}, "adapters": list(hf.adapters(model))}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What differs, one line each; empty if a cache of one can be read by the other."""
    lines = []
    for name in sorted(ours["config"].keys() | theirs["config"].keys()):
        a, b = ours["config"].get(name), theirs["config"].get(name)
        if a != b:
            lines.append(f"config.{name}: {a!r} here, {b!r} in the cache")
    for name in sorted(ours["weights"].keys() | theirs["weights"].keys()):
        if ours["weights"].get(name) != theirs["weights"].get(name):
            lines.append(f"weights of the {name} differ")
    if ours["adapters"] != theirs["adapters"]:
        lines.append(f"active adapters: {ours['adapters']} here, {theirs['adapters']} in the cache")
    return lines


def _groups(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # quantised weights are buffers
    keys = [name for name in named if any(part in name.split(".") for part in KEY_PROJECTION) and name.endswith("weight")]
    groups = {
        "embedding": [model.get_input_embeddings().weight],  # type: ignore[operator]
        "norms": [tensor for name, tensor in named.items() if "norm" in name or "ln_" in name],
        "adapters": [tensor for name, tensor in named.items() if "lora_" in name],
    }
    if keys:
        groups |= {"first key projection": [named[keys[0]]], "last key projection": [named[keys[-1]]]}
    return {name: tensors for name, tensors in groups.items() if tensors}


def _digest(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_owner(cache: Any, runner: Any) -> None:
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
