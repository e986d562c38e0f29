"""How many examples of a property a run draws: a fifth of them, or all where slow tests run too."""

from __future__ import annotations

all_of_them = False  # set by conftest.py, before tests are collected


def examples(count: int) -> int:
    """Of `count` examples those that this run draws."""
    return count if all_of_them else max(3, count // 5)
