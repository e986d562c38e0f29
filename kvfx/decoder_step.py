"""One forward of a decoder written by hand, as it is traced, and which of the decoder's buffers are its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvfx import tree
from kvfx.call import Call
from kvfx.errors import UnsupportedModel
from kvfx.form import BUFFERS, Past
from kvfx.passes import capture
from kvfx.passes.cache_write import slots_of

Marks = list[tuple[Tensor, Tensor, Tensor, Tensor] | None]


def step(
    module: nn.Module, call: Call, leaves: list[Any], past: Past | None, seen: Tensor, sizes: list[Tensor]
) -> tuple[tuple[Any, dict[str, Any]], Marks, Tensor]:
    """One forward, as it is traced.

    Args:
        module: a decoder.
        call: how it is called.
        leaves: the leaves of its arguments.
        past: the slots held; None in a prefill.
        seen: tokens seen per row, [B] int64.
        sizes: how many slots each layer shall hold of the new tokens, see `passes.cache_write`; none if all.

    Returns:
        What the module returns, with what its arguments and buffers that may be caches hold afterwards, by name; for each leaf of
        both that may be keys or values, the outputs of `passes.cache_leaf`, else None; the tokens seen after it.
    """
    # A decoder may write to what it is given. To copies then, which the passes take out where it does not.
    values = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    length = values[call.tokens].shape[1]
    positions = (seen[:, None] + torch.arange(length, device=seen.device)).int()
    held = {name: tree.attribute(module, name).clone() for name in call.buffers}
    if past is not None:
        slots = [
            torch.ops.kvfx.cache_read(keys, values, prefix, past.start, seen, past.size, index, False, False)
            for index, (keys, values, prefix) in enumerate(past.layers)
        ]
        filled = past.form.fill(slots, [other.clone() for other in past.others], slots_of(past.size))
        for leaf, name in call.pasts:
            values[leaf] = filled[name] if past.form.places else filled
        for leaf in call.counts:
            values[leaf] = slots_of(past.size)
        if BUFFERS in past.form.places:
            held = filled[BUFFERS]
    args, kwargs = tree.build(call.spec, values)
    out, buffers = called(module, args, kwargs, held)
    state = {
        name: argument
        for name, argument in zip(call.names, [*args, *kwargs.values()], strict=True)
        if (name in past.form.places if past is not None else any(map(may_be_cache, tree.leaves_of(argument))))
    }
    if held:
        state[BUFFERS] = buffers
    result = (out, state)
    marks = [torch.ops.kvfx.cache_leaf(leaf, positions, sizes) if may_be_cache(leaf) else None for leaf in tree.leaves_of(result)]
    return result, marks, seen + length


def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], held: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """What a module returns with `held` in place of its buffers of those names, and what these hold afterwards. Also traced."""
    own = {name: tree.attribute(module, name) for name in held}
    for name, tensor in held.items():
        tree.set_attribute(module, name, tensor)
    try:
        out = module(*args, **kwargs)
        return out, {name: tree.attribute(module, name) for name in held}
    finally:
        for name, tensor in own.items():
            tree.set_attribute(module, name, tensor)


def may_be_cache(leaf: Any) -> bool:
    """Whether a leaf of a tree may be a layer's keys or values."""
    return isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_floating_point()


def caches_in_buffers(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Names of all buffers that a decoder writes to, if some of them may be keys or values.

    Raises:
        UnsupportedModel: that cannot be told.
    """
    if not any(map(may_be_cache, module.buffers())):
        return ()
    try:
        names = capture.written_buffers(module, args, kwargs)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(module).__name__} has buffers that may be its cache, and whether it writes to them cannot be told: a forward "
            f"on shapes alone failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    return names if any(may_be_cache(tree.attribute(module, name)) for name in names) else ()
