"""The demo: the packaged model answers questions on a document whose cache was compressed before they were asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor

import kvfx
from kvfx.demo import notes, table
from kvfx.demo.measure import STAGES, Row, measure, with_full_cache
from kvfx.explanation import Explanation

POLICIES = ("none", "compactor:0.5", "compactor:0.25", "knorm:0.5", "knorm:0.25", "random:0.5", "random:0.25")

CAVEAT = (
    "[bold]What this shows:[/] a model that really retrieves runs through the rewritten graphs, and what a policy "
    "drops cannot be answered.\n"
    "[bold]What it does not show:[/] which policy is best for your model. This one has 0.7 M parameters and a "
    "synthetic vocabulary of 512 words. In its last layer notes have [italic]larger[/] key norms than prose, so that "
    "knorm, which keeps small ones as published, ends at the bottom; of large language models the opposite is "
    "reported. In this document notes and prose share no word, so that the leverage in compactor tells them apart "
    "easily."
)


@dataclass(frozen=True)
class Demo:
    """What the demo measured.

    Attributes:
        document: the text and the questions.
        tokens: of the document.
        rows: a measurement for each policy, the full cache first.
        right: for each policy and question whether it was answered word for word.
        kept: for each policy which tokens each head kept, per layer `[Hkv, S]` bool.
        explanation: what was found in the model, under the first policy that is not the full cache.
        backend: what ran the graphs.
        seconds: from loading to the last answer.
    """

    document: notes.Document
    tokens: int
    rows: list[Row]
    right: list[list[bool]]
    kept: list[list[np.ndarray]]
    explanation: Explanation
    backend: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data, without the texts."""
        questions = len(self.document.questions)
        rows = [
            {**asdict(row), "right": sum(right), "questions": questions, "share": row.nbytes / self.rows[0].nbytes}
            for row, right in zip(self.rows, self.right, strict=True)
        ]
        return {
            "backend": self.backend,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "rows": rows,
            "sites": self.explanation.as_dict(),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        questions = len(self.document.questions)
        title = f"{questions} questions on a document of {self.tokens} tokens, compressed before they were asked"
        yield table.comparison(self.rows, title, [f"{sum(right)}/{questions}" for right in self.right])
        compiling = sum(row.first_prefill + row.warm_up for row in self.rows)
        yield (
            f"prefill: of the document, median of 3. per token: from one to the next, median, {questions} answers "
            f"decoded together, `generate` included. Both after warm-up, by {self.backend} with "
            f"{torch.get_num_threads()} threads. First calls, which compile: {compiling:.0f} s of "
            f"{self.seconds:.0f} s in all.\n"
        )
        yield self.explanation
        yield CAVEAT


def run(
    backend: str = "inductor",
    questions: int = 40,
    *,
    tokens: int = 1024,
    seed: int = 0,
    policies: Sequence[str] = POLICIES,
    console: Console | None = None,
) -> Demo:
    """Measure `policies` on the packaged model.

    Args:
        backend: what runs the graphs.
        questions: how many are asked of the one document.
        tokens: length of the document.
        seed: of the document.
        policies: what to compare; `none`, the full cache, is put in front.
        console: where progress is shown; nowhere if None.

    Raises:
        InputError: the document is too short for so many questions.
        PolicyError: a policy is malformed.
    """
    start = time.perf_counter()
    document = notes.write(tokens, questions, seed)
    chosen = with_full_cache(policies)
    with table.progress(console or Console(quiet=True), STAGES * len(chosen)) as say:
        model, tokenizer = load()
        context = tokenizer(document.text, return_tensors="pt").input_ids
        batch, longest = asked(document, tokenizer)
        rows, models, kept = measure(model, chosen, context, [batch], new_tokens=longest, backend=backend, say=say)
        explanation = kvfx.explain(models[:2][-1])
    right = [answered(document, tokenizer, row.answers) for row in rows]
    return Demo(document, tokens, rows, right, kept, explanation, backend, time.perf_counter() - start)


def asked(document: notes.Document, tokenizer: Any) -> tuple[Tensor, int]:
    """The questions of a document as token ids, `[B, 2]`, and the tokens of the longest answer."""
    batch = tokenizer([question.text for question in document.questions], return_tensors="pt").input_ids
    return batch, max(len(question.answer) for question in document.questions)


def answered(document: notes.Document, tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[bool]:
    """Which questions of a document token ids answer, a row for each question."""
    return [
        question.is_answered_by(tokenizer.convert_ids_to_tokens(list(answer)))
        for question, answer in zip(document.questions, answers, strict=True)
    ]


def load() -> tuple[Any, Any]:
    """The packaged model in float32, and its tokenizer."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = transformers.AutoModelForCausalLM.from_pretrained(notes.MODEL, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(notes.MODEL)
