"""Attention with a bias per head on its logits, such as ALiBi: added, or given to `baddbmm`.

Accepts   what `eager` accepts, and a bias with a row per head: added to the logits before or after scale and mask (MPT, Falcon), or
          as the first operand of `baddbmm` with any alpha and beta (BLOOM).
Refuses   what `eager` refuses.

The bias becomes part of the mask of the waist, in the order in which the model applies them.
"""

from __future__ import annotations

from torch import fx

from kvfx.passes.attention.logits import MATMUL, baddbmm, logits, matmul, softmax, times_value
from kvfx.passes.attention.reading import reading
from kvfx.passes.attention.waist import put_waist
from kvfx.passes.match import Match, OneOf
from kvfx.passes.report import Site
from kvfx.passes.rule import Rule

PATTERN = times_value(softmax(logits(OneOf(matmul=matmul(), baddbmm=baddbmm()))))


def guard(match: Match) -> None:
    """What is matched can be said in the words of the waist op."""
    reading(match)


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op in place of the match, bias and masks in one."""
    return put_waist(graph, match, reading(match), RULE.name, "baddbmm" if "baddbmm" in match.tags else "matmul")


RULE = Rule("alibi", MATMUL, PATTERN, guard, rewrite)
