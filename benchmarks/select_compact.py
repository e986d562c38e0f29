"""Choosing and moving the kept tokens: kvfx's `select` and `compact` against top-k, sort and gather.

    python benchmarks/select_compact.py             # all settings, 31 rounds: about ten minutes
    python benchmarks/select_compact.py --tokens 4096 --rounds 11

Both sides are compiled by Inductor, with one thread. The other side chooses arbitrarily among equal scores. `share` is the time
over that of a layer's projections, MLP and attention at the speed of one large matmul, which no prefill reaches: an upper bound.
Writes results/select_compact.csv and .md. The file is not called `select`, because Python has a module of this name.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from method import AA, RESULTS, Row, compare, machine, write
from torch import Tensor

from kvfx.kernels.compact import compact
from kvfx.kernels.select import select

TOKENS = [1024, 4096, 16384, 65536, 131072]
KEEPS = [0.5, 0.1]


@dataclass(frozen=True)
class Shape:
    """A layer: hidden and MLP sizes, query heads, KV heads, which are the rows of a batch of one, and channels of a head."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    dim: int

    def flops(self, tokens: int) -> float:
        """Of a prefill: projections, MLP and causal attention."""
        projections = self.hidden * self.dim * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * tokens * (projections + 3 * self.hidden * self.mlp) + 2.0 * self.heads * self.dim * tokens * tokens


SHAPES = [Shape(512, 1408, 8, 2, 64), Shape(2048, 5632, 16, 4, 128), Shape(4096, 14336, 32, 8, 128)]


def ours(key: Tensor, value: Tensor, positions: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return compact(key, value, positions, select(scores, count, None), False)


def theirs(key: Tensor, value: Tensor, positions: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return compact(key, value, positions, scores.topk(count, -1).indices.sort(-1).values, False)


def matmul_speed() -> float:
    """Flops per second of a large float32 matmul."""
    a = torch.randn(2048, 2048)
    a @ a
    start = time.process_time()
    for _ in range(5):
        a @ a
    return 5 * 2 * 2048**3 / (time.process_time() - start)


def repeats(tokens: int) -> int:
    """Calls timed together, so that even of the shortest rows they take milliseconds."""
    return max(1, 65536 // tokens)


def measure(shape: Shape, tokens: int, keep: float, rounds: int) -> list[Row]:
    """A layer's keys and values as a model lays them out: the heads of a token beside each other."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, tokens, shape.kv_heads, shape.dim, generator=generator).transpose(1, 2) for _ in range(2))
    scores = torch.randn(1, shape.kv_heads, tokens, generator=generator)
    positions = torch.arange(tokens, dtype=torch.int32)[None]
    inputs = (key, value, positions, scores, int(tokens * keep))
    setting = f"rows={shape.kv_heads} D={shape.dim} S={tokens} keep={keep}"
    them, us = (functools.partial(_repeat, function, repeats(tokens), inputs) for function in (THEIRS, OURS))
    return compare(setting, them, {"kvfx": us}, goals={"kvfx": 1.0}, rounds=rounds)


def _repeat(function: Callable[..., object], times: int, inputs: tuple[object, ...]) -> None:
    for _ in range(times):
        function(*inputs)


OURS, THEIRS = (torch.compile(function, dynamic=True, fullgraph=True) for function in (ours, theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    speed = matmul_speed()
    rows: list[Row] = []
    lines = [
        f"Measured on {machine()}.\n",
        "CPU time of `select` and `compact` over that of top-k, sort and gather, median of paired runs with its 95 % interval.",
        f"`share`: of a layer's arithmetic at {speed / 1e9:.0f} Gflop/s, the speed of a large matmul here.\n",
        "| setting | ratio | 95 % | A/A 95 % | goal | | ms | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for tokens in options.tokens:
            for keep in KEEPS:
                noise, row = measure(shape, tokens, keep, options.rounds)
                assert noise.variant == AA
                seconds = row.seconds / repeats(tokens)
                share = seconds / (shape.flops(tokens) / speed)
                intervals = f"{row.low:.3f}-{row.high:.3f} | {noise.low:.3f}-{noise.high:.3f}"
                lines.append(
                    f"| {row.setting} | {row.ratio:.3f} | {intervals} | {row.goal} | {row.verdict} | {1e3 * seconds:.2f} "
                    f"| {100 * share:.2f} % |"
                )
                print(lines[-1], flush=True)
                rows += [noise, row]
                write("select_compact", rows, "python " + shlex.join(sys.argv))
                (RESULTS / "select_compact.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
