"""Pattern combinators over a graph: `Op`, `Var`, `Const`, `OneOf`, `Through`.

A pattern is solved against a node and yields every way it can match. `Match.depth` counts the ops that agreed, so that the best
partial match can be reported when nothing matched whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from kvfx.passes.graph import is_call


@dataclass(frozen=True)
class Match:
    """What a pattern bound: operands by name, the alternatives taken, and the nodes it covers."""

    bound: dict[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    nodes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def bind(self, name: str, value: Any) -> Match:
        """With one more operand."""
        return Match({**self.bound, name: value}, self.tags, self.nodes)

    def tag(self, name: str) -> Match:
        """With one more alternative taken."""
        return Match(self.bound, self.tags | {name}, self.nodes)

    def cover(self, node: fx.Node) -> Match:
        """With one more node."""
        return Match(self.bound, self.tags, (*self.nodes, node))


class Pattern:
    """Something that a node can match."""

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Yield `match` extended by each way in which `node` fits."""
        raise NotImplementedError


@dataclass(frozen=True)
class Var(Pattern):
    """Anything; the same thing wherever the name stands again."""

    name: str

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Bind, or compare with what is bound."""
        if self.name not in match.bound:
            yield match.bind(self.name, node)
        elif match[self.name] is node:
            yield match


@dataclass(frozen=True)
class Const(Pattern):
    """A Python number; the given one, if one is given."""

    name: str
    value: int | float | None = None

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Bind a number."""
        if isinstance(node, (int, float)) and (self.value is None or node == self.value):
            yield match.bind(self.name, node)


class Op(Pattern):
    """A call of one of `targets` whose leading arguments match `args`; the call itself is bound to `name`, if given."""

    def __init__(self, targets: Any | tuple[Any, ...], *args: Pattern, name: str | None = None) -> None:
        self.targets = targets if isinstance(targets, tuple) else (targets,)
        self.args = args
        self.name = name

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Match the call, then its arguments."""
        if not is_call(node, *self.targets) or len(node.args) < len(self.args):
            return
        found = match.cover(node)
        if self.name is not None:
            found = found.bind(self.name, node)
        yield from _solve_all(list(zip(self.args, node.args, strict=False)), found)


def _solve_all(pairs: list[tuple[Pattern, Any]], match: Match) -> Iterator[Match]:
    if not pairs:
        yield match
        return
    (pattern, node), rest = pairs[0], pairs[1:]
    for found in pattern.solve(node, match):
        yield from _solve_all(rest, found)


class OneOf(Pattern):
    """The first of the named alternatives that lets the whole match; its name becomes a tag."""

    def __init__(self, **alternatives: Pattern) -> None:
        self.alternatives = alternatives

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Try the alternatives in order."""
        for tag, pattern in self.alternatives.items():
            for found in pattern.solve(node, match):
                yield found.tag(tag)


@dataclass(frozen=True)
class Through(Pattern):
    """The pattern, below all ops for which `skip` holds."""

    skip: Callable[[fx.Node], bool]
    pattern: Pattern

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Go down, then match."""
        while isinstance(node, fx.Node) and self.skip(node):
            match, node = match.cover(node), node.args[0]
        yield from self.pattern.solve(node, match)


def first(pattern: Pattern, node: fx.Node) -> Match | None:
    """The preferred way in which `node` matches, or None."""
    return next(pattern.solve(node, Match()), None)
