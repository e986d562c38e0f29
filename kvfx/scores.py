"""The score atoms that a policy can name: one row each, from its parameters to its kernel op.

A new score is one row in `SCORES` and one op in `kvfx.kernels`. Parser, checks, lowering and docs read the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kvfx.errors import PolicyError, unknown_name
from kvfx.passes.plan import OpCall, Sketch


@dataclass(frozen=True)
class Word:
    """A named choice, some with one number: `norm`, `chunk(256)`."""

    name: str
    arg: int | None = None

    def __str__(self) -> str:
        return self.name if self.arg is None else f"{self.name}({self.arg})"


Value = int | float | Word
Args = Mapping[str, Any]  # an atom's values by parameter, each checked by its Param


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


@dataclass(frozen=True)
class Param:
    """A parameter of an atom. `bare`: written without its name, as `48` in `leverage(48, ...)`."""

    name: str
    default: Value
    takes: Int | Real | OneOf
    bare: bool = False


@dataclass(frozen=True)
class ScoreRow:
    """A score atom.

    Attributes:
        summary: what it favours.
        params: its parameters, in order.
        lower: from the parameters' values and the fraction kept (None under `tokens=`) to the op call.
        source: where it comes from.
        cost: per token, layer and KV head.
        sign: -1 if the op returns the negated score.
        batch_coupled: why a row's score depends on the other rows, so that it needs batch 1 without padding and
            cannot be exported; empty if it does not.
    """

    summary: str
    params: tuple[Param, ...]
    lower: Callable[[Args, Fraction | None], OpCall]
    source: str
    cost: str
    sign: int = 1
    batch_coupled: str = ""
    call: OpCall = field(init=False)

    def __post_init__(self) -> None:
        defaults = {param.name: param.default for param in self.params}
        object.__setattr__(self, "call", self.lower(defaults, Fraction(1, 2)))

    @property
    def op(self) -> str:
        """The kernel op that computes the score."""
        return self.call.op

    @property
    def taps(self) -> tuple[str, ...]:
        """The site tensors that the op reads at the atom's defaults."""
        return self.call.taps


def _argument(value: Value) -> int:
    """Return n of `chunk(n)`, and 0 for a plain word."""
    return value.arg or 0 if isinstance(value, Word) else 0


def _key_norm(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("key_norm", ("key",))


def _chunk_attention(args: Args, keep: Fraction | None) -> OpCall:
    taps = ("query", "key", "value") if args["v"] == Word("norm") else ("query", "key")
    options = (("chunk", _argument(args["q"])), ("scale", float(args["scale"])), ("pool", _argument(args["pool"]) or 1))
    return OpCall("chunk_attention", taps, options=options)


def _leverage(args: Args, keep: Fraction | None) -> OpCall:
    tap = "pre_key" if args["rope"] == Word("pre") else "key"
    return OpCall("leverage", (tap,), Sketch(args["size"], args["seed"]), (("chunk", _argument(args["per"])),))


def _random(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("random", ("key",), options=(("seed", args["seed"]),))


def _kvpress_compactor(args: Args, keep: Fraction | None) -> OpCall:
    blend = args["blend"]
    if blend == Word("removed"):
        if keep is None:
            raise PolicyError(
                "kvpress_compactor(blend=removed) weighs leverage by the fraction removed, but the budget is a count. "
                "Give the budget as a fraction, as in uniform(0.5), or blend as a number."
            )
        blend = float(1 - keep)
    options = (("blend", float(blend)), ("chunk", args["chunk"]))
    taps = ("query", "key", "value", "pre_key")
    return OpCall("kvpress_compactor", taps, Sketch(args["size"], args["seed"]), options)


SIZE = Param("size", 48, Int(1), bare=True)
SEED = Param("seed", 0, Int())

SCORES: dict[str, ScoreRow] = {
    "knorm": ScoreRow(
        summary="L2 norm of the key; `-knorm` is the published score",
        params=(),
        lower=_key_norm,
        sign=-1,
        source="Devoto et al., arXiv:2406.11430",
        cost="reads the key once",
    ),
    "attn": ScoreRow(
        summary="attention that a token receives from the queries of its own chunk, causality dropped",
        params=(
            Param("q", Word("chunk", 256), OneOf({"chunk": Int(1)})),
            Param("mask", Word("none"), OneOf({"none": None})),
            Param("over", Word("sum"), OneOf({"sum": None})),
            Param("v", Word("norm"), OneOf({"norm": None, "none": None})),
            Param("pool", Word("avg", 3), OneOf({"avg": Int(1, odd=True), "none": None})),
            Param("scale", 1, Real()),
        ),
        lower=_chunk_attention,
        source="Compactor, arXiv:2507.08143, section on non-causal attention; kvpress NonCausalAttnPress",
        cost="one attention over chunks: 2 D chunk multiply-adds per query head",
    ),
    "leverage": ScoreRow(
        summary="statistical leverage of the sketched key: how far it sticks out of its chunk",
        params=(
            SIZE,
            Param("rope", Word("pre"), OneOf({"pre": None, "post": None})),
            Param("per", Word("chunk", 512), OneOf({"chunk": Int(1), "row": None})),
            SEED,
        ),
        lower=_leverage,
        source="Compactor, arXiv:2507.08143, Algorithm 1; the authors' engine compactor-vllm",
        cost="D size + 1.5 size^2 multiply-adds, and one Cholesky of [size, size] per chunk",
    ),
    "random": ScoreRow(
        summary="uniform noise from a counter, the baseline every score must beat",
        params=(SEED,),
        lower=_random,
        source="kvpress RandomPress",
        cost="none to speak of",
    ),
    "kvpress_compactor": ScoreRow(
        summary="kvpress's CompactorPress bug for bug, with its own protection of 8 first and 4 last tokens",
        params=(
            SIZE,
            Param("blend", Word("removed"), OneOf({"removed": None}, number=Real())),
            Param("chunk", 256, Int(1)),
            SEED,
        ),
        lower=_kvpress_compactor,
        source="kvpress 0.5.5, CompactorPress",
        cost="as attn and leverage, over the whole row",
        batch_coupled=(
            "kvpress standardises its scores over all rows of a batch at once, so what a row keeps depends on its "
            "neighbours: give it one row, without padding. Its float arithmetic on the length cannot be exported."
        ),
    ),
}
