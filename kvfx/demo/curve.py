"""Accuracy against bytes held, a panel for each family of policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfx.demo import figure
from kvfx.demo.family import FAMILIES, family_of
from kvfx.demo.sweep import Point, Sweep
from kvfx.policy import Policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIB = 1024


def draw(sweep: Sweep) -> Figure:
    """Draw a line for each policy with 95 % intervals; in each panel the lines of the other families stand in grey.

    Raises:
        InputError: matplotlib is not installed.
    """
    lines: dict[str, list[Point]] = {}
    for point in sweep.points:
        lines.setdefault(point.policy, []).append(point)
    family = {name: family_of(Policy.parse(name)) for name in lines}
    shown = [each for each in FAMILIES if each in family.values()]
    rows = (len(shown) + 1) // 2
    picture = figure.new(15 if len(shown) > 1 else 8, 3.4 * rows + 0.6)
    panels = list(picture.subplots(rows, min(2, len(shown)), squeeze=False, sharex=True, sharey=True).flat)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel, title in zip(panels, shown, strict=False):
        for name, points in lines.items():
            if family[name] != title:
                panel.plot(*_place(points), color="0.85", linewidth=0.8, zorder=1)
        _own(panel, {name: points for name, points in lines.items() if family[name] == title})
        panel.axhspan(100 * sweep.full.low, 100 * sweep.full.high, color="0.5", alpha=0.15, linewidth=0)
        panel.axhline(100 * sweep.full.right / sweep.full.questions, color="0.3", linewidth=0.8, linestyle=":", label="full cache")
        panel.set_title(title, fontsize=10, loc="left")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False)
        _axes(panel, sweep)
    picture.supxlabel("KiB held for a document, of the full cache below", fontsize=9)
    picture.supylabel("questions answered word for word, %", fontsize=9)
    picture.suptitle(
        f"{sweep.full.questions} questions on {sweep.documents} documents of {sweep.tokens} tokens, compressed before they were "
        "asked; 95 % intervals by Wilson",
        fontsize=10,
    )
    return picture


def _own(panel: Axes, lines: dict[str, list[Point]]) -> None:
    """Draw a family: a colour and a marker for each name; a variant, NAME@VARIANT, is hollow and broken."""
    names = list(dict.fromkeys(name.partition("@")[0] for name in lines))
    for name, points in lines.items():
        base, _, variant = name.partition("@")
        index = names.index(base)
        color = figure.COLORS[index % len(figure.COLORS)]
        marker = figure.MARKERS[(index + index // len(figure.COLORS)) % len(figure.MARKERS)]  # no pair stands twice
        style = "-" if not variant else "--" if variant == "kvpress" else ":"
        held, right = _place(points)
        errors = [
            [value - 100 * point.low for value, point in zip(right, points, strict=True)],
            [100 * point.high - value for value, point in zip(right, points, strict=True)],
        ]
        panel.errorbar(
            held, right, errors, label=name, color=color, marker=marker, markersize=4.5, linestyle=style,
            markerfacecolor="white" if variant else color, linewidth=1.1, elinewidth=0.7, capsize=1.5,
        )  # fmt: skip


def _place(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.nbytes / KIB for point in points], [100 * point.right / point.questions for point in points]


def _axes(panel: Axes, sweep: Sweep) -> None:
    """Bytes on a logarithmic axis, with ticks where policies without overhead end up."""
    full = sweep.full.nbytes / KIB
    keeps = sorted({point.keep for point in sweep.points} | {1.0})
    panel.set_xscale("log")
    panel.set_xticks([keep * full for keep in keeps], [f"{keep * full:,.0f}\n{keep:.0%}" for keep in keeps], fontsize=7)
    panel.set_xticks([], minor=True)
    panel.set_ylim(-3, 103)
    panel.tick_params(labelsize=7, labelbottom=True)
