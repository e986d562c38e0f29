"""What `kvfx.explain` returns: the report of the passes as tables, text or data."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

import kvfx
from kvfx.params import write_number
from kvfx.passes.attention import ATTENTION_RULES
from kvfx.passes.report import Refusal, Report, Site
from kvfx.policy import PREFILL, Policy

LONG = 100_000  # a prompt of so many tokens shows the share of a pyramid's layer to three digits
# What differs between refusals that are one for a reader: layer numbers and the numbers behind the names of nodes.
COUNTED = re.compile(r"(?<=layer )\d+|(?<=[a-z]\.)\d+|_\d+\b")


@dataclass(frozen=True)
class Explanation:
    """Every attention site of a model under a policy: how it was found and what is done there, or why it is left alone.

    Attributes:
        model: name of the model's class.
        policy: what was to be kept.
        report: what the passes found and did.
        remark: what a reader should know about how the model was traced.
    """

    model: str
    policy: Policy
    report: Report
    remark: str = ""

    @property
    def coverage(self) -> float:
        """Share of the cache layers that are compressed, in [0, 1]."""
        return self.report.coverage

    @property
    def layers(self) -> int:
        """Cache layers without those of sliding windows; where nothing is evicted, so that none is marked, attention sites."""
        return self.report.layers or len(self.report.sites) - self.windows

    @property
    def windows(self) -> int:
        """Attention sites with a sliding window, which no policy touches."""
        return sum(site.window is not None for site in self.report.sites)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left alone that the policy should have compressed."""
        everything = self.policy.score is None or len(self.report.compressed) == self.layers
        return bool(self.report.sites) and everything and not self.refusals

    @property
    def refusals(self) -> list[Refusal]:
        """Every place that was left alone: sites that were found and refused later, then what no rule took."""
        refused = [site for site in self.report.sites if site.refusal]
        sources = {rule.name: rule.source for rule in ATTENTION_RULES}
        found = [Refusal(site.rule, site.refusal, site.name, sources.get(site.rule, ""), where=site.where) for site in refused]
        return found + self.report.refusals

    def budget(self, site: Site) -> str:
        """What the cache layer of `site` keeps: "all", the model's own window, or a share or count of a prompt's S real tokens."""
        budget = self.policy.budget
        if site.window is not None:
            return f"window of {site.window}"
        if budget is None or site.layer not in {found.layer for found in self.report.compressed}:
            return "all"
        layers = self.layers + self.windows  # a budget is spread over all layers, though windows take no part
        counts = self.policy.counts(LONG, layers)
        count = counts[site.layer or 0]
        if budget.keep is None:
            return f"{count} tokens"
        share = f"{count / LONG:.3g}" if len(set(counts)) > 1 else write_number(budget.keep)
        if budget.most is not None:
            return f"{share} of S, at most {budget.most}"
        return f"{share} of each {budget.per.arg}" if budget.per.arg else f"{share} of S"

    @property
    def layout(self) -> str:
        """Of the caches that `compress` and `generate` make by themselves: "ragged" where heads compete, or "dense"."""
        return "ragged" if self.policy.budget is not None and self.policy.budget.pool in ("heads", "blocks") else "dense"

    def competition(self) -> str:
        """Who competes for what is kept, and what each is sure of; nothing where nobody does."""
        budget = self.policy.budget
        if budget is None or budget.pool == "uniform" or not self.report.compressed:
            return ""
        if budget.pool == "blocks":
            return self._blocks()
        floor = [f"{write_number(budget.floor)} of that"] if budget.floor else []
        least = [f"{budget.sure} slot{'s' * (budget.sure > 1)}"] if budget.sure else []
        sure = " and of ".join([*floor, *least]) or "nothing but protected tokens"
        text = f"What a row keeps is the mean: the {budget.pool} compete, and each is sure of {sure}."
        if budget.pool == "heads":
            text += f" Slots are in blocks of a pool, layout {self.layout}, of which each head has as many as it needs."
        if budget.pool == "layers":
            text += " The cut follows after the last layer has been scored, so at its peak a prefill holds the whole cache."
        return text

    def _blocks(self) -> str:
        text = (
            "What a row keeps is the mean: all heads of all layers compete for whole blocks of slots, layout ragged, and each is "
            "sure of a block. What stays is written after the last layer has been scored, so at its peak a prefill holds the whole "
            "cache."
        )
        if self.policy.when == PREFILL:
            return text
        often = self.policy.when.arg
        again = f"After every {often} tokens" if often else "When a pool has no room for the next token"
        return text + f" {again} blocks are evicted again, by what attention has paid to their slots since."

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data; every key is always there."""
        return {
            "model": self.model,
            "policy": str(self.policy),
            "name": self.policy.name,
            "remark": self.remark,
            "layout": self.layout,
            "competition": self.competition(),
            "coverage": self.coverage,
            "layers": self.layers,
            "compressed": len(self.report.compressed),
            "sites": [site.as_dict() | {"budget": self.budget(site)} for site in self.report.sites],
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "leftovers": self.report.leftovers,
            "lowered": self.report.lowered,
            "seconds": self.report.seconds,
            "versions": {"kvfx": kvfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }

    @property
    def title(self) -> str:
        """The result in a line."""
        title = f"{self.model} under {self.policy.name}: {len(self.report.compressed)} of {self.layers} layers compressed"
        return f"{title}, besides {self.windows} with sliding windows" if self.windows else title

    def found(self) -> Table:
        """One row for all layers that are treated alike."""
        table = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("layers", "found as", "heads", "cache", "reads", "score", "keeps"):
            table.add_column(column, overflow="fold")
        table.add_column("lowered to", no_wrap=True)
        alike: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.report.sites:
            apart = (site.window, self.budget(site) == "all", COUNTED.sub("", site.refusal))
            alike.setdefault((apart, *_cells(site)), []).append(site)
        for (_, *cells), sites in alike.items():
            numbers = _ranges(site.index if site.layer is None else site.layer for site in sites)
            kept = list(dict.fromkeys(self.budget(site) for site in sites))
            budget = kept[0] if len(kept) == 1 else f"{kept[0].split()[0]} to {kept[-1]}"
            lowering = "left whole" if sites[0].refusal else sites[0].lowering
            table.add_row(*map(Text, (numbers, *cells, budget, lowering)))
        return table

    def refused(self) -> Table:
        """What was left alone, once for all that is refused alike, with where it stands and whose rule refused it."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column()
        groups: dict[tuple[str, ...], list[Refusal]] = {}
        for refusal in self.refusals:
            words = (refusal.reason, refusal.where, refusal.nearest)
            groups.setdefault((refusal.rule, refusal.source, *(COUNTED.sub("", text) for text in words)), []).append(refusal)
        for refusals in groups.values():
            one, more = refusals[0], len(refusals) - 1
            also = f" and {more} more like it, to {refusals[-1].node}" if more else ""
            grid.add_row(Text("left alone", "bold"), Text(f"{one.node}{also}"))
            for name, text in (
                ("  because", one.reason),
                ("  in", one.where),
                ("  rule", f"{one.rule}, {one.source}" if one.source else one.rule),
                ("  nearest", one.nearest),
            ):
                if text:
                    grid.add_row(Text(name), Text(text))
        return grid

    def forms(self) -> str:
        """Which kernels gave way to their references, and why; empty where none did."""
        elsewhere = ("triton", "reference: asked for", "reference: tensors are on cpu", "reference: tensors are on meta")
        plain = [f"{op} runs its {form}" for op, form in self.report.lowered.items() if form not in elsewhere]
        return "\n".join(plain)

    def leftovers(self) -> str:
        """What stands in the graph instead of attention, or nothing if attention was found."""
        if self.report.sites:
            return ""
        ops = ", ".join(f"{count} x {op}" for op, count in sorted(self.report.leftovers.items()))
        return f"No attention was recognised. Found instead: {ops or 'no attention-like op at all'}."

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.found() if self.report.sites else Text(self.title, "italic")
        if self.refusals:
            yield self.refused()
        yield from (Text(line) for line in (self.competition(), self.forms(), self.leftovers(), self.remark) if line)
        yield ""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


def _cells(site: Site) -> tuple[str, ...]:
    """What a site's row says between its layer and its budget."""
    return (
        f"{site.rule}, {site.spelling}" if site.spelling else site.rule,
        f"{site.heads} q / {site.kv_heads} kv x {site.head_dim}",
        site.cache,
        " ".join(site.taps),
        f"{site.score}, without {' and '.join(site.unseen)}" if site.unseen else site.score,
    )


def _ranges(numbers: Iterable[int]) -> str:
    """`0-4, 6` for 0, 1, 2, 3, 4, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
