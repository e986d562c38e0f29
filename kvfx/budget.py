"""Budget and Protect: how many slots a head keeps, and which tokens it may not lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kvfx.errors import PolicyError, unknown_name
from kvfx.params import Int, OneOf, Word, bind, exact, plain, word, write_number

ROW, FLAT = Word("row"), Word("flat")
PER = OneOf({"row": None, "chunk": Int(2)})
SHAPE = OneOf({"flat": None, "pyramid": Int(1)})
# What stands in the parentheses of `uniform(...)`, and the attribute it sets.
ARGUMENTS = {"keep": "keep", "tokens": "tokens", "round": "rounding", "per": "per", "shape": "shape", "min": "least"}


@dataclass(frozen=True)
class Budget:
    """How many slots each KV head keeps, the same for all heads of a layer: a fraction of the row's real tokens, or a count.

    Attributes:
        keep: the fraction kept, in (0, 1]. A float is read as a decimal of nine digits, so 0.3 is 3/10.
        tokens: the count kept; exactly one of `keep` and `tokens` is given.
        rounding: `floor` is exact and counts protected tokens in; `kvpress` is that library's float formula.
        per: where tokens compete: in the whole `row`, or each `chunk(n)` of n real tokens keeps its own share.
        shape: `flat`, the same for all layers, or `pyramid(beta)`, falling from layer to layer with the same mean.
        least: what the last layer of a pyramid keeps at least; the budget's `min` in the language.
    """

    keep: Fraction | None = None
    tokens: int | None = None
    rounding: str = "floor"
    per: Word = ROW
    shape: Word = FLAT
    least: int = 0

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.tokens is None):
            raise PolicyError("a budget is either a fraction kept, uniform(0.5), or a count, uniform(tokens=1024).")
        if self.rounding not in ("floor", "kvpress"):
            raise unknown_name("rounding", str(self.rounding), ("floor", "kvpress"))
        if self.keep is not None:
            object.__setattr__(self, "keep", _share(self.keep))
        elif Int(1).read(self.tokens) is None:
            raise PolicyError(f"uniform(tokens={self.tokens}) is no count: expected {Int(1)}.")
        elif self.rounding == "kvpress":
            raise PolicyError("round=kvpress rounds a fraction, and tokens= has nothing to round. Write round=floor.")
        for name, takes, value in (("per", PER, self.per), ("shape", SHAPE, self.shape), ("min", Int(), self.least)):
            if takes.read(value) is None:
                raise PolicyError(f"uniform({name}={value}) is not built: {name} takes {takes}.")
        if self.least and self.shape == FLAT:
            raise PolicyError(f"min={self.least} is the least of a pyramid's layers. Write shape=pyramid(20), or leave min out.")
        if self.rounding == "kvpress" and self.shape != FLAT and self.least < 2:
            raise PolicyError(f"round=kvpress with shape={self.shape} needs min, the window of its SnapKV: write min=64.")
        if self.rounding == "kvpress" and self.per != ROW:
            raise PolicyError(f"round=kvpress counts over the whole row, not per={self.per}. Write round=floor, or per=row.")

    def counts(self, length: int, protected: int, layers: int, unit: int = 1) -> list[int]:
        """Return how many of `length` real tokens stay in each layer when `protected` of them must.

        A pyramid (PyramidKV, arXiv:2406.02069) falls from `2 n - n / beta` to `n / beta` unprotected tokens in equal steps,
        n being the flat count; where the first layer has not so many tokens, it keeps all of them and the pyramid is flatter.
        Layers at equal distance from the two ends make up for each other, so the total is that of the flat budget.

        Args:
            length: real tokens of a row.
            protected: of them, those that must stay.
            layers: layers of the model.
            unit: tokens that stay or leave together; kvpress counts such chunks.
        """
        if self.rounding == "kvpress" and self.keep is not None:
            return self._kvpress_counts(length, layers, unit)
        flat = self.count(length, protected)
        protected = min(protected, flat)
        mean, room = flat - protected, length - protected
        if self.shape == FLAT or mean == 0:
            return [flat] * layers
        steepest = Fraction(mean, self.shape.arg or 1)
        last = max(steepest, Fraction(2 * mean - room), Fraction(max(self.least, 2) - protected))
        spread = 2 * max(mean - last, Fraction(0))  # first minus last
        upper = [mean + int(spread * (layers - 1 - 2 * layer) / (2 * max(layers - 1, 1))) for layer in range(layers // 2)]
        middle = [mean] * (layers % 2)
        return [protected + free for free in [*upper, *middle, *(2 * mean - free for free in reversed(upper))]]

    def _kvpress_counts(self, length: int, layers: int, unit: int) -> list[int]:
        """Count by kvpress's float formulas: tokens, whole chunks, or a pyramid, which falls back to a rounded count."""
        assert self.keep is not None
        keep = 1 - float(1 - self.keep)
        if length >= unit > 1:
            chunks = max(1, int(-(-length // unit) * keep))
            # Its window wins, so the short last chunk, which lies inside the window, stays.
            return [chunks * unit - -length % unit] * layers
        if self.shape == FLAT:
            return [self.count(length, 0)] * layers
        window = self.least
        capacity = window + length * keep
        last = (capacity - window) / (self.shape.arg or 1)
        first = (capacity - window) * 2 - last
        if first >= length - window:
            first = length - window
            last = (capacity - window) * 2 - first
        if not length >= first >= last >= window:
            return [max(1, round(length * keep))] * layers
        step = (first - last) / (layers - 1) if layers > 1 else 0.0
        return [round(first - layer * step) for layer in range(layers)]

    def count(self, length: int, protected: int) -> int:
        """Return how many of `length` real tokens stay, in the mean over layers, when `protected` of them must."""
        if self.rounding == "kvpress" and self.keep is not None:
            return min(length, max(1, int(length * (1 - float(1 - self.keep)))))
        amount = self.tokens or 0 if self.keep is None else length * self.keep.numerator // self.keep.denominator
        return min(length, max(1, protected, amount))

    def to_dict(self) -> dict[str, Any]:
        """Return the budget as plain data; a fraction that no short decimal equals is text, `"1/3"`."""
        amount = {"tokens": self.tokens} if self.keep is None else {"keep": plain(self.keep)}
        return {"uniform": amount | {name: plain(value) for name, value in self._changed()}}

    def _changed(self) -> list[tuple[str, Any]]:
        """The arguments beside the amount that are not at their defaults."""
        given = [("round", self.rounding, "floor"), ("per", self.per, ROW), ("shape", self.shape, FLAT), ("min", self.least, 0)]
        return [(name, value) for name, value, default in given if value != default]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Read what stands under `uniform`."""
        given = bind("uniform", ARGUMENTS, _items("uniform", data))
        return cls(**{ARGUMENTS[name]: word(value) if name in ("per", "shape") else value for name, value in given.items()})

    def __str__(self) -> str:
        amount = f"tokens={self.tokens}" if self.keep is None else write_number(self.keep)
        return f"budget=uniform({', '.join([amount, *(f'{name}={value}' for name, value in self._changed())])})"


@dataclass(frozen=True)
class Protect:
    """Real tokens at the two ends of a row that are always kept, inside the budget."""

    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        for name, value in (("sinks", self.sinks), ("recent", self.recent)):
            if type(value) is not int or Int().read(value) is None:
                raise PolicyError(f"protect({name}={value}) is not a number of tokens: expected {Int()}.")

    @property
    def total(self) -> int:
        """Tokens protected in a row that is long enough."""
        return self.sinks + self.recent

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Protect:
        """Read `{"sinks": 8, "recent": 4}`."""
        return cls(**bind("protect", ("sinks", "recent"), _items("protect", data)))

    def __str__(self) -> str:
        return f"protect(sinks={self.sinks}, recent={self.recent})"


def _share(value: Any) -> Fraction:
    """Read a fraction kept."""
    keep = exact("keep", value, "(0, 1]")
    if not 0 < keep <= 1:
        raise PolicyError(
            f"keep={write_number(keep)} is outside (0, 1]: a budget is the fraction kept, so 0.25 keeps a quarter. "
            "To keep a count, write uniform(tokens=n); to keep all, none."
        )
    return keep


def _items(what: str, data: Any) -> Any:
    """Return the items of a mapping."""
    if not isinstance(data, Mapping):
        raise PolicyError(f"{what} is {data!r}: expected a mapping of names to numbers.")
    return data.items()
