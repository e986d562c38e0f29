"""What an operator launches: its Triton kernels with the types and constants that they are compiled for. Needs no GPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._higher_order_ops import triton_kernel_wrap as wrap
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as closure_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.autotuner import Autotuner

from kvfx.kernels import KernelOp

LENGTH = 1000
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: what is launched.
        arguments: its arguments by name: fake tensors, numbers.
        options: warps and stages.
        programs: how many there are.
        given: the arguments, by name, that are memory of the operator's own arguments.
    """

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    programs: int
    given: frozenset[str]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.fn.__name__

    def writes(self) -> frozenset[str]:
        """The arguments that the kernel writes to, as torch finds out; all of them if it does not understand the kernel.

        What is written, torch.compile copies before the launch, unless nothing else reads it.
        """
        triton.runtime.driver.set_active(_Driver())
        accesses = wrap.identify_accessed_tensors(self.kernel, dict(self.arguments), {})
        return frozenset(write.name for write in accesses.read_writes.writes)

    def compile(self, capability: int) -> Any:
        """The kernel, as Inductor copies it, compiled for a chip, e.g. 90; what `triton.compile` returns."""
        constant = {param.name for param in self.kernel.params if param.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            # As Triton's own launcher does: ones and None become constants, and multiples of 16 are known to be that.
            if name in constant or value is None or (type(value) is int and value == 1):
                signature[name], constants[(place,)] = "constexpr", value
                continue
            signature[name] = _type(value)
            if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=as_copied(self.kernel), signature=signature, constexprs=constants, attrs=attributes)
        return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=self.options)


@functools.cache
def as_copied(kernel: Any) -> Any:
    """The kernel from the source that Inductor writes into its own programs: all that it calls, wherever that is defined."""
    source = f"import triton\nimport triton.language as tl\n\n@triton.jit\n{closure_of(kernel)}"
    name = f"{kernel.fn.__name__}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = Path(tempfile.mkdtemp()) / f"{name}.py"  # Triton reads the source of a kernel from its file
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.fn.__name__)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def serves_every_length(op: KernelOp, arguments: tuple[Any, ...]) -> bool:
    """Whether one graph of `op` serves all lengths. Sizes and numbers among the arguments are lengths from `LENGTH` up."""
    # A number that is a length is the axis of a tensor, as budgets carry them.
    carried = [torch.empty(value, 0, device="meta") if type(value) is int and value >= LENGTH else value for value in arguments]
    where = [place for place, value in enumerate(carried) if isinstance(value, Tensor)]

    def body(*tensors: Tensor) -> Any:
        full = list(carried)
        for place, tensor in zip(where, tensors, strict=True):
            full[place] = tensor.shape[0] if type(arguments[place]) is int else tensor
        return op.launcher(*full)

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fakes = []
    for place in where:
        moves = [DimDynamic.DYNAMIC if size >= LENGTH else DimDynamic.STATIC for size in carried[place].shape]
        context = StatelessSymbolicContext(dynamic_sizes=moves)
        fakes.append(mode.from_tensor(carried[place], symbolic_context=context))
    with mode, enable_python_dispatcher():  # without which some ops refuse symbolic sizes
        make_fx(body, tracing_mode="real")(*fakes)
    # That lengths of several arguments are one and the same is no condition on it.
    conditions = [guard.expr for guard in shapes.guards if not _is_same(guard.expr)]
    fixed = [value for value in shapes.replacements.values() if value.is_number]
    return not conditions and not fixed and all(limit.upper > 2**40 for limit in shapes.var_to_range.values())


def _is_same(condition: Any) -> bool:
    return type(condition).__name__ in ("Eq", "Equality") and all(side.is_symbol for side in condition.args)


class _Driver:
    """All that torch asks a driver in order to read a kernel."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launches(op: KernelOp, arguments: tuple[Any, ...]) -> Iterator[Launch]:
    """What `op` launches for arguments like these; only the shapes, strides and types of tensors matter."""
    where = [place for place, value in enumerate(arguments) if isinstance(value, Tensor)]

    def body(*tensors: Tensor) -> Any:
        full = list(arguments)
        for place, tensor in zip(where, tensors, strict=True):
            full[place] = tensor
        return op.launcher(*full)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [_alike(arguments[place]) for place in where]
        graph = make_fx(body, tracing_mode="real")(*fakes).graph
    own = {_memory(place.meta["val"]) for place in graph.find_nodes(op="placeholder")}
    for node in graph.nodes:
        if node.target is wrap.triton_kernel_wrapper_mutation:
            yield _launch(node.kwargs, own)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _alike(tensor: Tensor) -> Tensor:
    """A fake tensor of the CPU, because a torch without CUDA does not index fake tensors of another device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _launch(given: Any, own: set[int]) -> Launch:
    kernel = wrap.kernel_side_table.get_kernel(given["kernel_idx"])
    constants = wrap.kernel_side_table.get_constant_args(given["constant_args_idx"])
    options: dict[str, int] = {}
    if isinstance(kernel, Autotuner):  # how torch carries the number of warps
        (config,) = kernel.configs
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        kernel = kernel.fn
    (grid,) = given["grid"]
    programs = 1
    for size in grid:
        programs *= int(size)
    values = tree_map_only(torch.fx.Node, lambda node: node.meta["val"], {**given["kwargs"], **constants})
    mine = frozenset(name for name, value in values.items() if isinstance(value, Tensor) and _memory(value) in own)
    return Launch(kernel, values, options, programs, mine)
