"""How measurements are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvfx.demo.measure import STAGES, Row


def comparison(rows: Sequence[Row], title: str, right: Sequence[str] = ()) -> Table:
    """One line per policy: `right` answers if they are known, bytes held, their share of the first row's, and times."""
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for column in (["right"] if right else []) + ["bytes held", "of full", "prefill", "per token"]:
        table.add_column(column, justify="right")
    for index, row in enumerate(rows):
        share = f"{row.nbytes / rows[0].nbytes:.1%}"
        cells = [f"{row.nbytes:,}", share, milliseconds(row.prefill), milliseconds(row.decode)]
        table.add_row(row.policy, *right[index : index + 1], *cells)
    return table


def milliseconds(seconds: float | None) -> str:
    """Seconds as a cell of a table."""
    return "-" if seconds is None else f"{1000 * seconds:,.1f} ms"


@contextmanager
def progress(console: Console, policies: int) -> Iterator[Any]:
    """Show a bar while `policies` are measured; yields what to call with the name of the next stage."""
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=STAGES * policies + 1)
        yield lambda text: bar.update(task, description=text, advance=1)
