"""Pictures as files. The one place that knows matplotlib, which only they need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvfx.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("png", "svg")
# Okabe and Ito's colours, which colour-blind readers can tell apart; without the yellow, too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new(width: float, height: float) -> Figure:
    """An empty figure of so many inches, laid out so that no text overlaps.

    Raises:
        InputError: matplotlib is not installed.
    """
    check()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def check() -> None:
    """Say before anything is measured that pictures cannot be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - whether it is there
    except ImportError:
        raise InputError(
            "pictures are drawn by matplotlib, which is not installed. Install it, pip install 'kvfx[plot]', or ask for no pictures"
        ) from None


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `folder/name.png` and `.svg`, each whole or not at all; return their paths."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in KINDS]
    for kind, path in zip(KINDS, paths, strict=True):
        partial = path.with_name(f".{path.name}.partial")
        # Without a date and with fixed ids, equal pictures are equal files.
        with matplotlib.rc_context({"svg.hashsalt": "kvfx"}):
            figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        os.replace(partial, path)
    return paths
