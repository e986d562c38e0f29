"""What `kvfx.explain` returns: the report of the passes as a table, text or data."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from kvfx.passes.report import Report, Site
from kvfx.policy import Policy


@dataclass(frozen=True)
class Explanation:
    """Every attention site of a model under a policy."""

    model: str
    policy: Policy
    report: Report

    @property
    def coverage(self) -> float:
        """Share of the cache layers that are compressed, in [0, 1]."""
        return self.report.coverage

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        return {"model": self.model, "policy": str(self.policy), **self.report.as_dict()}

    def table(self) -> Table:
        """One row for each run of layers that were treated alike."""
        share = f"{len(self.report.compressed)} of {self.report.layers or len(self.report.sites)} layers compressed"
        table = Table(title=f"{self.model} under {self.policy.name}: {share}")
        for column in ("layers", "found as", "heads", "cache", "reads", "score", "lowered to"):
            table.add_column(column, overflow="fold")
        if self.report.reasons():
            table.add_column("left alone because", overflow="fold")
        for alike, sites in groupby(self.report.sites, _without_number):
            numbers = [site.index if site.layer is None else site.layer for site in sites]
            table.add_row(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", *alike)
        for refusal in self.report.refusals:
            table.add_row("-", refusal.rule, "", "", "", "", "", f"{refusal.node}: {refusal.reason}")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]


def _without_number(site: Site) -> tuple[str, ...]:
    """A site's cells but the first, and the reason only if there is one."""
    heads = f"{site.heads} q / {site.kv_heads} kv x {site.head_dim}"
    cells = (f"{site.rule}, {site.spelling}", heads, site.cache, " ".join(site.taps), site.score.replace(" ", "\n"), site.lowering)
    return (*cells, site.refusal) if site.refusal else cells
