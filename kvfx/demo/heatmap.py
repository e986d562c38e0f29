"""Which tokens of a context each layer and head has kept, as a picture: what was evicted of an answer stands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfx.cache import Cache
from kvfx.demo import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AROUND = 4  # tokens shown on either side of a statement
# What a cell says, and its colour: blue stayed, orange was needed and is gone.
CELLS = {
    "evicted": "#ECECEC",
    "kept": "#A6CBE3",
    "kept, needed for the answer": "#0B4F8A",
    "evicted, needed for the answer": "#E8590C",
}


@dataclass(frozen=True)
class Strip:
    """What one policy has kept.

    Attributes:
        title: said above the strip.
        kept: for each layer, whether each head holds each token, `[Hkv, S]` bool.
    """

    title: str
    kept: list[np.ndarray]


def kept_tokens(cache: Cache, row: int = 0) -> list[np.ndarray]:
    """Read from a cache which of the S tokens that a row has seen each head of each layer holds, `[Hkv, S]` bool."""
    layers = []
    for layer in cache.layers:
        positions = layer.positions[row].cpu().numpy()
        kept = np.zeros((len(positions), int(cache.lengths_seen[row])), dtype=bool)
        for held, of_head in zip(kept, positions, strict=True):
            held[of_head[of_head >= 0]] = True
        layers.append(kept)
    return layers


def codes(kept: np.ndarray, needed: Sequence[int]) -> np.ndarray:
    """What each cell of `[heads, S]` says, an index into `CELLS`; `needed` are indices of tokens."""
    is_needed = np.zeros(kept.shape[1], dtype=bool)
    is_needed[list(needed)] = True
    return np.where(is_needed, np.where(kept, 2, 3), np.where(kept, 1, 0))


def draw(title: str, strips: Sequence[Strip], words: Sequence[str], places: Sequence[range] = ()) -> Figure:
    """Draw a strip for each policy, all tokens from left to right; beside it, enlarged, the statements that answer a question.

    Args:
        title: above all.
        strips: of the same tokens; at least one.
        words: the tokens, as text.
        places: where the statements stand that answer the question; without any, nothing is enlarged.

    Raises:
        InputError: matplotlib is not installed.
    """
    needed = [index for place in places for index in place]
    columns = _enlarged(places, len(words))
    tall = min(4.0, max(0.75, 0.1 * sum(map(len, strips[0].kept))))
    picture = figure.new(16 if columns else 12, 1.5 + (tall + 0.3) * len(strips))
    ratios = [3, 1 + 0.02 * len(columns)] if columns else [1]
    grid = picture.subplots(len(strips), len(ratios), squeeze=False, width_ratios=ratios, sharex="col")
    for row, shown in zip(grid, strips, strict=True):
        cells, heads = codes(np.concatenate(shown.kept), needed), [len(layer) for layer in shown.kept]
        _show(row[0], cells, heads)
        row[0].set_title(shown.title, fontsize=9, loc="left")
        if columns:
            gap = np.full(len(cells), np.nan)
            _show(row[1], np.stack([gap if at is None else cells[:, at] for at in columns], 1), heads)
            row[1].set_yticklabels([])
    grid[-1][0].set_xlabel("token of the context", fontsize=9)
    if columns:
        at = [index for index, column in enumerate(columns) if column is not None]
        grid[-1][1].set_xticks(at, [words[columns[index]] for index in at], rotation=90, fontsize=7)  # type: ignore[index]
        for label, index in zip(grid[-1][1].get_xticklabels(), at, strict=True):
            label.set_color("black" if columns[index] in needed else "0.5")
        grid[0][1].set_title("the statements asked about, enlarged", fontsize=9, loc="left")
    from matplotlib.patches import Patch

    known = [*CELLS.items()] if needed else [*CELLS.items()][:2]
    handles = [Patch(facecolor=color, edgecolor="0.7", label=label) for label, color in known]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    picture.suptitle(title, fontsize=11)
    return picture


def _enlarged(places: Sequence[range], tokens: int) -> list[int | None]:
    """Columns to enlarge: the statements and their surroundings, a gap (None) between those that do not touch."""
    shown = sorted({at for place in places for at in range(max(0, place.start - AROUND), min(tokens, place.stop + AROUND))})
    columns: list[int | None] = []
    for at in shown:
        if columns and columns[-1] != at - 1:
            columns.append(None)
        columns.append(at)
    return columns


def _show(axes: Axes, cells: Any, heads: Sequence[int]) -> None:
    """Draw cells, whose rows are the heads of one layer after the other."""
    from matplotlib.colors import ListedColormap

    colors = ListedColormap(list(CELLS.values()))
    axes.imshow(cells, cmap=colors, vmin=-0.5, vmax=len(CELLS) - 0.5, aspect="auto", interpolation="nearest")
    ends = np.cumsum(heads)
    named = range(0, len(heads), max(1, len(heads) // 8))
    axes.set_yticks([ends[layer] - heads[layer] / 2 - 0.5 for layer in named], [f"layer {layer}" for layer in named])
    axes.tick_params(axis="both", labelsize=7, length=0)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1.5 if len(heads) <= 16 else 0.3)
