"""Attention spelled as one of the kernels behind `scaled_dot_product_attention`: flash, efficient, cuDNN, math.

Accepts   any of them for inference, of which only the output is read; the bias of those that take one as their mask.
Refuses   what `sdpa` refuses, a log-sum-exp or probabilities that are read, which the waist does not give, and a dropout mask.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from kvfx.passes.attention.sdpa import operands, waist_site
from kvfx.passes.graph import arguments, aten, inputs, is_call
from kvfx.passes.match import Match, Op, Var
from kvfx.passes.report import Refuse, Site
from kvfx.passes.rule import Rule

KERNELS = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_attention_math.default,
)
PATTERN = Op(KERNELS, Var("query"), Var("key"), Var("value"), name="attention")


def guard(match: Match) -> None:
    """Nothing but the output is read; operands are those of `sdpa`."""
    node = match["attention"]
    for user in node.users:
        if user.op == "output" or (not _is_output(user) and user.users):
            raise Refuse(f"`{user.name}` reads more than the output of {node.target}", node)
    if arguments(node).get("dropout_mask") is not None:
        raise Refuse("a dropout mask inside attention", node)
    operands(match)


def _is_output(user: fx.Node) -> bool:
    return is_call(user, operator.getitem) and inputs(user)[1] == 0


def rewrite(graph: fx.Graph, match: Match) -> Site:
    """Put the waist op in place of the first result."""
    node = match["attention"]
    given: dict[str, Any] = arguments(node)
    site = waist_site(graph, match, given.get("attn_mask", given.get("attn_bias")), RULE.name)
    for user in list(node.users):
        if _is_output(user):
            user.replace_all_uses_with(site.nodes["attention"])
        graph.erase_node(user)
    graph.erase_node(node)
    return site


RULE = Rule("flash", KERNELS, PATTERN, guard, rewrite)
