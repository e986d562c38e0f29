"""The offline queue of `benchmarks/throughput.py`: its answers, its promise that no row runs out of memory, and its cost model."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, replace
from typing import Any

import cost_model
import pytest
import throughput_page
import torch
from cost_model import Load, Machine, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from offline_queue import BlockServer, Clock, Queue, Request, blocks_at_most, blocks_kept
from paper_setups import SETUPS
from throughput import paper_rows

import kvfx
from decoding import VOCABULARY, fresh_llama
from examples import examples

RATES = (1, 4)
HEADS = 2 * 2  # of two layers
LENGTHS = [(40, 9), (70, 9), (40, 20), (33, 1), (70, 2), (61, 14)]  # of prompts and answers


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [Request(torch.randint(1, VOCABULARY, (1, length), generator=generator), output) for length, output in LENGTHS]


@functools.cache
def llama() -> Any:
    return fresh_llama(num_hidden_layers=2)


@functools.cache
def server(rate: int, blocks: int) -> BlockServer:
    policy = kvfx.Policy.parse(f"kv_compress(rate={rate})")
    pool = kvfx.Pool(bytes=blocks * block_bytes(llama()))
    return BlockServer(kvfx.compile(llama(), policy, pool=pool, backend="eager"), pool, policy, HEADS)


def block_bytes(model: Any) -> int:
    dim = model.config.hidden_size // model.config.num_attention_heads
    return 16 * (2 * dim * 4 + 4)


# -- the queue ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
def test_each_prompt_gets_the_tokens_that_it_gets_alone(rate):
    """Lengths of all kinds in a pool for two or three of them: rows join and leave at any time, and nobody runs out of blocks."""
    serving = server(rate, 90)
    alone = requests()
    for request in alone:
        Queue(serving, [request], Clock()).run()
    together = requests()
    queue = Queue(serving, together, Clock())
    queue.run()
    assert [each.answer for each in together] == [each.answer for each in alone]
    assert [len(each.answer) for each in together] == [output for _, output in LENGTHS]
    assert queue.peak > 1
    assert len(queue.batches) < sum(output - 1 for _, output in LENGTHS)
    serving._collect([])
    assert serving.pool.free == serving.pool.blocks


def test_a_prompt_that_never_fits_is_refused_before_anything_runs():
    serving = server(1, 90)
    Queue(serving, requests()[:1], Clock()).run()  # the pool now has its blocks
    long = Request(torch.ones(1, 2000, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="a prompt of 2000 tokens and 2 more need 504 blocks, and the pool has 89"):
        Queue(serving, [long], Clock())


def test_time_inside_of_something_timed_counts_once():
    ticks = iter([0.0, 1.0, 3.0, 10.0])
    clock = Clock(lambda: next(ticks))
    with clock("outer"), clock("inner"):
        pass
    assert clock.seconds == {"inner": 2.0, "outer": 8.0}
    assert clock.total == 10.0


@given(
    data=st.data(),
    heads=st.integers(1, 6),
    length=st.integers(1, 90),
    remaining=st.integers(0, 40),
    block=st.sampled_from([1, 4, 16]),
)
@settings(max_examples=examples(200))
def test_the_reservation_holds_whichever_heads_keep_the_blocks(data, heads, length, remaining, block):
    """A head that gave up blocks ends in a full one; one that did not, where the prompt ends."""
    kept, protected = data.draw(st.integers(0, length)), data.draw(st.integers(0, length))
    most = -(-length // block)
    spare = blocks_kept(length, kept, protected, heads, block)
    own = []
    for head in range(heads):
        others = heads - head - 1
        least = -(-min(protected, length) // block)
        own.append(data.draw(st.integers(min(least, spare), max(min(least, spare), min(most, spare - others * least)))))
        spare -= own[-1]
    needed = sum(-(-((length if mine == most else mine * block) + remaining) // block) for mine in own)
    assert needed <= blocks_at_most(length, kept, protected, heads, block, remaining)


# -- the cost model ----------------------------------------------------------------------------------------------------------------

TINY = Shape(
    layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, dim=2, vocabulary=10, weight_bytes=2, channel_bytes=4
)  # fmt: skip
APART = Machine(
    launch=1.0, step_launches=3, prefill_launches=5, prefill=100.0, products=50.0, weights=32.0, slots=64.0, kept=16.0,
    schedule=0.25, join=0.5, overlap=False,
)  # fmt: skip


def test_what_a_model_costs_is_its_products():
    assert TINY.weights == 2 * ((4 * 4 + 4 * 2 + 4 * 2 + 4 * 4) + 3 * 4 * 8)  # query, key, value, output; three of the MLP
    assert TINY.head_weights == 40
    assert TINY.model_bytes == (288 + 40 + 40) * 2
    assert TINY.slot_bytes == 2 * 2 * 4
    assert TINY.prefill_flops(3) == 2 * (288 * 3 + 40) + 2 * 2 * 2 * 2 * 9
    assert TINY.row_flops() == 2 * 328
    assert TINY.slot_flops() == 2 * (2 * 2 + 2 * 2)  # two query heads: a product with the key, one with the value


def test_a_step_and_a_queue_by_hand():
    """One after the other: launches, products, weights, slots."""
    step = 3 + 2 * 656 / 50 + 328 * 2 / 32 + 2 * 2 * 10 * 16 / 64
    assert cost_model.step_seconds(TINY, APART, rows=2, slots=10) == pytest.approx(step)
    load = Load(prompts=5, input=6, output=3, bytes=2 * 2 * 8 * 16, block=1, beside=0)
    predicted = cost_model.predict(TINY, APART, load, kept=6)
    assert predicted.batch == 2  # of 8 slots in 2 heads
    two, one = (3 + rows * 656 / 50 + 20.5 + rows * 2 * 7.5 * 16 / 64 for rows in (2, 1))
    assert predicted.seconds["decode"] == pytest.approx(2 * (2 * two + one))
    assert predicted.seconds["prefill"] == pytest.approx(5 * (5 + TINY.prefill_flops(6) / 100))
    assert predicted.seconds["schedule"] == pytest.approx(5 * (6 * 2 * 0.25 + 6 * 2 * 16 / 16))
    assert predicted.seconds["join"] == pytest.approx(5 * 0.5)
    assert predicted.total == pytest.approx(sum(predicted.seconds.values()))
    assert cost_model.predict(TINY, APART, load, kept=6, evicts=False).seconds["schedule"] == 0


def test_blocks_take_whole_blocks_and_one_that_is_nobodys():
    load = Load(prompts=9, input=40, output=18, bytes=1000 * 20, block=16, beside=4)
    assert cost_model.slots_needed(load, kept=16) == 16 + 32
    assert cost_model.rows_that_fit(TINY, load, kept=16) == (1000 - 16) // (2 * 48)
    with pytest.raises(ValueError, match="do not hold a row of 900 and 18 tokens"):
        cost_model.predict(TINY, APART, load, kept=900)


def test_a_machine_that_overlaps_pays_the_longer_of_both():
    both = replace(APART, overlap=True)
    moved, arithmetic = 20.5 + 2 * 2 * 10 * 16 / 64, (2 * 656 + 40 * 16) / 50
    assert cost_model.step_seconds(TINY, both, rows=2, slots=10) == pytest.approx(3 + max(moved, arithmetic))


def test_a_higher_rate_never_predicts_less():
    for setup in SETUPS:
        rates = [cost_model.predict(setup.shape, setup.machine, setup.load, setup.kept(rate)).total for rate in (1, 2, 8, 64)]
        assert rates == sorted(rates, reverse=True)


# -- the page ----------------------------------------------------------------------------------------------------------------------


def test_the_page_calls_predicted_what_was_predicted_and_gives_the_papers_figures_beside_it():
    rows = [{key: float(value) if isinstance(value, int) else value for key, value in asdict(row).items()} for row in paper_rows()]
    page = throughput_page.tables("a machine", rows)
    assert page.count(": predicted\n") == len(SETUPS)
    assert "measured\n" not in page
    (fastest,) = (line for line in page.splitlines() if "| 1875 |" in line)
    assert fastest.startswith("| 64 |")
    assert fastest.rstrip(" |").endswith("5.18")
    assert not math.isnan(float(fastest.split(" | ")[3]))
