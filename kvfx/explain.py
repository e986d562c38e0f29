"""What `kvfx.explain` returns: the report of the passes as a table, text or data."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from kvfx.passes.report import Report
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
        """One row per site."""
        share = f"{len(self.report.compressed)} of {self.report.layers or len(self.report.sites)} layers compressed"
        table = Table(title=f"{self.model} under {self.policy.name}: {share}")
        for column in ("layer", "found as", "heads", "cache", "reads", "score", "lowered to", "left alone because"):
            table.add_column(column, overflow="fold")
        for site in self.report.sites:
            layer = str(site.index if site.layer is None else site.layer)
            heads = f"{site.heads} q / {site.kv_heads} kv x {site.head_dim}"
            found, taps = f"{site.rule}, {site.spelling}", " ".join(site.taps)
            table.add_row(layer, found, heads, site.cache, taps, site.score, site.lowering, site.refusal)
        for refusal in self.report.refusals:
            table.add_row("-", refusal.rule, "", "", "", "", "", f"{refusal.node}: {refusal.reason}")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]
