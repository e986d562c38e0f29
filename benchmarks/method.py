"""How a timed bar is measured: one thread, process CPU time, alternating pairs, a bootstrap interval, and an A/A row beside it.

Also what every benchmark writes: a CSV with the machine, the versions and the command in front.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
Column = Callable[[Mapping[str, Any]], str]  # of a table, from a row
AA = "A/A"


@dataclass(frozen=True)
class Row:
    """One variant against the baseline, in one setting.

    Attributes:
        setting: what was run, e.g. the model and the prompt length.
        variant: what differs from the baseline; "A/A" is the baseline against itself.
        ratio, low, high: median of the paired ratios of CPU time, and its 95 % bootstrap interval.
        seconds, baseline_seconds: medians of CPU time.
        floor: the ratio that the added arithmetic alone would give at the baseline's speed, or "" if not known.
        goal: the ratio that is promised, or "" if none is.
        verdict: "met" or "not met" if the ratio is further from the goal than the A/A interval reaches from 1, else "undecided".
        rounds: pairs measured.
    """

    setting: str
    variant: str
    ratio: float
    low: float
    high: float
    seconds: float
    baseline_seconds: float
    floor: float | str
    goal: float | str
    verdict: str
    rounds: int


@dataclass(frozen=True)
class Held(Row):
    """A row of which the memory counts too.

    Attributes:
        held: bytes that the variant holds, over those that the baseline holds.
        bar: what `held` is promised to be at most, or "" if nothing is.
    """

    held: float
    bar: float | str


@dataclass(frozen=True)
class Subject:
    """What a benchmark measures, of models at lengths, and how it shows it.

    Attributes:
        name: of the result files, unless the command line gives another.
        settings: models and lengths, by name.
        measure: rows of one setting, from the model's name, what `make` made of it, the length and the options.
        table: results/NAME.md, from NAME.
        plot: draws results/NAME.png and .svg, from NAME.
        make: what is measured at all lengths of one model, from its name.
    """

    name: str
    settings: Sequence[tuple[str, int]]
    measure: Callable[[str, Any, int, argparse.Namespace], list[Row]]
    table: Callable[[str], str]
    plot: Callable[[str], None]
    make: Callable[[str], Any]

    def parser(self, about: str | None) -> argparse.ArgumentParser:
        """The command line, to which a benchmark may add."""
        models = list(dict.fromkeys(model for model, _ in self.settings))
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--lengths", nargs="+", type=int)
        parser.add_argument("--models", nargs="+", default=models)
        parser.add_argument("--rounds", type=int, default=31)
        parser.add_argument("--name", default=self.name, help="of the result files")
        parser.add_argument("--plot-only", action="store_true", help="write the table and the picture of results that are there")
        return parser

    def run(self, options: argparse.Namespace) -> None:
        """Measure the settings that were asked for; write and show what there is after each."""
        torch.set_num_threads(1)
        rows: list[Row] = []
        for name in () if options.plot_only else options.models:
            model = self.make(name)
            for length in (length for setting, length in self.settings if setting == name):
                if options.lengths and length not in options.lengths:
                    continue
                rows += self.measure(name, model, length, options)
                write(options.name, rows, "python " + shlex.join(sys.argv))
                self.report(options.name)
        if options.plot_only:
            self.report(options.name)

    def report(self, name: str) -> None:
        """Write and print the table of results/NAME.csv, and draw it."""
        text = self.table(name)
        print(text, flush=True)
        (RESULTS / f"{name}.md").write_text(text)
        self.plot(name)


@dataclass(frozen=True)
class Fresh:
    """A run that uses up what it works on: `prepare` makes that anew, untimed, and returns what is timed."""

    prepare: Callable[[], Callable[[], object]]

    def __call__(self) -> object:
        """Prepare and run."""
        return self.prepare()()


def compare(
    setting: str,
    baseline: Callable[[], object],
    variants: Mapping[str, Callable[[], object]],
    floors: dict[str, float] | None = None,
    goals: dict[str, float] | None = None,
    rounds: int = 31,
) -> list[Row]:
    """Measure all variants, each paired with a baseline run near it; everything is run twice before it is timed.

    A round is baseline, half of the variants, baseline again, the other half. A variant is paired with the baseline of its half;
    the second baseline with the first one, further apart than any other pair, is the A/A row. Every other round runs backwards,
    and the variants rotate, so that each stands at each distance, before and after.
    """
    torch.set_num_threads(1)
    for run in (baseline, *variants.values()):
        run(), run()
    ratios: dict[str, list[float]] = {name: [] for name in (AA, *variants)}
    times: dict[str, list[float]] = {name: [] for name in (AA, *variants)}
    first_times = []
    for index in range(rounds):
        turn = index // 2 % max(1, len(variants))
        names = [*variants][turn:] + [*variants][:turn]
        half = (len(names) + 1) // 2
        sequence = ["", *names[:half], AA, *names[half:]]
        took: dict[str, float] = {}
        for name in sequence if index % 2 == 0 else reversed(sequence):
            took[name] = _cpu_seconds(variants.get(name, baseline))
        for name in (AA, *names):
            times[name].append(took[name])
            ratios[name].append(took[name] / took[AA if name in names[half:] else ""])
        first_times.append(took[""])
    rows = []
    for name in ratios:
        low, high = _bootstrap_median(ratios[name])
        row = Row(
            setting, name, statistics.median(ratios[name]), low, high, statistics.median(times[name]),
            statistics.median(first_times), (floors or {}).get(name, ""), (goals or {}).get(name, ""), "", rounds,
        )  # fmt: skip
        rows.append(row)
    return [replace(row, verdict=_verdict(row, rows[0])) for row in rows]


def with_bytes(rows: Sequence[Row], baseline: str, held: Mapping[str, int], bars: Mapping[str, float]) -> list[Row]:
    """Rows against `baseline`, and beside each the bytes that it holds, of all titles."""
    return [
        Held(**asdict(row), held=held.get(row.variant, held[baseline]) / held[baseline], bar=bars.get(row.variant, ""))
        for row in rows
    ]


def number(key: str, digits: int, scale: Callable[[Mapping[str, Any]], float] = lambda row: 1) -> Column:
    """For a table: a number of a row, times `scale`; nothing where the row has none."""
    return lambda row: f"{scale(row) * row[key]:.{digits}f}" if isinstance(row[key], float) else ""


def text(key: str) -> Column:
    """For a table: a text of a row."""
    return lambda row: str(row[key])


RATIO: dict[str, Column] = {"ratio": number("ratio", 3), "95 %": lambda row: f"{row['low']:.3f}-{row['high']:.3f}"}


def table_of(name: str, about: Sequence[str], columns: Mapping[str, Column]) -> str:
    """What `results/NAME.csv` says, as Markdown: where it was measured, what it is about, and a line for each row."""
    where, rows = read(name)
    begin = where if where.startswith("Predicted") else f"Measured on {where}"
    return "\n".join([f"{begin}.\n", *about, "", *markdown(rows, columns), ""])


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> list[str]:
    """The lines of a table."""
    lines = ["|".join(f" {title} " if title else " " for title in columns), "|".join(["---"] * len(columns))]
    lines += [" " + " | ".join(cell(row) for cell in columns.values()) + " " for row in rows]
    return [f"|{line}|" for line in lines]


def bytes_column(row: Mapping[str, Any]) -> str:
    """For a table: bytes held, and whether their bar is met; nothing for results that are older than this column."""
    if "held" not in row:
        return ""
    bar = f" (bar {row['bar']:.2f}, {'met' if row['held'] <= row['bar'] else 'not met'})" if isinstance(row["bar"], float) else ""
    return f"{row['held']:.3f}{bar}"


def _verdict(row: Row, noise: Row) -> str:
    if isinstance(row.goal, str):
        return ""
    width = max(noise.high - 1, 1 - noise.low)
    if abs(row.ratio - row.goal) <= width:
        return "undecided"
    return "met" if row.ratio < row.goal else "not met"


def _cpu_seconds(run: Callable[[], object]) -> float:
    if isinstance(run, Fresh):
        run = run.prepare()
    start = time.process_time()
    run()
    return time.process_time() - start


def _bootstrap_median(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def machine() -> str:
    """What the numbers were measured on."""
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{processor}, 1 thread; {versions}"


def write(name: str, rows: Sequence[Any], command: str, where: str = "") -> Path:
    """Write rows, dataclasses of one kind, to `results/NAME.csv`, with the machine, or `where`, and the command in front."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        file.write(f"# {where or machine()}\n# {command}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(row).items()})
    return path


def read(name: str) -> tuple[str, list[dict[str, Any]]]:
    """The machine that `results/NAME.csv` was measured on, and its rows; numbers are floats."""
    lines = (RESULTS / f"{name}.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return lines[0].removeprefix("# "), [{key: _number(value) for key, value in row.items()} for row in rows]


def save(figure: Any, name: str) -> None:
    """Write a matplotlib figure to `results/NAME.png` and `results/NAME.svg`."""
    for kind in ("png", "svg"):
        figure.savefig(RESULTS / f"{name}.{kind}", dpi=150, bbox_inches="tight")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
