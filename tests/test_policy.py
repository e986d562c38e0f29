"""The policy language: four equal forms, presets, errors, counts, and what a policy is lowered to."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfx.algebra import Atom, Combine, Number, Splice, ZScore
from kvfx.budget import PER, ROW, Budget, Protect
from kvfx.errors import PolicyError
from kvfx.lower import lower, sketch_digest
from kvfx.params import Int, OneOf, Real, Word
from kvfx.passes import plan
from kvfx.passes.plan import OpCall, Plan, Scalar, Sketch
from kvfx.policy import PLANNED, TOKEN, Policy, as_policy
from kvfx.presets import PRESETS, table_markdown
from kvfx.scores import SCORES

DOCS = Path(__file__).parent.parent / "docs" / "policy.md"


def values(takes):
    match takes:
        case Int(least, odd):
            return st.integers(least, 10**6).map(lambda n: n | 1 if odd else n)
        case Real():
            return st.floats(-1e30, 1e30, allow_nan=False)
        case OneOf(words, number):
            choices = [st.just(Word(w)) if n is None else values(n).map(lambda n, w=w: Word(w, n)) for w, n in words.items()]
            return st.one_of(*choices, *([values(number)] if number else []))


def words(names):
    return st.sampled_from([Word(name) for name in names.split()])


def attention():
    """The combinations of `attn` that are built."""
    free = {param.name: values(param.takes) for param in SCORES["attn"].params}
    causal = free | {"mask": words("causal")}
    chunk = {
        "buffer": st.just(0),
        "q": values(OneOf({"chunk": Int(1)})),
        "mask": words("none"),
        "over": words("sum"),
        "heads": words("sum"),
    }
    average = values(OneOf({"avg": Int(1, odd=True), "none": None}))
    return st.one_of(
        st.fixed_dictionaries(causal | {"q": values(OneOf({"win": Int(1), "last": None}))}),
        st.fixed_dictionaries(causal | {"q": words("all"), "over": words("sum count squares")}),
        st.fixed_dictionaries(free | chunk | {"pool": average, "scale": values(Real())}),
    )


def atoms():
    rows = [
        attention() if name == "attn" else st.fixed_dictionaries({p.name: values(p.takes) for p in row.params})
        for name, row in SCORES.items()
    ]
    return st.one_of(*(args.map(lambda args, n=name: Atom(n, **args)) for name, args in zip(SCORES, rows, strict=True)))


def scores():
    def grow(inner):
        with_atom = st.one_of(atoms(), st.builds(Combine, st.sampled_from("+-*"), atoms(), inner))
        return st.one_of(st.builds(ZScore, with_atom), st.builds(Combine, st.sampled_from("+-*"), inner, inner))

    numbers = st.builds(Number, st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), values(Real())))
    leaves = st.recursive(st.one_of(numbers, atoms()), grow, max_leaves=8)
    return st.one_of(atoms(), st.builds(Combine, st.sampled_from("+-*"), leaves, atoms()), st.builds(ZScore, atoms()))


SCORE = scores()  # made once: making it takes longer than drawing from it
KEEPS = st.one_of(
    st.integers(1, 10**9).map(lambda n: Fraction(n, 10**9)),
    st.integers(1, 1000).flatmap(lambda d: st.integers(1, d).map(lambda n: Fraction(n, d))),
)


SHARES = st.one_of(KEEPS, st.just(Fraction(0)))


def pooled():
    """Budgets that heads or layers compete for."""
    floors, amount = st.one_of(SHARES, st.just(Fraction(0))), {"tokens": st.integers(100, 10**6)}
    most, least = st.one_of(st.none(), st.integers(10**6, 10**9)), st.sampled_from([0, 2, 7, 99])
    heads, layers = {"pool": st.just("heads")}, {"pool": st.just("layers"), "most": most}
    return st.one_of(
        st.builds(Budget, KEEPS, **heads, floor=floors, least=least, rounding=st.sampled_from(["floor", "kvpress"])),
        st.builds(Budget, KEEPS, **layers, floor=floors, least=least),
        st.builds(Budget, **amount, **heads, floor=floors),
        st.builds(Budget, **amount, **layers, least=least),
    )


@st.composite
def policies(draw):
    kvpress = st.builds(Budget, KEEPS, rounding=st.just("kvpress"))
    pyramids = {"shape": st.builds(Word, st.just("pyramid"), st.integers(1, 99)), "least": st.integers(2, 99)}
    shapes = st.one_of(st.just({}), st.fixed_dictionaries(pyramids))
    shaped = st.builds(lambda keep, per, shape: Budget(keep, per=per, **shape), KEEPS, values(PER), shapes)
    kvpress_pyramid = st.builds(Budget, KEEPS, rounding=st.just("kvpress"), **pyramids)
    counted = st.builds(Budget, tokens=st.integers(1, 10**6))
    budget = draw(st.one_of(st.builds(Budget, KEEPS), counted, shaped, kvpress, kvpress_pyramid, pooled()))
    score = draw(st.one_of(SCORE, st.builds(Splice, SCORE, SCORE, SHARES)) if budget.per == ROW else SCORE)
    ends = st.integers(0, (2**20 if budget.tokens is None else budget.tokens) // 2 if budget.most is None else 1)
    protect = draw(st.builds(Protect, ends, ends)) if budget.rounding == "floor" else Protect()
    together = {
        "unit": draw(values(OneOf({"token": None, "chunk": Int(2)}))) if budget.per == ROW else TOKEN,
        "align": draw(st.sampled_from(["perhead", "shared"])) if budget.pool != "heads" else "perhead",
    }
    if budget.pool != "uniform" and budget.rounding == "kvpress":
        together["unit"] = TOKEN
    try:
        return Policy(score, budget, protect, **together)
    except PolicyError:  # blend=removed under a count
        return Policy(score, Budget(draw(KEEPS)), protect, **together)


@settings(max_examples=70, deadline=None)
@given(st.one_of(policies(), st.just(Policy(None))))
def test_all_forms_are_the_same_value(policy):
    forms = [
        Policy.parse(str(policy)),
        Policy.parse(policy.name),
        Policy.from_dict(policy.to_dict()),
        Policy.from_json(policy.to_json()),
        Policy.from_yaml(policy.to_yaml()),
        as_policy(str(policy)),
        as_policy(policy.to_dict()),
        as_policy(policy),
    ]
    assert set(forms) == {policy}
    assert {str(form) for form in forms} == {str(policy)}


@settings(max_examples=25, deadline=None)
@given(policies(), policies())
def test_text_is_unique_per_value(one, other):
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_canonical_and_labelled(name):
    policy = Policy.parse(name)
    assert str(policy) == PRESETS[name].text
    assert policy.name == (name if name == "none" else f"{name}:0.5")
    assert Policy.parse(policy.name) == policy


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_of_a_preset_has_a_source(name):
    preset = PRESETS[name]
    unsourced = re.sub(r"\{\w+\}", "", preset.policy)
    for key, source in preset.sources.items():
        assert key in preset.params or key in preset.policy, f"{key} is not in the preset"
        assert source
        unsourced = unsourced.replace(key, "") if key not in preset.params else unsourced
    assert not re.search(r"\d", unsourced), unsourced
    assert set(preset.params) <= set(preset.sources)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("compactor", "compactor:0.5"),
        ("compactor:25%", "compactor:0.25"),
        ("compactor:1/3", "compactor:1/3"),
        ("compactor(0.25)", "compactor:0.25"),
        ("compactor:0.25(seed=3, blend=0.35)", "compactor(blend=0.35, seed=3):0.25"),
        ("compactor@kvpress(blend=0.35):0.5", "compactor@kvpress(blend=0.35):0.5"),
        ("random(7)", "random(seed=7):0.5"),
        ("random:0.25(7)", "random(seed=7):0.25"),
        ("-knorm | budget=uniform(keep=0.2)", "knorm:0.2"),
        ("  none ", "none"),
        ("snapkv(window=32)", "snapkv(window=32):0.5"),
        ("snapkv(window=32) | protect(recent=8)", None),
        ("chunkkv(chunk=10) | align=perhead", None),
        ("keydiff | align=shared", "(keydiff) | align=shared | budget=uniform(0.5)"),
        ("criticalkv(share=0.25, window=32):0.3", "criticalkv(share=0.25, window=32):0.3"),
        ("splice(knorm, keydiff, 50%) | budget=uniform(0.5)", "splice(knorm, keydiff, 0.5) | budget=uniform(0.5)"),
        (
            "splice(then=random, first=-knorm, share=1/3) | budget=uniform(0.5)",
            "splice(-knorm, random(seed=0), 1/3) | budget=uniform(0.5)",
        ),
        ("leverage | budget=uniform(0.5)", "leverage(48, rope=pre, per=chunk(512), seed=0) | budget=uniform(0.5)"),
    ],
)
def test_labels_are_short(text, label):
    label = label or str(Policy.parse(text))  # None: no preset says it
    assert Policy.parse(text).name == label
    assert Policy.parse(label) == Policy.parse(text)


def test_a_buffer_of_nothing_is_not_written_and_any_other_is():
    score = "attn(q=win(8), mask=causal, over=squares, heads=sum, v=none, pool=max(7), scale=model{})"
    plain, zero, ten = (Policy.parse(score.format(end) + " | budget=uniform(0.5)") for end in ("", ", buffer=0", ", buffer=10"))
    assert plain == zero != ten
    assert "buffer" not in str(zero) + zero.to_json()
    assert str(ten).startswith(score.format(", buffer=10"))
    assert ten.to_dict()["score"]["attn"]["buffer"] == 10


def test_positional_and_named_arguments_are_the_same():
    one = Policy.parse("leverage(32, post) | budget=uniform(0.5)")
    assert one == Policy.parse("leverage(rope=post, size=32.0) | budget=uniform(50%)")
    assert one == Policy(Atom("leverage", 32, "post"), Budget(0.5))
    assert hash(one) == hash(Policy(Atom("leverage", rope=Word("post"), size=32), Budget(Fraction(1, 2))))


@pytest.mark.parametrize(
    ("text", "budget", "protect"),
    [
        ("compactor:0.25 | protect(sinks=64)", Budget(0.25), Protect(64, 4)),
        ("compactor | budget=uniform(tokens=1024) | protect(recent=0)", Budget(tokens=1024), Protect(8, 0)),
        ("compactor | budget=uniform(0.3)", Budget(0.3), Protect(8, 4)),
        ("compactor@kvpress | budget=uniform(0.3)", Budget(0.3, rounding="kvpress"), Protect()),
        ("knorm:0.3 | budget=uniform(0.3)", None, None),
        ("knorm:0.3 | budget=uniform(tokens=9)", None, None),
        ("knorm:0.3 | budget=uniform(round=kvpress)", Budget(0.3, rounding="kvpress"), Protect()),
        ("snapkv:0.3 | budget=heads(floor=0.2)", Budget(0.3, pool="heads", floor="0.2"), Protect(0, 64)),
        ("compactor:0.3 | score=-knorm | pos=keep", Budget(0.3), Protect(8, 4)),
        ("snapkv:0.3 | protect(recent=8)", Budget(0.3), Protect(0, 8)),
        ("snapkv | budget=heads(0.3, floor=20%)", Budget(0.3, pool="heads", floor=Fraction(1, 5)), Protect(0, 64)),
        ("snapkv | budget=heads(floor=0.2)", Budget(0.5, pool="heads", floor=Fraction(1, 5)), Protect(0, 64)),
        ("snapkv | budget=layers(tokens=100, max=none)", Budget(tokens=100, pool="layers"), Protect(0, 64)),
        ("snapkv | budget=layers(min=2, max=900)", Budget(0.5, pool="layers", most=900), Protect(0, 64)),
        ("pyramidkv | budget=heads(0.3, shape=flat)", Budget(0.3, pool="heads"), Protect(0, 64)),
        ("snapkv@kvpress | budget=heads(floor=0.2)", Budget(0.5, pool="heads", floor="0.2", rounding="kvpress"), Protect()),
    ],
)
def test_clauses_after_a_preset_merge_key_by_key(text, budget, protect):
    if budget is None:
        with pytest.raises(PolicyError, match="given twice"):
            Policy.parse(text)
    else:
        policy = Policy.parse(text)
        assert (policy.budget, policy.protect) == (budget, protect)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "compacter:0.5",
            r"unknown policy 'compacter'. Did you mean 'compactor'\? Known: adakv, adakv@kvpress, chunkkv, ",
        ),
        ("kvzip", "unknown policy 'kvzip'.*leverage"),
        ("compactor@paper:0.5", "unknown policy 'compactor@paper'"),
        ("-knormal | budget=uniform(0.5)", r"unknown score 'knormal'. Did you mean 'knorm'\?"),
        ("compactor(sed=3)", r"unknown argument of the preset compactor: 'sed'. Did you mean 'seed'\?"),
        ("none:0.5", "unknown argument of the preset none: 'keep'"),
        (
            "leverage(48, ridge=1) | budget=uniform(0.5)",
            "unknown argument of leverage: 'ridge'. Known: per, rope, seed, size",
        ),
        ("leverage(48, size=48) | budget=uniform(0.5)", "the argument size is given twice"),
        ("random(1, 2, 3)", "takes 2 arguments at most"),
        ("compactor:0", r"keep=0 is outside \(0, 1\]"),
        ("compactor:1.5", r"keep=1.5 is outside \(0, 1\]"),
        ("compactor:1e999", r"is outside \(0, 1\]"),
        ("compactor:0.12345678912", "nine decimals at most"),
        ("attn(q=gauss(64)) | budget=uniform(0.5)", r"attn\(q=gauss\(64\)\) is not built: q takes chunk\(n\)"),
        (
            "attn(q=win(64)) | budget=uniform(0.5)",
            r"attn with q=win\(64\): mask=none is not built, mask takes causal\.",
        ),
        ("attn(q=all, mask=causal, over=max, heads=mean) | budget=uniform(0.5)", "over takes sum or count or squares"),
        ("attn(scale=model) | budget=uniform(0.5)", "scale=model is not built, scale takes a number"),
        ("attn(buffer=10) | budget=uniform(0.5)", r"attn with q=chunk\(256\): buffer=10 is not built, buffer takes 0\."),
        (
            "attn(q=last, mask=causal, buffer=-1) | budget=uniform(0.5)",
            r"attn\(buffer=-1\) is not built: buffer takes an integer >= 0",
        ),
        ("attn(pool=avg(4)) | budget=uniform(0.5)", r"pool takes avg\(n\), n an odd integer >= 1 or max\(n\)"),
        ("1e999*knorm | budget=uniform(0.5)", "too large"),
        (
            "compactor | budget=uniform(tokens=8)",
            r"tokens=8 is less than the 12 tokens of protect\(sinks=8, recent=4\)",
        ),
        ("compactor@kvpress | budget=uniform(tokens=8)", "rounds a fraction"),
        ("kvpress_compactor | budget=uniform(tokens=8)", "the budget is a count"),
        ("compactor@kvpress | protect(sinks=4)", "without regard to protect"),
        ("compactor | protect(sinks=-1)", r"protect\(sinks=-1\) is not a number of tokens"),
        ("compactor | protect(sinks=1) | protect(recent=1)", "the axis protect is given twice"),
        ("-knorm | score=random | budget=uniform(0.5)", "the axis score is given twice"),
        ("compactor:0.5 | budget=uniform(0.25)", "the budget is given twice"),
        ("compactor | budget=uniform(0.5, tokens=3)", "either a fraction kept"),
        ("compactor | budget=0.5", "names its pool"),
        ("-knorm", "no budget"),
        ("-knorm | budget=uniform(0.5, per=5)", r"per takes row or chunk\(n\)"),
        ("-knorm | budget=uniform(0.5, per=chunk(1))", r"per=chunk\(1\)\) is not built"),
        ("-knorm | budget=uniform(0.5, shape=cone(3))", r"shape takes flat or pyramid\(n\), n an integer >= 1"),
        ("-knorm | budget=uniform(0.5, min=9)", "min=9 is the least of a pyramid's layers"),
        ("-knorm | budget=uniform(0.5, per=chunk(9), round=kvpress)", "counts over the whole row, not per="),
        ("-knorm | budget=uniform(0.5, shape=pyramid(9), round=kvpress)", "needs min, the window of its SnapKV"),
        ("splice(-knorm, recency, 0.5) | budget=uniform(0.5, per=chunk(9))", "splice ranks the whole row"),
        ("-knorm | unit=chunk(5) | budget=uniform(0.5, per=chunk(9))", "per=chunk\\(9\\) would cut units apart"),
        ("-knorm:0.5", "follows the name of a preset"),
        ("none | budget=uniform(0.5)", "keeps everything"),
        ("3 | budget=uniform(0.5)", "the same for every token"),
        ("knorm + zscore(3) | budget=uniform(0.5)", "standardises a constant"),
        ("1 + splice(knorm, random, 0.5) | budget=uniform(0.5)", "splice stands inside a score"),
        ("-splice(knorm, random, 0.5) | budget=uniform(0.5)", "splice stands inside a score"),
        ("zscore(splice(knorm, random, 0.5)) | budget=uniform(0.5)", "splice stands inside a score"),
        ("splice(splice(knorm, random, 0.5), random, 0.5) | budget=uniform(0.5)", "splice stands inside a score"),
        ("splice(knorm, random) | budget=uniform(0.5)", r"splice lacks share: expected splice\(first, then, share\)"),
        ("splice(knorm, random, 0.5, 1) | budget=uniform(0.5)", "splice takes 3 arguments at most: first, then, share"),
        ("splice(knorm, random, 1.5) | budget=uniform(0.5)", r"share=1.5 is outside \[0, 1\]"),
        ("splice(knorm, random, -0.5) | budget=uniform(0.5)", r"share=-0.5 is outside \[0, 1\]"),
        ("splice(knorm, random, 0.12345678912) | budget=uniform(0.5)", "share=.* is too fine"),
        ("splice(knorm, random, half) | budget=uniform(0.5)", r"share.* is not a fraction: expected a number in \[0, 1\]"),
        ("splice(knorm, 3, 0.5) | budget=uniform(0.5)", "the same for every token"),
        ("splice(knorm, zscore(3), 0.5) | budget=uniform(0.5)", "standardises a constant"),
        ("splice(knorm, none, 0.5) | budget=uniform(0.5)", "unknown score 'none'"),
        ("compactor | budget=pages(0.3)", "unknown value of the axis budget: 'pages'. Known: blocks, heads, layers, uniform"),
        ("compactor | budget=heads(floor=1.5)", r"floor=1.5 is outside \[0, 1\]"),
        ("compactor | budget=heads(floor=half)", "floor=.*is not a fraction"),
        ("compactor | budget=heads(0.3, tokens=9)", r"either a fraction kept, heads\(0.5\), or a count"),
        ("compactor | budget=heads(max=9)", "max=9 means nothing in heads.*which takes round, floor, min.*write max=none"),
        ("compactor | budget=uniform(floor=0.2)", "floor=0.2 means nothing in uniform.*write floor=0"),
        ("compactor | budget=layers(round=kvpress)", "round=kvpress means nothing in layers.*write round=floor"),
        ("pyramidkv | budget=heads(0.3)", r"shape=pyramid\(20\) means nothing in heads.*write shape=flat"),
        ("-knorm | budget=layers(0.3, per=chunk(9))", r"per=chunk\(9\) means nothing in layers.*write per=row"),
        ("-knorm | align=shared | budget=heads(0.3)", "align=shared, cannot compete"),
        ("-knorm | budget=heads(tokens=9, min=10)", "tokens=9 is less than min=10"),
        ("-knorm | budget=layers(tokens=1)", "tokens=1 is less than min=2"),
        ("-knorm | budget=heads(tokens=90, floor=0.5, min=10)", "floor=0.5 a number of tokens, so that it or min=10 says nothing"),
        ("-knorm | budget=layers(0.3, min=1)", "keeps 2 slots at least. Write min=2"),
        ("-knorm | budget=layers(0.3, min=9, max=8)", "max=8 is less than min=9"),
        ("-knorm | budget=layers(tokens=9, max=8)", "max=8 is less than tokens=9"),
        ("-knorm | budget=layers(0.3, max=0)", r"layers\(max=0\) is no count: expected an integer >= 1, or none"),
        ("snapkv | budget=layers(0.3, max=63)", r"max=63 is less than the 64 tokens of protect\(sinks=0, recent=64\)"),
        ("snapkv | budget=heads(tokens=63)", r"tokens=63 is less than the 64 tokens of protect"),
        ("-knorm | unit=chunk(9) | budget=heads(0.3, round=kvpress)", r"Leave unit=chunk\(9\) out"),
        ("compactor | heads(0.3)", "'heads' is no clause"),
        ("compactor | pos=rerotate", "'pos=rerotate' is planned but not built yet.*Built: pos=keep"),
        ("compactor | composite", "'align=composite' is planned but not built yet.*Built: align=perhead or shared"),
        ("compactor | unit=head", "'unit=head' is planned but not built yet.*Built: unit=token or chunk"),
        (
            "compactor | unit=chunk(1)",
            r"unit=chunk\(1\) is not built: unit takes token or chunk\(n\), n an integer >= 2",
        ),
        ("compactor | unit=word", "unknown value of the axis unit: 'word'. Known: chunk, token"),
        ("compactor | align=none", "unknown value of the axis align: 'none'. Known: perhead, shared"),
        ("none | align=shared", "keeps everything"),
        ("compactor | colour=red", "unknown axis 'colour'. Known: align, budget, pos, protect, score, unit"),
        ("compactor >> none", "stages in a row"),
        ("compactor ; none", "phases"),
    ],
)
def test_bad_policies_are_refused_with_their_reason(text, message):
    with pytest.raises(PolicyError, match=message) as refusal:
        Policy.parse(text)
    assert text in str(refusal.value)


@pytest.mark.parametrize("axis", sorted(set(PLANNED) - {"budget", "pos", "unit", "align", "when"}))
def test_axes_that_are_not_built_are_refused(axis):
    with pytest.raises(PolicyError, match=f"'{axis}' is planned but not built yet.*score, unit, align, budget"):
        Policy.parse(f"compactor:0.5 | {axis}={PLANNED[axis][0]}")
    with pytest.raises(PolicyError, match=f"'{axis}' is planned"):
        Policy.from_dict({**Policy.parse("compactor").to_dict(), axis: PLANNED[axis][0]})


@pytest.mark.parametrize(
    ("text", "caret", "expected"),
    [
        ("compactor:0.5 | protect(sinks=)", 30, "a name or a number"),
        ("(knorm | budget=uniform(0.5)", 7, r"'\)'"),
        ("compactor | ", 11, "a name"),
    ],
)
def test_a_syntax_error_points_at_its_place(text, caret, expected):
    with pytest.raises(PolicyError, match=f"Expected .*{expected}") as refusal:
        Policy.parse(text)
    _, shown, pointer, _ = str(refusal.value).splitlines()
    assert shown.strip() == text.strip()
    assert pointer.index("^") - 4 == caret


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"score": {"knorm": 3}, "budget": {"uniform": {"keep": 0.5}}},
        {"score": {"knorm": {}}, "budget": 0.5},
        {"score": {"knorm": {}}, "budget": {"uniform": {"ratio": 0.5}}},
        {"score": {"knorm": {}}, "budget": {"uniform": {"keep": "half"}}},
        {"score": {"leverage": {"size": True}}, "budget": {"uniform": {"keep": 0.5}}},
        {"score": {"knorm": {}}, "budget": {"uniform": {"keep": 0.5}}, "protect": {"sinks": 1.5}},
        {"score": {"splice": {"first": {"knorm": {}}, "then": {"random": {}}}}, "budget": {"uniform": {"keep": 0.5}}},
        {
            "score": {"splice": {"first": {"knorm": {}}, "then": {"random": {}}, "share": "half"}},
            "budget": {"uniform": {"keep": 1}},
        },
        {
            "score": {"splice": {"first": {"knorm": {}}, "then": {"random": {}}, "share": 1, "at": 1}},
            "budget": {"uniform": {"keep": 1}},
        },
        {"score": {"knorm": {}}, "budget": {"uniform": {"keep": 0.5}}, "unit": 20},
        {"score": {"knorm": {}}, "budget": {"uniform": {"keep": 0.5}}, "unit": {"chunk": "many"}},
        {"score": {"knorm": {}}, "budget": {"uniform": {"keep": 0.5}}, "align": ["shared"]},
        3,
    ],
)
def test_bad_data_is_refused(data):
    with pytest.raises(PolicyError):
        as_policy(data)


def test_bad_json_and_yaml_are_refused():
    with pytest.raises(PolicyError, match="not JSON"):
        Policy.from_json("{")
    with pytest.raises(PolicyError, match="not YAML"):
        Policy.from_yaml("{")


@given(
    st.one_of(
        st.builds(Budget, KEEPS, pool=st.sampled_from(["uniform", "heads"])),
        st.builds(Budget, tokens=st.integers(1, 5000)),
        st.builds(Budget, KEEPS, pool=st.just("heads"), floor=SHARES, least=st.integers(0, 99)),
    ),
    st.integers(1, 10**6),
    st.integers(0, 100),
)
def test_count_stays_within_its_bounds(budget, length, protected):
    count = budget.count(length, protected)
    assert 1 <= count <= length
    assert count >= min(length, protected)
    amount = budget.tokens or budget.keep * length
    assert count <= max(1, protected, amount)


@given(KEEPS, st.integers(1, 10**4), st.integers(0, 9), st.one_of(st.none(), st.integers(9, 200)))
def test_layers_that_compete_share_two_slots_each_at_least_and_no_more_than_they_may(keep, length, protected, most):
    budget = Budget(keep, pool="layers", most=most)
    count = budget.count(length, protected)
    assert count == min(length, max(2, protected, int(keep * length)), most or length)
    assert budget.counts(length, protected, 5) == [count] * 5


@given(KEEPS, KEEPS, st.integers(1, 10**6), st.integers(0, 100))
def test_count_grows_with_keep(one, other, length, protected):
    less, more = sorted([one, other])
    assert Budget(less).count(length, protected) <= Budget(more).count(length, protected)


@pytest.mark.parametrize(
    ("keep", "length", "count"),
    [("0.3", 10, 3), (0.1, 1000, 100), (1 - 0.7, 10, 3), ("1/3", 9, 3), (0.5, 1, 1), (1, 7, 7)],
)
def test_count_is_exact(keep, length, count):
    assert Budget(keep).count(length, protected=0) == count


@given(st.integers(1, 99), st.integers(1, 10**5))
def test_count_follows_kvpress_when_asked(percent, length):
    removed = float(f"0.{percent:02}")  # what a user of that library writes
    budget = Budget(1 - Fraction(percent, 100), rounding="kvpress")
    assert budget.count(length, protected=12) == max(1, int(length * (1 - removed)))


def test_with_keep_changes_only_the_keep():
    policy = Policy.parse("compactor@kvpress:0.5")
    assert policy.with_keep(0.25) == Policy.parse("compactor@kvpress:0.25")
    with pytest.raises(PolicyError, match="none keeps everything"):
        Policy.parse("none").with_keep(0.25)


def test_only_kvpress_couples_the_rows_of_a_batch():
    coupled = [name for name in PRESETS if Policy.parse(name).batch_coupled]
    kvpress = ["compactor", "snapkv", "pyramidkv", "tova", "expected_attention", "chunkkv", "criticalkv", "adakv", "critical_adakv"]
    assert coupled == [f"{name}@kvpress" for name in kvpress]


ATTENTION = OpCall("chunk_attention", ("query", "key", "value"), None, (("chunk", 256), ("scale", 1.0), ("pool", 3)))
LEVERAGE = OpCall("leverage", ("pre_key",), Sketch(48, 0), (("chunk", 512),))
KEY_NORM = OpCall("key_norm", ("key",))
KVPRESS = OpCall("kvpress_compactor", ("query", "key", "value", "pre_key"), Sketch(48, 0), (("blend", 0.5), ("chunk", 256)))
COMPACTOR = plan.Combine("add", plan.ZScore(ATTENTION), plan.Combine("mul", Scalar(0.3), plan.ZScore(LEVERAGE)))


ENGINE = plan.Combine(
    "add",
    plan.ZScore(OpCall("chunk_attention", ("query", "key"), None, (("chunk", 128), ("scale", 1.0), ("pool", 1)))),
    plan.Combine("mul", Scalar(0.5), plan.ZScore(OpCall("leverage", ("pre_key",), Sketch(48, 42), (("chunk", 512),)))),
)


def attention_call(op, *options, pool=1):
    tail = (("heads", "mean"), ("pool", pool), ("pool_kind", "avg"))
    return OpCall(op, ("query", "key"), None, (*options, *tail))


SNAPKV = attention_call("window_attention", ("window", 64), ("buffer", 0), ("reduce", "mean"), pool=5)
TOVA = (("window", 1), ("buffer", 0), ("reduce", "mean"), ("heads", "layer"), ("pool", 1), ("pool_kind", "avg"))


def expected(op, **protect):
    options = (("sinks", 4), ("covariance", True), ("epsilon", 0.0))
    return Plan(OpCall(op, ("pre_query", "key", "rotation", "value"), None, options, future=512), **protect)


def kvpress_window(window, kernel, layer):
    options = (("window", window), ("kernel", kernel), ("layer", layer))
    return OpCall("kvpress_window_attention", ("query", "key"), None, options)


def critical(score):
    projected = OpCall("value_projection", ("value", "output_weight"))
    then = plan.Combine("mul", plan.Combine("add", score, Scalar(0.0001)), projected)
    return plan.Splice(score, then, Fraction(1, 2))


SQUARES = OpCall(
    "window_attention",
    ("query", "key"),
    options=(("window", 8), ("buffer", 0), ("reduce", "squares"), ("heads", "sum"), ("pool", 7), ("pool_kind", "max")),
)

PLANS = {
    "none": Plan(None),
    "knorm": Plan(KEY_NORM),
    "compactor": Plan(COMPACTOR, sinks=8, recent=4),
    "compactor@kvpress": Plan(KVPRESS),
    "knorm@kvpress": Plan(KEY_NORM),
    "keydiff@kvpress": Plan(OpCall("key_diff", ("key",))),
    "snapkv@kvpress": Plan(kvpress_window(64, 5, False)),
    "tova@kvpress": Plan(kvpress_window(1, 1, True)),
    "criticalkv": Plan(critical(SNAPKV), recent=64),
    "criticalkv@kvpress": Plan(critical(kvpress_window(64, 5, False))),
    "streaming_llm": Plan(OpCall("position", ("key",), None, (("sinks", 0),)), sinks=4),
    "streaming_llm@kvpress": Plan(OpCall("position", ("key",), None, (("sinks", 4),))),
    "keydiff": Plan(OpCall("key_diff", ("key",))),
    "snapkv": Plan(SNAPKV, recent=64),
    "pyramidkv": Plan(SNAPKV, recent=64),
    "pyramidkv@kvpress": Plan(kvpress_window(64, 5, False)),
    "tova": Plan(OpCall("window_attention", ("query", "key"), None, TOVA), recent=1),
    "h2o_prefill": Plan(attention_call("column_attention", ("buffer", 0), ("reduce", "count"))),
    "h2o_prefill@kvpress": Plan(attention_call("column_attention", ("buffer", 0), ("reduce", "count"))),
    "expected_attention": expected("expected_attention", sinks=4),
    "expected_attention@kvpress": expected("kvpress_expected_attention"),
    "lagkv": Plan(OpCall("lag", ("key", "value"), None, (("lag", 128), ("sinks", 4))), sinks=4),
    "lagkv@kvpress": Plan(OpCall("lag", ("key", "value"), None, (("lag", 128), ("sinks", 4)))),
    "chunkkv": Plan(SNAPKV, recent=64, shared=True, chunk=20),
    "chunkkv@kvpress": Plan(kvpress_window(64, 5, False), shared=True, chunk=20),
    "compactor@engine": Plan(ENGINE, sinks=16, recent=64, floor=Fraction(0)),
    "adakv": Plan(SNAPKV, recent=64, floor=Fraction(1, 5)),
    "adakv@kvpress": Plan(kvpress_window(64, 5, False), floor=Fraction(1, 5), least=1),
    "critical_adakv": Plan(critical(SNAPKV), recent=64, floor=Fraction(1, 5)),
    "critical_adakv@kvpress": Plan(critical(kvpress_window(64, 5, False)), floor=Fraction(1, 5), least=1),
    "kv_compress": Plan(SQUARES, sinks=4, recent=8, later=True),
    "random": Plan(OpCall("random", ("key",), None, (("seed", 0),))),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_lowered_to_their_plans(name):
    assert lower(Policy.parse(name)) == PLANS[name]


@pytest.mark.parametrize(
    ("score", "expr"),
    [
        ("(knorm)", plan.Combine("mul", Scalar(-1.0), KEY_NORM)),
        ("-knorm*2", plan.Combine("mul", Scalar(2.0), KEY_NORM)),
        ("(1+2)*-knorm", plan.Combine("mul", Scalar(3.0), KEY_NORM)),
        (
            "attn(v=none, pool=none)",
            OpCall("chunk_attention", ("query", "key"), None, (("chunk", 256), ("scale", 1.0), ("pool", 1))),
        ),
        ("-redundancy", OpCall("redundancy", ("key",))),
        (
            "attn(q=win(9), mask=causal, over=max, heads=max, v=norm, pool=max(3), scale=0.5)",
            OpCall(
                "window_attention",
                ("query", "key", "value"),
                None,
                (
                    ("window", 9),
                    ("buffer", 0),
                    ("scale", 0.5),
                    ("reduce", "max"),
                    ("heads", "max"),
                    ("pool", 3),
                    ("pool_kind", "max"),
                ),
            ),
        ),
        (
            "attn(q=all, mask=causal, over=squares, heads=sum, v=none, pool=none, scale=model, buffer=10)",
            OpCall(
                "column_attention",
                ("query", "key"),
                None,
                (("buffer", 10), ("reduce", "squares"), ("heads", "sum"), ("pool", 1), ("pool_kind", "avg")),
            ),
        ),
        (
            "expected(64, sinks=0, cov=none, v=none)",
            OpCall(
                "expected_attention",
                ("pre_query", "key", "rotation"),
                None,
                (("sinks", 0), ("covariance", False), ("epsilon", 0.0)),
                future=64,
            ),
        ),
        ("leverage(16, rope=post, per=row, seed=9)", OpCall("leverage", ("key",), Sketch(16, 9), (("chunk", 0),))),
    ],
)
def test_scores_are_lowered_without_detours(score, expr):
    assert lower(Policy.parse(f"{score} | budget=uniform(0.5)")).score == expr


@settings(max_examples=30, deadline=None)
@given(policies(), KEEPS)
def test_plans_do_not_depend_on_keep(policy, keep):
    bakes_keep = any(("blend", Word("removed")) in atom.values for atom in policy.atoms())
    if policy.budget.keep is not None and not bakes_keep:
        assert lower(policy.with_keep(keep)) == lower(policy)


def test_sketches_stand_in_the_plan_by_their_digest():
    policy = Policy.parse("compactor")
    ones, zeros = [torch.ones(2, 8, 48)], [torch.zeros(2, 8, 48)]
    assert lower(policy, ones) == lower(policy, [torch.ones(2, 8, 48)])
    assert lower(policy, ones) != lower(policy, zeros)
    assert lower(policy, ones).sketch_digest == sketch_digest(ones) != sketch_digest(zeros)
    with pytest.raises(PolicyError, match=r"do not fit knorm:0\.5, whose sketches have no columns"):
        lower(Policy.parse("knorm"), ones)


def test_the_page_on_policies_is_up_to_date():
    tables = DOCS.read_text(encoding="utf-8").split("<!-- tables -->")[1]
    assert tables.strip() == table_markdown(), "put kvfx.presets.table_markdown() between the <!-- tables --> marks"
