"""Five tasks: a context, a question behind it and the one right answer.

| task | the context says | question | answer |
|---|---|---|---|
| single | one note, and nothing else is stated | `ask a` | its values |
| multikey | a note asked for among notes on other names | `ask a` | its values |
| multivalue | three notes on one name, among names with three notes each | `all a` | the values, in any order |
| multiquery | two notes asked for among notes on other names | `asks a b :` | `a`, its values, `b`, its values |
| trace | a chain `set a 5 ; set b a ; set c b ;` among other chains | `trace c` | `b a 5` |

Facts that nobody asks for come with the length, a statement to each 64 tokens. See `documents` for decoys in the prose.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from retriever.documents import DECOYS, Cast, Fact, document
from retriever.vocabulary import ASKS, COLON, text

__all__ = ["TASKS", "Problem", "correct", "problem", "text"]

TASKS = ("single", "multikey", "multivalue", "multiquery", "trace")
TOKENS_PER_STATEMENT = 64


@dataclass(frozen=True)
class Problem:
    """One question on one context.

    Attributes:
        task: one of `TASKS`.
        context: token ids, the leading `<s>` included.
        question: token ids that go on behind the context.
        answer: token ids, the closing `;` included.
        ordered: whether the answer must come in this order; if not, all but the closing `;` may be rearranged.
        gold: indices into `context` of the tokens of the statements that hold the answer, ascending.
    """

    task: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    ordered: bool
    gold: tuple[int, ...]


def problem(task: str, tokens: int, seed: int, index: int, *, decoys: float = DECOYS, distractors: int | None = None) -> Problem:
    """Problem number `index` of a task. Equal arguments give equal problems, whatever was drawn before.

    Args:
        task: one of `TASKS`.
        tokens: length of the context.
        seed: of a series of problems.
        index: within the series.
        decoys: share of the prose words that are names and values, 0 to 1.
        distractors: facts that nobody asks for; by default as many as give a statement to each 64 tokens, two or more,
            and none in "single".

    Raises:
        ValueError: an unknown task, a share outside of [0, 1], or more facts than fit.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; expected one of {', '.join(TASKS)}")
    if not 0 <= decoys <= 1:
        raise ValueError(f"decoys is {decoys}; expected a share of the prose between 0 and 1")
    cast = Cast(random.Random(f"{task} {tokens} {seed} {index} {decoys} {distractors}"))
    state = {"multivalue": cast.list, "trace": cast.chain}.get(task, cast.note)
    asked = [state() for _ in range(2 if task == "multiquery" else 1)]
    if distractors is None:
        distractors = 0 if task == "single" else max(2, tokens // TOKENS_PER_STATEMENT // len(asked[0].statements))
    facts = asked + [state() for _ in range(distractors)]
    context, starts = document(facts, cast, tokens, decoys)
    gold = sorted(
        start + offset
        for fact, places in zip(asked, starts, strict=False)
        for statement, start in zip(fact.statements, places, strict=True)
        for offset in range(len(statement))
    )
    question, answer = jointly(asked) if task == "multiquery" else (asked[0].question, asked[0].answer)
    return Problem(task, tuple(context), question, answer, task != "multivalue", tuple(gold))


def jointly(notes: Sequence[Fact]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One question for several notes, and its answer, which says of each name what its note says."""
    names = [note.question[-1] for note in notes]
    answer = tuple(word for name, note in zip(names, notes, strict=True) for word in (name, *note.answer))
    return (ASKS, *names, COLON), answer


def correct(problem: Problem, answer: Sequence[int]) -> bool:
    """Whether `answer`, token ids, begins with the whole answer of `problem`."""
    given, wanted = list(answer[: len(problem.answer)]), list(problem.answer)
    if problem.ordered:
        return given == wanted
    return given[-1:] == wanted[-1:] and sorted(given[:-1]) == sorted(wanted[:-1])
