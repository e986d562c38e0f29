"""An offline queue in a fixed memory: what compression gains when more rows fit, and where the time goes (KV-Compress).

    python benchmarks/throughput.py                  # 256 prompts, all rates: about ten minutes, half of it compilation
    python benchmarks/throughput.py --quick          # 8 prompts, rates 1 and 64, writes nothing
    python benchmarks/throughput.py --prompts 64
    python benchmarks/throughput.py --plot-only      # writes the tables and draws the results again

The set-up is that of arXiv:2410.00161 (256 prompts, twelve tokens read for each one generated, blocks of 16, memory for about three
rows that are not compressed), scaled to the machine: a Llama of random weights on a CPU with one thread, one of the size of
Llama-3.1-8B on a GPU. Every rate has a pool of the same bytes, and `torch.compile` of the plain model, whose cache grows by
concatenation, as many rows as the same bytes hold. Rate 1 keeps everything too, in blocks, scored as at any other rate.

`offline_queue.py` says who is admitted when. The queues take turns, a wave at a time, so that a neighbour on the machine slows all
of them; between them `calibration.py` measures what `cost_model.py` needs to predict each of them. Time is the CPU time of the
process on a CPU, that of the clock on a GPU. A graph that is compiled while it is timed stops the run, as does a prompt that did
not get all its tokens. Writes results/throughput.csv, .md, .png and .svg.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gpu_models
import torch
from calibration import Calibration, Point, drawn
from cost_model import Load, Prediction, Shape, predict
from growing_cache import GrowingServer
from method import write
from offline_queue import BlockServer, Clock, Queue, Request, blocks_kept, schedule_timed
from paper_setups import SETUPS, predictions
from throughput_page import report
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import kvfx

RATES = (1, 2, 4, 8, 16, 64)
PLAIN = "torch.compile"
ROWS = 3  # that fit when nothing is evicted, as in the paper
FEW, MANY = 2, 16  # rows of the micro-measurements
ROUNDS = 24  # of them
SAME = 0.98  # of the answers at rate 1 that are those of the plain model, at least: rounding may tip a draw between two tokens
PHASES = ("prefill", "schedule", "join", "decode", "rest")


@dataclass(frozen=True)
class Row:
    """One queue.

    Attributes:
        setup: model, machine and lengths.
        kind: "measured", or "predicted" where no such machine was at hand.
        rate: of compression, or "torch.compile".
        batch: most rows together; measured or predicted.
        tokens_per_second: read and generated, of the whole queue.
        generated_per_second: generated ones alone.
        multiple: tokens per second over those of the uncompressed queue.
        prefill, schedule, join, decode, rest: seconds in all.
        model_batch, model_seconds: what the cost model says of it, or "" where that is all there is.
        error: model_seconds over the measured seconds, minus 1.
        paper: the paper's tokens per second, or "".
        paper_multiple: the paper's.
        at_paper_batch: predicted multiple if both queues had the paper's batches, or "".
    """

    setup: str
    kind: str
    rate: str
    batch: int
    tokens_per_second: float
    generated_per_second: float
    multiple: float
    prefill: float
    schedule: float
    join: float
    decode: float
    rest: float
    model_batch: int | str = ""
    model_seconds: float | str = ""
    error: float | str = ""
    paper: float | str = ""
    paper_multiple: float | str = ""
    at_paper_batch: float | str = ""


# -- the machine's own scale -------------------------------------------------------------------------------------------------------


def small(device: str) -> LlamaForCausalLM:
    """Four narrow layers in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4, head_dim=32, num_hidden_layers=4,
        vocab_size=512, max_position_embeddings=1024, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


def shape_of(model: LlamaForCausalLM) -> Shape:
    """Of a model, for the cost model."""
    config, size = model.config, model.dtype.itemsize
    return Shape(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size, size, size,
    )  # fmt: skip


def load_of(shape: Shape, prompts: int, tokens: int, output: int) -> Load:
    """A queue, in the memory of `ROWS` whole rows in blocks, and of the block that is nobody's."""
    load = Load(prompts, tokens, output, 0)
    blocks = ROWS * shape.extents * -(-(tokens + output - 1) // load.block) + 1
    return Load(prompts, tokens, output, int(blocks * load.block * (shape.slot_bytes + load.beside)))


def clock_of(device: str) -> Callable[[], float]:
    """Seconds: of this process on a CPU; of all that was started on a GPU."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


class Bench:
    """All queues of one model: what serves them, and the calibration of both kinds of server."""

    def __init__(self, model: LlamaForCausalLM, load: Load, rates: tuple[int, ...], backend: str) -> None:
        self.model, self.load, self.shape, self.backend = model, load, shape_of(model), backend
        self.device = str(model.device.type)
        self.now = clock_of(self.device)
        self.policies = {rate: kvfx.Policy.parse(f"kv_compress(rate={rate})") for rate in {*rates, 1, 64}}
        self.servers: dict[str, Any] = {PLAIN: GrowingServer(model, int(load.bytes), backend)}
        self.servers |= {str(rate): self.blocks(rate) for rate in rates}
        few, many, short = self.ids(FEW), self.ids(MANY), drawn(2 * FEW, load.input // 8, self.shape.vocabulary, 2, self.device)
        grown = GrowingServer(model, 4 * int(load.bytes), backend)
        whole, least = self.blocks(1), self.blocks(64)
        self.calibrations = {
            False: Calibration([
                Point(grown, FEW, load.input, few),
                Point(grown, 2 * FEW, load.input, many),
                Point(grown, 2 * FEW, load.input // 8, short),
            ], load.output, self.now),
            True: Calibration([
                Point(whole, FEW, load.input, few), Point(least, FEW, self.kept(64), few), Point(least, MANY, self.kept(64), many),
            ], load.output, self.now),
        }  # fmt: skip

    def ids(self, count: int, seed: int = 1) -> list[torch.Tensor]:
        """Prompts of the queue's length."""
        return drawn(count, self.load.input, self.shape.vocabulary, seed, self.device)

    def blocks(self, rate: int) -> BlockServer:
        """A server with a pool of its own, which has its memory."""
        pool = kvfx.Pool(bytes=int(self.load.bytes))
        compiled = kvfx.compile(self.model, self.policies[rate], pool=pool, backend=self.backend)
        return BlockServer(compiled, pool, self.policies[rate], self.shape.extents)

    def kept(self, rate: int) -> float:
        """Slots that a head keeps of a prompt in the mean."""
        policy, load = self.policies[rate], self.load
        kept = policy.counts(load.input, self.shape.layers)[0]
        return blocks_kept(load.input, kept, policy.protect.total, self.shape.extents, load.block) * load.block / self.shape.extents

    def queue(self, name: str, prompts: int) -> Queue:
        """A new queue of the first prompts."""
        requests = [Request(ids, self.load.output) for ids in self.ids(prompts, seed=0)]
        return Queue(self.servers[name], requests, Clock(self.now))

    def warm_up(self) -> None:
        """Compile everything: one row, and several."""
        for name in self.servers:
            for prompts in (1, 2):
                self.queue(name, prompts).run()
        for calibration in self.calibrations.values():
            for point in calibration.points:
                Queue(point.server, [Request(point.prompts[0], self.load.output)], Clock(self.now)).run()
            calibration.round()
            calibration.samples.clear()
        gc.collect()  # what compilation leaves, which holds blocks

    def predicted(self, name: str) -> Prediction:
        """What the cost model says of a queue."""
        machine = self.calibrations[name != PLAIN].machine(self.shape, self.load)
        if name == PLAIN:
            load = Load(self.load.prompts, self.load.input, self.load.output, self.load.bytes, block=1, beside=0)
            return predict(self.shape, machine, load, load.input, evicts=False)
        return predict(self.shape, machine, self.load, self.kept(int(name)))

    def measure(self, rounds: int) -> dict[str, Queue]:
        """All queues, by turns; those that are behind go on first."""
        queues = {name: self.queue(name, self.load.prompts) for name in self.servers}
        waves = {name: queue.waves() for name, queue in queues.items()}
        built, measured = counters["stats"]["unique_graphs"], 0
        while (least := min(queue.done for queue in queues.values())) < 1:
            if measured <= rounds * least:
                measured += 1
                for calibration in self.calibrations.values():
                    calibration.round()
            name = min(queues, key=lambda name: queues[name].done)
            with schedule_timed(queues[name].clock):
                next(waves[name], None)
        if counters["stats"]["unique_graphs"] != built:
            raise SystemExit(f"{counters['stats']['unique_graphs'] - built} graphs were compiled while they were timed")
        check_answers(queues, self.load.output)
        return queues

    def rows(self, queues: dict[str, Queue], setup: str) -> Iterator[Row]:
        """What was measured, and what was predicted of it."""
        load, whole = self.load, queues[PLAIN].clock.total
        for name, queue in queues.items():
            total, model = queue.clock.total, self.predicted(name)
            yield Row(
                setup, "measured", name, queue.peak, load.tokens / total, load.prompts * load.output / total, whole / total,
                *(queue.clock.seconds.get(phase, 0.0) for phase in PHASES), model.batch, model.total, model.total / total - 1,
            )  # fmt: skip


def check_answers(queues: dict[str, Queue], output: int) -> None:
    """Everybody got all tokens, and where nothing is evicted those of the plain model."""
    for name, queue in queues.items():
        if any(len(request.answer) != output for request in queue.requests):
            raise SystemExit(f"at rate {name} some prompts did not get all their tokens")
    if "1" in queues:
        pairs = list(zip(queues[PLAIN].requests, queues["1"].requests, strict=True))
        same = sum(plain.answer == ours.answer for plain, ours in pairs) / len(pairs)
        if same < SAME:
            raise SystemExit(f"only {same:.1%} of the answers at rate 1 are those of the plain model")


def paper_rows() -> Iterator[Row]:
    """The paper's set-ups, predicted."""
    for setup in SETUPS:
        load, whole = setup.load, (0.0, 0.0)
        for rate, model, given in predictions(setup):
            if rate == 0:
                whole = model.total, given.total if given else 0.0
            known, multiple = setup.paper.get(rate, ("", ""))
            yield Row(
                setup.name, "predicted", str(rate) if rate else "none", model.batch, load.tokens / model.total,
                load.prompts * load.output / model.total, whole[0] / model.total,
                *(model.seconds.get(phase, 0.0) for phase in PHASES), paper="" if known is None else known,
                paper_multiple=multiple, at_paper_batch=whole[1] / given.total if given else "",
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rates", nargs="+", type=int, default=[*RATES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--name", default="throughput", help="of the result files")
    parser.add_argument("--quick", action="store_true", help="8 prompts, rates 1 and 64; writes nothing")
    parser.add_argument("--plot-only", action="store_true", help="write the tables and the picture of results that are there")
    options = parser.parse_args(arguments)
    if options.plot_only:
        report(options.name)
        return
    if options.quick:
        options.prompts, options.rates = 8, [1, 64]
    torch.set_num_threads(1)
    start = time.perf_counter()
    on_cpu = options.device == "cpu"
    model = small("cpu") if on_cpu else gpu_models.model_of(32, options.device)
    load = load_of(shape_of(model), options.prompts, *((384, 32) if on_cpu else (6000, 500)))
    bench = Bench(model, load, tuple(options.rates), options.backend)
    bench.warm_up()
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    queues = bench.measure(3 if options.quick else ROUNDS)
    model_name = "4 layers of 256, float32" if on_cpu else "8B, bf16"
    title = f"{model_name}, {load.prompts} prompts of {load.input} tokens and {load.output} more"
    rows = list(bench.rows(queues, title))
    if options.quick:
        print(*rows, sep="\n")
        for kind, calibration in bench.calibrations.items():
            print("kvfx" if kind else PLAIN, calibration.machine(bench.shape, load), sep=": ")
        return
    write(options.name, [*rows, *paper_rows()], "python " + shlex.join(sys.argv))
    report(options.name)


if __name__ == "__main__":
    main()
