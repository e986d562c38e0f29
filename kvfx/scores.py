"""The score atoms that a policy can name: one row each, from its parameters to its kernel op.

A new score is one row in `SCORES` and one op in `kvfx.kernels`. Parser, checks, lowering and docs read the row.
"""

from __future__ import annotations

from fractions import Fraction

from kvfx.errors import PolicyError
from kvfx.kvpress_scores import KVPRESS_SCORES
from kvfx.params import Int, OneOf, Param, Real, Value, Word, words
from kvfx.passes.plan import OpCall, Sketch
from kvfx.score_row import EXPECTED, SEED, SIZE, Args, ScoreRow, expected


def _argument(value: Value) -> int:
    """Return n of `chunk(n)`, and 0 for a plain word."""
    return value.arg or 0 if isinstance(value, Word) else 0


def _key_norm(args: Args, keep: Fraction | None) -> OpCall:
    return OpCall("key_norm", ("key",))


# What `attn` takes beside each q, one row per kernel op.
_ATTENTION: dict[str, dict[str, tuple[str, ...]]] = {
    "chunk": {
        "mask": ("none",), "over": ("sum",), "heads": ("sum",), "pool": ("avg", "none"), "scale": ("a number",), "buffer": ("0",),
    },
    "win": {"mask": ("causal",)},
    "all": {"mask": ("causal",), "over": ("sum", "count", "squares")},
}  # fmt: skip


def _attention(args: Args, keep: Fraction | None) -> OpCall:
    q, pool, scale = args["q"], args["pool"], args["scale"]
    form = "win" if q.name == "last" else q.name
    wrong = []
    for name, built in _ATTENTION[form].items():
        given = (args[name].name,) if isinstance(args[name], Word) else ("a number", str(args[name]))
        if not set(given) & set(built):
            wrong.append(f"{name}={args[name]} is not built, {name} takes {' or '.join(built)}")
    if wrong:
        raise PolicyError(f"attn with q={q}: {'; '.join(wrong)}.")
    taps = ("query", "key", "value") if args["v"] == Word("norm") else ("query", "key")
    width = (("pool", _argument(pool) or 1),)
    factor = () if isinstance(scale, Word) else (("scale", float(scale)),)
    if form == "chunk":
        return OpCall("chunk_attention", taps, options=(("chunk", q.arg), *factor, *width))
    reduce = (("reduce", args["over"].name), ("heads", args["heads"].name))
    options = (("buffer", args["buffer"]), *factor, *reduce, *width, ("pool_kind", "avg" if pool == Word("none") else pool.name))
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
            "(`layer`: all of the layer), then weighted by `v`, then pooled; but heads are summed last, each pooled by itself, "
            "where the mask is causal. A query less than `buffer` tokens behind does not count. `scale=model` is the model's own"
        ),
        params=(
            Param("q", Word("chunk", 256), OneOf({"chunk": Int(1), "win": Int(1), "last": None, "all": None})),
            Param("mask", Word("none"), words("none causal")),
            Param("over", Word("sum"), words("sum mean max count squares")),
            Param("heads", Word("sum"), words("sum mean max layer")),
            Param("v", Word("norm"), words("norm none")),
            Param("pool", Word("avg", 3), OneOf({"avg": Int(1, odd=True), "max": Int(1, odd=True), "none": None})),
            Param("scale", 1, OneOf({"model": None}, number=Real())),
            Param("buffer", 0, Int(), silent=True),
        ),
        lower=_attention,
        source=(
            "chunk: Compactor, arXiv:2507.08143, section on non-causal attention; kvpress NonCausalAttnPress. "
            "win: SnapKV, arXiv:2404.14469. last: TOVA, arXiv:2401.06104. all: H2O, arXiv:2306.14048. "
            "squares, heads=sum, buffer: KV-Compress, arXiv:2410.00161"
        ),
        cost="multiply-adds per query head: 2 D chunk; D win; D S for all, one attention more, two under padding",
    ),
    "expected": ScoreRow(
        summary=(
            "attention that the next `future` queries are expected to pay, if they are normal with the mean and "
            "covariance (`cov`) of the row's queries behind its first `sinks`; plus `eps`, weighted by `v`. Sinks score 0"
        ),
        params=EXPECTED,
        lower=expected,
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
    **KVPRESS_SCORES,
}
