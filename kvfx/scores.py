"""The score atoms that a policy can name: one row each, from its parameters to its kernel op.

A new score is one row in `SCORES` and one op in `kvfx.kernels`. Parser, checks, lowering and docs read the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from kvfx.errors import PolicyError
from kvfx.params import Int, OneOf, Param, Real, Value, Word, words
from kvfx.passes.plan import OpCall, Sketch

Args = Mapping[str, Any]  # an atom's values by parameter, each checked by its Param


@dataclass(frozen=True)
class ScoreRow:
    """A score atom.

    Attributes:
        summary: what it favours.
        params: its parameters, in order.
        lower: from the parameters' values and the fraction kept (None under `tokens=`) to the op call.
        source: where it comes from.
        cost: per token, layer and KV head.
        sign: -1 if the op returns the negated score.
        batch_coupled: why a row's score depends on the other rows, so that it needs batch 1 without padding and
            cannot be exported; empty if it does not.
        least: real tokens that a prompt must have, for an atom's values.
    """

    summary: str
    params: tuple[Param, ...]
    lower: Callable[[Args, Fraction | None], OpCall]
    source: str
    cost: str
    sign: int = 1
    batch_coupled: str = ""
    least: Callable[[Args], int] = lambda args: 1
    call: OpCall = field(init=False)

    def __post_init__(self) -> None:
        defaults = {param.name: param.default for param in self.params}
        object.__setattr__(self, "call", self.lower(defaults, Fraction(1, 2)))

    @property
    def op(self) -> str:
        """The kernel op that computes the score."""
        return self.call.op

    @property
    def taps(self) -> tuple[str, ...]:
        """The site tensors that the op reads at the atom's defaults."""
        return self.call.taps


def _argument(value: Value) -> int:
    """Return n of `chunk(n)`, and 0 for a plain word."""
    return value.arg or 0 if isinstance(value, Word) else 0


def _key_norm(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("key_norm", ("key",))


# What `attn` takes beside each q, one row per kernel op.
_ATTENTION = {
    "chunk": {"mask": ("none",), "over": ("sum",), "heads": ("sum",), "pool": ("avg", "none"), "scale": ("a number",)},
    "win": {"mask": ("causal",), "over": ("sum", "mean", "max", "count", "squares"), "heads": ("mean", "max", "layer")},
    "all": {"mask": ("causal",), "over": ("sum", "count", "squares"), "heads": ("mean", "max", "layer")},
}


def _attention(args: Args, keep: Fraction | None) -> OpCall:
    q, pool, scale = args["q"], args["pool"], args["scale"]
    form = "win" if q.name == "last" else q.name
    wrong = []
    for name, built in _ATTENTION[form].items():
        given = args[name].name if isinstance(args[name], Word) else "a number"
        if given not in built:
            wrong.append(f"{name}={args[name]} is not built, {name} takes {' or '.join(built)}")
    if wrong:
        raise PolicyError(f"attn with q={q}: {'; '.join(wrong)}.")
    taps = ("query", "key", "value") if args["v"] == Word("norm") else ("query", "key")
    width = (("pool", _argument(pool) or 1),)
    factor = () if isinstance(scale, Word) else (("scale", float(scale)),)
    if form == "chunk":
        return OpCall("chunk_attention", taps, options=(("chunk", q.arg), *factor, *width))
    reduce = (("reduce", args["over"].name), ("heads", args["heads"].name))
    options = (*factor, *reduce, *width, ("pool_kind", "avg" if pool == Word("none") else pool.name))
    if form == "win":
        return OpCall("window_attention", taps, options=(("window", q.arg or 1), *options))
    return OpCall("column_attention", taps, options=options)


def _key_diff(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("key_diff", ("key",))


def _redundancy(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("redundancy", ("key",))


def _lag(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("lag", ("key", "value"), options=(("lag", args["size"]), ("sinks", args["sinks"])))


def _position(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("position", ("key",), options=(("sinks", args["sinks"]),))


def _leverage(args: Args, keep: Fraction | None) -> OpCall:
    tap = "pre_key" if args["rope"] == Word("pre") else "key"
    return OpCall("leverage", (tap,), Sketch(args["size"], args["seed"]), (("chunk", _argument(args["per"])),))


def _value_projection(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("value_projection", ("value", "output_weight"))


def _random(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("random", ("key",), options=(("seed", args["seed"]),))


def _kvpress_window_attention(args: Args, keep: Fraction | None) -> OpCall:
    options = (("window", args["window"]), ("kernel", args["kernel"]), ("layer", args["heads"] == Word("layer")))
    return OpCall("kvpress_window_attention", ("query", "key"), options=options)


def _expected(args: Args, keep: Fraction | None) -> OpCall:
    options = (("sinks", args["sinks"]), ("covariance", args["cov"] == Word("full")), ("epsilon", float(args["eps"])))
    taps = ("pre_query", "key", "rotation", *["value"] * (args["v"] == Word("norm")))
    return OpCall("expected_attention", taps, options=options, future=args["future"])


def _kvpress_expected(args: Args, keep: Fraction | None) -> OpCall:
    return replace(_expected(args, keep), op="kvpress_expected_attention")


def _kvpress_compactor(args: Args, keep: Fraction | None) -> OpCall:
    blend = args["blend"]
    if blend == Word("removed"):
        if keep is None:
            raise PolicyError(
                "kvpress_compactor(blend=removed) weighs leverage by the fraction removed, but the budget is a count. "
                "Give the budget as a fraction, as in uniform(0.5), or blend as a number."
            )
        blend = float(1 - keep)
    options = (("blend", float(blend)), ("chunk", args["chunk"]))
    taps = ("query", "key", "value", "pre_key")
    return OpCall("kvpress_compactor", taps, Sketch(args["size"], args["seed"]), options)


SIZE = Param("size", 48, Int(1), bare=True)
SEED = Param("seed", 0, Int())
EXPECTED = (
    Param("future", 512, Int(1), bare=True),
    Param("sinks", 4, Int()),
    Param("cov", Word("full"), words("full none")),
    Param("v", Word("norm"), words("norm none")),
    Param("eps", 0, Real()),
)

SCORES: dict[str, ScoreRow] = {
    "knorm": ScoreRow(
        summary="L2 norm of the key; `-knorm` is the published score",
        params=(),
        lower=_key_norm,
        sign=-1,
        source="Devoto et al., arXiv:2406.11430",
        cost="reads the key once",
    ),
    "attn": ScoreRow(
        summary=(
            "attention that a token receives from the queries `q`: of its own chunk (`mask=none`), of the last n, "
            "of the last one or of all (`mask=causal`); reduced `over` those queries, then over query `heads` "
            "(`layer`: all of the layer), then weighted by `v`, then pooled. `scale=model` is the model's own"
        ),
        params=(
            Param("q", Word("chunk", 256), OneOf({"chunk": Int(1), "win": Int(1), "last": None, "all": None})),
            Param("mask", Word("none"), words("none causal")),
            Param("over", Word("sum"), words("sum mean max count squares")),
            Param("heads", Word("sum"), words("sum mean max layer")),
            Param("v", Word("norm"), words("norm none")),
            Param("pool", Word("avg", 3), OneOf({"avg": Int(1, odd=True), "max": Int(1, odd=True), "none": None})),
            Param("scale", 1, OneOf({"model": None}, number=Real())),
        ),
        lower=_attention,
        source=(
            "chunk: Compactor, arXiv:2507.08143, section on non-causal attention; kvpress NonCausalAttnPress. "
            "win: SnapKV, arXiv:2404.14469. last: TOVA, arXiv:2401.06104. all: H2O, arXiv:2306.14048"
        ),
        cost="multiply-adds per query head: 2 D chunk; D win; D S for all, one attention more, two under padding",
    ),
    "expected": ScoreRow(
        summary=(
            "attention that the next `future` queries are expected to pay, if they are normal with the mean and "
            "covariance (`cov`) of the row's queries behind its first `sinks`; plus `eps`, weighted by `v`. Sinks score 0"
        ),
        params=EXPECTED,
        lower=_expected,
        source="Expected Attention, arXiv:2510.00636; kvpress ExpectedAttentionPress",
        cost="2 D^2 multiply-adds per query head",
    ),
    "leverage": ScoreRow(
        summary="statistical leverage of the sketched key: how far it sticks out of its chunk",
        params=(
            SIZE,
            Param("rope", Word("pre"), OneOf({"pre": None, "post": None})),
            Param("per", Word("chunk", 512), OneOf({"chunk": Int(1), "row": None})),
            SEED,
        ),
        lower=_leverage,
        source="Compactor, arXiv:2507.08143, Algorithm 1; the authors' engine compactor-vllm",
        cost="D size + 1.5 size^2 multiply-adds, and one Cholesky of [size, size] per chunk",
    ),
    "keydiff": ScoreRow(
        summary="distance from the common direction: minus the cosine to the mean of the row's unit keys",
        params=(),
        lower=_key_diff,
        source="KeyDiff, arXiv:2504.15364",
        cost="reads the key twice",
    ),
    "redundancy": ScoreRow(
        summary="mean cosine to the other keys; `-redundancy` keeps what no other token repeats",
        params=(),
        lower=_redundancy,
        sign=-1,
        source="R-KV, arXiv:2505.24133, without its softmax and its threshold",
        cost="reads the key twice",
    ),
    "lag": ScoreRow(
        summary="rank inside a block of `size` tokens, on the scale of the next block; the newest blocks come first",
        params=(Param("size", 128, Int(2), bare=True), Param("sinks", 4, Int())),
        lower=_lag,
        source="LagKV, arXiv:2504.04704; kvpress LagKVPress",
        cost="reads key and value twice, one sort per block",
    ),
    "recency": ScoreRow(
        summary="place in the row: the newest stay, behind the first `sinks`",
        params=(Param("sinks", 0, Int()),),
        lower=_position,
        source="StreamingLLM, arXiv:2309.17453",
        cost="none to speak of",
    ),
    "vproj": ScoreRow(
        summary="L1 norm of the value behind the output projection, mean over the query heads of the group",
        params=(),
        lower=_value_projection,
        source="CriticalKV, arXiv:2502.03805",
        cost="hidden D multiply-adds per query head, as many as the output projection itself",
    ),
    "random": ScoreRow(
        summary="uniform noise from a counter, the baseline every score must beat",
        params=(SEED,),
        lower=_random,
        source="kvpress RandomPress",
        cost="none to speak of",
    ),
    "kvpress_window": ScoreRow(
        summary="kvpress's SnapKVPress bug for bug, or with `heads=layer` its TOVAPress; the window's own tokens win",
        params=(
            Param("window", 64, Int(1), bare=True),
            Param("kernel", 5, Int(1, odd=True)),
            Param("heads", Word("mean"), words("mean layer")),
        ),
        lower=_kvpress_window_attention,
        source="kvpress 0.5.5, SnapKVPress and TOVAPress",
        least=lambda args: args["window"] + 1,
        cost="D window multiply-adds per query head",
        batch_coupled=(
            "kvpress does not look at padding, and its window is the last slots: give it one row, without padding. "
            "Its float arithmetic on the length cannot be exported."
        ),
    ),
    "kvpress_expected": ScoreRow(
        summary="kvpress's ExpectedAttentionPress bug for bug; its sinks win",
        params=EXPECTED,
        lower=_kvpress_expected,
        source="kvpress 0.5.5, ExpectedAttentionPress",
        least=lambda args: args["sinks"] + 1,
        cost="2 D^2 multiply-adds per query head",
        batch_coupled=(
            "kvpress does not look at padding, and its sinks are the first slots: give it one row, without padding. "
            "Its float arithmetic on the length cannot be exported."
        ),
    ),
    "kvpress_compactor": ScoreRow(
        summary="kvpress's CompactorPress bug for bug, with its own protection of 8 first and 4 last tokens",
        params=(
            SIZE,
            Param("blend", Word("removed"), OneOf({"removed": None}, number=Real())),
            Param("chunk", 256, Int(1)),
            SEED,
        ),
        lower=_kvpress_compactor,
        source="kvpress 0.5.5, CompactorPress",
        least=lambda args: 14,
        cost="as attn and leverage, over the whole row",
        batch_coupled=(
            "kvpress standardises its scores over all rows of a batch at once, so what a row keeps depends on its "
            "neighbours: give it one row, without padding. Its float arithmetic on the length cannot be exported."
        ),
    ),
}
