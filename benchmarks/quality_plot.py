"""Small multiples of `quality.py`: a panel for each task and length, a colour for each family of policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from quality_cells import Cell, Place
from quality_store import Answer
from retriever.tasks import TASKS

from kvfx.demo import figure
from kvfx.demo.family import FAMILIES, family_of
from kvfx.policy import Policy

MAIN = {"compactor": "-", "leverage only": "--", "attention only": ":"}  # drawn with intervals, by these lines


def draw(places: Mapping[Place, Sequence[Answer]], folder: Path, name: str) -> None:
    """Draw `NAME.png` and `.svg` into a folder."""
    cells = {place: Cell.of(answers) for place, answers in places.items()}
    tasks = [task for task in TASKS if any(place.task == task for place in cells)]
    lengths = sorted({place.tokens for place in cells})
    picture = figure.new(3.1 * len(tasks) + 0.6, 2.5 * len(lengths) + 1.1)
    panels = picture.subplots(len(lengths), len(tasks), squeeze=False, sharex=True, sharey=True)
    for row, tokens in zip(panels, lengths, strict=True):
        for panel, task in zip(row, tasks, strict=True):
            _panel(panel, {place: cell for place, cell in cells.items() if (place.task, place.tokens) == (task, tokens)})
            panel.set_title(f"{task}, {tokens} tokens", fontsize=9, loc="left")
    drawn = [family for family in FAMILIES if any(_family(place.policy) == family for place in cells if place.policy != "none")]
    handles = [Line2D([], [], color=_color(family), label=family) for family in drawn]
    handles += [
        Line2D([], [], color=_color(FAMILIES[0]), linewidth=2, linestyle=style, label=policy)
        for policy, style in MAIN.items()
        if any(place.policy == policy for place in cells)
    ]
    handles.append(Line2D([], [], color="0.3", linestyle=(0, (1, 3)), label="full cache"))
    picture.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    for panel in panels[-1]:
        panel.set_xlabel("bytes held, of the full cache", fontsize=8)
    picture.supylabel("questions answered, %", fontsize=9)
    figure.save(picture, folder, name)


def _panel(panel: Axes, cells: Mapping[Place, Cell]) -> None:
    (full,) = (cell for place, cell in cells.items() if place.policy == "none")
    policies = sorted({place.policy for place in cells} - {"none"}, key=lambda policy: policy in MAIN)
    for policy in policies:
        line = sorted((cell for place, cell in cells.items() if place.policy == policy), key=lambda cell: cell.bytes)
        held = [cell.bytes / full.bytes for cell in line]
        right = [100 * cell.share for cell in line]
        color = _color(_family(policy))
        if policy in MAIN:
            errors = [[100 * (cell.share - cell.low) for cell in line], [100 * (cell.high - cell.share) for cell in line]]
            panel.errorbar(held, right, errors, color=color, linestyle=MAIN[policy], linewidth=2, elinewidth=0.8, capsize=1.5)
        else:
            panel.plot(held, right, color=color, linewidth=0.8, alpha=0.75)
    panel.axhline(100 * full.share, color="0.3", linewidth=0.8, linestyle=(0, (1, 3)))
    panel.set_xscale("log")
    panel.set_xticks([0.05, 0.1, 0.25, 0.5], ["5 %", "10 %", "25 %", "50 %"], fontsize=7)
    panel.set_xticks([], minor=True)
    panel.set_xlim(0.042, 0.62)
    panel.set_ylim(-4, 104)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.25)


def _family(policy: str) -> str:
    return FAMILIES[0] if policy in MAIN else family_of(Policy.parse(policy))


def _color(family: str) -> str:
    return figure.COLORS[FAMILIES.index(family) % len(figure.COLORS)]
