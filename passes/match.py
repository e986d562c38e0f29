"""Pattern combinators over a graph: `Op`, `Var`, `Const`, `Seq`, `OneOf`, `Through`, `Chain`, `Where`.

A pattern is solved against a node and yields every way it can match. Ops that do not fit are noted together with how many fitted
before them, so that the best partial match can be reported when nothing matched whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from kvfx.passes.graph import is_call


@dataclass(frozen=True)
class Miss:
    """Where a pattern stopped fitting: after how many ops, at which node, and what was expected there."""

    ops: int
    node: Any
    expected: str

    def __str__(self) -> str:
        called = f" ({self.node.target})" if isinstance(self.node, fx.Node) and self.node.op == "call_function" else ""
        return f"fitted {self.ops} ops, then `{self.node}`{called} instead of {self.expected}"


@dataclass(frozen=True)
class Match:
    """What a pattern bound: operands by name, the alternatives taken, and the nodes it covers."""

    bound: dict[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    nodes: tuple[fx.Node, ...] = ()
    misses: list[Miss] | None = field(default=None, compare=False)

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def __contains__(self, name: str) -> bool:
        return name in self.bound

    def bind(self, name: str, value: Any) -> Match:
        """With one more operand."""
        return replace(self, bound={**self.bound, name: value})

    def tag(self, name: str) -> Match:
        """With one more alternative taken."""
        return replace(self, tags=self.tags | {name})

    def cover(self, node: fx.Node) -> Match:
        """With one more node."""
        return replace(self, nodes=(*self.nodes, node))

    def miss(self, node: Any, expected: str) -> None:
        """Note that `node` does not fit, if anyone wants to know."""
        if self.misses is not None:
            self.misses.append(Miss(len(self.nodes), node, expected))


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
            match.miss(node, " or ".join(dict.fromkeys(str(target).rpartition(".")[0] for target in self.targets)))
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


class Seq(Pattern):
    """A list, item by item."""

    def __init__(self, *items: Pattern) -> None:
        self.items = items

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Match a list of the same length."""
        if isinstance(node, (list, tuple)) and len(node) == len(self.items):
            yield from _solve_all(list(zip(self.items, node, strict=True)), match)


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


@dataclass(frozen=True)
class Step:
    """One op of a `Chain`: what it is to the chain, the node, its further operands, and the operand that the chain continues at."""

    kind: str
    node: fx.Node
    others: tuple[Any, ...]
    below: Any


class Chain(Pattern):
    """`end`, below any number of ops that `steps` knows; the steps taken, top first, are bound to `name`."""

    def __init__(self, name: str, steps: Callable[[fx.Node], Iterable[Step]], end: Pattern) -> None:
        self.name = name
        self.steps = steps
        self.end = end

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Try the end here, then below each step that this node can be."""
        yield from self._solve(node, match, ())

    def _solve(self, node: Any, match: Match, taken: tuple[Step, ...]) -> Iterator[Match]:
        yield from self.end.solve(node, match.bind(self.name, taken))
        for step in self.steps(node) if isinstance(node, fx.Node) else ():
            yield from self._solve(step.below, match.cover(node), (*taken, step))


@dataclass(frozen=True)
class Where(Pattern):
    """The pattern, on a node for which `test` holds; `expected` says what that is."""

    expected: str
    test: Callable[[Any], bool]
    pattern: Pattern

    def solve(self, node: Any, match: Match) -> Iterator[Match]:
        """Test, then match."""
        if self.test(node):
            yield from self.pattern.solve(node, match)
        else:
            match.miss(node, self.expected)


def first(pattern: Pattern, node: fx.Node) -> Match | None:
    """The preferred way in which `node` matches, or None."""
    return next(pattern.solve(node, Match()), None)


def nearest(pattern: Pattern, node: fx.Node) -> Miss:
    """Where the best partial match of a node that does not match ends; of equals the first."""
    misses: list[Miss] = []
    for _ in pattern.solve(node, Match(misses=misses)):
        pass
    return max(misses, key=lambda miss: miss.ops, default=Miss(0, node, "what the rule describes"))
