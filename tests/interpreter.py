"""What Triton's interpreter gets wrong and kernels need: products of bfloat16.

It keeps these as integers of 16 bits, and `tl.dot` multiplies the integers (seen in Triton 3.9).
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

_as_it_is = InterpreterBuilder.create_dot


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _as_it_is(self, a, b, *rest)


def repair() -> None:
    """Let `tl.dot` take bfloat16 for what it is."""
    InterpreterBuilder.create_dot = _dot
