"""All policies at several keeps: what is still answered, against the bytes that are still held."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

import kvfx
from kvfx.demo import notes, run, table
from kvfx.demo.heatmap import kept_tokens
from kvfx.demo.interval import wilson
from kvfx.demo.measure import ask
from kvfx.policy import Policy
from kvfx.presets import PRESETS

KEEPS = (1.0, 0.5, 0.25, 0.1, 0.05)
SHOWN = 0.25  # the keep of which pictures show the tokens
# By eager, with 5 keeps and 4 documents, tracing included: 30 policies took 270 s of CPU time, Intel Xeon, one thread.
SECONDS_A_POLICY = 10


@dataclass(frozen=True)
class Point:
    """One policy at one keep.

    Attributes:
        policy: its name without the keep.
        keep: the fraction kept that was asked for; what a policy protects may be more.
        right: questions answered word for word.
        questions: asked.
        low, high: 95 % interval of their ratio, by Wilson.
        nbytes: held for a document, mean.
    """

    policy: str
    keep: float
    right: int
    questions: int
    low: float
    high: float
    nbytes: float


@dataclass(frozen=True)
class Sweep:
    """What was measured.

    Attributes:
        full: the full cache.
        points: the policies, all keeps of one together.
        document: the first document.
        answered: of each point at the keep `SHOWN` on that document, by policy: for each question whether it was answered.
        kept: of the same, which tokens each head kept, per layer `[Hkv, S]` bool.
        tokens: of each document.
        documents: how many.
        backend: what ran the graphs.
        seconds: from loading to the last answer.
    """

    full: Point
    points: list[Point]
    document: notes.Document
    answered: dict[str, list[bool]]
    kept: dict[str, list[np.ndarray]]
    tokens: int
    documents: int
    backend: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data, without the texts."""
        return {
            "backend": self.backend,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokens": self.tokens,
            "documents": self.documents,
            "seconds": self.seconds,
            "full": asdict(self.full),
            "points": [{**asdict(point), "share": point.nbytes / self.full.nbytes} for point in self.points],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        keeps = list(dict.fromkeys(point.keep for point in self.points))
        title = (
            f"answered right, of {self.full.questions} questions on {self.documents} documents of {self.tokens} tokens, compressed "
            f"before they were asked; the full cache: {_share(self.full)}"
        )
        grid = Table(title=title, title_justify="left")
        grid.add_column("policy")
        for keep in keeps:
            grid.add_column(f"keep {keep:g}", justify="right", no_wrap=True)
        for policy in dict.fromkeys(point.policy for point in self.points):
            grid.add_row(policy, *(_share(point) for point in self.points if point.policy == policy))
        yield grid
        yield (
            "In brackets: 95 % intervals by Wilson, as if the questions of a document were independent. By "
            f"{self.backend} with {torch.get_num_threads()} threads, {self.seconds:.0f} s in all.\n"
        )
        yield run.CAVEAT


def _share(point: Point) -> str:
    return f"{point.right / point.questions:.0%} ({100 * point.low:.0f}-{100 * point.high:.0f})"


def policies() -> list[str]:
    """The presets that have a keep."""
    return [name for name in PRESETS if Policy.parse(name).budget is not None]


def sweep(
    backend: str = "eager",
    questions: int = 40,
    *,
    documents: int = 4,
    tokens: int = 1024,
    names: Sequence[str] | None = None,
    keeps: Sequence[float] = KEEPS,
    console: Console | None = None,
) -> Sweep:
    """Measure policies at all `keeps` on the packaged model.

    Args:
        backend: what runs the graphs. With "eager" nothing but tracing is waited for.
        questions: how many are asked of each document.
        documents: how many, with seeds from 0 on.
        tokens: length of a document.
        names: policies whose keep is replaced; all presets that have one if None.
        keeps: fractions kept.
        console: where progress is shown; nowhere if None.

    Raises:
        InputError: a document is too short for so many questions.
        PolicyError: a policy is malformed, or keeps everything.
    """
    start = time.perf_counter()
    texts = [notes.write(tokens, questions, seed) for seed in range(documents)]
    chosen = [(name, keep, Policy.parse(name).with_keep(keep)) for name in dict.fromkeys(names or policies()) for keep in keeps]
    console = console or Console(quiet=True)
    count = len(chosen) // len(keeps)
    estimate = f", about {max(1, round(SECONDS_A_POLICY * count / 60))} min on two cores" if backend == "eager" else ""
    console.print(
        f"{count} policies x {len(keeps)} keeps x {questions * documents} questions on {documents} documents of {tokens} tokens, "
        f"by {backend}{estimate}"
    )
    points: list[Point] = []
    answered: dict[str, list[bool]] = {}
    kept: dict[str, list[np.ndarray]] = {}
    with table.progress(console, documents * (1 + len(chosen))) as say:
        model, tokenizer = run.load()
        for name, keep, policy in [("none", 1.0, Policy.parse("none")), *chosen]:
            compressed = kvfx.compile(model, policy, backend=backend)
            rights: list[list[bool]] = []
            nbytes = []
            for index, document in enumerate(texts):
                say(f"{policy.name}, document {index + 1} of {documents}")
                cache = compressed.compress(tokenizer(document.text, return_tensors="pt").input_ids)
                nbytes.append(cache.nbytes)
                rights.append(run.answered(document, tokenizer, ask(compressed, cache, *run.asked(document, tokenizer)).tolist()))
                if index == 0 and (keep == SHOWN or name == "none"):
                    answered[name], kept[name] = rights[0], kept_tokens(cache)
            right = sum(map(sum, rights))
            points.append(Point(name, keep, right, questions * documents, *wilson(right, questions * documents), fmean(nbytes)))
    seconds = time.perf_counter() - start
    return Sweep(points[0], points[1:], texts[0], answered, kept, tokens, documents, backend, seconds)
