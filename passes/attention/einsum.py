"""Attention of which at least one product is an `einsum`.

Accepts   two operands and a result, a letter per axis: batch and heads in this order in both operands, one axis that is summed, one
          of keys, one of queries, and maybe one that groups query heads; for the rest what `eager` accepts, with any bias.
Refuses   equations in which batch and heads, or queries and the heads of a group, cannot be told apart; diagonals and `...`; values
          that are summed over anything but keys.
"""

from __future__ import annotations

from torch import fx

from kvfx.passes.attention.logits import MATMUL, any_value, logits, product, softmax
from kvfx.passes.attention.reading import reading
from kvfx.passes.attention.waist import put_waist
from kvfx.passes.graph import aten
from kvfx.passes.match import Match
from kvfx.passes.report import Site
from kvfx.passes.rule import Rule

PATTERN = any_value(softmax(logits(product())))


def guard(match: Match) -> None:
    """What is matched can be said in the words of the waist op."""
    reading(match)


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op in place of the match, between permutations of the axes."""
    spelling = match["equation"] if "equation" in match else match["value_equation"]
    return put_waist(graph, match, reading(match), RULE.name, spelling)


RULE = Rule("einsum", (*MATMUL, aten.einsum.default), PATTERN, guard, rewrite)
