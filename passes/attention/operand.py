"""Query, key and value as attention's own tensors: below casts, scales, and what repeats heads, as near to the cache as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvfx.passes.attention.axes import SAME, before_view, brought, is_tensor, keeps_values, readers
from kvfx.passes.graph import aten, inputs, is_call, val
from kvfx.passes.report import Refuse

MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
DIVIDE = (aten.div.Tensor, aten.div.Scalar)
# What fills a tensor with one number, and which argument that is.
FULL: dict[Any, int] = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
# What makes a number of numbers, where a scale is computed in the graph.
FOLDED = frozenset(
    {
        aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default, aten.sqrt.default, aten.rsqrt.default,
        aten.reciprocal.default, aten.neg.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.mul.Tensor,
        aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.full.default, aten.scalar_tensor.default, aten.to.dtype,
        aten.to.dtype_layout, aten._to_copy.default, *SAME,
    }
)  # fmt: skip


def number(node: Any) -> float | None:
    """The number that `node` is, if that is known from constants; None if it comes from an input or is no number."""
    if isinstance(node, (int, float)):
        return float(node)
    if is_call(node, *FULL):
        return number(inputs(node)[FULL[node.target]])
    value = _folded(node) if is_tensor(node) else None
    return float(value) if value is not None and value.numel() == 1 else None


def _folded(node: fx.Node) -> torch.Tensor | None:
    if val(node).dim() > 1:
        return None
    if node.op == "get_attr":
        constant: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            constant = getattr(constant, name)
        return None if isinstance(constant, torch.nn.Parameter) else constant.detach().clone()
    if not is_call(node, *FOLDED):
        return None
    arguments = [_folded(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
    if any(argument is None for argument in arguments) or any(isinstance(arg, fx.Node) for arg in node.kwargs.values()):
        return None
    result: torch.Tensor = node.target(*arguments, **node.kwargs)  # type: ignore[operator]
    return result


def factor_of(node: Any) -> tuple[Any, float] | None:
    """What `node` multiplies by a known number, and that number; None if it does something else.

    An in-place product is left alone: what it multiplies no longer holds what it did.
    """
    if is_call(node, *MULTIPLY):
        for tensor, by in (node.args, node.args[::-1]):
            if (factor := number(by)) is not None and is_tensor(tensor):
                return tensor, factor
    if is_call(node, *DIVIDE) and not node.kwargs and (factor := number(inputs(node)[1])) is not None and factor != 0:
        return inputs(node)[0], 1 / factor
    return None


@dataclass(frozen=True)
class Place:
    """Where an operand can be taken from.

    Attributes:
        node: a tensor that the operand is made of.
        axes: its axes, see `axes`.
        factor: the operand is this times the tensor.
    """

    node: fx.Node
    axes: str
    factor: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether its axes are [B, H, tokens, D] in this order."""
        return self.axes in ("bHsd", "bHtd", "bhtd")

    @property
    def heads(self) -> Any:
        """How many heads it has, None where that cannot be seen."""
        sizes = dict(zip(self.axes, val(self.node).shape, strict=True))
        if "g" in sizes and "h" in sizes:
            return sizes["h"] * sizes["g"]
        return sizes.get("H", sizes.get("h"))

    @property
    def batch(self) -> str | None:
        """The size of the batch as text."""
        return str(val(self.node).shape[self.axes.index("b")]) if "b" in self.axes else None


def brought_place(graph: fx.Graph, place: Place, heads: Any) -> fx.Node:
    """What is at `place`, as [B, H, tokens, D]; `heads` are its heads where they cannot be seen."""
    return brought(graph, place.node, place.axes, "bHsd" if "s" in place.axes else "bHtd", heads)


def heads_of(found: list[Place]) -> Any:
    """How many heads the operand has, as seen where it or the nearest thing it is a view of shows them; None if nothing does."""
    return next((place.heads for place in found if place.heads is not None), None)


def places(node: fx.Node, axes: str) -> list[Place]:
    """The operand `node`, and what it is a view, a cast or a multiple of, nearest first.

    What something else reads too may be what a cache stores, so the search ends there.
    """
    found = [Place(node, axes)]
    while len(readers(found[-1].node)) <= 1 and (below := _below(found[-1])) is not None:
        found.append(below)
    return found


def _below(place: Place) -> Place | None:
    node, axes = place.node, place.axes
    if node.op != "call_function":
        return None
    if keeps_values(node):
        return Place(inputs(node)[0], axes, place.factor)
    if (scaled := factor_of(node)) is not None:
        return Place(scaled[0], axes, place.factor * scaled[1])
    if not node.args or not is_tensor(inputs(node)[0]) or (before := before_view(node, axes)) is None:
        return None
    return Place(inputs(node)[0], before, place.factor)


def query_of(found: list[Place]) -> Place:
    """The query without its scale: as near to [B, H, S, D] as can be."""
    unscaled = [place for place in found if place.factor == found[-1].factor]
    whole = [place for place in unscaled if place.is_whole]
    return whole[-1] if whole else next((place for place in unscaled if "n" not in place.axes), unscaled[0])


def key_and_value(keys: list[Place], values: list[Place], like: torch.dtype) -> tuple[Place, Place]:
    """Keys and values of equally many heads and of one type, nearest to the cache: repeated only if there is no other way."""
    values = [place for place in values if place.factor == 1.0]
    for key in _preferred(keys, like):
        for value in _preferred(values, like):
            if str(key.heads) == str(value.heads):
                return key, value
    return keys[0], values[0]


def _preferred(found: list[Place], like: torch.dtype) -> list[Place]:
    """Whole ones first, of those the deepest; then what still must be permuted."""
    alike = [place for place in reversed(found) if val(place.node).dtype == like]
    return [place for place in alike if place.is_whole] + [place for place in alike if not place.is_whole]


def check(query: Place, key: Place, value: Place, heads: Any, at: fx.Node) -> None:
    """Heads, batches and types are those of a decoder's self-attention.

    Args:
        query: where the query is taken from.
        key: the same of the key.
        value: the same of the value.
        heads: the number of query heads, and of those of key and value where it cannot be seen.
        at: the attention.

    Raises:
        Refuse: they are not.
    """
    q, k, v = heads, *(heads if place.heads is None else place.heads for place in (key, value))
    if str(k) != str(v) or (isinstance(q, int) and isinstance(k, int) and q % k):
        raise Refuse(f"{q} query heads on {k} key and {v} value heads", at)
    if len({place.batch for place in (query, key, value) if place.batch is not None}) > 1:
        raise Refuse(f"batches of {query.batch}, {key.batch} and {value.batch}", at)
    types = [val(place.node).dtype for place in (query, key, value)]
    if len({*types}) != 1:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in types)
        raise Refuse(f"query, key and value of types {names}, expected one type", at)
