"""Rule: one spelling of attention, as a pattern, a guard and a rewrite."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from kvfx.passes.match import Match, Pattern
from kvfx.passes.report import Site


@dataclass(frozen=True)
class Rule:
    """How one spelling of attention is recognised.

    Attributes:
        name: how reports call the spelling.
        anchors: op targets that may end such an attention; a node with another target is never tried.
        pattern: what must stand above the anchor.
        guard: raises `Refuse` where the pattern fits and the meaning does not.
        rewrite: puts `kvfx::attention` in place of the match and describes the site.
        source: module and line of the pattern, which stands in the file of its guard.
    """

    name: str
    anchors: tuple[object, ...]
    pattern: Pattern
    guard: Callable[[Match], None]
    rewrite: Callable[[fx.Graph, Match], Site]
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        lines, _ = inspect.findsource(self.guard)
        line = next((number for number, text in enumerate(lines, 1) if text.startswith("PATTERN = ")), 1)
        object.__setattr__(self, "source", f"{self.guard.__module__}:{line}")
