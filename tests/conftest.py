"""What every test stands on: no network, one thread, one seed, and no compiled graphs left by other modules."""

import gc
import os
from collections import defaultdict

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; models of tests are made, never fetched
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import examples

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: kernels run on tensors of the CPU

torch.set_num_threads(1)  # the models are tiny; threads only wait for each other
gc.set_threshold(50_000, 20, 100)  # tracing makes very many objects that live on: looking for garbage took a tenth of the time


def pytest_configure(config):
    """Draw all examples of each property where no test is left out."""
    examples.all_of_them = not config.option.markexpr


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow all rows of a test marked `sample(n)` but n of them, from the first to the last in even steps."""
    rows = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            rows[item.parent.nodeid, item.originalname].append(item)
    for found in rows.values():
        (count,) = found[0].get_closest_marker("sample").args
        drawn = {round(place * (len(found) - 1) / max(1, count - 1)) for place in range(count)}
        for place, item in enumerate(found):
            if place not in drawn:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed():
    """Start every test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def forget_graphs():
    """Drop what Dynamo compiled for a module's tests when they are done."""
    yield
    torch._dynamo.reset()
