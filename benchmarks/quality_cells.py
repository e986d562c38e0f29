"""What many answers say together: shares with intervals, and differences between policies that answered the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from quality_store import Answer, Store

from kvfx.demo.interval import wilson

DRAWS = 10_000  # of the bootstrap


class Place(NamedTuple):
    """What a cell is about."""

    policy: str
    keep: float
    task: str
    tokens: int


@dataclass(frozen=True)
class Cell:
    """A policy at a keep on one task and length, or on several.

    Attributes:
        questions: asked.
        right: answered.
        low, high: 95 % interval of their ratio, by Wilson.
        kl: mean over questions, nats per token.
        gold: share of the answers' statements that was kept, mean.
        bytes: held for a context, mean.
    """

    questions: int
    right: int
    low: float
    high: float
    kl: float
    gold: float
    bytes: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Cell:
        """Sum up answers, one at least."""
        right = sum(answer.right for answer in answers)
        means = (float(np.mean([getattr(answer, name) for answer in answers])) for name in ("kl", "gold", "bytes"))
        return cls(len(answers), right, *wilson(right, len(answers)), *means)

    @property
    def share(self) -> float:
        """Of the questions that were answered."""
        return self.right / self.questions


def by_place(store: Store) -> dict[Place, list[Answer]]:
    """All answers, in the order of their indices, by what they are about."""
    places: dict[Place, list[Answer]] = {}
    for key in sorted(store.answers):
        answer = store.answers[key]
        setting = store.settings[answer.at]
        places.setdefault(Place(setting.policy, setting.keep, answer.task, answer.tokens), []).append(answer)
    return places


class Interval(NamedTuple):
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def at_least(self, goal: float) -> str:
        """Whether the whole interval reaches `goal`, or none of it."""
        return "met" if self.low >= goal else "not met" if self.high < goal else "undecided"

    def above(self, goal: float) -> str:
        """Whether the whole interval is above `goal`, or none of it."""
        return "met" if self.low > goal else "not met" if self.high <= goal else "undecided"


def paired(places: Mapping[Place, Sequence[Answer]], one: Place, other: Place) -> np.ndarray:
    """Right or wrong of the questions that two cells share, `[n, 2]`.

    Raises:
        ValueError: they share none.
    """
    first, second = ({answer.index: answer.right for answer in places.get(place, ())} for place in (one, other))
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError(f"{one} and {other} have no question in common")
    return np.array([(first[index], second[index]) for index in shared], dtype=float)


def mean_difference(pairs: Iterable[np.ndarray]) -> Interval:
    """The first minus the second, mean over cells of equal weight; questions are drawn anew within each cell."""
    differences = [pair[:, 0] - pair[:, 1] for pair in pairs]
    generator = np.random.default_rng(0)  # pages can be repeated
    drawn = np.mean([_resampled(each[:, None], generator)[:, 0] for each in differences], axis=0)
    return _interval(float(np.mean([each.mean() for each in differences])), drawn)


def ratio(pairs: Iterable[np.ndarray]) -> Interval:
    """Questions that the first answered over those that the second did, all cells together; drawn anew within each cell."""
    cells = list(pairs)
    generator = np.random.default_rng(0)
    drawn = np.sum([len(cell) * _resampled(cell, generator) for cell in cells], axis=0)
    total = np.sum([cell.sum(0) for cell in cells], axis=0)
    if not total[1]:
        raise ValueError("the second answered no question, so that nothing can be said of a share of it")
    return _interval(float(total[0] / total[1]), drawn[:, 0] / np.maximum(drawn[:, 1], 1))


def _resampled(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means over rows of `[n, k]`, drawn with replacement, `[DRAWS, k]`."""
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=DRAWS)
    return counts @ values / len(values)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    return Interval(value, *map(float, np.quantile(drawn, (0.025, 0.975))))
