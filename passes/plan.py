"""Plan: what the passes are asked to do, in the compiler's own words.

A policy (what to keep; `kvfx.policy`) is lowered to a Plan, and the passes know nothing else. A Plan is plain, frozen data; two
plans that compare equal give the same graph, whatever share of the cache is kept, because the count is an input of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

# What a score may read at a site. `query` and `key` carry RoPE, `pre_query` and `pre_key` do not; all are the new tokens' own, keys
# and values with one row per KV head. `rotation` is what RoPE will do, on average, to the queries that follow: [B, Hq, D, D],
# float32, from the right onto row vectors; None in a model without RoPE, and for a prompt of one token, which stays in any case.
# `output_weight` is the weight of the projection behind attention, [hidden, Hq*Dv].
TAPS = ("query", "key", "value", "pre_query", "pre_key", "rotation", "output_weight")


@dataclass(frozen=True)
class Sketch:
    """A random matrix `[Hkv, D, size]`, drawn anew for each layer and head from `seed`."""

    size: int
    seed: int = 0


@dataclass(frozen=True)
class OpCall:
    """A kernel op on tensors of the site, in the op's own argument order, then `Sketch` constants, then keyword constants.

    Where `rotation` is among the tensors, it is averaged over `future` positions behind the prompt.
    """

    op: str
    taps: tuple[str, ...]
    sketch: Sketch | None = None
    options: tuple[tuple[str, int | float | bool | str], ...] = ()
    future: int = 0


@dataclass(frozen=True)
class Scalar:
    """A number in a score expression."""

    value: float


@dataclass(frozen=True)
class ZScore:
    """Standardise a score over each row's unprotected real tokens and all KV heads."""

    of: Expr


@dataclass(frozen=True)
class Combine:
    """`left op right`, op one of add, sub, mul."""

    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Splice:
    """Rank by `first` up to a share of what a row keeps, by `then` behind it. Only at the top of a score."""

    first: Expr
    then: Expr
    share: Fraction


Expr = OpCall | Scalar | ZScore | Combine | Splice


@dataclass(frozen=True)
class Keep:
    """How many of a prompt's tokens stay, for graphs in which nothing else says so: a fraction, or a count.

    Attributes:
        numerator: of the fraction kept.
        denominator: of the fraction kept.
        tokens: the count kept; 0 means that the fraction holds.
        least: what stays in any case, the protected tokens among them.
        pyramid: how steeply counts fall over the layers, their mean staying the same; 0 means that all layers keep equally many.
        last: what the last layer of a pyramid keeps at least.
        layers: of the model; only a pyramid needs it.
    """

    numerator: int = 1
    denominator: int = 1
    tokens: int = 0
    least: int = 1
    pyramid: int = 0
    last: int = 0
    layers: int = 1

    def slots(self, length: int | torch.SymInt | Tensor, layer: int) -> Any:
        """Slots that `layer` keeps of `length` tokens, without a branch on it: a symbol, or the lengths of rows, int64."""
        wanted = self.tokens or length * self.numerator // self.denominator
        flat = _at_most(length, _at_least(wanted, max(1, self.least)))
        if not self.pyramid:
            return flat
        # As kvfx.budget.Budget.counts, in integers: all in units of 1 / pyramid.
        protected = _at_most(flat, self.least)
        mean, room = flat - protected, length - protected
        steepest = _at_least(mean, self.pyramid * (2 * mean - room))
        last = _at_least(steepest, self.pyramid * (max(self.last, 2) - protected))
        spread = 2 * _at_least(self.pyramid * mean - last, 0)
        mirrored = self.layers - 1 - layer
        steps = abs(mirrored - layer)
        free = spread * steps // (2 * max(self.layers - 1, 1) * self.pyramid)
        return flat + free if layer < mirrored else flat - free


def _at_least(number: Any, bound: Any) -> Any:
    return number.clamp(min=bound) if isinstance(number, Tensor) else torch.sym_max(number, bound)


def _at_most(number: Any, bound: Any) -> Any:
    return number.clamp(max=bound) if isinstance(number, Tensor) else torch.sym_min(number, bound)


@dataclass(frozen=True)
class Plan:
    """Score every token of a prompt, protect both ends, keep the best.

    Attributes:
        score: the score expression, or None to store the cache whole.
        sinks: first real tokens of a row that are always kept.
        recent: last real tokens of a row that are always kept.
        shared: one choice of tokens for all KV heads of a layer, by the mean of their scores.
        chunk: tokens that stay or leave together; 0 means that each stands alone.
        per: tokens of a chunk that keeps its own share of the budget; 0 means that the whole row competes.
        sketches: per layer, a matrix `[Hkv, D, k]` or `[B, Hkv, D, k]` that replaces the drawn one.
        sketch_digest: sha256 over `sketches`; stands for them in comparisons.
        keep: how many tokens stay, in an exported program; None elsewhere, where an input of the graph says so.
        windows: of an exported model, for each cache layer the tokens that its sliding window sees, or None if it sees all; a layer
            with a window is left whole. Empty if no layer has one.
        floor: of what a head keeps on average, the share that every head of a layer keeps in any case; with 1 heads do not compete.
        least: tokens that every head keeps in any case, unless the average is less.
        later: whether the choice is made behind the graph, among all layers: scores are then given as they are, nothing protected.
        received: which power of its probabilities attention over blocks also sums for each slot, 0 for none; see
            `kernels.ragged_probabilities`. Only of a plan that evicts nothing.
        impl: what ops become: "auto" takes Triton kernels on CUDA and references elsewhere, "triton" and "reference" only these.
    """

    score: Expr | None
    sinks: int = 0
    recent: int = 0
    sketches: tuple[Tensor, ...] | None = field(default=None, compare=False, repr=False)
    sketch_digest: str | None = None
    shared: bool = False
    chunk: int = 0
    per: int = 0
    keep: Keep | None = None
    windows: tuple[int | None, ...] = ()
    floor: Fraction = Fraction(1)
    least: int = 0
    later: bool = False
    received: int = 0
    impl: str = "auto"

    def calls(self) -> Iterator[OpCall]:
        """The op calls of the score, left to right."""
        todo: list[Expr] = [self.score] if self.score is not None else []
        while todo:
            expr = todo.pop(0)
            match expr:
                case OpCall():
                    yield expr
                case ZScore(of):
                    todo.insert(0, of)
                case Combine(_, left, right) | Splice(left, right):
                    todo[:0] = [left, right]

    @property
    def taps(self) -> tuple[str, ...]:
        """The site tensors that the score reads, each once, in the order of `TAPS`."""
        used = {tap for call in self.calls() for tap in call.taps}
        return tuple(tap for tap in TAPS if tap in used)

    @property
    def futures(self) -> tuple[int, ...]:
        """Over how many positions the score wants `rotation` averaged, each number once."""
        return tuple(dict.fromkeys(call.future for call in self.calls() if "rotation" in call.taps))
