"""One row of the op table: what an operator is, in tensors."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("kvfx", "FRAGMENT")  # the registrations live as long as this object


class Dims(NamedTuple):
    """Sizes from which an op makes example arguments."""

    B: int = 2
    Hkv: int = 2
    G: int = 2
    S: int = 37
    D: int = 16

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self._asdict().items())


@dataclass(frozen=True)
class KernelOp:
    """An operator `torch.ops.kvfx.<name>`: contract, definition and examples.

    Creating the row registers the operator. The reference is its CompositeImplicitAutograd implementation, so fake
    tensors, tracing, symbolic shapes and autograd all run the reference itself; no second definition can drift.

    Attributes:
        name: operator name, unique in the table.
        schema: arguments and returns in the operator schema language, without the name.
        reference: the definition, in plain torch.
        inputs: example arguments from (dims, dtype, device, seed); tests and benchmarks read them.
        triton: `module:function` of the Triton launcher, or None where Inductor's own kernels serve.
        cost: memory traffic and arithmetic in one line.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    inputs: Callable[[Dims, torch.dtype, str, int], tuple]
    triton: str | None = None
    cost: str = ""

    def __post_init__(self) -> None:
        if hasattr(torch.ops.kvfx, self.name):
            return  # Python started in the repository's root finds this folder as `kernels` too, and transformers looks
        _LIBRARY.define(self.name + self.schema)
        _LIBRARY.impl(self.name, self.reference, "CompositeImplicitAutograd")

    def __str__(self) -> str:
        return self.name

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered operator, as it stands in a graph."""
        return getattr(torch.ops.kvfx, self.name).default

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the arguments that the operator writes to; then it returns nothing."""
        return tuple(argument.name for argument in self.overload._schema.arguments if argument.is_write)

    @functools.cached_property
    def kernel(self) -> torch._ops.OpOverload:
        """The Triton form, `torch.ops.kvfx.<name>_triton`: the same arguments, the same answer, on CUDA.

        Inductor looks into it and compiles the kernels with the rest of a graph; so does AOTInductor. Importing Triton waits until
        this is asked for.

        Raises:
            ImportError: Triton is not installed.
        """
        name = f"{self.name}_triton"
        if not hasattr(torch.ops.kvfx, name):
            torch.library.triton_op(f"kvfx::{name}", self.launcher, mutates_args=self.written)
        return getattr(torch.ops.kvfx, name).default

    def unavailable(self, device: torch.device) -> str | None:
        """Why the Triton form cannot run on a device at all; None if it can."""
        try:
            interpreted = importlib.import_module(".tiles_triton", __package__).INTERPRETED
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        if device.type == "cuda" or (device.type == "cpu" and interpreted):
            return None
        return f"Triton runs on CUDA, not on {device.type} (but with TRITON_INTERPRET=1, and then with backend='eager')"

    def refusal(self, *args: Any) -> str | None:
        """Why the Triton form does not take arguments of such shapes and types; None if it does."""
        return self._module.refusal(*args)

    @property
    def launcher(self) -> Callable[..., Any]:
        """What launches the Triton kernels."""
        return getattr(self._module, self.name)

    @property
    def _module(self) -> ModuleType:
        assert self.triton is not None, f"{self.name} has no Triton form"
        return importlib.import_module(f".{self.triton.partition(':')[0]}", __package__)


def samples(dtype: torch.dtype, device: str, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Draw one normal tensor per shape, the same values on every device and in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
