"""Facts, and documents in which they are hidden.

A fact is one or more statements, a question and its answer. A document is prose with the statements of many facts
strewn into it; those of one fact keep their order:

    note k_nera 342 718 905 ;                                           ask k_nera    342 718 905 ;
    note k_nera 342 ; ... note k_nera 718 ; ... note k_nera 905 ;       all k_nera    718 342 905 ;  in any order
    set k_nera 342 ; ... set k_dufi k_nera ; ... set k_cuja k_dufi ;    trace k_cuja  k_dufi k_nera 342 ;

What tells statements from prose must be the statement and not the rarity of its words. So a document has a small cast of
names and of values: facts take theirs from it, so that a value alone does not find its note, and a share of the prose
are decoys, words of the cast. A name that a note explains is now and then followed by the first of its values, as a
text comes back to what it said: words of the prose have reason to look at the notes, and no answer can be read off
them, since a note that is quoted has two values or more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from retriever.vocabulary import ALL, ASK, BEGIN, END, NAMES, NOTE, SET, TRACE, VALUES, prose

DECOYS = 0.1  # share of the prose words that are names and values
CAST = 24  # names, and values, that a document speaks of; more names if it states more


@dataclass(frozen=True)
class Fact:
    """What one question is about.

    Attributes:
        statements: token ids; they stand in the document in this order, other text between them.
        question: token ids.
        answer: token ids, the closing `;` included.
        quote: what may follow the name in prose: its first value if there are more; empty if nothing may.
    """

    statements: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    quote: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of all statements."""
        return sum(map(len, self.statements))


class Cast:
    """The names and values of one document. Facts are made of them, each name in one fact."""

    def __init__(self, draw: random.Random, size: int = CAST) -> None:
        self.draw = draw
        self.size = size
        self.values = draw.sample(VALUES, size)
        self._names = draw.sample(NAMES, len(NAMES))
        self._taken = 0

    @property
    def names(self) -> list[int]:
        """Those of the facts made so far, and others up to `size`."""
        return self._names[: max(self.size, self._taken)]

    @property
    def names_left(self) -> int:
        """How many names no fact has."""
        return len(self._names) - self._taken

    def name(self) -> int:
        """A name that no fact has.

        Raises:
            ValueError: there is none left.
        """
        if not self.names_left:
            raise ValueError(f"all {len(self._names)} names are taken; expected fewer facts")
        self._taken += 1
        return self._names[self._taken - 1]

    def note(self) -> Fact:
        """A note with two to four values."""
        name, values = self.name(), self.draw.sample(self.values, self.draw.choice((2, 3, 4)))
        return Fact(((NOTE, name, *values, END),), (ASK, name), (*values, END), tuple(values[:1]))

    def list(self, count: int = 3) -> Fact:
        """`count` notes on one name, each with one value; the answer lists them in an order of its own."""
        name, values = self.name(), self.draw.sample(self.values, count)
        listed = self.draw.sample(values, count)
        return Fact(tuple((NOTE, name, value, END) for value in values), (ALL, name), (*listed, END))

    def chain(self) -> Fact:
        """A name set to a value, a second name set to the first, a third to the second."""
        first, second, third = self.name(), self.name(), self.name()
        value = self.draw.choice(self.values)
        statements = ((SET, first, value, END), (SET, second, first, END), (SET, third, second, END))
        return Fact(statements, (TRACE, third), (second, first, value, END))


def document(facts: Sequence[Fact], cast: Cast, tokens: int, decoys: float) -> tuple[list[int], list[list[int]]]:
    """Strew the statements of `facts` into prose.

    Args:
        facts: what the document says, made of `cast`.
        cast: the names and values of its decoys, and where randomness comes from.
        tokens: its length, the leading `<s>` included.
        decoys: share of the prose words that are names and values.

    Returns:
        The token ids, and for each fact where each of its statements begins.

    Raises:
        ValueError: the facts do not fit.
    """
    room = tokens - 1 - sum(fact.length for fact in facts)
    if room < 0:
        raise ValueError(f"{len(facts)} facts need {tokens - room} tokens; expected to fit them into {tokens}")
    owners = [index for index, fact in enumerate(facts) for _ in fact.statements]
    cast.draw.shuffle(owners)
    waiting = [iter(fact.statements) for fact in facts]
    words = list(islice(_prose(facts, cast, decoys), room))
    cuts = sorted(cast.draw.randint(0, room) for _ in owners)
    ids, done = [BEGIN], 0
    starts: list[list[int]] = [[] for _ in facts]
    for owner, cut in zip(owners, cuts, strict=True):
        ids += words[done:cut]
        done = cut
        starts[owner].append(len(ids))
        ids += next(waiting[owner])
    return ids + words[done:], starts


def _prose(facts: Sequence[Fact], cast: Cast, decoys: float) -> Iterator[int]:
    """Words without end, of which `decoys` are of the cast, as many names as values; quotes come on top."""
    draw, names = cast.draw, cast.names
    quotes = {fact.question[-1]: fact.quote for fact in facts}
    for word in prose(draw):
        if draw.random() >= decoys:
            yield word
        elif draw.random() < 0.5:
            yield draw.choice(cast.values)
        else:
            name = draw.choice(names)
            yield name
            if draw.random() < 0.5:
                yield from quotes.get(name, ())
