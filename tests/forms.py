"""The forms of an operator that tests judge alike: its reference, and the Triton kernel beside it.

Without a GPU the kernel runs in Triton's interpreter, on tensors of the CPU. Outputs start out as NaN, or as the largest integer,
so that what a kernel leaves out is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from kvfx.kernels import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    from interpreter import repair

    repair()


@dataclass(frozen=True)
class Form:
    """An operator as its reference computes it, or as its kernel does."""

    name: str
    kernel: bool

    def __call__(self, *args: Any) -> Any:
        """The operator's answer, on the CPU."""
        return run_kernel(self.name, *args) if self.kernel else OPS[self.name].overload(*args)

    def __str__(self) -> str:
        return f"{self.name} {'triton' if self.kernel else 'reference'}"


def forms_of(name: str) -> list[Form]:
    """The forms of an operator."""
    return [Form(name, kernel) for kernel in (False, True) if not kernel or OPS[name].triton is not None]


def forms(*names: str) -> Any:
    """Parametrise a test by `op`: every form of these operators."""
    return pytest.mark.parametrize("op", [form for name in names for form in forms_of(name)], ids=str)


def run_kernel(name: str, *args: Any) -> Any:
    """What the Triton kernel of an operator makes of arguments on the CPU; those that it writes to are written."""
    assert OPS[name].refusal(*args) is None
    on_device = tree_map_only(Tensor, _moved, args)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        answer = OPS[name].kernel(*on_device)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    for argument, given, moved in zip(OPS[name].overload._schema.arguments, args, on_device, strict=False):
        if argument.name in OPS[name].written and given is not moved:
            given.copy_(moved)
    return tree_map_only(Tensor, Tensor.cpu, answer)


def kernel_answers(name: str, *args: Any) -> list[Tensor]:
    """What the Triton kernel of an operator returns, or leaves in what it writes to; `args` stay as they are."""
    op = OPS[name]
    written = [i for i, argument in enumerate(op.overload._schema.arguments) if argument.name in op.written]
    own = [x.clone() if i in written else x for i, x in enumerate(args)]
    answer = run_kernel(name, *own)
    return [own[i] for i in written] if answer is None else tree_leaves(answer)


def _moved(tensor: Tensor) -> Tensor:
    """The tensor on the device, strides and all."""
    if DEVICE == "cpu":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)
