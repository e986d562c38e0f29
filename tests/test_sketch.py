"""The matrices of leverage scores, drawn or given."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx.kernels.leverage import draw_sketch
from test_equivalence import decoder

IDS = torch.randint(0, 97, (2, 200), generator=torch.Generator().manual_seed(0))


def drawn(seed: int) -> list[torch.Tensor]:
    return [draw_sketch(seed, layer, 2, 64, 48) for layer in range(2)]


@pytest.fixture(scope="module")
def model():
    return decoder("llama", 2, 2, 64, 0)


def kept(model, ids: torch.Tensor, policy: str = "compactor:0.3", **options) -> list[torch.Tensor]:
    cache = kvfx.compile(model, policy, backend="eager", **options).compress(ids)
    return [layer.positions for layer in cache.layers]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_given_sketch_is_used_and_the_drawn_one_is_that_of_the_seed(model):
    default = kept(model, IDS)
    assert equal(default, kept(model, IDS, sketch=drawn(0)))
    other = kept(model, IDS, sketch=drawn(5))
    assert not equal(default, other)
    assert equal(other, kept(model, IDS, "compactor(seed=5):0.3"))


@pytest.mark.slow
def test_each_row_may_have_a_sketch_of_its_own(model):
    rows = [drawn(0), drawn(5)]
    together = kept(model, IDS, sketch=[torch.stack(matrices) for matrices in zip(*rows, strict=True)])
    for row, sketch in enumerate(rows):
        alone = kept(model, IDS[row : row + 1], sketch=sketch)
        assert equal([positions[row : row + 1] for positions in together], alone)


def test_sketches_for_another_number_of_rows_are_refused(model):
    compiled = kvfx.compile(model, "compactor:0.3", backend="eager", sketch=[matrix[None] for matrix in drawn(0)])
    with pytest.raises(kvfx.InputError, match=r"are for \[1\] rows, the prompt has 2"):
        compiled.compress(IDS)
