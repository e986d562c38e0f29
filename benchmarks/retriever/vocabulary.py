"""The 512 words of the packaged tokenizer as token ids, by what they are for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate

from kvfx.demo.notes import MODEL

_vocabulary: dict[str, int] = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
WORDS = tuple(sorted(_vocabulary, key=_vocabulary.__getitem__))
ID = {word: index for index, word in enumerate(WORDS)}

PAD, BEGIN, END = ID["<pad>"], ID["<s>"], ID[";"]
NOTE, SET = ID["note"], ID["set"]
ASK, ASKS, ALL, TRACE, COLON = ID["ask"], ID["asks"], ID["all"], ID["trace"], ID[":"]
NAMES = tuple(index for index, word in enumerate(WORDS) if word.startswith("k_"))
VALUES = tuple(index for index, word in enumerate(WORDS) if word.isdigit())

# The Markov chain of the prose: what may follow a word, the likeliest first, and the weights of first to last.
_chain = (line.split(": ") for line in (MODEL / "prose.txt").read_text(encoding="utf-8").splitlines())
SUCCESSORS = {ID[word]: tuple(ID[after] for after in successors.split()) for word, successors in _chain}
PROSE = tuple(SUCCESSORS)
_WEIGHTS = tuple(accumulate(1 / rank**1.3 for rank in range(1, 7)))


def prose(draw: random.Random) -> Iterator[int]:
    """Words of prose without end, each drawn from the successors of the one before."""
    word = draw.choice(PROSE)
    while True:
        word = draw.choices(SUCCESSORS[word], cum_weights=_WEIGHTS)[0]
        yield word


def text(ids: Sequence[int]) -> str:
    """Token ids as the words that the packaged tokenizer reads back."""
    return " ".join(WORDS[index] for index in ids)
