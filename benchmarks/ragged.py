"""Attention of one token to heads that hold unequally many slots: kvfx's form beside others, and beside attention to all of them.

    python benchmarks/ragged.py                     # all settings, 31 rounds: about a quarter of an hour, most of it compilation
    python benchmarks/ragged.py --models narrow --lengths 4096 --rounds 11
    python benchmarks/ragged.py --plot-only         # draws results/ragged.csv again

All forms are Inductor with one thread: one graph of a few layers, whose queries wait for each other as those of a model do. The new
token's key and value are in place, or given beside the pool where the form takes them so; nothing is written, and no tables are
made, which `decode.py` has in its steps. Each answer is compared with its definition in float64 before anything is timed, that of
a form in bfloat16 in float32 too. Heads keep 10 % to 95 % of S tokens, half of all in the mean. Writes results/ragged.csv, .md,
.png and .svg after each setting.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from method import AA, RATIO, Row, Subject, bytes_column, compare, number, read, save, table_of, text, with_bytes
from ragged_forms import FRAGMENTED, FULL, HALF, PLAIN, Form, forms
from ragged_problem import LAYERS, Problem, Shape, after, definition
from torch._dynamo.utils import counters

matplotlib.use("Agg")
SHAPES = {
    "narrow": Shape(1, 8, 2, 64, torch.float32),
    "narrow, 4 rows": Shape(4, 8, 2, 64, torch.float32),
    "heads 32/8 x 128, bf16": Shape(1, 32, 8, 128, torch.bfloat16),
}
SETTINGS = [
    ("narrow", 4096), ("narrow", 8192), ("narrow, 4 rows", 4096),
    ("heads 32/8 x 128, bf16", 4096), ("heads 32/8 x 128, bf16", 8192),
]  # fmt: skip
GOALS = {PLAIN: {HALF: 0.70, FRAGMENTED: 0.70}, FULL: {HALF: 0.80, FRAGMENTED: 0.80}}
BARS = {PLAIN: {HALF: 0.53, FRAGMENTED: 0.53}}


# -- what is right -----------------------------------------------------------------------------------------------------------------


def check(title: str, problem: Problem, form: Form) -> None:
    """Stop if a form is further from the definition in float64 than four times what the definition in its own dtype is."""
    outs = form.step()
    for layer, out in enumerate(outs):
        query = after(problem.queries[layer], outs[:layer])
        exact, plain = (definition(problem, layer, query, form.lengths, dtype) for dtype in (torch.float64, query.dtype))
        error, rounding = (float((result.double() - exact).abs().max()) for result in (out, plain))
        allowed = 4 * rounding + 16 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        if not error <= allowed:
            raise SystemExit(f"{title}, layer {layer}: error {error:.2e}, rounding explains {allowed:.2e}")


def checked(problem: Problem) -> dict[str, Form]:
    """All forms, compiled and right."""
    torch.compiler.reset()
    ways = forms(problem)
    for title, form in ways.items():
        check(title, problem, form)
    return ways


# -- what is measured --------------------------------------------------------------------------------------------------------------


def measure(name: str, shape: Shape, length: int, options: argparse.Namespace) -> list[Row]:
    """All forms against plain attention to all tokens, and kvfx's against its own that holds all tokens."""
    torch._dynamo.config.capture_scalar_outputs = True  # the forms that slice read lengths from tensors
    with torch.no_grad():
        if shape.dtype != torch.float32:  # whose rounding hides that a slot is missing
            checked(Problem(replace(shape, dtype=torch.float32), length))
        ways = checked(Problem(shape, length))
        runs = {title: functools.partial(repeat, form.step, shape.repeats(length)) for title, form in ways.items()}
        floors = {title: float(form.lengths.mean()) / length for title, form in ways.items()}
        held = {title: form.bytes for title, form in ways.items()}
        built = counters["stats"]["unique_graphs"]
        measured: list[Row] = []
        for baseline, titles in ((PLAIN, [*ways]), (FULL, [HALF, FRAGMENTED])):
            variants = {title: runs[title] for title in titles if title != baseline}
            title, goals = f"{name} S={length} / {baseline}", GOALS[baseline]
            rows = compare(title, runs[baseline], variants, floors, goals, options.rounds)
            measured += with_bytes(rows, baseline, held, BARS.get(baseline, {}))
    if counters["stats"]["unique_graphs"] != built:
        raise SystemExit(f"{counters['stats']['unique_graphs'] - built} graphs were compiled while they were timed")
    return measured


def repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def calls(row: dict[str, Any]) -> int:
    """How often a run of a row attends, counted by layers."""
    name, length = row["setting"].split(" / ")[0].rsplit(" S=", 1)
    return LAYERS * SHAPES[name].repeats(int(length))


def table(name: str) -> str:
    about = [
        "CPU time of attention of one token, over that of the baseline behind the slash: median of pairs, with its 95 % interval.",
        "`floor`: bytes of the keys and values of the slots held, over those of all. `bytes`: those of all tensors that hold them,",
        "tables and free slots included, over the baseline's. A goal is met, or not, when the ratio is further from it than the",
        "A/A interval reaches from 1; nearer is undecided.",
    ]
    columns = {
        "setting / baseline": text("setting"), "form": text("variant"), **RATIO, "floor": number("floor", 2),
        "goal": number("goal", 2), "": text("verdict"), "bytes": bytes_column,
        "us a layer": number("seconds", 0, lambda row: 1e6 / calls(row)),
        "baseline us": number("baseline_seconds", 0, lambda row: 1e6 / calls(row)), "pairs": number("rounds", 0),
    }  # fmt: skip
    return table_of(name, about, columns)


def plot(name: str) -> None:
    """Draw `results/NAME.csv`: one panel for each setting, one bar for each form; time over that of plain attention."""
    where, rows = read(name)
    settings = list(dict.fromkeys(row["setting"].split(" / ")[0] for row in rows))
    against = {setting: [row for row in rows if row["setting"] == f"{setting} / {PLAIN}"] for setting in settings}
    size = (2.6 * len(settings) + 2.2, 0.2 * max(map(len, against.values())) + 1.25)
    figure, panels = pyplot.subplots(1, len(settings), figsize=size, sharey=True, squeeze=False)
    for panel, setting in zip(panels[0], settings, strict=True):
        titles = [PLAIN if row["variant"] == AA else row["variant"] for row in against[setting]]
        ratios = [row["ratio"] for row in against[setting]]
        panel.barh(range(len(titles)), ratios, color=["tab:blue" if title.startswith("kvfx") else "0.6" for title in titles])
        for place, row in enumerate(against[setting]):
            beside = max(row[key] for key in ("ratio", "floor") if isinstance(row[key], float))
            panel.text(beside, place, f" {row['ratio']:.2f}", va="center", fontsize=8)
            if isinstance(row["floor"], float):
                panel.plot(row["floor"], place, "|", color="black", markersize=8)
        panel.axvline(1, color="0.5", linewidth=0.8)
        panel.set_title(setting, fontsize=9)
        panel.set_xlim(0, 1.2 * max(1, *ratios))
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(titles)), titles)
    panels[0][0].invert_yaxis()
    figure.supxlabel(f"CPU time / that of {PLAIN}; mark: bytes of the slots held / of all", fontsize=9)
    figure.suptitle(f"Attention of one token to heads of unequal length, Inductor\n{where}", fontsize=8)
    figure.tight_layout()
    save(figure, name)
    pyplot.close(figure)


SUBJECT = Subject("ragged", SETTINGS, measure, table, plot, SHAPES.__getitem__)

if __name__ == "__main__":
    SUBJECT.run(SUBJECT.parser(__doc__).parse_args())
