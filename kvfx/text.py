"""The text form of a policy, read with `grammar.lark` into a Policy. `str(policy)` writes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import resources
from typing import Any, Literal

from lark import Lark, Transformer, UnexpectedInput, UnexpectedToken, v_args

from kvfx.algebra import NAMES, SPLICE, Atom, Combine, Number, Score, Splice, ZScore
from kvfx.budget import AMOUNTS, ARGUMENTS, POOLS, Budget, Protect, read_rate
from kvfx.errors import PolicyError, unknown_name
from kvfx.params import Word, bind, write_number
from kvfx.policy import AXES, PLANNED, Policy, axis_error
from kvfx.presets import PRESETS, expand
from kvfx.scores import SCORES

NOT_BUILT = {">": "stages in a row (>>)", ";": "phases (;)", "{": "policies inside policies ({})", '"': "files"}


@dataclass(frozen=True)
class Call:
    """`name@variant(arguments)`; an argument is its name or None, and its value."""

    name: str
    variant: str | None
    arguments: Arguments
    in_parentheses: bool = False


@dataclass(frozen=True)
class Binary:
    """`left op right`, not yet known to be a score."""

    op: Literal["+", "-", "*"]
    left: Node
    right: Node


Node = Fraction | Call | Binary
Arguments = tuple[tuple[str | None, Node], ...]


@v_args(inline=True)
class _Syntax(Transformer):
    """From lark's tree to nodes: numbers become exact fractions, signs before them are folded in."""

    def start(self, head: tuple[Node, Arguments], *clauses: tuple[str, Node]) -> tuple[Any, ...]:
        return *head, clauses

    def head(self, expr: Node, keep: str | None, arguments: Arguments | None) -> tuple[Node, Arguments]:
        return expr, () if keep is None else (("keep", self.number(keep)), *(arguments or ()))

    def axis(self, name: str, expr: Node) -> tuple[str, Node]:
        return str(name), expr

    def bare(self, call: Call) -> tuple[str, Node]:
        return "", call

    def add(self, left: Node, right: Node) -> Binary:
        return Binary("+", left, right)

    def sub(self, left: Node, right: Node) -> Binary:
        return Binary("-", left, right)

    def mul(self, left: Node, right: Node) -> Binary:
        return Binary("*", left, right)

    def neg(self, of: Node) -> Node:
        return -of if isinstance(of, Fraction) else Binary("*", Fraction(-1), of)

    def group(self, of: Node) -> Node:
        return Call(of.name, of.variant, of.arguments, in_parentheses=True) if isinstance(of, Call) else of

    def number(self, text: str) -> Fraction:
        return Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)

    def call(self, name: str, variant: str | None, arguments: Arguments | None) -> Call:
        return Call(str(name), variant and str(variant), arguments or ())

    def arguments(self, *arguments: tuple[str | None, Node] | None) -> Arguments:
        return tuple(argument for argument in arguments if argument is not None)

    def argument(self, name: str | None, value: Node) -> tuple[str | None, Node]:
        return name and str(name), value


_PARSER = Lark(resources.files("kvfx").joinpath("grammar.lark").read_text(encoding="utf-8"), parser="lalr", maybe_placeholders=True)


def parse(text: str) -> Policy:
    """Read a policy."""
    text = " ".join(text.split())
    try:
        return _read(text)
    except PolicyError as error:
        raise error if text in str(error) else PolicyError(f"{error}\n  in: {text}") from None


def _read(text: str) -> Policy:
    try:
        head, colon, clauses = _Syntax().transform(_PARSER.parse(text))
    except UnexpectedInput as error:
        raise PolicyError(_explain(text, error)) from None
    base = _preset(head, colon)
    axes: dict[str, Node] = {"score": head} if base is None else {}
    if any(name == "keep" for name, _ in colon) and any(axis == "budget" and _names_amount(node) for axis, node in clauses):
        raise PolicyError("the budget is given twice, as ':KEEP' and as budget=. Give it once.")
    for axis, node in clauses:
        axis = axis or _axis_of(node)
        if axis not in AXES:
            raise axis_error(axis)
        if axis in axes:
            raise PolicyError(f"the axis {axis} is given twice. Give it once.")
        axes[axis] = node
    base = base or Policy(None)
    return Policy(
        _score(axes["score"]) if "score" in axes else base.score,
        _budget(axes["budget"], base.budget) if "budget" in axes else base.budget,
        _protect(axes["protect"], base.protect) if "protect" in axes else base.protect,
        str(_value("pos", axes["pos"])) if "pos" in axes else base.pos,
        _value("unit", axes["unit"]) if "unit" in axes else base.unit,
        str(_value("align", axes["align"])) if "align" in axes else base.align,
        _value("when", axes["when"]) if "when" in axes else base.when,
    )


def _preset(head: Node, colon: Arguments) -> Policy | None:
    """Return the preset that a policy starts with, or None if it starts with a score."""
    if not isinstance(head, Call) or head.in_parentheses:
        if colon:
            raise PolicyError("':KEEP' follows the name of a preset. After a score, write | budget=uniform(KEEP).")
        return None
    name = f"{head.name}@{head.variant}" if head.variant else head.name
    arguments = head.arguments + colon
    if name in PRESETS:
        params = PRESETS[name].params
        amount = tuple((arg, node) for arg, node in arguments if arg in AMOUNTS[1:] and "keep" in params)
        bound = bind(f"the preset {name}", params, (each for each in arguments if each not in amount))
        if len(amount) + ("keep" in bound) > 1:
            raise PolicyError(f"the preset {name} is given two amounts. Give one of {', '.join(AMOUNTS)}.")
        if not bound and name == "none":
            return Policy(None)
        policy = _read(expand(name, {arg: _argument(arg, node) for arg, node in bound.items()}))
        if amount and policy.budget is not None:
            policy = replace(policy, budget=_budget(Call(policy.budget.pool, None, amount), policy.budget))
        return policy
    if colon or head.variant:
        raise unknown_name("policy", name, PRESETS)
    if head.name not in NAMES:
        raise unknown_name("policy", name, [*PRESETS, *NAMES])
    return None


def _axis_of(call: Node) -> str:
    """Return the axis that a clause without `axis=` belongs to."""
    if isinstance(call, Call) and call.name == "protect":
        return "protect"
    name = call.name if isinstance(call, Call) else ""
    for axis, values in PLANNED.items():
        if name in (axis, *values):
            raise axis_error(axis, name if axis in AXES else "")
    raise PolicyError(f"'{name}' is no clause: expected protect(sinks=n, recent=n), or axis=value with one of {', '.join(AXES)}.")


def _score(node: Node) -> Score | None:
    """Read the score axis; `none` is no score."""
    match node:
        case Call("none", None, ()):
            return None
    return _expr(node)


def _expr(node: Node) -> Score:
    match node:
        case Call("zscore", None, arguments):
            bound = bind("zscore", ["of"], arguments)
            if not bound:
                raise PolicyError("zscore() is empty: expected a score inside, as in zscore(-knorm).")
            return ZScore(_expr(bound["of"]))
        case Call("splice", None, arguments):
            bound = bind("splice", SPLICE, arguments)
            if missing := [name for name in SPLICE if name not in bound]:
                raise PolicyError(f"splice lacks {' and '.join(missing)}: expected splice(first, then, share), share in [0, 1].")
            return Splice(_expr(bound["first"]), _expr(bound["then"]), bound["share"])
        case Call(name, None, arguments) if name in SCORES:
            bound = bind(name, [param.name for param in SCORES[name].params], arguments)
            return Atom(name, **{arg: _value(f"{name}({arg}=)", value) for arg, value in bound.items()})
        case Call(name, variant):
            raise unknown_name("score", f"{name}@{variant}" if variant else name, NAMES)
        case Binary(op, left, right):
            return Combine(op, _expr(left), _expr(right))
    return Number(_float(node))


def _budget(node: Node, base: Budget | None) -> Budget:
    """Read the budget axis over the preset's: what it does not name stays."""
    if not isinstance(node, Call):
        raise PolicyError("a budget names its pool: expected budget=uniform(0.5) or budget=uniform(tokens=1024).")
    if node.name not in POOLS:
        raise axis_error("budget", node.name)
    given = read_rate(node.name, bind(node.name, ARGUMENTS, node.arguments))
    fields: dict[str, Any] = {"keep": None, "tokens": None} if "keep" in given or "tokens" in given else {}
    fields["pool"] = node.name
    for name, value in given.items():
        fields[ARGUMENTS[name]] = (
            value if isinstance(value, Fraction) and name in ("keep", "floor") else _value(f"{node.name}({name}=)", value)
        )
    if "rounding" in fields:
        fields["rounding"] = str(fields["rounding"])
    return replace(base, **fields) if base else Budget(**fields)


def _names_amount(node: Node) -> bool:
    """Whether a budget says how much is kept, and not only who competes for it."""
    return not isinstance(node, Call) or any(name in (None, *AMOUNTS) for name, _ in node.arguments)


def _protect(node: Node, base: Protect) -> Protect:
    """Read the protect axis over the preset's: what it does not name stays."""
    if not isinstance(node, Call) or node.name != "protect":
        raise PolicyError("expected protect(sinks=n, recent=n).")
    given = bind("protect", ("sinks", "recent"), node.arguments)
    return replace(base, **{name: _value(f"protect({name}=)", value) for name, value in given.items()})


def _value(where: str, node: Node) -> Any:
    """Read a number or a word."""
    match node:
        case Fraction():
            return int(node) if node.denominator == 1 else _float(node)
        case Call(name, None, ()):
            return Word(name)
        case Call(name, None, ((None, Fraction(denominator=1) as number),)):
            return Word(name, int(number))
    raise PolicyError(f"{where}: expected a number, a word, or a word with a whole number such as chunk(256).")


def _argument(name: str, node: Node) -> str:
    """Write a preset's argument back as text, to be put into the preset's policy."""
    return write_number(node) if isinstance(node, Fraction) else str(_value(name, node))


def _float(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        raise PolicyError("a number is too large: expected one below 1e30.") from None


def _explain(text: str, error: Any) -> str:
    """Say what was found where, with a caret under it, and what was expected."""
    ended = isinstance(error, UnexpectedToken) and error.token.type == "$END"
    place = len(text) if ended else error.pos_in_stream or 0
    found = "the policy ends too early" if ended else f"did not expect {text[place]!r}"
    caret = f"\n    {text}\n    {' ' * place}^"
    if text[place : place + 1] in NOT_BUILT:
        return f"{NOT_BUILT[text[place]]} are planned but not built yet.{caret}\n  Write one score with its clauses."
    names = error.accepts or error.expected if isinstance(error, UnexpectedToken) else error.allowed
    return f"{found}.{caret}\n  Expected {_readable(names)}."


def _readable(terminals: Iterable[str]) -> str:
    named = {"NAME": "a name", "NUMBER": "a number", "$END": "the end"}
    words = sorted(named.get(name) or f"'{_PARSER.get_terminal(name).pattern.value}'" for name in terminals)
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
