"""Exported programs: a copy of the graph is rewritten as any other, then it and its signature take the place of the program's own.

A program has no place for a cache beside its inputs and results. Its results that are the keys and values that an attention reads
are the cache; a prefill, run with a plan that has a score, returns what is kept of them instead. Where keys and values are written
to a preallocated argument, buffer or result, what is kept takes its first places, and the others stay as they were.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, TensorArgument

from kvfx.passes import capture
from kvfx.passes.axes import Order, ordered, peel
from kvfx.passes.cache_read import WINDOW
from kvfx.passes.cache_write import WRITE, size_of
from kvfx.passes.graph import aten, call, inline, inputs, is_call, slice_of, val
from kvfx.passes.plan import Plan
from kvfx.passes.pre_rope import rope_of
from kvfx.passes.report import Refuse, Report, Site
from kvfx.passes.store_spellings import WHOLE, Store, store_of

MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


class Result(NamedTuple):
    """Where the program returns a tensor.

    Attributes:
        place: which of its results.
        order: the order in which that sees the axes of the tensor.
        store: the write of it to a preallocated tensor, which is what is returned; None if the tensor itself is.
        outer: the order in which the result sees the axes of the preallocated tensor.
    """

    place: int
    order: Order
    store: Store | None = None
    outer: Order = ()


def open_program(program: ExportedProgram, functional: bool = True) -> fx.GraphModule:
    """A copy of the program's graph, whose nodes say what they are to the program.

    Args:
        program: of pre-dispatch ATen.
        functional: whether its ops must not write in place.

    Raises:
        ValueError: the program is not functional.
    """
    if functional and program.dialect != "ATEN":
        raise ValueError(
            f"this program is as torch.export.export made it (dialect {program.dialect}), with ops that write in place; the passes "
            "read functional ATen. Run them on program.run_decompositions({}), whose empty table leaves attention whole."
        )
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    copied = graph.graph_copy(program.graph, known, return_output_node=True)
    assert isinstance(copied, tuple)
    outputs, old = copied
    graph.output(outputs).meta.update(old.meta)
    for check in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(check)  # of a type that the graph fixes, but a reader of what the passes would do without
    module = fx.GraphModule(program.graph_module, graph)
    signature = program.graph_signature
    kinds = [spec.kind for spec in signature.output_specs]
    module.meta["results"] = [index for index, kind in enumerate(kinds) if kind in (OutputKind.USER_OUTPUT, *MUTATIONS)]
    module.meta["mutations"] = [index for index, kind in enumerate(kinds) if kind in MUTATIONS]
    for spec, node in zip(signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True):
        meta = known[node].meta
        meta["source"], meta["is_parameter"] = node.name, spec.kind is InputKind.PARAMETER
        meta["is_input"] = spec.kind is InputKind.USER_INPUT
    return module


def commit(program: ExportedProgram, module: fx.GraphModule) -> None:
    """Put a rewritten copy in the program's place, and make its signature say what is true of it."""
    signature, old = program.graph_signature, program.graph_module.graph
    input_specs, names = list(signature.input_specs), [spec.arg for spec in signature.output_specs]
    constants = _lift_constants(program, module)
    try:
        program.graph_module.graph = module.graph
        program.constants.update((str(spec.target), tensor) for _, spec, tensor in constants)
        for place, spec, _ in constants:
            signature.input_specs.insert(place, spec)
        for output, node in zip(signature.output_specs, inputs(module.graph.output_node())[0], strict=True):
            if isinstance(node, fx.Node):
                output.arg = replace(output.arg, name=node.name)
        program.validate()
    except BaseException:
        program.graph_module.graph, signature.input_specs[:] = old, input_specs
        for spec, argument in zip(signature.output_specs, names, strict=True):
            spec.arg = argument
        for _, spec, _ in constants:
            del program.constants[str(spec.target)]
        raise


def _lift_constants(program: ExportedProgram, module: fx.GraphModule) -> list[tuple[int, InputSpec, Tensor]]:
    """Make arguments of the tensors that the passes put into the graph: which argument, what it is, and its value."""
    graph, lifted = module.graph, list[tuple[int, InputSpec, Tensor]]()
    specs = program.graph_signature.input_specs
    first = next((place for place, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT), len(specs))
    places = graph.find_nodes(op="placeholder")
    made: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        tensor = getattr(module, target)
        if not isinstance(tensor, Tensor):
            continue  # a graph of a higher-order op
        if target not in made:
            with graph.inserting_before(places[first]) if first < len(places) else graph.inserting_after(places[-1]):
                made[target] = graph.placeholder(f"c_{target}")
            made[target].meta["val"] = val(node)
            spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(made[target].name), target)
            lifted.append((first + len(lifted), spec, tensor))
        node.replace_all_uses_with(made[target])
        graph.erase_node(node)
    return lifted


def write_results(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Number the cache layers; mark the storing of results that are keys and values of a site as a cache marks it.

    A layer is a pair of keys and values that attention reads, in graph order. Those that hold windows, by the plan, are left whole.
    """
    results = _results(module)
    layers: dict[tuple[fx.Node, fx.Node], int] = {}
    for site in report.sites:
        key, value = inputs(site.nodes["attention"])[1:3]
        layers.setdefault((peel(key)[0], peel(value)[0]), len(layers))
    problem = _uncounted(plan, len(layers))
    written: set[int] = set()
    for site in report.sites:
        key, value = inputs(site.nodes["attention"])[1:3]
        layer = layers[peel(key)[0], peel(value)[0]]
        if layer in written:
            continue
        written.add(layer)
        try:
            _write(module, plan, site, layer, results, problem)
        except Refuse as refuse:
            site.refusal = refuse.reason


def _results(module: fx.GraphModule) -> dict[fx.Node, list[Result]]:
    """What each of the program's results that may be keys or values is, below permutations and copies, or a write of."""
    results: dict[fx.Node, list[Result]] = {}
    outputs = inputs(module.graph.output_node())[0]
    for place in module.meta["results"]:
        if not isinstance(outputs[place], fx.Node) or not isinstance(val(outputs[place]), Tensor) or val(outputs[place]).dim() != 4:
            continue
        tensor, order = peel(outputs[place])
        store = _store(tensor)
        if store is not None:
            source, inner = peel(store.source)
            results.setdefault(source, []).append(Result(place, inner, store, order))
        elif place not in module.meta["mutations"]:  # which cannot shrink
            results.setdefault(tensor, []).append(Result(place, order))
    return results


def _store(tensor: fx.Node) -> Store | None:
    """The write to some places of a preallocated tensor that `tensor` is the outcome of."""
    try:
        store = store_of(tensor)
        while store is not None and store.axis == WHOLE:  # of what was written to a slice of everything
            store = store_of(store.source)
    except Refuse:
        return None
    return store


def _uncounted(plan: Plan, layers: int) -> str:
    """Why it is not known which layer of the model a layer of the graph is, where the plan treats layers differently."""
    differ = any(plan.windows) or plan.sketches is not None or (plan.keep is not None and plan.keep.pyramid)
    if not plan.windows or not differ or layers == len(plan.windows):
        return ""
    return f"attention over {layers} cache layers was found, the model has {len(plan.windows)}; which is which is not known"


def _write(module: fx.GraphModule, plan: Plan, site: Site, layer: int, results: dict[fx.Node, list[Result]], problem: str) -> None:
    attention, graph = site.nodes["attention"], module.graph
    query, key, value = inputs(attention)[:3]
    keys, values = peel(key), peel(value)
    window = plan.windows[layer] if plan.windows and not problem else None
    if window is not None:
        with graph.inserting_before(attention):
            mark = call(graph, WINDOW, key, value, layer, window)
            for index in range(2):
                attention.update_arg(index + 1, call(graph, operator.getitem, mark, index))
        return
    if keys[0] not in results or values[0] not in results or keys[0] is values[0]:
        return
    if problem:
        raise Refuse(problem, attention)
    if str(val(key).shape[2]) != str(val(query).shape[2]):
        held, new = val(key).shape[2], val(query).shape[2]
        raise Refuse(f"its keys are of {held} tokens and its queries of {new}; a prefill has no past", key)
    assert plan.keep is not None
    keep, positions = plan.keep, _positions(module, site)

    def given(key: Tensor) -> tuple[Tensor, Tensor]:
        counted = torch.arange(key.shape[2], dtype=torch.int32, device=key.device).expand(key.shape[0], -1)
        return counted, size_of(keep.slots(key.shape[2], layer), key.device)

    counted, size = inline(graph, capture.trace(given, val(key)).graph, [key], before=attention)
    with graph.inserting_before(attention):
        if positions is not None:
            counted = call(graph, aten._to_copy.default, positions, dtype=torch.int32)
        write = call(graph, WRITE, key, value, counted, None, size, layer)
        outputs = list(inputs(graph.output_node())[0])
        for index, (tensor, order) in enumerate((keys, values)):
            stored = call(graph, operator.getitem, write, index)
            for place, axes, store, outer in results[tensor]:
                moved = ordered(stored, tuple(order.index(axis) for axis in axes))
                if store is not None:
                    held = call(graph, aten.sym_size.int, stored, 2)
                    moved = ordered(call(graph, aten.slice_scatter.default, store.tensor, moved, store.axis, 0, held), outer)
                outputs[place] = moved
    graph.output_node().args = (tuple(outputs),)


def _positions(module: fx.GraphModule, site: Site) -> fx.Node | None:
    """The argument that holds the positions of the tokens: what RoPE makes its factors of, if the shape fits."""
    query = inputs(site.nodes["attention"])[0]
    try:
        rope = rope_of(query)
    except Refuse:
        return None
    batch, _, tokens, _ = val(query).shape
    read = slice_of(rope.factors) if rope is not None else ()
    found = [
        node
        for node in read
        if node.op == "placeholder"
        and node.meta.get("is_input")
        and [str(size) for size in val(node).shape] == [str(batch), str(tokens)]
        and not val(node).is_floating_point()
    ]
    return found[0] if len(found) == 1 else None


def read_lengths(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Take out the empty tensors whose length carried a count: here nothing is outside the graph that could give another."""
    for size in module.graph.find_nodes(op="call_function", target=aten.empty.memory_format):
        for user in list(size.users):
            if is_call(user, aten.sym_size.int) and inputs(user)[1] == 0:
                user.replace_all_uses_with(inputs(size)[0][0])
                module.graph.erase_node(user)
    module.graph.eliminate_dead_code()


def name_caches(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Say of each site which layer it is of, where nothing is evicted: it only gets its attention lowered."""
    layers: dict[fx.Node, Any] = {}
    for site in report.sites:
        key = peel(inputs(site.nodes["attention"])[1])[0]
        store = _store(key)
        site.cache = "cat" if is_call(key, aten.cat.default) else "new" if store is None else store.spelling
        site.layer = layers.setdefault(key, len(layers))
