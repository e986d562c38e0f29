"""The scores of kvpress, bug for bug: atoms for the `@kvpress` presets that the other atoms cannot express."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from kvfx.errors import PolicyError
from kvfx.params import Int, OneOf, Param, Real, Word, words
from kvfx.passes.plan import OpCall, Sketch
from kvfx.score_row import EXPECTED, SEED, SIZE, Args, ScoreRow, expected


def _kvpress_window_attention(args: Args, keep: Fraction | None) -> OpCall:
    options = (("window", args["window"]), ("kernel", args["kernel"]), ("layer", args["heads"] == Word("layer")))
    return OpCall("kvpress_window_attention", ("query", "key"), options=options)


def _kvpress_expected(args: Args, keep: Fraction | None) -> OpCall:
    return replace(expected(args, keep), op="kvpress_expected_attention")


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


KVPRESS_SCORES: dict[str, ScoreRow] = {
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
