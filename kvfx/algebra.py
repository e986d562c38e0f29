"""Score expressions: numbers and atoms under + - *, zscore and splice, written as text or as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from kvfx.errors import PolicyError, unknown_name
from kvfx.params import Real, Value, Word, bind, exact, plain, shortest, word, write_number
from kvfx.scores import SCORES, ScoreRow

NAMES = (*SCORES, "zscore", "splice")  # what may stand before an opening parenthesis in a score
SPLICE = ("first", "then", "share")


@dataclass(frozen=True)
class Number:
    """A number in a score."""

    value: float

    def __post_init__(self) -> None:
        if Real().read(self.value) is None:
            raise PolicyError(f"{self.value!r} cannot stand in a score: expected a finite number below 1e30.")
        object.__setattr__(self, "value", float(self.value) + 0.0)


@dataclass(frozen=True, init=False, repr=False)
class Atom:
    """A score atom with a value for each of its parameters, in the order of its row in `SCORES`.

    Python spells it as the text does: `Atom("attn", v="none", pool=Word("avg", 5))`, `Atom("leverage", 48)`.
    """

    name: str
    values: tuple[tuple[str, Value], ...]

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        if name not in SCORES:
            raise unknown_name("score", name, NAMES)
        params = SCORES[name].params
        given = bind(name, [param.name for param in params], [(None, arg) for arg in args] + list(kwargs.items()))
        values = []
        for param in params:
            wanted = word(given.get(param.name, param.default))
            value = param.takes.read(wanted)
            if value is None:
                raise PolicyError(f"{name}({param.name}={wanted}) is not built: {param.name} takes {param.takes}.")
            values.append((param.name, value))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", tuple(values))

    @property
    def row(self) -> ScoreRow:
        """The atom's row in `SCORES`."""
        return SCORES[self.name]

    @property
    def stated(self) -> tuple[tuple[str, Value], ...]:
        """The values that text and data state: all but those of `silent` parameters at their defaults."""
        silent = {(param.name, param.default) for param in self.row.params if param.silent}
        return tuple(item for item in self.values if item not in silent)

    def __str__(self) -> str:
        bare = {param.name for param in self.row.params if param.bare}
        words = [(name, str(value) if isinstance(value, Word) else write_number(value)) for name, value in self.stated]
        args = ", ".join(text if name in bare else f"{name}={text}" for name, text in words)
        return f"{self.name}({args})" if args else self.name

    def __repr__(self) -> str:
        return f"Atom({', '.join([repr(self.name)] + [f'{name}={value!r}' for name, value in self.values])})"


@dataclass(frozen=True)
class ZScore:
    """A score standardised over each row's unprotected real tokens and all KV heads."""

    of: Score


@dataclass(frozen=True)
class Combine:
    """`left op right`, op one of + - *. A leading minus is `-1 * right`."""

    op: Literal["+", "-", "*"]
    left: Score
    right: Score


@dataclass(frozen=True)
class Splice:
    """Two scores in turn: the first `share` of what a row keeps goes by `first`, the rest by `then`. Only at the top of a score.

    Attributes:
        first: the score that is asked first; protected tokens win in it, so they take from its share.
        then: the score of the tokens left over.
        share: in [0, 1], read as `keep` is. A row that keeps n tokens takes floor(share * n) by `first`, but one at least
            unless the share is 0.
    """

    first: Score
    then: Score
    share: Fraction

    def __post_init__(self) -> None:
        share = exact("share", self.share, "[0, 1]")
        if not 0 <= share <= 1:
            raise PolicyError(f"share={write_number(share)} is outside [0, 1]: the first score chooses this share of what is kept.")
        object.__setattr__(self, "share", share)


Score = Number | Atom | ZScore | Combine | Splice


def parts(score: Score) -> Iterator[Score]:
    """Yield a score and everything inside it, left to right."""
    yield score
    match score:
        case ZScore(of):
            yield from parts(of)
        case Combine(_, left, right) | Splice(left, right):
            yield from parts(left)
            yield from parts(right)


def write(score: Score) -> str:
    """Write a score as text, with no more parentheses than it needs."""
    match score:
        case Number(value):
            return write_number(value)
        case ZScore(of):
            return f"zscore({write(of)})"
        case Splice(first, then, share):
            return f"splice({write(first)}, {write(then)}, {write_number(share)})"
        case Combine("*", Number(-1), of) if not isinstance(of, Number):
            return f"-{_inside(of, '+-*')}"
        case Combine("*", left, right):
            return f"{_inside(left, '+-')}*{_inside(right, '+-*')}"
        case Combine(op, left, right):
            return f"{write(left)} {op} {_inside(right, '+-')}"
    return str(score)


def _inside(score: Score, loose: str) -> str:
    """Write an operand, in parentheses if its own operator is one of `loose`."""
    match score:
        case Combine("*", Number(-1), of) if not isinstance(of, Number):
            return write(score)
        case Combine(op) if op in loose:
            return f"({write(score)})"
    return write(score)


def to_data(score: Score) -> Any:
    """Return a score as numbers and one-item dicts: `{"+": [{"attn": {...}}, {"zscore": ...}]}`."""
    match score:
        case Number(value):
            return shortest(value)
        case ZScore(of):
            return {"zscore": to_data(of)}
        case Splice(first, then, share):
            return {"splice": {"first": to_data(first), "then": to_data(then), "share": plain(share)}}
        case Combine(op, left, right):
            return {op: [to_data(left), to_data(right)]}
        case Atom(name):
            return {name: {key: plain(value) for key, value in score.stated}}


def from_data(data: Any) -> Score:
    """Read what `to_data` returns."""
    match data:
        case int() | float():
            return Number(data)
        case str():
            return Atom(data)
        case Mapping() if len(data) == 1:
            match next(iter(data.items())):
                case "zscore", of:
                    return ZScore(from_data(of))
                case "splice", {"first": first, "then": then, "share": share, **others} if not others:
                    return Splice(from_data(first), from_data(then), share)
                case ("+" | "-" | "*") as op, [left, right]:
                    return Combine(op, from_data(left), from_data(right))
                case str() as name, Mapping() as values:
                    return Atom(name, **values)
    raise PolicyError(
        f"{data!r} is not a score: expected a number, an atom such as {{'leverage': {{'size': 48}}}}, "
        "{'zscore': score}, {'splice': {'first': score, 'then': score, 'share': 0.5}}, or an operator with two operands, "
        "{'+': [score, score]}."
    )
