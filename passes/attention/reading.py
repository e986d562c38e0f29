"""What a matched attention means, whatever its spelling: operands, scale, cap, sinks, masks, and the layout of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvfx.passes.attention.axes import PERMUTES, before_view, is_tensor, order, readers, shape_of
from kvfx.passes.attention.equation import product_axes, value_axes
from kvfx.passes.attention.operand import Place, check, heads_of, key_and_value, number, places, query_of
from kvfx.passes.graph import arguments, aten, is_call, val
from kvfx.passes.match import Match, Step
from kvfx.passes.report import Refuse

# A logit this low has no probability beside any other.
HIDDEN = -1e4


@dataclass(frozen=True)
class Bias:
    """One thing that is added to logits, or filled in where a mask says so.

    Attributes:
        kind: "add", "subtract", "fill" where the mask holds, "keep" where it does not, or "times" for what is there already.
        node: the bias or the mask; None for "times".
        by: the number that is filled in or multiplied by.
        axes: axes of the logits there.
        at: the node that does it.
    """

    kind: str
    node: fx.Node | None
    by: float
    axes: str
    at: fx.Node


@dataclass(frozen=True)
class Reading:
    """An attention in the words of the waist op; `out` are the axes of the matched result."""

    query: Place
    key: Place
    value: Place
    heads: Any
    scale: float
    softcap: float | None
    biases: tuple[Bias, ...]
    out: str
    axes: str  # of the logits, where softmax reads them


def reading(match: Match, softcap: float | None = None) -> Reading:
    """Read a match that `logits` and `softmax` and a product with values made.

    Args:
        match: names `attention`, `weights`, `softmax`, `axis`, `logits`, `product`, `query`, `key` and `value`; `capped` are the
            steps between product and soft cap, if there is one.
        softcap: the cap.

    Raises:
        Refuse: the pattern fits and the meaning does not.
    """
    node = match["attention"]
    for covered in match.nodes:
        _check_readers(covered, match)
    axes, of_query, of_key = product_axes(match)
    scale, biases, axes = _steps(match, axes, softcap)
    axis = match["axis"] % len(axes)
    if axes[axis] != "t":
        raise Refuse(f"softmax over axis {axis} of {_shape(match['softmax'])}, expected the axis of keys", match["softmax"])
    weights = _weights(match["weights"], axes)
    of_value, out = value_axes(match, weights)
    queries, keys, values = (places(match[name], of) for name, of in (("query", of_query), ("key", of_key), ("value", of_value)))
    query = query_of(queries)
    key, value = key_and_value(keys, values, val(query.node).dtype)
    heads = heads_of(queries)
    if heads is None:  # beside the batch, where keys and values have as many heads as queries
        known = [heads_of(keys), heads_of(values), val(match["softmax"]).shape[axes.index("H")] if "H" in axes else None]
        heads = next((count for count in known if count is not None), None)
    if heads is None:
        raise Refuse(f"query has {val(match['query']).dim()} axes, expected [B, H, S, D]", node)
    check(query, key, value, heads, node)
    return Reading(query, key, value, heads, scale * query.factor * key.factor, softcap, biases, out, axes)


def _check_readers(node: fx.Node, match: Match) -> None:
    inside = {*match.nodes}
    for reader in readers(node) if node is not match["attention"] else ():
        shifts = is_call(reader, aten.max.dim, aten.amax.default) and all(
            user in inside or all(last in inside for last in user.users) for user in reader.users
        )
        if reader not in inside and not shifts:
            raise Refuse(f"`{node.name}` inside attention is also read by `{reader.name}`", node)


def _steps(match: Match, axes: str, softcap: float | None) -> tuple[float, tuple[Bias, ...], str]:
    """Scale, biases and final axes of the logits, from the product upwards."""
    scale, biases = 1.0, list[Bias]()
    if "bias" in match:
        given = arguments(match["product"])
        scale = float(given["alpha"])
        if given["beta"]:
            biases = [Bias("add", match["bias"], 0.0, axes, match["product"])]
            if given["beta"] != 1:
                biases.append(Bias("times", None, float(given["beta"]), axes, match["product"]))
    below = tuple(match["capped"]) if "capped" in match else ()
    for step in reversed(below):
        if step.kind in ("times", "over"):
            scale *= _number(step)
        elif step.kind not in ("view", "cast", "shift"):
            raise Refuse(f"`{step.node.name}` puts a mask or a bias on logits that are capped afterwards", step.node)
        axes = _after(step, axes)
    if softcap is not None and biases:
        raise Refuse("logits are capped after a bias was added", match["product"])
    for step in reversed(match["logits"]):
        if step.kind in ("times", "over"):
            by = _number(step)
            if softcap is not None:
                raise Refuse(f"`{step.node.name}` scales logits that were capped before", step.node)
            scale *= by
            biases += [Bias("times", None, by, axes, step.node)] * (by != 1.0 and bool(biases))
        elif step.kind in ("bias", "penalty"):
            biases.append(Bias("add" if step.kind == "bias" else "subtract", step.others[0], 0.0, axes, step.node))
        elif step.kind == "floor":
            _hidden(step.others[0], step)  # at or below what hides: it keeps rows of nothing else from becoming NaN
        elif step.kind in ("fill", "keep"):
            mask, value = step.others
            biases.append(Bias(step.kind, mask, _hidden(value, step), axes, step.node))
        axes = _after(step, axes)
    return scale, tuple(biases), axes


def _number(step: Step) -> float:
    factor = step.others[0]
    by = number(factor)
    if by is None:
        shape = f" of shape {_shape(factor)}" if is_tensor(factor) else ""
        raise Refuse(f"the scale `{factor}`{shape} is not a number known when the graph is made", step.node)
    return 1 / by if step.kind == "over" else by


def _hidden(value: Any, step: Step) -> float:
    filled = number(value)
    if filled is None or filled > HIDDEN:
        reason = f"fills hidden logits with {value if filled is None else filled}, expected a number of at most {HIDDEN:g}"
        raise Refuse(f"`{step.node.name}` {reason}", step.node)
    return filled


def _after(step: Step, axes: str) -> str:
    """The axes of the logits behind a step."""
    if step.kind != "view" or not isinstance(val(step.node), Tensor):
        return axes
    if is_call(step.node, *PERMUTES):
        return "".join(axes[axis] for axis in order(step.node))
    # Behind the view they are those which, looked at through the view, are what they are in front of it.
    candidates = (axes, axes.replace("n", "bH"), axes.replace("n", "bhg"), axes.replace("bH", "n"), axes.replace("bhg", "n"))
    for after in (*candidates, axes.replace("hg", "H"), axes.replace("H", "hg")):
        if len(after) == val(step.node).dim() and before_view(step.node, after) == axes:
            return after
    raise Refuse(f"`{step.node.name}` makes {_shape(step.node)} of logits [{', '.join(axes)}]", step.node)


def _weights(steps: tuple[Step, ...], axes: str) -> str:
    """The axes of the probabilities where values are multiplied."""
    for step in reversed(steps):
        if step.kind == "dropout" and step.others[0] != 0.0 and step.others[1]:
            raise Refuse(f"dropout {step.others[0]} inside attention", step.node)
        axes = _after(step, axes)
    return axes


def _shape(node: fx.Node) -> str:
    return f"[{', '.join(shape_of(node))}]"
