"""ScoreRow: what a score atom is, and the parameters that several atoms have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kvfx.params import Int, Param, Real, Word, words
from kvfx.passes.plan import OpCall

SIZE = Param("size", 48, Int(1), bare=True)
SEED = Param("seed", 0, Int())
# Of `expected` and of its kvpress variant.
EXPECTED = (
    Param("future", 512, Int(1), bare=True),
    Param("sinks", 4, Int()),
    Param("cov", Word("full"), words("full none")),
    Param("v", Word("norm"), words("norm none")),
    Param("eps", 0, Real()),
)

Args = Mapping[str, Any]  # an atom's values by parameter, each checked by its Param


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
        least: real tokens that a prompt must have, for an atom's values.
    """

    summary: str
    params: tuple[Param, ...]
    lower: Callable[[Args, Fraction | None], OpCall]
    source: str
    cost: str
    sign: int = 1
    batch_coupled: str = ""
    least: Callable[[Args], int] = lambda args: 1
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


def expected(args: Args, keep: Fraction | None) -> OpCall:
    """Lower `expected`, and for the most part its kvpress variant."""
    options = (("sinks", args["sinks"]), ("covariance", args["cov"] == Word("full")), ("epsilon", float(args["eps"])))
    taps = ("pre_query", "key", "rotation", *["value"] * (args["v"] == Word("norm")))
    return OpCall("expected_attention", taps, options=options, future=args["future"])
