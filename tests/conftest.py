"""What every test stands on: no network, one thread, one seed, and no compiled graphs left by other modules."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; models of tests are made, never fetched
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: kernels run on tensors of the CPU

torch.set_num_threads(1)  # the models are tiny; threads only wait for each other


@pytest.fixture(autouse=True)
def seed():
    """Start every test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def forget_graphs():
    """Drop what Dynamo compiled for a module's tests when they are done."""
    yield
    torch._dynamo.reset()
