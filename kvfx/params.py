"""Parameters of atoms and axes: the values that text can hold, how they are checked, written and bound to names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kvfx.errors import PolicyError, unknown_name


@dataclass(frozen=True)
class Word:
    """A named choice, some with one number: `norm`, `chunk(256)`."""

    name: str
    arg: int | None = None

    def __str__(self) -> str:
        return self.name if self.arg is None else f"{self.name}({self.arg})"


Value = int | float | Word


def plain(value: Value | Fraction) -> Any:
    """Return a value as plain data: 48, `"none"`, `{"chunk": 256}`; a fraction as 0.3, or `"1/3"` if no short decimal equals it."""
    if isinstance(value, Fraction):
        decimal = float(value)
        return decimal if Fraction(repr(decimal)) == value else str(value)
    if isinstance(value, Word):
        return value.name if value.arg is None else {value.name: value.arg}
    return value


def word(value: Any) -> Any:
    """Read what `plain` returns."""
    match value:
        case str():
            return Word(value)
        case Mapping() if len(value) == 1:
            [(name, arg)] = value.items()
            return Word(name, arg)
    return value


def shortest(value: float) -> int | float:
    """Return whole numbers as integers, so that equal numbers are written alike."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def write_number(value: int | float | Fraction) -> str:
    """Write a number as short as it can be without losing any of it: `48`, `0.3`, `1e-05`, `1/3`."""
    if isinstance(value, Fraction):
        try:
            decimal = write_number(float(value))
        except OverflowError:
            return str(value)
        return decimal if Fraction(decimal) == value else str(value)
    return str(shortest(value))


def exact(name: str, value: Any, where: str) -> Fraction:
    """Read a fraction: text or a Fraction as it is, a float as a decimal of nine digits."""
    try:
        fraction = Fraction(f"{value:.9f}") if isinstance(value, float) else Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise PolicyError(f"{name}={value!r} is not a fraction: expected a number in {where}, such as 0.5.") from None
    if fraction.denominator > 10**9:
        raise PolicyError(f"{name}={write_number(fraction)} is too fine for exact 64-bit counts: give nine decimals at most.")
    return fraction


def bind(what: str, names: Iterable[str], arguments: Iterable[tuple[str | None, Any]]) -> dict[str, Any]:
    """Give each argument, named or in its place (name None), to one of `names`."""
    names = list(names)
    bound: dict[str, Any] = {}
    places = iter(names)
    for name, value in arguments:
        name = name or next(places, None)
        if name is None:
            raise PolicyError(f"{what} takes {len(names)} arguments at most: {', '.join(names) or 'none'}.")
        if name not in names:
            raise unknown_name(f"argument of {what}:", name, names)
        if name in bound:
            raise PolicyError(f"{what}: the argument {name} is given twice. Give it once.")
        bound[name] = value
    return bound


@dataclass(frozen=True)
class Int:
    """An integer parameter that fits 64 bits."""

    least: int = 0
    odd: bool = False

    def read(self, value: Any) -> int | None:
        """Return the value in its normal form, or None if the parameter does not take it."""
        value = shortest(value) if isinstance(value, float) else value
        fits = type(value) is int and self.least <= value < 2**63 and (value % 2 == 1 or not self.odd)
        return value if fits else None

    def __str__(self) -> str:
        return f"an {'odd ' if self.odd else ''}integer >= {self.least}"


@dataclass(frozen=True)
class Real:
    """A finite number."""

    def read(self, value: Any) -> int | float | None:
        """See `Int.read`."""
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e30:
            return None
        return shortest(float(value)) + 0  # -0.0 is written as 0

    def __str__(self) -> str:
        return "a number"


@dataclass(frozen=True)
class OneOf:
    """One of some words, each mapped to the number it takes or None; or, if `number`, a plain number."""

    words: Mapping[str, Int | None]
    number: Real | None = None

    def read(self, value: Any) -> Value | None:
        """See `Int.read`."""
        match value:
            case Word(name, None) if name in self.words and self.words[name] is None:
                return value
            case Word(name, arg) if (takes := self.words.get(name)) and takes.read(arg) is not None:
                return value
        return self.number.read(value) if self.number else None

    def __str__(self) -> str:
        words = [name if takes is None else f"{name}(n), n {takes}" for name, takes in self.words.items()]
        return " or ".join([str(self.number)] * (self.number is not None) + words)


def words(names: str) -> OneOf:
    """One of some plain words, given with spaces between them."""
    return OneOf(dict.fromkeys(names.split()))


@dataclass(frozen=True)
class Param:
    """A parameter of an atom.

    Attributes:
        name: its name.
        default: its value where none is given.
        takes: which values it takes.
        bare: written without its name, as `48` in `leverage(48, ...)`.
        silent: not written at its default, so that what was canonical before there was the parameter still is.
    """

    name: str
    default: Value
    takes: Int | Real | OneOf
    bare: bool = False
    silent: bool = False
