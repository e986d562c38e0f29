"""How measurements are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvfx.demo.measure import Row


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
def progress(console: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """Show a bar, the time passed and the time left over so many steps; yields what to call with the name of each as it begins."""
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("left:"))
    # The first call of each policy compiles, so that speed is known over many steps only.
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=120) as bar:
        task = bar.add_task("loading", total=steps + 1)
        yield lambda text: bar.update(task, description=text, advance=1)
