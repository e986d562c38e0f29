"""What `quality.py` found, to read: results/NAME.csv and .md, pictures, and docs/quality.md. All of it follows from the answers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import quality_plot
from method import RESULTS
from quality_cells import Cell, Interval, Place, by_place, mean_difference, paired, ratio
from quality_store import Answer, Store
from retriever.tasks import TASKS

Places = dict[Place, list[Answer]]
PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
NAME = "quality"  # of the results that the page is about
BASE, ALONE = "compactor", ("leverage only", "attention only")
KEPT_HALF = 0.97  # of what the full cache answers, at keep 0.5, on every task
SMALL = (0.1, 0.05)  # keeps at which compactor is to be above each of its parts
HEAD = """# Quality

What the packaged model, a toy, still answers when its cache was compressed before the question was known. Written by
`python benchmarks/quality.py`; a test holds it to the committed answers,
[benchmarks/results/quality.jsonl.gz](../benchmarks/results/quality.jsonl.gz), a line for each question. The tasks are those of
`benchmarks/retriever/tasks.py`; each problem has a context of its own, whose statements are hidden in prose with decoys.

- **%**: questions of which every token of the answer is the likeliest one, in brackets the 95 % interval by Wilson.
- **KL**: divergence of the next-token distribution from the full cache's, in nats, mean over the tokens of the reference answer.
- **keep**: the fraction asked for. What a policy protects stays even if it is more: `snapkv` and its kin hold 64 tokens at least.
- **gold**: share of the statements that hold the answer which is still in the cache, mean over layers and heads.
- *leverage only* and *attention only* are the two terms of `compactor` alone, with its budget and protection.

Which policy is best for a large language model cannot be read here: see "The demo's model, and what it does not show" in the
[README](../README.md).
"""


def report(store: Store) -> None:
    """Pack the answers, write what they say and print it; docs/quality.md only from the results that it is about."""
    places = by_place(store)
    if not places:
        raise SystemExit(f"there are no results in {store.path} or {store.packed}; run the benchmark first")
    text = page(store)
    store.pack()
    (store.folder / f"{store.name}.csv").write_text(cells_csv(store), encoding="utf-8")
    quality_plot.draw(places, store.folder, store.name)
    if (store.folder, store.name) == (RESULTS, NAME):
        PAGE.write_text(text, encoding="utf-8")
    print(text)


def page(store: Store) -> str:
    """docs/quality.md. What the numbers mean, where a goal is not met, is written by hand: results/quality_findings.md."""
    places = by_place(store)
    lengths = sorted({place.tokens for place in places})
    parts = [HEAD, measured(store), goals(places)]
    findings = RESULTS / "quality_findings.md"
    if findings.exists():
        parts.append(findings.read_text(encoding="utf-8"))
    parts.append("## Accuracy against what is held\n\n![accuracy of every policy](../benchmarks/results/quality.png)\n")
    parts += [f"## {tokens} tokens\n\n{means(places, tokens)}\n{tasks(places, tokens)}" for tokens in lengths]
    return "\n".join(parts)


def measured(store: Store) -> str:
    """Where the answers come from."""
    where = sorted({setting.where for setting in store.settings.values() if setting.where})
    weights = sorted({setting.weights[:12] for setting in store.settings.values()})
    lines = [f"- {len(store.answers):,} answers; weights {', '.join(weights)} (sha256)."]
    return "\n".join(["## Measured on\n", *lines, *(f"- {each}" for each in where), ""])


# -- goals -------------------------------------------------------------------------------------------------------------------------


def goals(places: Places) -> str:
    """What was promised, and whether the whole 95 % bootstrap interval is on one side of it."""
    names = _tasks(places)
    lengths = sorted({place.tokens for place in places})
    rows = ["| goal | found | 95 % | questions | |", "|---|---|---|---|---|"]
    for task in names:
        pairs = _pairs(places, Place(BASE, 0.5, task, 0), Place("none", 1.0, task, 0), lengths)
        if pairs:
            found = ratio(pairs)
            title = f"{BASE}:0.5 answers {100 * KEPT_HALF:g} % of what the full cache does, {task}"
            rows.append(_row(title, found, "%", sum(map(len, pairs)), found.at_least(KEPT_HALF)))
    for keep in SMALL:
        for other in ALONE:
            pairs = [
                pair for task in names for pair in _pairs(places, Place(BASE, keep, task, 0), Place(other, keep, task, 0), lengths)
            ]
            if pairs:
                found = mean_difference(pairs)
                title = f"{BASE}:{keep} above {other}, mean over tasks and lengths"
                rows.append(_row(title, found, "points", sum(map(len, pairs)), found.above(0)))
    about = (
        "Questions are paired: both sides answered the same ones. A goal is met, or not, if the whole interval, of a bootstrap\n"
        "over questions within each task and length, is on one side of it; else it is undecided.\n"
    )
    return "\n".join(["## Goals\n", about, *rows, ""])


def _pairs(places: Places, one: Place, other: Place, lengths: Sequence[int]) -> list[np.ndarray]:
    both = [(one._replace(tokens=tokens), other._replace(tokens=tokens)) for tokens in lengths]
    return [paired(places, *each) for each in both if each[0] in places and each[1] in places]


def _row(title: str, found: Interval, unit: str, questions: int, verdict: str) -> str:
    value, low, high = (f"{100 * each:+.1f}" if unit == "points" else f"{100 * each:.1f}" for each in found)
    return f"| {title} | {value} {unit} | {low} to {high} | {questions} | {verdict} |"


# -- tables ------------------------------------------------------------------------------------------------------------------------


def means(places: Places, tokens: int) -> str:
    """A row for each policy: all tasks together, at every keep; the best at the smallest keep first."""
    keeps = _keeps(places)
    heads = " | ".join(f"keep {keep:g}, % | KL" for keep in keeps)
    lines = [
        "All tasks together.\n",
        f"| policy | questions | {heads} | held at {keeps[-1]:g} |",
        f"|{'---|' * (2 * len(keeps) + 3)}",
    ]
    full = Cell.of(_of(places, "none", 1.0, tokens))
    found = {policy: [_of(places, policy, keep, tokens) for keep in keeps] for policy in _policies(places)}
    rows = {policy: [Cell.of(answers) for answers in some] for policy, some in found.items() if all(some)}
    for policy, cells in sorted(rows.items(), key=lambda item: [-cell.share for cell in reversed(item[1])]):
        shown = " | ".join(f"{_share(cell)} | {cell.kl:.2f}" for cell in cells)
        asked = _numbers(cell.questions for cell in cells)
        lines.append(f"| {policy} | {asked} | {shown} | {cells[-1].bytes / full.bytes:.1%} |")
    return "\n".join([*lines, "", f"The full cache: {_share(full)} of {full.questions}.", ""])


def tasks(places: Places, tokens: int) -> str:
    """A row for each policy, a column for each task: % at every keep. Intervals of each are in the CSV."""
    keeps, names = _keeps(places), _tasks(places)
    cells = [Cell.of(answers) for place, answers in places.items() if place.tokens == tokens]
    widest = max(100 * (cell.high - cell.low) / 2 for cell in cells)
    lines = [
        f"By task, % at keep {' / '.join(f'{keep:g}' for keep in keeps)}; {_numbers(cell.questions for cell in cells)} questions "
        f"each, so that 95 % intervals reach up to {widest:.0f} points to either side.",
        "[quality.csv](../benchmarks/results/quality.csv) has the interval, KL, gold and bytes of each.\n",
        f"| policy | {' | '.join(names)} | gold, all tasks |",
        f"|{'---|' * (len(names) + 2)}",
    ]
    for policy in ("none", *_policies(places)):
        at = keeps if policy != "none" else [1.0]
        if any(_of(places, policy, keep, tokens) for keep in at):
            shares = [_slashed([_of(places, policy, keep, tokens, task) for keep in at], "share") for task in names]
            gold = _slashed([_of(places, policy, keep, tokens) for keep in at], "gold")
            lines.append(f"| {policy} | {' | '.join(shares)} | {gold} |")
    return "\n".join([*lines, ""])


def _slashed(found: Sequence[list[Answer]], value: str) -> str:
    return " / ".join(f"{100 * getattr(Cell.of(answers), value):.0f}" if answers else "-" for answers in found)


def _numbers(given: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(given))))


def _share(cell: Cell) -> str:
    return f"{100 * cell.share:.0f} ({100 * cell.low:.0f}-{100 * cell.high:.0f})"


def cells_csv(store: Store) -> str:
    """Every policy, keep, task and length in a row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["policy", "keep", "task", "tokens", "questions", "right", "low", "high", "kl", "gold", "bytes"])
    for place, answers in by_place(store).items():
        cell = Cell.of(answers)
        numbers = (round(cell.low, 4), round(cell.high, 4), round(cell.kl, 4), round(cell.gold, 4), round(cell.bytes))
        writer.writerow([*place, cell.questions, cell.right, *numbers])
    return out.getvalue()


# -- what there is -----------------------------------------------------------------------------------------------------------------


def _of(places: Places, policy: str, keep: float, tokens: int, task: str | None = None) -> list[Answer]:
    """Answers of one task, or of all."""
    names = _tasks(places) if task is None else [task]
    return [answer for name in names for answer in places.get(Place(policy, keep, name, tokens), ())]


def _keeps(places: Places) -> list[float]:
    return sorted({place.keep for place in places if place.policy != "none"}, reverse=True)


def _policies(places: Places) -> list[str]:
    return list(dict.fromkeys(place.policy for place in places if place.policy != "none"))


def _tasks(places: Places) -> list[str]:
    return [task for task in TASKS if any(place.task == task for place in places)]
