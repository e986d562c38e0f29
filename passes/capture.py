"""Capture: from what `torch.compile` hands a backend to one flat graph of pre-dispatch ATen, and on to a backend.

This is the only file that imports private parts of torch. Everything else in the passes sees an `fx.GraphModule` whose nodes are
ATen calls with `meta["val"]`, where `aten.linear` and `aten.scaled_dot_product_attention` are still whole and lengths symbolic.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.debugging import aot_eager
from torch._export.utils import _get_shape_env_from_gm
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import disable_fake_tensor_cache
from torch.export import ExportedProgram
from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
    ShapeEnv,
    free_unbacked_symbols,
)
from torch.utils import _pytree as pytree

Compiled = Callable[..., Any]
Rewrite = Callable[[fx.GraphModule], None]


class UnknownSize(Exception):
    """Raised where an op that could not ask about a size made up a new one."""


NeedsSizes = (PendingUnbackedSymbolNotFound, GuardOnDataDependentSymNode, UnknownSize)
SMALL = 128  # a condition on a length is tried on so many; what ops need are a few tokens, or nothing


def _inductor(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    # Inductor would move what only the graph's output reads, which is every layer's eviction, to the end of the graph.
    compiled: Any = compile_fx(graph, example_inputs, config_patches={"reorder_for_locality": False})
    return compiled


def _run_as_is(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    return graph.forward


# Whatever goes wrong between Dynamo and a backend.
CompileError = torch._dynamo.exc.TorchDynamoException


def is_graph_break(error: BaseException) -> bool:
    """Whether `error` says that some code cannot be traced."""
    return isinstance(error, torch._dynamo.exc.Unsupported)


# What a rewritten graph is handed to. "eager" runs it node by node, "aot_eager" through AOTAutograd, "inductor" compiles it.
BACKENDS: dict[str, Callable[..., Any]] = {
    "inductor": _inductor,
    "aot_eager": aot_eager,
    "eager": _run_as_is,
}


# A step has few graphs, but one row or several, a window that is full or not, a single slot: such differences multiply.
_VARIANTS: dict[str, Any] = {"recompile_limit": 32} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}


def compile_with(function: Callable[..., Any], rewrite: Rewrite, backend: str) -> Compiled:
    """Compile `function` as one graph, rewritten by `rewrite` before `backend` sees it.

    Every call owns a code object: Dynamo counts its limit of graph variants per code object, so that two compiled models that
    share Python code would use up each other's variants.
    """

    def capture_and_compile(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        aten = to_aten(graph, example_inputs)
        rewrite(aten)
        return BACKENDS[backend](aten, example_inputs)

    code = function.__code__.replace(co_name=f"{function.__name__}_{id(capture_and_compile):x}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, backend=capture_and_compile, fullgraph=True, **_VARIANTS)


def to_aten(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Retrace a Dynamo graph to pre-dispatch ATen, under Dynamo's own fake mode, so that its symbols stay Dynamo's.

    Placeholders keep the name of what they came from in `meta["source"]`, e.g. `L['input_ids']`.
    """
    context = TracingContext.get()
    assert context.fake_mode is not None
    fakes, sources = [], []
    for node, example in zip(graph.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        argument = node.meta.get("grapharg")
        sources.append(argument.source.name if argument is not None and argument.source is not None else node.name)
        if isinstance(example, Tensor) and not isinstance(example, FakeTensor):
            example = _fake_like_dynamo(context, example)
        elif not isinstance(example, Tensor):
            example = node.meta["example_value"]
        fakes.append(example)
    with context.fake_mode, fx.traceback.preserve_node_meta():
        run = fx.Interpreter(graph).run
        aten = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    for node, source, example in zip(aten.graph.find_nodes(op="placeholder"), sources, example_inputs, strict=True):
        node.meta["source"] = source() if callable(source) else source
        node.meta["is_parameter"] = isinstance(example, torch.nn.Parameter)
    for node in aten.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
            node.meta["val"] = None  # it writes to its arguments, or checks them
    for node in aten.graph.find_nodes(op="call_function", target=torch.ops.aten.type_as.default):
        node.target, (tensor, like) = torch.ops.aten.to.dtype, node.args  # which would look as if it read the values of `like`
        node.args = (tensor, like.meta["val"].dtype)
    return aten


def _fake_like_dynamo(context: TracingContext, tensor: Tensor) -> FakeTensor:
    """The fake that Dynamo made of `tensor`, with the same symbols."""
    assert context.fake_mode is not None
    symbolic = context.tensor_to_context.get(tensor)
    if symbolic is None:
        return context.fake_mode.from_tensor(tensor, static_shapes=True)
    source = symbolic.tensor_source
    return context.fake_mode.from_tensor(tensor, static_shapes=False, symbolic_context=symbolic, source=source)


def trace(function: Callable[..., Any], *fakes: Any) -> fx.GraphModule:
    """Trace `function` on fake arguments to pre-dispatch ATen."""
    with fake_mode_of(fakes):
        # Nodes copied from one trace share their fakes; the same object twice would be traced as the same argument twice.
        apart = [fake.detach() if isinstance(fake, Tensor) else fake for fake in fakes]
        return make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*apart)


@contextlib.contextmanager
def fake_mode_of(values: Sequence[Any]) -> Iterator[None]:
    """Enter the fake mode that the tensors among `values` belong to, without its cache, which takes longer than it saves here."""
    fake = next((value for value in pytree.tree_leaves(values) if isinstance(value, FakeTensor)), None)
    if fake is None:
        yield
    else:
        # Filling it works out the symbolic shapes of each result twice more. Without the dispatcher some ops refuse symbolic sizes.
        with disable_fake_tensor_cache(fake.fake_mode), fake.fake_mode, enable_python_dispatcher():
            yield


def mark_dynamic(tensor: Tensor, *dims: int) -> None:
    """Let the sizes of `dims` vary without a new graph. Sizes 0 and 1 are specialised whatever the mark."""
    torch._dynamo.maybe_mark_dynamic(tensor, list(dims))


def frees_memory_early() -> bool:
    """Whether Inductor orders nodes for peak memory, without which a layer's full cache outlives its layer."""
    return bool(inductor_config.reorder_for_peak_memory)


@contextlib.contextmanager
def editing(program: ExportedProgram, ask_small: bool = False) -> Iterator[list[str]]:
    """While nodes are traced into a program: let its symbols be asked about, and forget the answers if the edit fails.

    Once the context ends, the list that it gives holds, as text, where the symbols may vary less than before; `range_constraints`
    of the program say so too.

    Args:
        program: what is edited.
        ask_small: whether ops may ask if a size is 0 or 1, or below another. Most need not, and then serve every length.

    Raises:
        NeedsSizes: an op has to ask.
    """
    shapes, narrowed = _get_shape_env_from_gm(program.graph_module), list[str]()
    if shapes is None:  # no size varies
        yield narrowed
        return
    guards, ranges, frozen = len(shapes.guards), dict(shapes.var_to_range), shapes.frozen
    shapes.frozen = False  # which would let conditions pass unseen
    try:
        with shape_config.patch(backed_size_oblivious=not ask_small):  # type: ignore[attr-defined]
            yield narrowed
    except BaseException:
        shapes.pending_fresh_unbacked_symbols.clear()
        del shapes.guards[guards:]
        shapes.var_to_range.update(ranges)
        shapes._update_version_counter()
        raise
    finally:
        shapes.frozen = frozen
    for symbol, before in program.range_constraints.items():
        now = _narrowed(shapes, symbol, before & shapes.bound_sympy(shapes.replace(symbol)), guards)
        if now != before:
            program.range_constraints[symbol] = now
            narrowed.append(f"{symbol} in {now}, before in {before}")


def untrue(program: ExportedProgram, *lengths: range, total: int = sys.maxsize) -> list[str]:
    """The conditions on lengths that tracing or compiling took for granted and that do not hold for all of `lengths`.

    AOTInductor checks no condition when it runs. They are tried on every length, as far as there are `SMALL` of them at both ends,
    and at every power of two between, one more and one less; of several lengths on all combinations of fewer.

    Args:
        program: whose conditions.
        lengths: of each of its symbols, in the order in which its inputs have them.
        total: the most that they add up to.
    """
    shapes, false = _get_shape_env_from_gm(program.graph_module), list[str]()
    symbols = dict(zip(symbols_of(program), (_tried(each, SMALL if len(lengths) == 1 else 8) for each in lengths), strict=False))
    for guard in () if shapes is None else shapes.guards:
        condition = shapes.replace(guard.expr)
        free = sorted(condition.free_symbols, key=str)
        cases = itertools.product(*(symbols.get(symbol, ()) for symbol in free)) if free else [()]
        bad = [case for case in cases if sum(case) <= total and condition.subs(dict(zip(free, case, strict=True))) == False]  # noqa: E712
        if bad or not symbols.keys() >= set(free):
            where = " and ".join(map(str, bad[0])) if bad else ""
            false.append(f"{condition}, which " + (f"does not hold of {where}" if bad else "is of more than one length"))
    return false


def symbols_of(program: ExportedProgram) -> list[Any]:
    """The symbols that are sizes of a program's inputs, in their order."""
    values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    return list(dict.fromkeys(size.node.expr for size in sizes if isinstance(size, torch.SymInt)))


def _tried(lengths: range, ends: int) -> list[int]:
    near = {2**power + more for power in range(40) for more in (-1, 0, 1)}
    return sorted({*lengths[:ends], *lengths[-ends:], *(size for size in near if size in lengths)})


def check_sizes(module: fx.GraphModule, given: fx.GraphModule) -> None:
    """Make sure that all sizes in `module` follow from those in `given`, of which it is an edited copy.

    Raises:
        UnknownSize: one does not.
    """
    made_up = _unknown_sizes(module) - _unknown_sizes(given)
    if made_up:
        raise UnknownSize(f"sizes {sorted(map(str, made_up))} follow from no length of the program")


def _unknown_sizes(module: fx.GraphModule) -> set[Any]:
    values = [node.meta.get("val") for node in module.graph.nodes]
    return set().union(*(free_unbacked_symbols(value) for value in values if isinstance(value, (Tensor, torch.SymInt))))


def _narrowed(shapes: ShapeEnv, symbol: Any, bounds: Any, known: int) -> Any:
    """`bounds` without the small values of a symbol for which a new condition does not hold."""
    bound = shapes.replace(symbol)
    for guard in shapes.guards[known:]:
        condition = shapes.replace(guard.expr)
        if condition.free_symbols == {bound}:
            small = range(int(bounds.lower), int(min(bounds.upper, bounds.lower + SMALL)) + 1)
            bad = [size for size in small if condition.subs(bound, size) == False]  # noqa: E712 - of sympy
            if bad:
                bounds = type(bounds)(bad[-1] + 1, bounds.upper)
    return bounds


def written_buffers(module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Names of the buffers that a forward of `module` writes to or replaces. It runs on shapes alone, and nothing is written."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    state: dict[str, Tensor] = {name: mode.from_tensor(tensor.detach()) for name, tensor in own.items()}
    before = {name: (state[name], state[name]._version) for name, _ in module.named_buffers()}
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    with mode, torch.no_grad():
        torch.func.functional_call(module, state, tuple(args), kwargs)
    return tuple(name for name, (tensor, version) in before.items() if state[name] is not tensor or tensor._version != version)
