"""Documents full of notes, and questions on them, in the language of the packaged model.

Every word is one token. A document is prose, drawn from the Markov chain in `model/prose.txt`, with notes strewn into
it; a question stands behind the document, and the model goes on with the answer:

    note k_nera 342 718 905 ;                                           ask k_nera    342 718 905 ;
    note k_nera 342 ; ... note k_nera 718 ; ... note k_nera 905 ;       all k_nera    718 342 905 ;  in any order
    set k_nera 342 ; ... set k_dufi k_nera ; ... set k_cuja k_dufi ;    trace k_cuja  k_dufi k_nera 342 ;

The model also learned `asks k_nera k_dufi :`, which is left out: with every question two words long, all can be asked
in one batch without padding.

On documents of the default length and density the full cache and `compactor:0.5` answer all questions,
`compactor:0.25` 96 % and `random:0.5` 15 % (seeds 0 to 7, 320 questions). These documents are plain: their prose shares
no word with their notes. The model was trained on harder ones, with names and values in the prose too, and on those
`benchmarks/retriever` asks it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle, islice
from pathlib import Path

from kvfx.errors import InputError

MODEL = Path(__file__).parent / "model"
END = ";"
KINDS = ("ask", "trace", "ask", "all")
# Share of a document that notes may fill. In training they filled up to about half of a sequence.
DENSITY = 0.4
# How often each of the six successors of a prose word follows it, in the prose that the model was trained on.
_SUCCESSOR_WEIGHTS = [1 / rank**1.3 for rank in range(1, 7)]


@dataclass(frozen=True)
class Question:
    """A question, the words that answer it, and the statements of the document that say so, in their order there."""

    kind: str
    text: str
    answer: tuple[str, ...]
    statements: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the statements."""
        return sum(len(statement.split()) for statement in self.statements)

    def is_answered_by(self, words: Sequence[str]) -> bool:
        """Whether `words` begin with the whole answer; the values of `all` may come in any order."""
        given, wanted = list(words[: len(self.answer)]), list(self.answer)
        if self.kind == "all":
            return sorted(given[:-1]) == sorted(wanted[:-1]) and given[-1:] == wanted[-1:]
        return given == wanted


@dataclass(frozen=True)
class Document:
    """A text of known length, and questions that it answers."""

    text: str
    questions: tuple[Question, ...]

    def places(self, question: Question) -> list[range]:
        """Where each statement that answers `question` stands: indices of words, which are tokens."""
        before = (f"{self.text} ".partition(f" {statement} ")[0] for statement in question.statements)
        starts = [len(text.split()) for text in before]
        return [range(start, start + len(statement.split())) for start, statement in zip(starts, question.statements, strict=True)]


def write(
    length: int = 1024, questions: int = 40, seed: int = 0, kinds: Sequence[str] = KINDS, density: float = DENSITY
) -> Document:
    """Write a document of exactly `length` tokens that answers `questions` questions.

    Notes that nobody asks about are added until notes fill the share `density`: the more of them, the less a policy can
    keep by merely telling notes from prose.

    Args:
        length: tokens of the document, the leading `<s>` included.
        questions: how many to ask, each about facts of its own.
        seed: of everything drawn.
        kinds: kinds of question, taken in turn: "ask", "all", "trace".
        density: largest share of the tokens that notes may take.

    Raises:
        InputError: the facts asked about do not fit.
    """
    draw = random.Random(seed)
    names = iter(draw.sample(_vocabulary().names, len(_vocabulary().names)))
    room = int(length * density)
    facts: list[Question] = []
    try:
        facts += (_FACTS[kind](names, draw) for kind in islice(cycle(kinds), questions))
    except (StopIteration, RuntimeError):
        facts, room = [], -1
    room -= sum(fact.length for fact in facts)
    if room < 0:
        raise InputError(
            f"the facts behind {questions} questions do not fit into a document of {length} tokens, of which notes may "
            f"fill {density:.0%}; ask fewer, or write a longer one"
        )
    asked = tuple(facts)
    for name in names:
        unasked = _ask(iter([name]), draw)
        if unasked.length > room:
            break
        room -= unasked.length
        facts.append(unasked)
    return Document(_assemble(facts, length, draw), tuple(draw.sample(asked, len(asked))))


def _assemble(facts: Sequence[Question], length: int, draw: random.Random) -> str:
    """Strew the statements into prose; those of one fact keep their order."""
    owners = [index for index, fact in enumerate(facts) for _ in fact.statements]
    draw.shuffle(owners)
    waiting = [iter(fact.statements) for fact in facts]
    prose = list(islice(_prose(draw), length - 1 - sum(fact.length for fact in facts)))
    cuts = sorted(draw.randint(0, len(prose)) for _ in owners)
    words, done = ["<s>"], 0
    for owner, cut in zip(owners, cuts, strict=True):
        words += prose[done:cut]
        words.append(next(waiting[owner]))
        done = cut
    return " ".join(words + prose[done:])


def _prose(draw: random.Random) -> Iterator[str]:
    """Words without end, each drawn from the successors of the one before."""
    successors = _vocabulary().successors
    weights = list(accumulate(_SUCCESSOR_WEIGHTS))
    word = draw.choice(sorted(successors))
    while True:
        word = draw.choices(successors[word], cum_weights=weights)[0]
        yield word


def _values(draw: random.Random, count: int | None = None) -> list[str]:
    return draw.sample(_vocabulary().values, count or draw.choice((2, 3, 4)))


def _note(name: str, values: Sequence[str]) -> str:
    return " ".join(("note", name, *values, END))


def _ask(names: Iterator[str], draw: random.Random) -> Question:
    name, values = next(names), _values(draw)
    return Question("ask", f"ask {name}", (*values, END), (_note(name, values),))


def _all(names: Iterator[str], draw: random.Random) -> Question:
    name, values = next(names), _values(draw, 3)
    statements = tuple(_note(name, [value]) for value in values)
    return Question("all", f"all {name}", (*values, END), statements)


def _trace(names: Iterator[str], draw: random.Random) -> Question:
    first, second, third, (value,) = next(names), next(names), next(names), _values(draw, 1)
    statements = (f"set {first} {value} ;", f"set {second} {first} ;", f"set {third} {second} ;")
    return Question("trace", f"trace {third}", (second, first, value, END), statements)


_FACTS = {"ask": _ask, "all": _all, "trace": _trace}


@dataclass(frozen=True)
class _Vocabulary:
    names: list[str]
    values: list[str]
    successors: dict[str, list[str]]


@cache
def _vocabulary() -> _Vocabulary:
    """The words of the packaged tokenizer, by what they are for."""
    words = sorted(json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    lines = (MODEL / "prose.txt").read_text(encoding="utf-8").splitlines()
    successors = {word: after.split() for word, after in (line.split(": ") for line in lines)}
    names, values = [word for word in words if word.startswith("k_")], [word for word in words if word.isdigit()]
    return _Vocabulary(names, values, successors)
