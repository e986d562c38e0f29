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
# What stands in the parentheses of a pool, and the attribute it sets.
ARGUMENTS = {"keep": "keep", "tokens": "tokens", "round": "rounding", "per": "per", "shape": "shape"}
ARGUMENTS |= {"min": "least", "floor": "floor", "max": "most", "rate": "rate"}
AMOUNTS = ("keep", "tokens", "rate")  # exactly one of them
# Who shares a budget out among themselves, and which arguments beside the amount mean something then.
POOLS = {"uniform": ("round", "per", "shape", "min"), "heads": ("round", "floor", "min"), "layers": ("floor", "min", "max")}
POOLS |= {"blocks": ()}
WORDS, NONE = ("per", "shape", "max"), Word("none")
LEAST = 2  # slots that a layer among layers keeps in any case: a graph for one slot, or none, would be another


@dataclass(frozen=True)
class Budget:
    """How many slots each KV head keeps: a fraction of the row's real tokens, or a count; in the mean, where some compete for them.

    Attributes:
        keep: the fraction kept, in (0, 1]. A float is read as a decimal of nine digits, so 0.3 is 3/10.
        tokens: the count kept; exactly one of `keep` and `tokens` is given.
        rounding: `floor` is exact and counts protected tokens in; `kvpress` is that library's float formula.
        per: where tokens compete: in the whole `row`, or each `chunk(n)` of n real tokens keeps its own share.
        shape: `flat`, the same for all layers, or `pyramid(beta)`, falling from layer to layer with the same mean.
        least: the budget's `min` in the language: what the last layer of a pyramid keeps at least, or what each that competes
            keeps unless the count is less. Among layers 0 stands for 2.
        pool: who competes: nobody under `uniform`; the KV heads of a layer for its slots under `heads`; under `layers` the layers,
            all heads of a layer keeping equally many; under `blocks` all heads of all layers, for whole blocks of slots.
        floor: the share of the count that each that competes keeps in any case.
        most: slots that no layer goes beyond, `max` in the language; None means any number.
    """

    keep: Fraction | None = None
    tokens: int | None = None
    rounding: str = "floor"
    per: Word = ROW
    shape: Word = FLAT
    least: int = 0
    pool: str = "uniform"
    floor: Fraction = Fraction(0)
    most: int | None = None

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise unknown_name("pool of a budget", str(self.pool), POOLS)
        if (self.keep is None) == (self.tokens is None):
            raise PolicyError(f"a budget is either a fraction kept, {self.pool}(0.5), or a count, {self.pool}(tokens=1024).")
        if self.rounding not in ("floor", "kvpress"):
            raise unknown_name("rounding", str(self.rounding), ("floor", "kvpress"))
        if self.keep is not None:
            object.__setattr__(self, "keep", _share(self.keep))
        elif Int(1).read(self.tokens) is None:
            raise PolicyError(f"{self.pool}(tokens={self.tokens}) is no count: expected {Int(1)}.")
        elif self.rounding == "kvpress":
            raise PolicyError("round=kvpress rounds a fraction, and tokens= has nothing to round. Write round=floor.")
        for name, takes, value in (("per", PER, self.per), ("shape", SHAPE, self.shape), ("min", Int(), self.least)):
            if takes.read(value) is None:
                raise PolicyError(f"{self.pool}({name}={value}) is not built: {name} takes {takes}.")
        self._refuse_others()
        self._read_pool()
        if self.pool == "uniform" and self.least and self.shape == FLAT:
            raise PolicyError(f"min={self.least} is the least of a pyramid's layers. Write shape=pyramid(20), or leave min out.")
        if self.rounding == "kvpress" and self.shape != FLAT and self.least < 2:
            raise PolicyError(f"round=kvpress with shape={self.shape} needs min, the window of its SnapKV: write min=64.")
        if self.rounding == "kvpress" and self.per != ROW:
            raise PolicyError(f"round=kvpress counts over the whole row, not per={self.per}. Write round=floor, or per=row.")

    def _read_pool(self) -> None:
        """Bring `floor`, `least` and `most` into their normal form, and refuse those that contradict each other or the amount."""
        floor, least = exact("floor", self.floor, "[0, 1]"), self.least
        if not 0 <= floor <= 1:
            raise PolicyError(f"floor={write_number(floor)} is outside [0, 1]: it is a share of what is kept in the mean.")
        most = None if self.most == NONE else self.most
        if most is not None and (most := Int(1).read(most)) is None:
            raise PolicyError(f"{self.pool}(max={self.most}) is no count: expected {Int(1)}, or none.")
        if self.pool == "layers" and least == 1:
            raise PolicyError("min=1: a layer among layers keeps 2 slots at least. Write min=2, or leave min out.")
        for name, value in (("floor", floor), ("most", most), ("least", 0 if (self.pool, least) == ("layers", LEAST) else least)):
            object.__setattr__(self, name, value)
        if self.tokens is not None and self.tokens < self.sure:
            raise PolicyError(f"tokens={self.tokens} is less than min={self.sure}, and a mean cannot be. Raise it, or lower min.")
        if self.tokens is not None and floor and self.least:
            raise PolicyError(
                f"tokens={self.tokens} makes floor={write_number(floor)} a number of tokens, so that it or min={least} says "
                "nothing. Leave one of them out."
            )
        if most is not None and most < (amount := max(self.tokens or 0, self.sure)):
            raise PolicyError(
                f"max={most} is less than {'tokens' if self.tokens else 'min'}={amount}, and a mean cannot be more. Raise max."
            )

    def _refuse_others(self) -> None:
        """Refuse what means nothing in this pool, such as what a preset's own pool left behind."""
        takes = POOLS[self.pool]
        for name, value, default in self._beside():
            if value != default and name not in takes:
                raise PolicyError(
                    f"{name}={_written(value)} means nothing in {self.pool}(...), which takes {', '.join(takes) or 'nothing'} "
                    f"beside the amount. Leave it out; behind a preset that says it, write {name}={_written(default)}."
                )

    @property
    def sure(self) -> int:
        """What each that competes keeps unless the count is less, the floor aside."""
        return max(self.least, LEAST if self.pool == "layers" else 0)

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
        least = LEAST if self.pool == "layers" else 1
        return min(length, max(least, protected, amount), length if self.most is None else self.most)

    def to_dict(self) -> dict[str, Any]:
        """Return the budget as plain data; a fraction that no short decimal equals is text, `"1/3"`."""
        amount = {"tokens": self.tokens} if self.keep is None else {"keep": plain(self.keep)}
        return {self.pool: amount | {name: plain(value) for name, value, default in self._beside() if value != default}}

    def _beside(self) -> list[tuple[str, Any, Any]]:
        """The arguments beside the amount: name, value, and default."""
        words = [("round", self.rounding, "floor"), ("per", self.per, ROW), ("shape", self.shape, FLAT)]
        return [*words, ("floor", self.floor, Fraction(0)), ("min", self.least, 0), ("max", self.most, None)]

    @classmethod
    def from_dict(cls, pool: str, data: Mapping[str, Any]) -> Budget:
        """Read what stands under the name of a pool."""
        given = read_rate(pool, bind(pool, ARGUMENTS, _items(pool, data)))
        return cls(pool=pool, **{ARGUMENTS[name]: word(value) if name in WORDS else value for name, value in given.items()})

    def __str__(self) -> str:
        amount = f"tokens={self.tokens}" if self.keep is None else write_number(self.keep)
        beside = [f"{name}={_written(value)}" for name, value, default in self._beside() if value != default]
        return f"budget={self.pool}({', '.join([amount, *beside])})"


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


def read_rate(pool: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read `rate=8`, by how much a cache is to shrink, as the fraction kept, 1/8."""
    given = dict(given)
    if "rate" in given:
        rate = exact("rate", given.pop("rate"), "[1, 10^9]")
        if not rate >= 1:
            raise PolicyError(f"{pool}(rate={write_number(rate)}) would grow the cache: rate=8 keeps an eighth. Write 1 or more.")
        if "keep" in given or "tokens" in given:
            raise PolicyError(f"{pool}: rate={write_number(rate)} is an amount, and another is given. Give one.")
        given["keep"] = 1 / rate
    return given


def _written(value: Any) -> str:
    """Write an argument as text."""
    return write_number(value) if isinstance(value, Fraction) else "none" if value is None else str(value)


def _share(value: Any) -> Fraction:
    """Read a fraction kept."""
    keep = exact("keep", value, "(0, 1]")
    if not 0 < keep <= 1:
        raise PolicyError(
            f"keep={write_number(keep)} is outside (0, 1]: a budget is the fraction kept, so 0.25 keeps a quarter. "
            "To keep a count, write tokens=n; to keep all, none."
        )
    return keep


def _items(what: str, data: Any) -> Any:
    """Return the items of a mapping."""
    if not isinstance(data, Mapping):
        raise PolicyError(f"{what} is {data!r}: expected a mapping of names to numbers.")
    return data.items()
