"""Training samples: one document that mixes all kinds of facts, and behind it as many questions as fit.

A third to a half of the tokens are answers, which the loss is taken of; of the prose a part is, lightly, so that the
model also learns the language. Positions of most samples have gaps in front of statements, so that short samples
train long distances (PoSE, https://arxiv.org/abs/2309.10400).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from retriever.documents import Cast, Fact, document
from retriever.tasks import jointly

KINDS = ("note", "list", "chain", "joint")
DENSE, SPARSE = (0.30, 0.47), (0.05, 0.30)  # share of a sample that statements fill; answers fill as much again
NAMES_OF_A_FACT = 3  # at most
GAPS = 6  # at most, in the positions of one sample


@dataclass(frozen=True)
class Mix:
    """What samples are like.

    Attributes:
        tokens: of document, questions and answers together; at least 64.
        kinds: of facts, out of `KINDS`; "joint" asks for two or three notes at once.
        casts: how many names, and values, a document speaks of; one of these.
        decoys: largest share of the prose words that are names and values; every fifth document has none.
        reach: largest position, by gaps; none if it is not beyond `tokens`.
    """

    tokens: int
    kinds: Sequence[str] = KINDS
    casts: Sequence[int] = (8, 16, 24, 48, 96)
    decoys: float = 0.2
    reach: int = 0


@dataclass(frozen=True)
class Sample:
    """Token ids of a document with questions and answers behind it.

    Attributes:
        ids: token ids.
        positions: of each token, ascending, with gaps.
        answers: indices of the tokens of answers.
        prose: indices of the words outside of statements.
    """

    ids: list[int]
    positions: list[int]
    answers: list[int]
    prose: list[int]


def sample(draw: random.Random, mix: Mix) -> Sample:
    """Draw one sample; all randomness comes from `draw`."""
    tokens = mix.tokens
    cast = Cast(draw, draw.choice(mix.casts))
    facts, asked = _facts(cast, tokens, [kind for kind in mix.kinds if kind != "joint"])
    questions = _questions(asked, draw, joint="joint" in mix.kinds)
    room = tokens - 1 - sum(fact.length for fact in facts)
    while sum(len(question) + len(answer) for question, answer in questions) > room:
        questions.pop()
    length = tokens - sum(len(question) + len(answer) for question, answer in questions)
    decoys = 0.0 if draw.random() < 0.2 else draw.uniform(0, mix.decoys)
    ids, starts = document(facts, cast, length, decoys)
    stated = {
        start + offset
        for fact, places in zip(facts, starts, strict=True)
        for statement, start in zip(fact.statements, places, strict=True)
        for offset in range(len(statement))
    }
    prose = [index for index in range(1, length) if index not in stated]
    answers: list[int] = []
    for question, answer in questions:
        ids += question
        answers += range(len(ids), len(ids) + len(answer))
        ids += answer
    places = [start for of_fact in starts for start in of_fact] + [length]
    return Sample(ids, _positions(draw, tokens, places, mix.reach), answers, prose)


def _facts(cast: Cast, tokens: int, kinds: Sequence[str]) -> tuple[list[Fact], list[Fact]]:
    """Facts that fill a random share of `tokens` together with their answers, and those of them that are asked for."""
    draw = cast.draw
    make = {"note": cast.note, "list": lambda: cast.list(draw.choice((2, 3, 4))), "chain": cast.chain}
    chosen = [kind for kind in kinds if draw.random() < 0.75] or [draw.choice(kinds)]
    budget = tokens * draw.uniform(*(DENSE if draw.random() < 0.7 else SPARSE))
    silent = draw.uniform(0, 0.3)
    facts: list[Fact] = []
    asked: list[Fact] = []
    filled = 0.0
    while filled < budget and cast.names_left >= NAMES_OF_A_FACT:
        fact = make[draw.choice(chosen)]()
        is_asked = not asked or draw.random() >= silent
        filled += (fact.length + is_asked * (len(fact.question) + len(fact.answer))) / 2
        if facts and filled > 0.48 * tokens:
            break
        facts.append(fact)
        if is_asked:
            asked.append(fact)
    return facts, asked


def _questions(asked: Sequence[Fact], draw: random.Random, joint: bool) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Questions and answers in random order; with `joint`, most notes are asked for two or three at a time."""
    facts = draw.sample(asked, len(asked))
    notes = [fact for fact in facts if fact.quote] if joint and draw.random() < 0.7 else []
    questions = []
    while len(notes) >= 2 and draw.random() < 0.7:
        together = [notes.pop() for _ in range(min(len(notes), draw.choice((2, 3))))]
        facts = [fact for fact in facts if fact not in together]
        questions.append(jointly(together))
    questions += [(fact.question, fact.answer) for fact in facts]
    draw.shuffle(questions)
    return questions


def _positions(draw: random.Random, tokens: int, places: Sequence[int], reach: int) -> list[int]:
    """0, 1, 2 and so on; in 60 % of samples with gaps at some of `places`, which add up to at most `reach`."""
    steps = [0] + [1] * (tokens - 1)
    if reach > tokens and draw.random() < 0.6:
        shares = [draw.random() ** 2 for _ in range(draw.randint(1, GAPS))]
        total = draw.randint(0, reach - tokens)
        for share in shares:
            steps[draw.choice(places)] += int(total * share / sum(shares))
    positions, position = [], 0
    for step in steps:
        position += step
        positions.append(position)
    return positions
