"""What `throughput.py` found, as Markdown and as a picture: a table and a panel for each set-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from method import RESULTS, Column, markdown, number, read

from kvfx.demo import figure

Result = Mapping[str, Any]  # a row of the CSV
PHASES = ("prefill", "schedule", "join", "decode", "rest")
GOAL = 0.15  # how far the cost model may be from a measured queue


def report(name: str) -> None:
    """Write and print the tables of results/NAME.csv, and draw it."""
    page = tables(*read(name))
    print(page, flush=True)
    (RESULTS / f"{name}.md").write_text(page)
    picture(read(name)[1], name)


def setups(rows: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """The rows of each set-up."""
    return [(setup, list(each)) for setup, each in groupby(rows, lambda row: row["setup"])]


# -- tables ------------------------------------------------------------------------------------------------------------------------


def share(phase: str) -> Column:
    """Of all seconds, those of one phase."""
    return lambda row: f"{100 * row[phase] / sum(row[each] for each in PHASES):.0f} %"


def percent(key: str) -> Column:
    """A signed share."""
    return lambda row: f"{100 * row[key]:+.1f} %"


def rate(row: Result) -> str:
    """The rate, whichever type it was read as."""
    return f"{row['rate']:.0f}" if isinstance(row["rate"], float) else row["rate"]


BOTH: dict[str, Column] = {
    "rate": rate, "batch": number("batch", 0), "tokens/s": number("tokens_per_second", 0), "multiple": number("multiple", 2),
    **{phase: share(phase) for phase in PHASES[:-1]},
}  # fmt: skip
MEASURED = {**BOTH, "rest": share("rest"), "cost model: batch": number("model_batch", 0), "seconds": percent("error")}
PREDICTED = {
    **BOTH, "with the paper's batches": number("at_paper_batch", 2), "paper, tokens/s": number("paper", 0),
    "paper, multiple": number("paper_multiple", 2),
}  # fmt: skip


def tables(where: str, rows: Sequence[Result]) -> str:
    """All of results/NAME.md."""
    lines = [
        "# An offline queue in a fixed memory", "",
        "Tokens per second count those read and those generated, over the whole queue. All queues of a set-up have the same",
        "bytes for keys and values; `torch.compile` and `none` are without kvfx, `multiple` is over those. Shares are of the",
        "queue's time.", "",
    ]  # fmt: skip
    for setup, found in setups(rows):
        measured = found[0]["kind"] == "measured"
        lines += [f"## {setup}: {found[0]['kind']}", ""]
        if measured:
            worst = max(abs(row["error"]) for row in found)
            lines += [
                f"Measured on {where}. `seconds` is how far the cost model is from the measured time of the queue; at most "
                f"{100 * worst:.1f} % here (goal: {100 * GOAL:.0f} %, {'met' if worst <= GOAL else 'not met'}).", "",
            ]  # fmt: skip
        else:
            lines += [
                "Predicted by the same cost model, from the device's datasheet and what `benchmarks/paper_setups.py` states; "
                "nothing here was measured by this project. The last columns are what the paper measured (arXiv:2410.00161).", "",
            ]  # fmt: skip
        lines += [*markdown(found, MEASURED if measured else PREDICTED), ""]
    return "\n".join(lines)


# -- picture -----------------------------------------------------------------------------------------------------------------------


def picture(rows: Sequence[Result], name: str) -> None:
    """Draw results/NAME.png and .svg: time by phase where it was measured, multiples where they are predicted."""
    found = setups(rows)
    drawn = figure.new(4.6 * len(found), 3.9)
    for panel, (setup, each) in zip(drawn.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        (_seconds if each[0]["kind"] == "measured" else _multiples)(panel, each)
        panel.set_title(f"{setup}: {each[0]['kind']}", fontsize=8, loc="left", wrap=True)
        panel.set_xticks(range(len(each)), [rate(row) for row in each], fontsize=7)
        panel.set_xlabel("rate of compression", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7, frameon=False)
    figure.save(drawn, RESULTS, name)


def _seconds(panel: Axes, rows: Sequence[Result]) -> None:
    bottom = [0.0] * len(rows)
    for color, phase in zip(figure.COLORS, PHASES, strict=False):
        heights = [row[phase] for row in rows]
        panel.bar(range(len(rows)), heights, bottom=bottom, color=color, label=phase, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    panel.plot(range(len(rows)), [row["model_seconds"] for row in rows], "k_", markersize=22, label="cost model")
    for place, (row, top) in enumerate(zip(rows, bottom, strict=True)):
        panel.annotate(f"batch {row['batch']:.0f}", (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=6.5)
    panel.set_ylim(0, 1.3 * max(bottom))
    panel.set_ylabel("seconds of the queue", fontsize=8)


def _multiples(panel: Axes, rows: Sequence[Result]) -> None:
    series = {
        "predicted": ("multiple", "o-"),
        "predicted, the paper's batches": ("at_paper_batch", "s"),
        "paper": ("paper_multiple", "^--"),
    }
    for color, (label, (key, style)) in zip(figure.COLORS, series.items(), strict=False):
        points = [(place, row[key]) for place, row in enumerate(rows) if isinstance(row[key], float)]
        panel.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4, linewidth=1)
    panel.set_ylim(0)
    panel.set_ylabel("tokens/s over those without compression", fontsize=8)
    panel.grid(alpha=0.25)
