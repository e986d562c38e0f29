"""Attention with a sink: one more logit per head, that takes probability and gives no value, as in GPT-OSS.

Accepts   logits joined with sinks [Hq] that are spread over rows and queries, less their row's maximum or not, softmax, the last
          column cut off; products, masks and values as `eager`, `alibi` and `einsum` do.
Refuses   sinks that differ by row or query, more than one column of them, anything else than the last column cut off.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvfx.passes.attention.axes import CASTS, EXPANDS, RESHAPES, SAME, is_tensor, shape_of
from kvfx.passes.attention.logits import MATMUL, any_step, any_value, logits, product, softmax
from kvfx.passes.attention.reading import Reading, reading
from kvfx.passes.attention.waist import put_waist
from kvfx.passes.graph import arguments, aten, inputs, is_call, val
from kvfx.passes.match import Chain, Match, Op, Seq, Var
from kvfx.passes.report import Refuse, Site
from kvfx.passes.rule import Rule

JOINED = Op(aten.cat.default, Seq(logits(product()), Var("sinks")), name="joined")
PROBABILITIES = softmax(Chain("joined_steps", any_step, JOINED))
PATTERN = any_value(Op(aten.slice.Tensor, PROBABILITIES, name="cut"))


def guard(match: Match) -> None:
    """One column is joined at the end, and that one is cut off again."""
    _read(match)
    sink_of(match)


def _read(match: Match) -> Reading:
    axes = val(match["product"]).dim()
    joined, cut = arguments(match["joined"]), arguments(match["cut"])
    if joined["dim"] % axes != axes - 1 or shape_of(match["sinks"])[-1] != "1":
        raise Refuse(f"`{match['sinks'].name}` is not one more column of the logits", match["joined"])
    for step in match["joined_steps"]:
        if step.kind not in ("shift", "cast"):
            raise Refuse(f"`{step.node.name}` changes logits and sinks together", step.node)
    if cut["dim"] % axes != axes - 1 or cut["start"] not in (0, None) or cut["step"] != 1 or not _cuts_last(cut["end"], match):
        raise Refuse(f"`{match['cut'].name}` cuts off something else than the column of the sinks", match["cut"])
    return reading(match)


def _cuts_last(end: Any, match: Match) -> bool:
    keys = shape_of(match["product"])[-1]
    return end == -1 or str(val(end) if isinstance(end, fx.Node) else end) == keys


def sink_of(match: Match) -> fx.Node:
    """The tensor that holds one logit per query head."""
    node = match["sinks"]
    while is_call(node, *EXPANDS, *CASTS, *SAME) and is_tensor(inputs(node)[0]):
        node = inputs(node)[0]
    spread = [size for size in shape_of(node) if size != "1"]
    while is_call(node, *RESHAPES) and val(node).dim() > 1:
        node = inputs(node)[0]
    heads = val(match["product"]).shape[1]
    if val(match["product"]).dim() != 4 or val(node).dim() != 1 or len(spread) > 1 or spread not in ([str(heads)], []):
        raise Refuse(f"sinks `{node.name}` of shape [{', '.join(shape_of(node))}], expected one per query head", match["joined"])
    return node


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op with its sinks in place of the match."""
    sinks, read = sink_of(match), reading(match)
    return put_waist(graph, match, read, RULE.name, "sinks", sinks)


RULE = Rule("sinks", (*MATMUL, aten.einsum.default), PATTERN, guard, rewrite)
