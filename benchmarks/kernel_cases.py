"""The sizes at which kernels are compiled and timed: one layer of Llama-3.1-8B, and what else they must take.

An operator adds its rows here; nothing else names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfx.kernels import Dims

LLAMA = Dims(B=1, Hkv=8, G=4, S=8192, D=128)


@dataclass(frozen=True)
class Sizes:
    """A layer, a prompt and a precision."""

    dims: Dims
    dtype: torch.dtype
    device: str = "meta"

    def tensor(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def keys(self) -> Tensor:
        """[B, Hkv, S, D]."""
        return self.tensor(self.dims.B, self.dims.Hkv, self.dims.S, self.dims.D)

    def sketch(self) -> Tensor:
        """[Hkv, D, 48] float32."""
        return torch.randn(self.dims.Hkv, self.dims.D, 48, device=self.device)

    def queries(self) -> Tensor:
        """[B, Hq, S, D]."""
        return self.tensor(self.dims.B, self.dims.Hkv * self.dims.G, self.dims.S, self.dims.D)


@dataclass(frozen=True)
class Case:
    """Arguments of an operator.

    Attributes:
        op: name of the operator.
        name: of the sizes and options.
        make: arguments, from sizes.
        sizes: of them.
    """

    op: str
    name: str
    make: Callable[[Sizes], tuple[Any, ...]]
    sizes: Sizes

    def arguments(self) -> tuple[Any, ...]:
        """Of the operator."""
        return self.make(self.sizes)


# Arguments of each operator as policies call it.
MAKE: dict[str, Callable[[Sizes], tuple[Any, ...]]] = {
    "key_norm": lambda sizes: (sizes.keys(),),
    "key_diff": lambda sizes: (sizes.keys(), None),
    "chunk_attention": lambda sizes: (sizes.queries(), sizes.keys(), sizes.keys(), None, 256, 1.0, 3),
    "leverage": lambda sizes: (sizes.keys(), None, sizes.sketch(), 512),
}

SIZES = {
    "bf16": Sizes(LLAMA, torch.bfloat16),
    "fp32": Sizes(LLAMA, torch.float32),
    "D 32": Sizes(LLAMA._replace(D=32), torch.bfloat16),
    "D 80": Sizes(LLAMA._replace(D=80), torch.float16),
    "D 256": Sizes(LLAMA._replace(D=256), torch.bfloat16),
    "D 256 fp32": Sizes(LLAMA._replace(D=256), torch.float32),
}

CASES = [Case(op, name, make, sizes) for op, make in MAKE.items() for name, sizes in SIZES.items()]
