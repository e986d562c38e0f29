"""Which form of the kernels a model runs: the same tokens stay whatever runs, and what cannot run is said."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import LlamaForCausalLM

import kvfx
from decoding import fresh_llama, llama, ones, tokens
from forms import DEVICE
from kvfx.kernels import OPS
from kvfx.passes.lower import lower
from kvfx.passes.plan import Plan
from kvfx.passes.report import Report
from kvfx.passes.traced_op import call_op
from yardstick import assert_within_rounding

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="benchmarks/gpu.py runs models on CUDA; here the interpreter does")

# A policy for each kernel that a prefill may run.
POLICIES = ["knorm:0.5", "keydiff:0.4", "compactor:0.5", "snapkv:0.6", "h2o_prefill:0.5", "expected_attention:0.5"]
LENGTH = 28


@functools.cache
def one_layer() -> LlamaForCausalLM:
    """The interpreter takes its time for each layer."""
    return fresh_llama(num_hidden_layers=1)


def compressed(policy: str, impl: str, mask: Tensor | None = None) -> kvfx.Cache:
    return kvfx.compile(one_layer(), policy, backend="eager", impl=impl).compress(tokens(2, LENGTH), mask)


def padded() -> Tensor:
    mask = ones(2, LENGTH)
    mask[0, :11] = 0
    return mask


@pytest.mark.sample(1)
@pytest.mark.parametrize(("policy", "is_padded"), [("compactor:0.5", False), *((policy, True) for policy in POLICIES)])
def test_kernels_keep_the_tokens_that_references_keep(policy, is_padded):
    mask = padded() if is_padded else None
    expected, actual = (compressed(policy, impl, mask) for impl in ("reference", "triton"))
    for one, other in zip(expected.layers, actual.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            assert_within_rounding(y, x, x.double())


def test_explain_says_what_ran():
    model = kvfx.compile(llama(), "knorm:0.5", backend="eager", impl="triton")
    model.compress(tokens(1, LENGTH))
    assert {site["lowering"] for site in kvfx.explain(model).as_dict()["sites"]} == {"triton"}
    without_kernel = kvfx.compile(llama(), "lagkv:0.5", backend="eager", impl="triton")
    without_kernel.compress(tokens(1, LENGTH))
    assert {site["lowering"] for site in kvfx.explain(without_kernel).as_dict()["sites"]} == {"triton, but lag reference"}
    by_default = kvfx.compile(llama(), "knorm:0.5", backend="eager")
    by_default.compress(tokens(1, LENGTH))
    assert {site["lowering"] for site in kvfx.explain(by_default).as_dict()["sites"]} == {"reference"}


def test_a_kernel_that_does_not_take_a_shape_is_an_error_where_kernels_are_asked_for():
    wide = fresh_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=260)
    model = kvfx.compile(wide, "knorm:0.5", backend="eager", impl="triton")
    expected = r"LlamaForCausalLM: impl='triton', but the kernel of key_norm cannot run .*: 260 channels are more than 256"
    with pytest.raises(kvfx.KernelUnavailable, match=expected):
        model.compress(tokens(1, LENGTH))
    by_default = kvfx.compile(wide, "knorm:0.5", backend="eager")
    cache = by_default.compress(tokens(1, LENGTH))
    assert cache.layers[0].keys.shape[2] == LENGTH // 2


def lowered(device: str, channels: int, impl: str) -> tuple[fx.GraphModule, Report]:
    """A graph of one `key_norm` after the pass `lower`."""
    graph, report = fx.Graph(), Report()
    with FakeTensorMode(shape_env=ShapeEnv()):
        key = graph.placeholder("key")
        key.meta["val"] = torch.empty(2, 3, 50, channels, device=device)
        graph.output(call_op(graph, report.traces, "key_norm", key))
    module = fx.GraphModule({}, graph)
    lower(module, Plan(None, impl=impl), report)
    return module, report


@pytest.mark.parametrize(
    ("device", "channels", "impl", "form"),
    [
        ("cuda", 64, "auto", "triton"),
        ("cuda", 64, "triton", "triton"),
        ("cuda", 64, "reference", "reference: asked for"),
        ("cuda", 260, "auto", "reference: 260 channels are more than 256"),
        ("cpu", 64, "auto", "reference: tensors are on cpu"),
    ],
)
def test_on_cuda_an_op_becomes_its_kernel_and_elsewhere_its_reference(device, channels, impl, form):
    module, report = lowered(device, channels, impl)
    assert report.lowered == {"key_norm": form}
    ops = {node.target for node in module.graph.nodes if node.op == "call_function"}
    assert (OPS["key_norm"].kernel in ops) == (form == "triton")
    assert OPS["key_norm"].overload not in ops


def test_an_unknown_impl_is_refused():
    with pytest.raises(kvfx.KvfxError, match=r"unknown impl 'cuda'; known: \['auto', 'reference', 'triton'\]"):
        kvfx.compile(llama(), "knorm:0.5", impl="cuda")


WITHOUT_GPU = """
import kvfx, torch
from decoding import llama, tokens
model = kvfx.compile(llama(), "knorm:0.5", backend="eager", impl="triton")
try:
    model.compress(tokens(1, 40))
except kvfx.KernelUnavailable as error:
    print(error)
"""


def test_kernels_asked_for_on_a_cpu_are_an_error():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    told = subprocess.run([sys.executable, "-c", WITHOUT_GPU], env=environment, capture_output=True, text=True, check=True).stdout
    assert "the kernel of key_norm cannot run" in told
    assert "Triton runs on CUDA, not on cpu" in told
    assert "With impl='auto' the reference takes its place." in told
