"""What Triton's interpreter gets wrong about bfloat16, which it keeps as integers of 16 bits (seen in Triton 3.9).

`tl.dot` multiplies the integers, float32 is cut off where every GPU rounds it to the nearest number, and subnormal numbers come out
as others in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot_of_others, _cast_of_others = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot_of_others(self, a, b, *rest)


def _cast(self: Any, source: Any, target: Any) -> Any:
    if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return _cast_of_others(self, source, target)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
    return TensorHandle(rounded.numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)


def repair() -> None:
    """Let kernels that run in the interpreter see bfloat16 as a GPU does."""
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = _dot, _cast
