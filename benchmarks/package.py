"""What a package costs: its decode steps and its prefill beside those of compiled models, and how long it takes to load.

    python benchmarks/package.py                    # all settings, 31 rounds; most of the time goes into compiling
    python benchmarks/package.py --models narrow --lengths 2048 --rounds 5 --policy knorm:0.5
    python benchmarks/package.py --plot-only        # writes results/package.md and draws results/package.csv again

All sides are Inductor with one thread. A step is a forward on one token; that of the package includes the choice of the token,
which the others leave out. Plain is torch.compile of the transformers model with its StaticCache, of as many slots as the package
has, as many of them filled, and none ever evicted. Before each run the cache is put back, untimed. Loading is of the packaged demo
model, all checksums included, beside a bar of two seconds; its ratio is to that. Writes results/package.csv, .md, .png and .svg.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import decode
import matplotlib
import torch
from decode import STEPS, Prompt
from matplotlib import pyplot
from method import AA, RATIO, Fresh, Row, Subject, compare, number, read, save, table_of, text
from torch import Tensor
from torch._dynamo.utils import counters

import kvfx
from kvfx.demo import notes, run

matplotlib.use("Agg")
EMBEDDED = "embedded"
SETTINGS = [("narrow", 2048), ("narrow", 4096), (EMBEDDED, 1024)]
NEW = 2 * STEPS  # tokens that there is room for
PLAIN, COMPILED, PACKAGE = "torch.compile, StaticCache", "kvfx.compile, StaticCache", "package"
# What is promised, by what is compared with what.
STEP_OF_PLAIN, STEP_OF_COMPILED, PREFILL, LOAD = 0.55, 1.0, 1.05, 2.0


def model_of(name: str) -> Any:
    return run.load()[0] if name == EMBEDDED else decode.model_of(name)


class Packaged:
    """A package and a compiled model of the same policy, behind the same prompt."""

    def __init__(self, model: Any, policy: str, length: int, folder: Path) -> None:
        self.model, self.policy, self.length, self.folder = model, policy, length, folder
        vocabulary = model.config.vocab_size
        self.ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        kvfx.export(model, folder, policy, max_prompt=length, max_new_tokens=NEW, tokenizer=notes.MODEL)
        self.package = kvfx.load(folder)
        self.slots = next(held.shape[2] for held in self.package.about.state if held.name == "layers.0.keys")
        self.compiled = kvfx.compile(model, policy)
        self.cache = kvfx.StaticCache(self.slots, length + NEW)

    def steps(self) -> Fresh:
        """Steps of the package, as a user gets tokens from it."""
        cache, token = self.package.compress(self.ids), torch.full((1, 1), 7)
        before = cache.copy()

        def prepare() -> Callable[[], object]:
            for tensor, held in zip(cache.tensors, before.tensors, strict=True):
                if tensor.dim() < 4:  # keys and values behind the others are room
                    tensor.copy_(held)
            cache.seen, cache.room = before.seen, before.room
            tokens = self.package.stream(token, cache=cache, max_new_tokens=STEPS + 1, stop=())
            next(tokens)  # which the first forward, over `token`, has chosen
            return lambda: list(itertools.islice(tokens, STEPS))

        return Fresh(prepare)

    def compiled_steps(self) -> Fresh:
        """Steps of the compiled model on its static cache."""
        self.cache.reset()
        self.compiled.compress(self.ids, past_key_values=self.cache)

        def prepare() -> Callable[[], object]:
            self.cache.crop(self.length - self.cache.get_seq_length())
            return decode.steps(self.compiled, self.cache)

        return Fresh(prepare)

    def plain_steps(self) -> Fresh:
        """Steps of the plain model, in as many slots."""
        return decode.static_cache(Prompt(self.model, self.ids[:, : self.slots - STEPS]))

    def compiled_prefill(self) -> Fresh:
        """The prompt's forward, into a static cache."""

        def prepare() -> Callable[[], object]:
            self.cache.reset()
            return lambda: self.compiled.compress(self.ids, past_key_values=self.cache)

        return Fresh(prepare)

    def prefill(self) -> Tensor:
        """The same by the package."""
        return self.package.compress(self.ids).tensors[0]


def measure(name: str, model: Any, length: int, options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        both = Packaged(model, options.policy, length, Path(folder) / "package")
        check_same(both)
        setting, rounds, goal = f"{name} S={length}", options.rounds, {PACKAGE: STEP_OF_COMPILED}
        rows = compare(
            f"{setting}, prefill / {COMPILED}",
            both.compiled_prefill(),
            {PACKAGE: both.prefill},
            goals={PACKAGE: PREFILL},
            rounds=rounds,
        )
        steps = both.steps()
        rows += compare(f"{setting}, step / {COMPILED}", both.compiled_steps(), {PACKAGE: steps}, goals=goal, rounds=rounds)
        plain = both.plain_steps()
        plain()
        built = counters["stats"]["unique_graphs"]
        rows += compare(f"{setting}, step / {PLAIN}", plain, {PACKAGE: steps}, goals={PACKAGE: STEP_OF_PLAIN}, rounds=rounds)
        if counters["stats"]["unique_graphs"] != built:
            raise SystemExit("a graph was compiled while it was timed")
        return rows + (loading(both.folder, rounds) if name == EMBEDDED else [])


def check_same(both: Packaged) -> None:
    """Compile everything; the package has to say what the compiled model says."""
    settings = {"do_sample": False, "eos_token_id": None}
    expected = both.compiled.generate(both.ids, max_new_tokens=STEPS, past_key_values=both.cache, **settings)
    if not torch.equal(both.package.generate(both.ids, max_new_tokens=STEPS, stop=()), expected):
        raise SystemExit("the package says other tokens than the compiled model")
    both.cache.reset()


def loading(folder: Path, rounds: int) -> list[Row]:
    """How long a package takes to load, over the bar."""
    rows = compare("load", lambda: kvfx.load(folder), {"load": lambda: kvfx.load(folder)}, rounds=rounds)
    (row,) = (row for row in rows if row.variant == "load")
    low, high = (row.seconds / LOAD * bound for bound in (row.low, row.high))
    ratio = row.seconds / LOAD
    verdict = "met" if high < 1 else "not met" if low > 1 else "undecided"
    return [
        replace(
            row, setting=f"{EMBEDDED}, load / {LOAD:.0f} s", ratio=ratio, low=low, high=high, baseline_seconds=LOAD, goal=1.0,
            verdict=verdict,
        )
    ]  # fmt: skip


def table(name: str) -> str:
    about = [
        "CPU time over that of what stands behind the slash: median of pairs, with its 95 % interval. A step is the mean of",
        f"{STEPS}. The plain model holds as many slots as the package and is never compressed. A goal is met, or not, when the",
        "ratio is further from it than the A/A interval reaches from 1; nearer is undecided.",
    ]
    each: Callable[[Any], float] = lambda row: 1000 / (STEPS if ", step" in row["setting"] else 1)  # noqa: E731
    columns = {
        "setting / baseline": text("setting"), "what": text("variant"), **RATIO, "goal": number("goal", 2), "": text("verdict"),
        "ms": number("seconds", 2, each), "baseline ms": number("baseline_seconds", 2, each), "pairs": number("rounds", 0),
    }  # fmt: skip
    return table_of(name, about, columns)


def plot(name: str) -> None:
    """Draw `results/NAME.csv`: a bar for each ratio, its goal beside it."""
    where, rows = read(name)
    rows = [row for row in rows if row["variant"] != AA]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.35 * len(rows) + 1.2))
    axes.barh(range(len(rows)), [row["ratio"] for row in rows], color="tab:blue")
    axes.scatter([row["goal"] for row in rows], range(len(rows)), marker="|", s=160, color="black", label="goal, at most")
    axes.set_yticks(range(len(rows)), [row["setting"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of the package over that of the baseline")
    axes.legend(fontsize=8)
    axes.set_title(f"Packages\n{where}", fontsize=8)
    save(figure, name)
    pyplot.close(figure)


SUBJECT = Subject("package", SETTINGS, measure, table, plot, model_of)

if __name__ == "__main__":
    PARSER = SUBJECT.parser(__doc__)
    PARSER.add_argument("--policy", default="compactor:0.5")
    SUBJECT.run(PARSER.parse_args())
