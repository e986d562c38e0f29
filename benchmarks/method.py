"""How a timed bar is measured: one thread, process CPU time, alternating pairs, a bootstrap interval, and an A/A row beside it."""

from __future__ import annotations

import csv
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One variant against the baseline, in one setting.

    Attributes:
        setting: what was run, e.g. the model and the prompt length.
        variant: what differs from the baseline; "A/A" is the baseline against itself.
        ratio, low, high: median of the paired ratios of CPU time, and its 95 % bootstrap interval.
        seconds, baseline_seconds: medians of CPU time.
        floor: the ratio that the added arithmetic alone would give at the baseline's speed, or "" if not known.
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
    rounds: int


def compare(
    setting: str,
    baseline: Callable[[], object],
    variants: dict[str, Callable[[], object]],
    floors: dict[str, float] | None = None,
    rounds: int = 31,
    report: Callable[[Row], None] = print,
) -> list[Row]:
    """Measure each variant in alternating pairs with the baseline; everything is run twice before it is timed."""
    torch.set_num_threads(1)
    rows = []
    for name, variant in {"A/A": baseline, **variants}.items():
        for _ in range(2):
            baseline(), variant()
        base_times, times = [], []
        for index in range(rounds):
            order = [(baseline, base_times), (variant, times)]
            for run, record in order if index % 2 == 0 else reversed(order):
                record.append(_cpu_seconds(run))
        ratios = [b / a for a, b in zip(base_times, times, strict=True)]
        low, high = _bootstrap_median(ratios)
        row = Row(
            setting, name, statistics.median(ratios), low, high, statistics.median(times), statistics.median(base_times),
            (floors or {}).get(name, ""), rounds,
        )  # fmt: skip
        report(row)
        rows.append(row)
    return rows


def _cpu_seconds(run: Callable[[], object]) -> float:
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


def write(name: str, rows: Iterable[Row], command: str) -> Path:
    """Write rows to `results/NAME.csv`, with the machine and the command in front."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        file.write(f"# {machine()}\n# {command}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(row).items()})
    return path
