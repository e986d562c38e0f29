"""docs/models.md, which the tests write: one row for each model, whose cells are what its checks returned."""

from __future__ import annotations

import os
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
COLUMNS = (
    "model",
    "class",
    "attention found as",
    "cache",
    "kv heads",
    "layers",
    "key before RoPE",
    "policies",
    "all kept",
    "uneven decode",
    "padded rows",
    "block",
    "exported",
)
HEAD = """# Models

Written by `make models`; the tests assert that each row is what a run finds. A row is a tiny random model of the family, given to
`kvfx.compile` and compared with a reference that runs the plain model eagerly, float64 beside it, and hides what was evicted.

- **attention found as**: the rule that recognised it. **cache**: how new keys join the held ones in a decode step.
- **kv heads**: heads of the cache, of query heads. **layers**: what they see; full ones are compressed, the others left alone.
- **key before RoPE**: whether scores that read it get it. **policies**: whose kept tokens equal the reference's ranking.
- **all kept**: keeping everything changes no logits. **uneven decode**: eight steps after each head evicted tokens of its own.
- **padded rows**: a padded row keeps and decodes as it does alone. **block**: several new tokens at once equal one by one.
- **exported**: whether the family's exported prefill keeps, in an ordinary program, what the reference's ranking chooses.

"""


def assert_row(*cells: str) -> None:
    """Assert that the page has this row, whatever its last cell says; with KVFX_WRITE_MODELS=1, write it instead."""
    assert len(cells) == len(COLUMNS) - 1
    _assert(cells[0], (*cells, _cells(cells[0])[-1]))


def assert_exported(name: str, cell: str) -> None:
    """Assert what the page says last of a model; with KVFX_WRITE_MODELS=1, write it instead."""
    _assert(name, (*_cells(name)[:-1], cell))


def _cells(name: str) -> list[str]:
    """The cells of a row; dashes for those that are not written yet."""
    cells = [cell.strip() for cell in committed().get(name, "").split("|")[1:-1]] or [name]
    return [*cells, *["-"] * (len(COLUMNS) - len(cells))]


def _assert(name: str, cells: tuple[str, ...]) -> None:
    rows = committed()
    line = f"| {' | '.join(cells)} |"
    if os.environ.get("KVFX_WRITE_MODELS") == "1":
        rows[name] = line
        table = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *(rows[name] for name in sorted(rows))]
        PAGE.write_text(HEAD + "\n".join(table) + "\n")
    assert committed().get(name) == line, "docs/models.md says otherwise; see what changed, then run `make models`"


def committed() -> dict[str, str]:
    """The rows of the page, by model."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [line for line in lines if line.startswith("|")][2:]
    return {row.split("|")[1].strip(): row for row in rows}
