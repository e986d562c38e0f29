"""The choice of a token: what transformers draws from, and nothing that makes no sense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import kvfx
from kvfx.sampling import Sampling

LOGITS = st.integers(0, 2**31).map(lambda seed: 3 * torch.randn(3, 11, generator=torch.Generator().manual_seed(seed)))


@settings(deadline=None)
@given(LOGITS, st.floats(0.1, 5), st.integers(0, 15), st.floats(0.05, 1))
def test_tokens_are_drawn_with_the_probabilities_of_transformers(logits, temperature, top_k, top_p):
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = LogitsProcessorList(steps)(torch.zeros(3, 1, dtype=torch.long), logits).softmax(-1)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).probabilities(logits), expected)


@settings(deadline=None)
@given(LOGITS)
def test_without_a_temperature_the_likeliest_token_is_taken(logits):
    assert torch.equal(Sampling().choose(logits), logits.argmax(-1))


def test_equal_seeds_draw_equal_tokens():
    logits = torch.zeros(4, 1000)
    drawn = [Sampling(1.0).choose(logits, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_what_never_is_drawn_has_no_probability():
    logits = torch.tensor([[4.0, 3.0, 2.0, -5.0]])
    assert (Sampling(1.0, top_k=2).probabilities(logits) > 0).tolist() == [[True, True, False, False]]
    assert (Sampling(1.0, top_p=0.1).probabilities(logits) > 0).tolist() == [[True, False, False, False]]


WRONG = {
    "temperature": ({"temperature": -1}, "temperature=-1: expected 0"),
    "no number": ({"temperature": float("nan")}, "temperature=nan"),
    "top_k": ({"temperature": 1, "top_k": -1}, "top_k=-1"),
    "top_p": ({"temperature": 1, "top_p": 0}, r"top_p=0: expected a probability in \(0, 1\]"),
    "nothing drawn": ({"top_p": 0.5}, "temperature=0 draws none. Give a temperature"),
}


@pytest.mark.parametrize("case", WRONG)
def test_numbers_that_make_no_sense_are_refused(case):
    numbers, message = WRONG[case]
    with pytest.raises(kvfx.InputError, match=message):
        Sampling(**numbers)
