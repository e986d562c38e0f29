"""What attention becomes below ATen's composites: keys and values are read as they are stored, never once for each query head."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from graphs import traced_step
from kvfx.kernels import OPS
from kvfx.passes import run
from kvfx.passes.graph import val
from kvfx.passes.plan import Plan
from test_equivalence import decoder

HEADS, TOKENS, DIM = 2, 40, 16
MASKS: dict[str, tuple[int, ...]] = {"no mask": (), "one row": (1, 1, 1, TOKENS), "a row per KV head": (2, HEADS, 1, TOKENS)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_keys_values_and_masks_keep_their_size(new, group, dtype):
    for rows, softcap, with_sinks in itertools.product(MASKS.values(), (None, 30.0), (False, True)):
        query = torch.randn(2, HEADS * group, new, DIM, dtype=dtype)
        key, value = (torch.randn(2, HEADS, TOKENS, DIM, dtype=dtype) for _ in range(2))
        mask = torch.rand(rows) < 0.7 if rows else None
        sinks = torch.randn(HEADS * group, dtype=dtype) if with_sinks else None
        graph = lowered(query, key, value, mask, 0.0, False, None, softcap, sinks)
        largest = {key: key.numel(), value: value.numel(), mask: 0 if mask is None else mask.numel() * (group if new > 1 else 1)}
        assert_no_larger(graph, dict(zip((query, *largest), (math.inf, *largest.values()), strict=True)))


@pytest.mark.parametrize("group", [1, 4])
def test_a_causal_prompt_keeps_the_size_of_its_keys(group):
    query, (key, value) = torch.randn(2, HEADS * group, TOKENS, DIM), (torch.randn(2, HEADS, TOKENS, DIM) for _ in range(2))
    graph = lowered(query, key, value, None, 0.0, True, None)
    assert_no_larger(graph, {query: math.inf, key: key.numel(), value: value.numel()})


def lowered(*arguments: object) -> fx.Graph:
    """The reference of the waist op, traced below the composites."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]

    def attend(*given: Tensor) -> Tensor:
        rest = iter(given)
        return OPS["attention"].reference(*(next(rest) if isinstance(argument, Tensor) else argument for argument in arguments))

    return make_fx(attend)(*tensors).graph


def assert_no_larger(graph: fx.Graph, largest: dict[Tensor | None, float]) -> None:
    """What is made of one input alone has no more elements than `largest` says of it, in the order of the inputs."""
    bounds = [bound for tensor, bound in largest.items() if tensor is not None]
    of: dict[fx.Node, set[int]] = {place: {index} for index, place in enumerate(graph.find_nodes(op="placeholder"))}
    for node in graph.nodes:
        if node.op == "call_function":
            of[node] = set().union(*(of[source] for source in node.all_input_nodes))
            if len(of[node]) == 1 and isinstance(made := node.meta.get("val"), Tensor) and min(of[node]) < len(bounds):
                assert made.numel() <= bounds[min(of[node])], node.format_node()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_decode_step_holds_nothing_of_the_size_of_expanded_keys(implementation):
    model = decoder("llama", 2, 2, DIM, 0)
    model.set_attn_implementation(implementation)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads == 2 * kv_heads
    module = traced_step(model, torch.ones(1, 1, dtype=torch.long), past=100)
    run(module, Plan(None))
    sizes = [val(node).numel() for node in module.graph.nodes if node.op == "call_function" and isinstance(val(node), Tensor)]
    assert max(int(size) for size in sizes) == kv_heads * 101 * DIM
