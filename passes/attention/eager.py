"""Attention spelled out with `matmul` or `bmm`: product, scale, mask, softmax, product.

Accepts   a scale (`*` or `/`) on queries, keys or logits, before or after the mask; masks that are added or filled in with a number
          of at most -1e4 (`masked_fill`, `where`), several or none; softmax in float32 or natively, of queries and keys cast up or
          not; dropout that does nothing; heads beside each other, grouped in an axis of their own, or joined with the batch; keys
          and values repeated to the query heads in any way.
Refuses   softmax over another axis, a scale that is no number, fills that hide nothing, dropout, probabilities or logits that
          something else reads too, operands without batch and heads.

Products and softmax are those of the waist afterwards: inputs of float16 and bfloat16 are not cast up before the products.
"""

from __future__ import annotations

from torch import fx

from kvfx.passes.attention.logits import MATMUL, logits, matmul, plain_step, softmax, times_value
from kvfx.passes.attention.reading import reading
from kvfx.passes.attention.waist import put_waist
from kvfx.passes.match import Match
from kvfx.passes.report import Site
from kvfx.passes.rule import Rule

PATTERN = times_value(softmax(logits(matmul(), plain_step)))


def guard(match: Match) -> None:
    """What is matched can be said in the words of the waist op."""
    reading(match)


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op in place of all from the product of queries and keys to that with values."""
    return put_waist(graph, match, reading(match), RULE.name, "matmul")


RULE = Rule("eager", MATMUL, PATTERN, guard, rewrite)
