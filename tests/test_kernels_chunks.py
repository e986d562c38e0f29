"""Scores inside chunks at the sizes of policies: several pieces and blocks, ends of chunks, wide heads, hard numbers."""

import pytest
import torch

from forms import forms
from kvfx.kernels import OPS, Dims
from kvfx.kernels.leverage import draw_sketch
from test_kernels import Case, slow_chunk_attention, slow_leverage
from yardstick import assert_within_rounding

BOTH = (torch.float64, torch.float32)


@pytest.mark.sample(2)
@forms("chunk_attention")
@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        (Case(Dims(1, 2, 2, 300, 12), torch.bfloat16, "none", False, 0), 256),  # a full chunk without a mask, a short one
        (Case(Dims(1, 1, 2, 256, 128), torch.float32, "none", False, 1), 256),  # keys in several steps
        (Case(Dims(2, 1, 2, 200, 16), torch.bfloat16, "interior", True, 2), 128),
        (Case(Dims(1, 2, 9, 230, 12), torch.float16, "none", False, 3), 100),  # heads for three programs, the last one short
        (Case(Dims(2, 1, 6, 130, 12), torch.float32, "left", False, 4), 65),  # blocks that hold the queries of several heads
        (Case(Dims(1, 1, 1, 65, 80), torch.float16, "none", True, 5), 64),
        (Case(Dims(1, 1, 1, 65, 96), torch.float32, "none", False, 6), 64),
        (Case(Dims(1, 1, 2, 33, 256), torch.bfloat16, "right", False, 7), 32),
        (Case(Dims(1, 1, 2, 33, 255), torch.float32, "none", False, 8), 32),
        (Case(Dims(3, 2, 5, 1, 12), torch.bfloat16, "interior", False, 9), 256),  # rows of one token and of none
    ],
    ids=str,
)
def test_chunk_attention_matches_its_definition_at_the_sizes_of_policies(op, case, chunk):
    B, H, G, S, D = case.dims
    query, key, value = case.draw((B, H * G, S, D), (B, H, S, D), (B, H, S, D + 1 if D < 256 else 40))
    arguments = (query, key, value, case.valid(), chunk, D**-0.5, 3)
    exact, low = (slow_chunk_attention(*arguments, dtype) for dtype in BOTH)
    assert_within_rounding(op(*arguments), low, exact)


@forms("chunk_attention")
@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_absent_keys_draw_no_attention_from_logits_of_one_sign(op, shift):
    """Zeros in the place of absent keys would win against logits far below zero, and lose against those far above it."""
    query, key = torch.full((1, 2, 21, 12), 10.0), shift * 10 + torch.randn(1, 1, 21, 12)
    exact, low = (slow_chunk_attention(query, key, None, None, 16, 1.0, 1, dtype) for dtype in BOTH)
    assert_within_rounding(op(query, key, None, None, 16, 1.0, 1), low, exact)


@forms("chunk_attention")
def test_equal_keys_share_attention_equally(op):
    query, key = torch.randn(1, 3, 21, 12), torch.ones(1, 1, 21, 12)
    torch.testing.assert_close(op(query, key, None, None, 16, 1.0, 1), torch.full((1, 1, 21), 3.0))


@pytest.mark.sample(2)
@forms("leverage")
@pytest.mark.parametrize(
    ("case", "chunk", "size"),
    [
        (Case(Dims(1, 2, 1, 700, 32), torch.bfloat16, "none", False, 0), 512, 48),  # one chunk with its tail: six pieces
        (Case(Dims(1, 1, 1, 1100, 16), torch.float32, "none", True, 1), 512, 48),  # more columns than channels
        (Case(Dims(2, 2, 1, 400, 16), torch.bfloat16, "interior", False, 2), 129, 8),  # pieces of one token
        (Case(Dims(3, 2, 1, 300, 12), torch.float16, "left", True, 3), 0, 6),  # whole rows of several pieces, some of them empty
        (Case(Dims(1, 1, 1, 200, 80), torch.float16, "none", False, 4), 64, 48),
        (Case(Dims(1, 1, 1, 200, 96), torch.bfloat16, "right", False, 5), 0, 64),
        (Case(Dims(1, 1, 1, 150, 256), torch.bfloat16, "none", False, 6), 128, 64),
        (Case(Dims(1, 1, 1, 150, 255), torch.float32, "none", True, 7), 0, 33),
        (Case(Dims(3, 2, 1, 1, 12), torch.bfloat16, "interior", False, 8), 512, 48),  # rows of one token and of none
    ],
    ids=str,
)
def test_leverage_matches_its_definition_at_the_sizes_of_policies(op, case, chunk, size):
    B, H, _, S, D = case.dims
    (key,) = case.draw((B, H, S, D))
    arguments = (key, case.valid(), draw_sketch(case.seed, 0, H, D, size), chunk)
    exact, low = (slow_leverage(*arguments, dtype) for dtype in BOTH)
    assert_within_rounding(op(*arguments), low, exact)


@pytest.mark.sample(3)
@forms("leverage")
@pytest.mark.parametrize("chunk", [0, 256])
@pytest.mark.parametrize("change", ["a common mean", "a sink", "a mean for each piece", "large", "small"])
def test_leverage_keeps_its_precision_far_from_the_origin(op, change, chunk):
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 600, 32, generator=generator)
    far = torch.randn(1, 1, 6, 32, generator=generator)
    if change == "a common mean":
        key += 100 * far[:, :, :1]
    elif change == "a sink":
        key[:, :, 0] *= 200
    elif change == "a mean for each piece":
        key += 100 * far.repeat_interleave(128, 2)[:, :, :600]
    else:
        key *= {"large": 1e4, "small": 1e-4}[change]
    arguments = (key, None, draw_sketch(0, 0, 1, 32, 24), chunk)
    exact, low = (slow_leverage(*arguments, dtype) for dtype in BOTH)
    assert_within_rounding(op(*arguments), low, exact)


@forms("leverage")
def test_rows_of_a_batch_may_have_their_own_sketches(op):
    key = torch.randn(2, 3, 40, 12)
    sketch = torch.stack([draw_sketch(seed, 0, 3, 12, 6) for seed in (0, 1)])
    together = op(key, None, sketch.mT.contiguous().mT, 16)  # strides as they come
    for row in range(2):
        exact, low = (slow_leverage(key[row : row + 1], None, sketch[row], 16, dtype) for dtype in BOTH)
        assert_within_rounding(together[row : row + 1], low, exact)


@forms("leverage")
@pytest.mark.parametrize("chunk", [0, 64])
def test_keys_that_are_all_equal_stand_out_nowhere(op, chunk):
    key = torch.ones(1, 2, 300, 12, dtype=torch.bfloat16)
    assert (op(key, None, draw_sketch(0, 0, 2, 12, 6), chunk) == 0).all()


@forms("leverage")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter computes in numpy
def test_keys_whose_squares_overflow_are_seen(op):
    key = torch.randn(1, 2, 40, 12)
    key[:, 0, 3] = 1e30
    score = op(key, None, draw_sketch(0, 0, 2, 12, 6), 0)
    assert score[:, 0].isnan().any()
    assert score[:, 1].isfinite().all()


@pytest.mark.sample(3)
@forms("leverage", "chunk_attention")
@pytest.mark.parametrize("size", [0.0, 1e-4, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_make_no_nan_of_finite_numbers(op, dtype, size):
    arguments = OPS[op.name].inputs(Dims(S=40), dtype, "cpu", 0)
    arguments = [x * size if isinstance(x, torch.Tensor) and x.dtype == dtype else x for x in arguments]
    assert op(*arguments).isfinite().all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({4: 257}, "chunks of 257 tokens are longer than 256"),
        ({5: -0.5}, "a scale of -0.5 is not positive"),
        ({1: torch.zeros(2, 2, 37, 16).half()}, "queries of torch.float32 and keys of torch.float16 differ"),
        ({2: torch.zeros(2, 2, 37, 257)}, "257 channels are more than 256"),
    ],
    ids=["chunk", "scale", "types", "channels"],  # of what changes: workers must agree on the names of tests
)
def test_chunk_attention_says_what_its_kernel_does_not_take(change, reason):
    arguments = OPS["chunk_attention"].inputs(Dims(), torch.float32, "cpu", 0)
    assert OPS["chunk_attention"].refusal(*arguments) is None
    assert OPS["chunk_attention"].refusal(*[change.get(i, x) for i, x in enumerate(arguments)]) == reason


def test_leverage_says_what_its_kernel_does_not_take():
    key, valid, sketch, chunk = OPS["leverage"].inputs(Dims(), torch.float32, "cpu", 0)
    refusal = OPS["leverage"].refusal
    assert refusal(key, valid, sketch, chunk) is None
    assert refusal(key, valid, torch.randn(2, 16, 65), chunk) == "65 columns of the sketch are more than 64"
    assert refusal(key, valid, sketch.double(), chunk) == "a sketch of torch.float64 is not of float32"
    assert refusal(key.double(), valid, sketch, chunk) == "torch.float64 is not one of float32, bfloat16 and float16"
