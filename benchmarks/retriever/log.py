"""What a training run said: a line of JSON for each record, and a table of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retriever.accuracy import Accuracy
from retriever.tasks import TASKS

Record = dict[str, Any]


class Log:
    """Records in a file, each with the step it belongs to. A log without a file only prints.

    Args:
        path: of the file, or None.
        step: the run goes on from here; records of later steps, which the checkpoint does not know, and of a
            final accuracy are dropped.
    """

    def __init__(self, path: Path | None, step: int = 0) -> None:
        self.path = path
        if path is None:
            return
        said = read(path) if path.exists() and step else []
        kept = [record for record in said if record["step"] <= step and record["kind"] != "final"]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)

    def __call__(self, kind: str, step: int, **values: Any) -> None:
        """Append a record and print it."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        print(f"{kind:>8} {step:>6}  " + "  ".join(f"{key} {_short(value)}" for key, value in values.items()), flush=True)


def read(path: Path) -> list[Record]:
    """All records of a log. A last line that was cut off while it was written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def accuracy_row(results: Sequence[Accuracy]) -> Record:
    """Results at one length, by task, for a record."""
    return {one.task: one.right for one in results} | {"asked": results[0].asked, "context": results[0].tokens}


def page(records: Sequence[Record]) -> str:
    """A log as Markdown: where it ran, the final accuracy with its intervals, and how it came about.

    Raises:
        ValueError: no training is in it.
    """
    starts = [record for record in records if record["kind"] == "start"]
    steps = [record for record in records if record["kind"] == "train"]
    if not starts or not steps:
        raise ValueError("the log tells of no training; expected that of the run that saved the checkpoint")
    first, last = starts[-1], steps[-1]
    state = "all of its" if last["step"] == first["of"] else f"cut short, of {first['of']:,}"
    lines = [
        "# Training of the packaged model",
        "",
        f"`{first['command']}` on {first['machine']}.",
        f"{last['step']:,} steps ({state} steps), {last['seen'] / 1e6:.1f} M tokens, {last['seconds'] / 60:.0f} minutes of "
        f"training, seed {first['recipe']['seed']}, started {len(starts)} time(s).",
        "Ordinary initialisation. The weights are those of the last step, chosen by no evaluation.",
        "",
        "## Accuracy of the shipped weights",
        "",
        "Exact match of greedy answers with the full cache, weights in float16 and arithmetic in float32; decoys as in",
        "`documents.py`. Right of asked, and the 95 % Wilson interval in per cent.",
        "",
        *_final(records),
        "",
        "## On the way",
        "",
        "Right answers at the given length of context, full cache.",
        "",
        *_way(records),
        "",
        "Loss in nats per token, mean of the steps since the line before.",
        "",
        "| step | minutes | tokens of a sample | loss of answers | of prose | tokens/s |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['step']} | {r['seconds'] / 60:.1f} | {r['length']} | {r['loss']:.3f} | {r['prose']:.3f} | {r['speed']:,.0f} |"
            for r in _thinned(steps, 40)
        ),
        "",
    ]
    return "\n".join(lines)


def _final(records: Sequence[Record]) -> list[str]:
    rows = {record["context"]: record for record in records if record["kind"] == "final"}
    lines = ["| tokens | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for context, row in sorted(rows.items()):
        results = [Accuracy(task, context, row[task], row["asked"]) for task in TASKS]
        cells = [f"{one.right}/{one.asked} ({100 * one.interval[0]:.1f}-{100 * one.interval[1]:.1f})" for one in results]
        lines.append(f"| {context:,} | " + " | ".join(cells) + " |")
    return lines


def _way(records: Sequence[Record]) -> list[str]:
    lines = ["| step | context | asked | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 3) + "|"]
    for row in records:
        if row["kind"] == "accuracy":
            cells = (row["step"], row["context"], row["asked"], *(row[task] for task in TASKS))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _thinned(records: Sequence[Record], most: int) -> list[Record]:
    every = -(-len(records) // most)
    return [record for index, record in enumerate(records, 1) if index % every == 0 or index == len(records)]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return f"({len(value)} entries)" if isinstance(value, dict) else str(value)
