"""Policy: what to keep of a KV cache, as a value. Text, dataclass tree, JSON and YAML are four forms of the same one.

    compactor:0.5 | protect(sinks=64)

A bare number in a budget is always the fraction **kept** of a row's own real tokens. The language is on one page,
`docs/policy.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import yaml

from kvfx import algebra, presets
from kvfx.algebra import Atom, Score, Splice, ZScore, parts
from kvfx.budget import POOLS, ROW, Budget, Protect
from kvfx.errors import PolicyError, unknown_name
from kvfx.params import Int, OneOf, Word, plain, word
from kvfx.scores import SCORES

NOTHING = Protect()
TOKEN = Word("token")
PREFILL = Word("prefill")
AXES = ("score", "unit", "align", "budget", "protect", "pos", "when")
UNIT = OneOf({"token": None, "chunk": Int(2)})
WHEN = OneOf({"prefill": None, "every": Int(1), "pressure": None})
BUILT = {"unit": ("token", "chunk"), "align": ("perhead", "shared"), "budget": tuple(POOLS), "pos": ("keep",)}
BUILT |= {"when": tuple(WHEN.words)}
# Axes and values that nothing lowers yet: named, so that the error can tell them from spelling mistakes.
PLANNED = {
    "unit": ("page", "span", "channel", "rowchannel", "head", "layer"),
    "align": ("composite", "reuse"),
    "when": ("chunk", "step", "segment", "overflow", "cascade", "offline"),
    "evicted": ("drop", "compensate", "merge", "prototype", "demote"),
    "store": ("fp16", "int8", "quant", "latent", "sparse", "pack"),
    "pos": ("rerotate", "yarn"),
    "route": ("route",),
    "weights": ("svd", "rotate", "fuse"),
    "share": ("alias", "merge_layers"),
}


def axis_error(axis: str, value: str = "") -> PolicyError:
    """Return the error for an axis, or a value of one, that is not built or not known."""
    what = f"{axis}={value}" if value else axis
    if value in PLANNED.get(axis, ()) or (not value and axis in PLANNED):
        built = f"{axis}={' or '.join(BUILT[axis])}" if axis in BUILT else f"the axes {', '.join(AXES)}"
        return PolicyError(f"'{what}' is planned but not built yet, and nothing is ignored silently. Built: {built}.")
    if value:
        return unknown_name(f"value of the axis {axis}:", value, BUILT.get(axis, ()))
    return unknown_name("axis", axis, AXES)


@dataclass(frozen=True)
class Policy:
    """What to keep. `score=None` keeps everything, and then there is no budget.

    Attributes:
        score: what a token is worth, higher = keep.
        budget: how many slots a KV head keeps, and who competes for them.
        protect: the tokens that stay anyway.
        pos: what RoPE phase kept keys hold.
        unit: what stays or leaves as a whole: `token`, or `chunk(n)`, runs of n real tokens by their mean score.
        align: `perhead`, each KV head chooses for itself, or `shared`, all of a layer keep the same tokens.
        when: `prefill`, once for each prompt; or there and again while tokens are generated: `every(n)` tokens, or under
            `pressure`, when a pool has no room for the next.
    """

    score: Score | None
    budget: Budget | None = None
    protect: Protect = NOTHING
    pos: str = "keep"
    unit: Word = TOKEN
    align: str = "perhead"
    when: Word = PREFILL

    def __post_init__(self) -> None:
        if self.pos != "keep":
            raise axis_error("pos", str(self.pos))
        if self.align not in BUILT["align"]:
            raise axis_error("align", str(self.align))
        if UNIT.read(self.unit) is None:
            if getattr(self.unit, "name", str(self.unit)) not in BUILT["unit"]:
                raise axis_error("unit", getattr(self.unit, "name", str(self.unit)))
            raise PolicyError(f"unit={self.unit} is not built: unit takes {UNIT}.")
        if WHEN.read(self.when) is None:
            if getattr(self.when, "name", str(self.when)) not in WHEN.words:
                raise axis_error("when", getattr(self.when, "name", str(self.when)))
            raise PolicyError(f"when={self.when} is not built: when takes {WHEN}.")
        if self.score is None:
            if self.when != PREFILL or self.budget or self.protect != NOTHING or self._together():
                raise PolicyError("the score none keeps everything, so it takes no other axis. Write: none.")
            return
        for part in parts(self.score):
            if isinstance(part, Splice) and part is not self.score:
                raise PolicyError("splice stands inside a score. It chooses in two turns, so it can only be the whole score.")
            if isinstance(part, ZScore) and not any(isinstance(inner, Atom) for inner in parts(part.of)):
                raise PolicyError(f"zscore standardises a constant. Put a score atom inside: {', '.join(SCORES)}.")
        turns = (self.score.first, self.score.then) if isinstance(self.score, Splice) else (self.score,)
        if not all(any(isinstance(part, Atom) for part in parts(turn)) for turn in turns):
            raise PolicyError(f"the score is the same for every token. Use a score atom: {', '.join(SCORES)}.")
        if self.budget is None:
            raise PolicyError("the policy has no budget: say how much to keep, for example | budget=uniform(0.5).")
        if self.budget.tokens is not None and self.budget.tokens < self.protect.total:
            raise PolicyError(
                f"tokens={self.budget.tokens} is less than the {self.protect.total} tokens of {self.protect}, and "
                "protected tokens are inside the budget. Raise the one or lower the other."
            )
        if self.budget.rounding == "kvpress" and self.protect.total:
            raise PolicyError(f"round=kvpress counts without regard to {self.protect}. Leave protect out, or write round=floor.")
        self._check_pool(self.budget)
        if isinstance(self.score, Splice) and self.budget.per != ROW:
            raise PolicyError(f"splice ranks the whole row by two scores, and per={self.budget.per} cuts it. Leave one out.")
        if self.unit != TOKEN and self.budget.per != ROW:
            raise PolicyError(f"per={self.budget.per} would cut units apart, and unit={self.unit} keeps them whole. Leave one out.")
        for atom in self.atoms():
            atom.row.lower(dict(atom.values), self.budget.keep)  # refuses values that do not fit the budget

    def _check_pool(self, budget: Budget) -> None:
        """Refuse what contradicts heads or layers that compete."""
        if budget.pool in ("heads", "blocks") and self.align == "shared":
            raise PolicyError(
                "heads that keep the same tokens, align=shared, cannot compete for them. Write align=perhead, or "
                "budget=uniform(...)."
            )
        if budget.pool == "blocks" and (self.unit != TOKEN or isinstance(self.score, Splice)):
            what = "splice ranks by two scores" if self.unit == TOKEN else f"unit={self.unit} keeps tokens together"
            raise PolicyError(f"{what}, and a block has one price, the score of the best token lost. Leave it out.")
        if self.when != PREFILL:
            self._check_when(budget)
        if budget.pool != "uniform" and budget.rounding == "kvpress" and self.unit != TOKEN:
            raise PolicyError(f"round=kvpress counts chunks under budget=uniform(...) alone. Leave unit={self.unit} out, or round.")
        if budget.most is not None and budget.most < self.protect.total:
            raise PolicyError(f"max={budget.most} is less than the {self.protect.total} tokens of {self.protect}. Raise max.")

    def _check_when(self, budget: Budget) -> None:
        """Refuse what decode steps cannot go on with: they add to a score what attention pays."""
        if budget.pool != "blocks":
            raise PolicyError(
                f"when={self.when} frees blocks while tokens are generated. Write budget=blocks(...), or when=prefill."
            )
        if self.received is None:
            raise PolicyError(
                f"when={self.when} adds to the score what every new token's attention pays, and this score is not such a sum. "
                "Write attn(q=win(8), mask=causal, over=squares, heads=sum, v=none), with over=squares or sum, or when=prefill."
            )

    @property
    def received(self) -> tuple[int, int] | None:
        """Which power of attention's probabilities the score sums, and how far a query must be behind; None if it does not."""
        if not isinstance(self.score, Atom) or self.score.name != "attn":
            return None
        given = {name: str(value) for name, value in self.score.values}
        power = {"sum": 1, "squares": 2}.get(given["over"])
        if power is None or [given[name] for name in ("mask", "heads", "v", "scale")] != ["causal", "sum", "none", "model"]:
            return None
        return power, int(given["buffer"])

    def atoms(self) -> Iterator[Atom]:
        """The score's atoms, left to right."""
        return (part for part in parts(self.score) if isinstance(part, Atom)) if self.score else iter(())

    def _together(self) -> list[str]:
        """The clauses about what is kept together, as text."""
        unit = [f"unit={self.unit}"] if self.unit != TOKEN else []
        return unit + ([f"align={self.align}"] if self.align != "perhead" else [])

    @property
    def batch_coupled(self) -> str:
        """Why a row's result depends on the other rows of its batch; empty if it does not."""
        return next((atom.row.batch_coupled for atom in self.atoms() if atom.row.batch_coupled), "")

    @property
    def least_tokens(self) -> int:
        """Real tokens that a prompt must have to be scored."""
        return max((atom.row.least(dict(atom.values)) for atom in self.atoms()), default=1)

    def counts(self, length: int, layers: int) -> list[int]:
        """Slots that each of `layers` layers keeps of `length` real tokens."""
        if self.budget is None:
            return [length] * layers
        return self.budget.counts(length, self.protect.total, layers, self.unit.arg or 1)

    @property
    def name(self) -> str:
        """A short label that parses to this policy: a preset such as `compactor:0.5`, or else the canonical text."""
        return presets.label(str(self))

    def with_keep(self, keep: float | str | Fraction) -> Policy:
        """Return this policy with another fraction kept."""
        if self.budget is None:
            raise PolicyError(f"none keeps everything, so it cannot keep {keep}. Choose a policy with a score.")
        return replace(self, budget=replace(self.budget, keep=keep, tokens=None))  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.score is None:
            return "none"
        head = algebra.write(self.score)
        if isinstance(self.score, Atom) and self.score.name in presets.PRESETS:
            head = f"({head})"  # a bare name would be read as the preset
        clauses = [str(self.protect)] if self.protect != NOTHING else []
        clauses += [f"when={self.when}"] if self.when != PREFILL else []
        return " | ".join([head, *self._together(), str(self.budget), *clauses])

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read the text form; `PolicyError` says what is wrong with it and where."""
        from kvfx.text import parse  # the parser builds policies, so it imports this module

        return parse(text)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data, one item per axis."""
        if self.score is None or self.budget is None:
            return {"score": "none"}
        protect = {"sinks": self.protect.sinks, "recent": self.protect.recent}
        return {
            "score": algebra.to_data(self.score),
            "unit": self.unit.name if self.unit.arg is None else {self.unit.name: self.unit.arg},
            "align": self.align,
            "budget": self.budget.to_dict(),
            "protect": protect,
            "pos": self.pos,
            "when": plain(self.when),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """Read what `to_dict` returns; what the text may leave out may be left out."""
        for axis in data:
            if axis not in AXES:
                raise axis_error(str(axis))
        if "score" not in data:
            raise PolicyError("the policy has no score. Give one, for example {'score': {'knorm': {}}, 'budget': ...}.")
        score, budget, protect = data["score"], data.get("budget"), data.get("protect", {})
        if budget is not None and (not isinstance(budget, Mapping) or len(budget) != 1 or not budget.keys() <= POOLS.keys()):
            raise axis_error("budget", str(next(iter(budget), "")) if isinstance(budget, Mapping) else str(budget))
        return cls(
            None if score == "none" else algebra.from_data(score),
            None if budget is None else Budget.from_dict(*next(iter(budget.items()))),
            Protect.from_dict(protect),
            data.get("pos", "keep"),
            word(data.get("unit", "token")),
            data.get("align", "perhead"),
            word(data.get("when", "prefill")),
        )

    def to_json(self) -> str:
        """Return the policy as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Read what `to_json` returns."""
        try:
            return as_policy(json.loads(text))
        except json.JSONDecodeError as error:
            raise PolicyError(f"this policy is not JSON: {error}") from None

    def to_yaml(self) -> str:
        """Return the policy as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Policy:
        """Read what `to_yaml` returns."""
        try:
            return as_policy(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise PolicyError(f"this policy is not YAML: {error}") from None


def as_policy(value: str | Mapping[str, Any] | Policy) -> Policy:
    """Return a policy from any form a user may write it in: text, plain data, or the policy itself."""
    match value:
        case Policy():
            return value
        case str():
            return Policy.parse(value)
        case Mapping():
            return Policy.from_dict(value)
    raise PolicyError(f"{value!r} is not a policy: expected text such as 'compactor:0.5', a dict, or a kvfx.Policy.")
