"""From the product of queries and keys to that of probabilities and values: the pieces that attention rules are composed of.

Between the two products stand, in any order that a model may choose, a scale, masks that are added or filled in, casts, views, and
the softmax. Each is one step of a `Chain`, so a rule says what it accepts and `reading` says what it means.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from kvfx.passes.attention.axes import CASTS, EXPANDS, PERMUTES, RESHAPES, SAME, is_parameter, is_tensor, shape_of
from kvfx.passes.graph import aten, inputs, is_call, is_whole_slice, val
from kvfx.passes.match import Chain, OneOf, Op, Pattern, Seq, Step, Var, Where

ADD = (aten.add.Tensor, aten.add_.Tensor)
SUBTRACT = (aten.sub.Tensor, aten.sub_.Tensor)
MULTIPLY = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar)
DIVIDE = (aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar)
MAXIMUM = (aten.max.other, aten.maximum.default, aten.clamp.default, aten.clamp_min.default)
FILL = (aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Tensor)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
DROPOUT = (aten.dropout.default, aten.dropout_.default)
MATMUL = (aten.matmul.default, aten.bmm.default)
PRODUCTS = (*MATMUL, aten.baddbmm.default, aten.einsum.default)
# Behind these stands new token data; what a softmax weighs by them alone is no attention.
MIXERS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.embedding.default)


def moves(node: fx.Node) -> bool:
    """Whether `node` is a view of whole axes."""
    return is_call(node, *SAME, *PERMUTES, *RESHAPES) or is_whole_slice(node) or _is_idle_expand(node)


def _is_idle_expand(node: fx.Node) -> bool:
    return is_call(node, *EXPANDS) and shape_of(node) == shape_of(inputs(node)[0])


def any_step(node: fx.Node) -> Iterator[Step]:
    """What may stand between logits and softmax, with any mask or bias."""
    if node.op != "call_function" or not node.args:
        return
    first, *others = node.args
    if moves(node):
        yield Step("view", node, (), first)
    elif is_call(node, *CASTS):
        yield Step("cast", node, (), first)
    elif is_call(node, *ADD) and is_tensor(others[0]) and not node.kwargs:
        yield Step("bias", node, (others[0],), first)
        yield Step("bias", node, (first,), others[0])
    elif is_call(node, *SUBTRACT) and is_tensor(others[0]) and not node.kwargs:
        yield Step("shift" if _is_row_maximum(others[0], first) else "penalty", node, (others[0],), first)
    elif is_call(node, *MULTIPLY):
        yield Step("times", node, (others[0],), first)
        if is_tensor(others[0]):
            yield Step("times", node, (first,), others[0])
    elif is_call(node, *DIVIDE) and not node.kwargs:
        yield Step("over", node, (others[0],), first)
    elif is_call(node, *MAXIMUM) and not node.kwargs and len(others) == 1:
        yield Step("floor", node, (others[0],), first)
    elif is_call(node, *FILL):
        yield Step("fill", node, (others[0], others[1]), first)
    elif is_call(node, *WHERE):
        yield Step("keep", node, (first, others[1]), others[0])
        yield Step("fill", node, (first, others[0]), others[1])


def plain_step(node: fx.Node) -> Iterator[Step]:
    """The same without a bias that differs by head."""
    return (step for step in any_step(node) if step.kind not in ("bias", "penalty") or not differs_by_head(step.others[0]))


def differs_by_head(bias: fx.Node) -> bool:
    """Whether a bias that is added to logits [.., heads, S, T] has more than one row for the heads."""
    shape = shape_of(bias)
    return len(shape) >= 3 and shape[-3] != "1"


def is_head_bias(mask: fx.Node | None) -> bool:
    """Whether a mask of the waist adds something of its own to each head, such as ALiBi, and does not only hide."""
    return mask is not None and val(mask).is_floating_point() and differs_by_head(mask)


def _is_row_maximum(node: Any, of: Any) -> bool:
    if is_call(node, aten.amax.default):
        return inputs(node)[0] is of and inputs(node)[2:] == [True]
    if not is_call(node, operator.getitem) or inputs(node)[1] != 0:
        return False
    source = inputs(node)[0]
    return is_call(source, aten.max.dim) and inputs(source)[0] is of and inputs(source)[2:] == [True]


def weight_step(node: fx.Node) -> Iterator[Step]:
    """What may stand between softmax and the product with values."""
    if is_call(node, *DROPOUT):
        yield Step("dropout", node, tuple(inputs(node)[1:]), inputs(node)[0])
    elif is_call(node, *CASTS):
        yield Step("cast", node, (), inputs(node)[0])
    elif moves(node):
        yield Step("view", node, (), inputs(node)[0])


def _computed(name: str) -> Pattern:
    return Where("a computed tensor", lambda node: not is_parameter(node), Var(name))


def matmul() -> Pattern:
    """Queries times keys."""
    return Op(MATMUL, _computed("query"), _computed("key"), name="product")


def baddbmm() -> Pattern:
    """A bias and queries times keys."""
    return Op(aten.baddbmm.default, Var("bias"), _computed("query"), _computed("key"), name="product")


def einsum() -> Pattern:
    """Queries times keys, axes by letter."""
    return Op(aten.einsum.default, Var("equation"), Seq(_computed("query"), _computed("key")), name="product")


def product() -> Pattern:
    """Queries times keys in any spelling."""
    return OneOf(matmul=matmul(), baddbmm=baddbmm(), einsum=einsum())


def logits(below: Pattern, steps: Callable[[fx.Node], Iterator[Step]] = any_step) -> Pattern:
    """Scaled and masked logits of a product."""
    return Chain("logits", steps, below)


def softmax(below: Pattern) -> Pattern:
    """Probabilities of logits."""
    return Op(SOFTMAX, below, Var("axis"), name="softmax")


def times_value(probabilities: Pattern) -> Pattern:
    """Probabilities times values by `matmul`; the anchor of a rule."""
    return Op(MATMUL, Chain("weights", weight_step, probabilities), Var("value"), name="attention")


def einsum_value(probabilities: Pattern) -> Pattern:
    """Probabilities times values by `einsum`."""
    weights = Chain("weights", weight_step, probabilities)
    both = OneOf(value_last=Seq(weights, Var("value")), value_first=Seq(Var("value"), weights))
    return Op(aten.einsum.default, Var("value_equation"), both, name="attention")


def any_value(probabilities: Pattern) -> Pattern:
    """Probabilities times values in any spelling."""
    return OneOf(matmul=times_value(probabilities), einsum=einsum_value(probabilities))


def resembles_attention(node: fx.Node) -> bool:
    """Whether `node` sums over the axis of a softmax whose logits were made of a product of two computed tensors.

    So the softmax of a router, which weighs experts by a projection of each token alone, does not resemble attention.
    """
    if not is_call(node, *MATMUL, aten.einsum.default):
        return False
    factors = node.all_input_nodes if is_call(node, aten.einsum.default) else node.all_input_nodes[:1]
    return any(_is_mixing(softmax) for factor in factors if (softmax := _softmax_of(factor)) is not None)


def _softmax_of(node: fx.Node) -> fx.Node | None:
    """The softmax over the last axis that probabilities come from, a few ops below."""
    for _ in range(8):
        if is_call(node, *SOFTMAX):
            return node if inputs(node)[1] in (-1, val(node).dim() - 1) else None
        if node.op != "call_function" or not node.args or not is_tensor(node.args[0]) or is_call(node, *PRODUCTS, *MIXERS):
            return None
        node = inputs(node)[0]
    return None


def _is_mixing(softmax: fx.Node) -> bool:
    """Whether logits descend from a product of two tensors that are no parameters, since the last projection."""
    todo, seen = [inputs(softmax)[0]], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or is_call(node, *MIXERS):
            continue
        seen.add(node)
        if is_call(node, *PRODUCTS):
            if not any(is_parameter(factor) for factor in node.all_input_nodes):
                return True
            continue
        todo.extend(source for source in node.all_input_nodes if is_tensor(source))
    return False
