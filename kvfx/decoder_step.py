"""One forward of a decoder written by hand, as it is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvfx import tree
from kvfx.call import Call
from kvfx.form import BUFFERS, Past
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
    own = {name: tree.attribute(module, name) for name in held}
    for name, tensor in held.items():
        tree.set_attribute(module, name, tensor)
    out = module(*args, **kwargs)
    state = {
        name: argument
        for name, argument in zip(call.names, [*args, *kwargs.values()], strict=True)
        if (name in past.form.places if past is not None else any([may_be_cache(leaf) for leaf in tree.leaves_of(argument)]))
    }
    if held:
        state[BUFFERS] = {name: tree.attribute(module, name) for name in held}
    for name, tensor in own.items():
        tree.set_attribute(module, name, tensor)
    result = (out, state)
    marks = [torch.ops.kvfx.cache_leaf(leaf, positions, sizes) if may_be_cache(leaf) else None for leaf in tree.leaves_of(result)]
    return result, marks, seen + length


def may_be_cache(leaf: Any) -> bool:
    """Whether a leaf of a tree may be a layer's keys or values."""
    return isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_floating_point()
