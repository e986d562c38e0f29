"""The pictures of what was measured: which file shows what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvfx.demo import curve, figure, heatmap
from kvfx.demo.checkpoint import Comparison
from kvfx.demo.heatmap import Strip
from kvfx.demo.notes import Document
from kvfx.demo.run import Demo
from kvfx.demo.sweep import SHOWN, Sweep


def draw(measured: Demo | Sweep | Comparison, folder: Path) -> list[Path]:
    """Draw what was measured into `folder`, as PNG and SVG; return the files.

    Raises:
        InputError: matplotlib is not installed.
    """
    if isinstance(measured, Sweep):
        return of_sweep(measured, folder)
    return of_demo(measured, folder) if isinstance(measured, Demo) else of_comparison(measured, folder)


def of_demo(demo: Demo, folder: Path) -> list[Path]:
    """Draw which tokens each policy kept, for the question that tells them apart best; return the files."""
    answered = {row.policy: right for row, right in zip(demo.rows, demo.right, strict=True)}
    kept = [Strip(row.policy, kept) for row, kept in zip(demo.rows, demo.kept, strict=True) if row.policy != "none"]
    return _of_document(demo.document, answered, kept, folder)


def of_sweep(sweep: Sweep, folder: Path) -> list[Path]:
    """Draw accuracy against bytes held, and which tokens were kept; return the files."""
    files = figure.save(curve.draw(sweep), folder, "accuracy")
    # A variant that follows kvpress keeps nearly what its preset keeps.
    titles = {name: f"{name}, keep {SHOWN}" for name in sweep.kept if name != "none" and not name.endswith("@kvpress")}
    answered = {title: sweep.answered[name] for name, title in titles.items()} | {"none": sweep.answered["none"]}
    return files + _of_document(
        sweep.document, answered, [Strip(title, sweep.kept[name]) for name, title in titles.items()], folder
    )


def of_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw which tokens of a user's context each policy kept; return the files."""
    rows = zip(comparison.rows, comparison.kept, strict=True)
    strips = [Strip(row.policy, kept) for row, kept in rows if row.policy != "none"]
    if not strips:
        return []
    title = f"tokens that each layer and head kept of a context of {comparison.prompt.context.shape[1]}"
    return figure.save(heatmap.draw(title, strips, ()), folder, "kept")


def most_telling(full: Sequence[bool], others: Sequence[Sequence[bool]]) -> int:
    """The question that the full cache answers and the other policies are most divided on; the first of equals."""
    right = [sum(answers) for answers in zip(*others, strict=True)]
    return min(range(len(full)), key=lambda index: (not full[index], abs(2 * right[index] - len(others))))


def _of_document(document: Document, answered: dict[str, list[bool]], strips: list[Strip], folder: Path) -> list[Path]:
    if not strips:
        return []
    index = most_telling(answered["none"], [answered[each.title] for each in strips])
    question = document.questions[index]
    titled = [Strip(f"{each.title}, answered {'right' if answered[each.title][index] else 'wrong'}", each.kept) for each in strips]
    title = (
        f"tokens that each layer and head kept, and the question asked afterwards: {question.text} → {' '.join(question.answer)}"
    )
    return figure.save(heatmap.draw(title, titled, document.text.split(), document.places(question)), folder, "kept")
