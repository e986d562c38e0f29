"""Attention whose logits are capped: `cap * tanh(logits / cap)`, as in Gemma 2.

Accepts   the cap between scale and mask, spelled with `/` or `*`; products, masks and values as `eager`, `alibi` and `einsum` do.
Refuses   a cap that is not the number by which logits were divided, masks or biases below the cap, a scale above it.
"""

from __future__ import annotations

import math

from torch import fx

from kvfx.passes.attention.logits import DIVIDE, MATMUL, MULTIPLY, any_step, any_value, logits, product, softmax
from kvfx.passes.attention.operand import number
from kvfx.passes.attention.reading import reading
from kvfx.passes.attention.waist import put_waist
from kvfx.passes.graph import aten
from kvfx.passes.match import Chain, Match, OneOf, Op, Var
from kvfx.passes.report import Refuse, Site
from kvfx.passes.rule import Rule

BELOW = Chain("capped", any_step, product())
NARROWED = OneOf(divided=Op(DIVIDE, BELOW, Var("narrow")), multiplied=Op(MULTIPLY, BELOW, Var("narrow")))
BOUNDED = Op((aten.tanh.default, aten.tanh_.default), NARROWED)
CAPPED = OneOf(
    cap_last=Op(MULTIPLY, BOUNDED, Var("cap"), name="cap_node"),
    cap_first=Op(MULTIPLY, Var("cap"), BOUNDED, name="cap_node"),
)
PATTERN = any_value(softmax(logits(CAPPED)))


def guard(match: Match) -> None:
    """Divided and multiplied by one number, and nothing but a scale below."""
    reading(match, _cap(match))


def _cap(match: Match) -> float:
    cap, narrow = number(match["cap"]), number(match["narrow"])
    if cap is None or narrow is None or not narrow or cap <= 0:
        raise Refuse("the cap of logits is not a positive number known when the graph is made", match["cap_node"])
    divided = narrow if "divided" in match.tags else 1 / narrow
    if not math.isclose(cap, divided, rel_tol=1e-6):
        raise Refuse(f"tanh of logits / {divided:g} is multiplied by {cap:g}, expected one number", match["cap_node"])
    return cap


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op with its cap in place of the match."""
    cap = _cap(match)
    return put_waist(graph, match, reading(match, cap), RULE.name, f"softcap {cap:g}")


RULE = Rule("softcap", (*MATMUL, aten.einsum.default), PATTERN, guard, rewrite)
