"""The rotation that RoPE gives, on average, to queries that follow a prompt: a matrix for each query head, made inside the graph.

RoPE is linear in the query, and linear in the factors that it makes of positions (cosines and sines). Hence its average over
positions is RoPE with averaged factors, and its matrix is RoPE of the identity. Both are copies of nodes that the graph has: of
those from positions to factors, for the positions that follow; and of those from the query to the roped query, for D tokens that
are the rows of the identity. So halves or pairs, a part of the channels, or a scale on top need no case of their own. What is not
seen to be linear, or to give each token the factors of its own position, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from kvfx.passes import capture
from kvfx.passes.axes import ordered
from kvfx.passes.graph import VIEWS, aten, call, inputs, is_call, val
from kvfx.passes.pre_rope import CASTS, PIECES, Rope, rope_of
from kvfx.passes.report import Refuse

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
WHERES = frozenset({aten.where.self, aten.where.ScalarOther})
LOOKUPS = frozenset({aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.embedding.default})


class FutureRotation:
    """Average over the `future` positions that follow each row's last one. The layers of a graph share what they can."""

    def __init__(self, future: int) -> None:
        self.future = future
        self._ahead: dict[fx.Node, Any] = {}  # nodes from positions to factors, and their copies for the positions that follow
        self._means: dict[fx.Node, fx.Node] = {}

    def of(self, query: fx.Node, positions: fx.Node, before: fx.Node) -> fx.Node | None:
        """Make the matrix that rotates row vectors, [B, Hq, D, D], float32.

        Args:
            query: queries after RoPE, [B, Hq, S, D].
            positions: the position of each token within its row, [B, S], negative at padding, as a cache stores them.
            before: the node in front of which new ones are put; `query` and `positions` stand in front of it.

        Returns:
            None in a model without RoPE; and in a graph for prompts of one token, which stays whatever its score.

        Raises:
            Refuse: this RoPE is not understood. The graph is as it was.
        """
        rope = rope_of(query)
        batch, heads, tokens, width = val(query).shape
        if rope is None or (isinstance(tokens, int) and tokens == 1):
            return None
        if isinstance(tokens, int):
            raise Refuse(f"the graph is for {tokens} tokens alone, which hides where RoPE depends on their number", query)
        length = str(tokens)  # symbols are compared as text, because comparing them guards
        held = _equals(positions)
        factors = {source: _token_axis(source, held, length) for source in _sources(rope, held)}
        _check_linear(rope)
        _check_sizes(_between(query, {rope.before, *factors}), length)
        graph = query.graph
        with graph.inserting_before(before), capture.fake_mode_of([val(query)]):  # which nodes without inputs do not bring along
            means = {factor: self._mean(factor, axis, positions, held, length) for factor, axis in factors.items() if axis >= 0}
            eye = call(graph, aten.eye.default, width, dtype=torch.float32, device=val(query).device)
            rows = batch if isinstance(batch, int) else call(graph, aten.sym_size.int, query, 0)
            identity = call(graph, aten.expand.default, eye, [rows, heads, width, width])
            given: dict[fx.Node, Any] = {rope.before: ordered(identity, tuple(rope.order.index(axis) for axis in range(4)))}
            for factor, mean in means.items():
                sizes = [width if axis == factors[factor] else -1 for axis in range(val(mean).dim())]
                given[factor] = call(graph, aten.expand.default, mean, sizes)
            return _copy(query, given, length, width, skip=CASTS)

    def _mean(self, factor: fx.Node, axis: int, positions: fx.Node, held: frozenset[fx.Node], length: str) -> fx.Node:
        """The average of `factor` over the positions that follow, float32, with one token on `axis`."""
        if factor not in self._means:
            if not held <= self._ahead.keys():
                self._ahead |= dict.fromkeys(held, self._following(positions))
            ahead = _copy(factor, self._ahead, length, self.future)
            dtype = torch.complex64 if val(factor).is_complex() else torch.float32
            self._means[factor] = call(factor.graph, aten.mean.dim, ahead, [axis], True, dtype=dtype)
        return self._means[factor]

    def _following(self, positions: fx.Node) -> fx.Node:
        """The positions behind the last one of each row, [B, future]."""
        graph = positions.graph
        first = call(graph, aten.add.Tensor, call(graph, aten.amax.default, positions, [-1], True), 1)
        return call(graph, aten.add.Tensor, first, call(graph, aten.arange.default, self.future, device=val(positions).device))


def _equals(positions: fx.Node) -> frozenset[fx.Node]:
    """Nodes that hold the same positions: in another integer type, or with another number at padding."""
    while is_call(positions, *CASTS):
        positions = inputs(positions)[0]
    if not is_call(positions, *WHERES):
        return frozenset({positions})
    real, index, _ = inputs(positions)
    return frozenset(user for user in index.users if is_call(user, positions.target) and inputs(user)[:2] == [real, index])


def _sources(rope: Rope, held: frozenset[fx.Node]) -> list[fx.Node]:
    """What the factors of RoPE are views of, in graph order: layers that unsqueeze the same cosines have the same sources."""
    found: dict[fx.Node, None] = {}
    for factor in rope.factors:
        while is_call(factor, *VIEWS - CASTS) and factor not in held:
            factor = inputs(factor)[0]
        found[factor] = None
    return [node for node in rope.before.graph.nodes if node in found]


def _token_axis(factor: fx.Node, held: frozenset[fx.Node], length: str) -> int:
    """The axis of `factor` on which each token has what its own position gives; -1 if it does not depend on positions.

    Raises:
        Refuse: it reads other positions than those in `held`, or several tokens' at once, or looks them up.
    """
    axes = dict.fromkeys(held, 1)
    nodes = _between(factor, held)
    _check_sizes(nodes, length)
    for node in nodes:
        value = val(node)
        if isinstance(value, SIZES):
            continue
        depends = any(source in axes for source in node.all_input_nodes)
        if depends and is_call(node, *LOOKUPS):
            raise Refuse(f"RoPE looks its factors up (`{node.name}`) in a table that may not reach the positions that follow", node)
        if not isinstance(value, Tensor):  # several tensors, which are taken apart next
            axes |= dict.fromkeys([node] * depends, -1)
            continue
        along = [axis for axis, size in enumerate(value.shape) if str(size) == length]
        if not depends and (along or _is_index(node)):
            raise Refuse(f"RoPE reads `{node.name}`, which is not the positions that the cache stores", node)
        if depends and len(along) != 1:
            raise Refuse(f"`{node.name}`, of which RoPE makes its factors, does not have one axis of tokens", node)
        if depends:
            axes[node] = along[0]
    return axes.get(factor, -1)


def _is_index(node: fx.Node) -> bool:
    return node.op == "placeholder" and not val(node).is_floating_point()


def _check_linear(rope: Rope) -> None:
    """Refuse unless the roped tensor is linear in the one before, and in the factors together."""
    degree = dict.fromkeys(rope.entries, 0)  # by how many factors each node was multiplied
    for node in rope.inside:
        own = [source for source in node.all_input_nodes if source in degree]
        others = [source for source in node.all_input_nodes if source not in degree and isinstance(val(source), Tensor)]
        if is_call(node, aten.mul.Tensor):
            linear = sum(arg in degree for arg in node.args) == 1
        elif is_call(node, aten.div.Tensor):
            linear = node.args[0] in degree and isinstance(node.args[1], (int, float))
        elif is_call(node, aten.add.Tensor, aten.sub.Tensor):
            linear = all(arg in degree for arg in node.args)
        else:
            linear = is_call(node, *PIECES) and not others
        degree[node] = max(degree[source] for source in own) + any(source in rope.factors for source in others)
        if not linear or degree[node] > 1:
            reason = "is not known to be linear in the query and in the factors of its position"
            raise Refuse(f"`{node.name}` inside RoPE {reason}", node)


def _check_sizes(nodes: Iterable[fx.Node], length: str) -> None:
    """Refuse sizes that are computed from the number of tokens; the number itself can be replaced."""
    for node in nodes:
        size = val(node)
        if isinstance(size, SIZES) and str(size) != length and length in re.findall(r"\w+", str(size)):
            raise Refuse(f"RoPE reads the size `{node.name}` = {size}, computed from the number of tokens", node)


def _between(node: fx.Node, ends: Iterable[fx.Node]) -> list[fx.Node]:
    """What `node` is computed from, down to `ends` and to sizes, in order; `node` comes last and `ends` are left out."""
    ends, found = frozenset(ends), dict[fx.Node, None]()

    def visit(node: fx.Node) -> None:
        if node in ends or node in found:
            return
        for source in () if isinstance(val(node), SIZES) else node.all_input_nodes:
            visit(source)
        found[node] = None

    visit(node)
    return list(found)


def _copy(node: fx.Node, made: dict[fx.Node, Any], length: str, tokens: int, skip: frozenset[Any] = frozenset()) -> Any:
    """Compute `node` again from what stands in `made` for others, for `tokens` tokens and without the ops in `skip`.

    Args:
        node: what to compute; where nothing above it changes, it is its own copy.
        made: nodes and what stands for them; grows by every copy.
        length: the number of tokens in the graph, as text.
        tokens: what stands for it in the copies.
        skip: ops of one input for which that input stands.
    """
    for old in _between(node, made):
        value = val(old)
        changed = any(made.get(source, source) is not source for source in old.all_input_nodes)
        if isinstance(value, SIZES):
            made[old] = tokens if str(value) == length else old
        elif changed and old.target in skip:
            made[old] = made[inputs(old)[0]]
        elif changed and callable(old.target):
            args, kwargs = fx.map_arg((old.args, old.kwargs), lambda arg: made.get(arg, arg))
            made[old] = call(node.graph, old.target, *args, **kwargs)
        else:
            made[old] = old
    return made[node]
