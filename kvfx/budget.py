"""Budget and Protect: how many slots a head keeps, and which tokens it may not lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kvfx.errors import PolicyError, unknown_name
from kvfx.params import Int, bind, exact, plain, write_number


@dataclass(frozen=True)
class Budget:
    """How many slots each KV head keeps, the same for all heads: a fraction of the row's real tokens, or a count.

    Attributes:
        keep: the fraction kept, in (0, 1]. A float is read as a decimal of nine digits, so 0.3 is 3/10.
        tokens: the count kept; exactly one of `keep` and `tokens` is given.
        rounding: `floor` is exact and counts protected tokens in; `kvpress` is that library's float formula.
    """

    keep: Fraction | None = None
    tokens: int | None = None
    rounding: str = "floor"

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

    def count(self, length: int, protected: int) -> int:
        """Return how many of `length` real tokens stay when `protected` of them must."""
        if self.rounding == "kvpress" and self.keep is not None:
            return min(length, max(1, int(length * (1 - float(1 - self.keep)))))
        amount = self.tokens or 0 if self.keep is None else length * self.keep.numerator // self.keep.denominator
        return min(length, max(1, protected, amount))

    def to_dict(self) -> dict[str, Any]:
        """Return the budget as plain data; a fraction that no short decimal equals is text, `"1/3"`."""
        if self.keep is None:
            return {"uniform": {"tokens": self.tokens}}
        return {"uniform": {"keep": plain(self.keep)} | ({"round": self.rounding} if self.rounding != "floor" else {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Read what stands under `uniform`."""
        given = bind("uniform", ("keep", "tokens", "round"), _items("uniform", data))
        return cls(given.get("keep"), given.get("tokens"), given.get("round", "floor"))

    def __str__(self) -> str:
        amount = f"tokens={self.tokens}" if self.keep is None else write_number(self.keep)
        return f"budget=uniform({amount}{', round=kvpress' if self.rounding == 'kvpress' else ''})"


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
