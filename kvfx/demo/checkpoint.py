"""The same comparison on a checkpoint, a text and questions of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

import kvfx
from kvfx.demo import table
from kvfx.demo.measure import STAGES, Row, measure, with_full_cache
from kvfx.errors import InputError
from kvfx.explanation import Explanation

GAP = "\n\n"  # between the context and a question


@dataclass(frozen=True)
class Prompt:
    """A context to compress, and what goes on behind it.

    Attributes:
        context: token ids, `[1, C]`; the same for every question.
        questions: token ids of the rest of each prompt, `[1, S]`.
        remarks: what a user should know about how the text was cut.
    """

    context: Tensor
    questions: tuple[Tensor, ...]
    remarks: tuple[str, ...]


def cut(tokenizer: Any, context: str, questions: Sequence[str]) -> Prompt:
    """Encode context and question together, as the model expects them, and cut behind the context.

    A prompt is one user message if the tokenizer has a chat template that shows the context verbatim, else plain text.
    The cut is where the tokens of all prompts still agree with those of a text that ends with the context: a token that
    reaches over the end of the context stays with the questions.

    Args:
        tokenizer: of transformers.
        context: what is compressed, before the questions are known.
        questions: what is asked of it.

    Raises:
        InputError: the context or a question is empty, or nothing of the context is left in front of the cut.
    """
    context, asked = context.strip(), [question.strip() for question in questions]
    if not context or not asked or not all(asked):
        raise InputError("the context and every question need some text, and at least one question is needed")
    remarks = []
    texts = _chats(tokenizer, context, asked)
    plain = texts is None
    if texts is None:
        texts = [context + GAP + question for question in asked]
        if getattr(tokenizer, "chat_template", None):
            remarks.append("The chat template changes the context, so context and question were joined as plain text.")
    head = texts[0][: texts[0].index(context) + len(context)]
    # A template has written the special tokens already.
    prefix, *prompts = (tokenizer(text, add_special_tokens=plain).input_ids for text in (head, *texts))
    common = min(_common(prefix, prompt) for prompt in prompts)
    if common == 0:
        raise InputError(
            f"the context's tokens, {prefix[:5]}..., are no prefix of the prompt's, {prompts[0][:5]}...; "
            "expected a tokenizer that reads from left to right"
        )
    if common < len(prefix):
        remarks.append(
            f"Of the context's {len(prefix)} tokens the last {len(prefix) - common} change with what follows; "
            "they were left to the questions, uncompressed."
        )
    rest = tuple(torch.tensor([prompt[common:]]) for prompt in prompts)
    if not all(part.shape[1] for part in rest):
        raise InputError("a question adds no token to the context; its text is unknown to the tokenizer")
    return Prompt(torch.tensor([prefix[:common]]), rest, tuple(remarks))


def _chats(tokenizer: Any, context: str, questions: Sequence[str]) -> list[str] | None:
    """Each prompt in the chat template; None if there is none, or it does not show the context verbatim."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    chats = []
    for question in questions:
        message = {"role": "user", "content": context + GAP + question}
        chats.append(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    heads = {chat.partition(context)[0] for chat in chats}
    return chats if len(heads) == 1 and all(context in chat for chat in chats) else None


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


@dataclass(frozen=True)
class Comparison:
    """What was measured, and what the model said.

    Attributes:
        rows: a measurement for each policy, the full cache first.
        questions: as they were asked.
        answers: for each policy the text of each answer.
        prompt: the tokens, cut into context and questions.
        kept: for each policy which tokens of the context each head kept, per layer `[Hkv, C]` bool.
        explanation: what was found in the model, under the last policy.
    """

    rows: list[Row]
    questions: tuple[str, ...]
    answers: list[list[str]]
    prompt: Prompt
    kept: list[list[np.ndarray]]
    explanation: Explanation

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        rows = [
            {**asdict(row), "answers": answers, "share": row.nbytes / self.rows[0].nbytes}
            for row, answers in zip(self.rows, self.answers, strict=True)
        ]
        return {
            "tokens": self.prompt.context.shape[1],
            "questions": self.questions,
            "remarks": self.prompt.remarks,
            "rows": rows,
            "sites": self.explanation.as_dict(),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for index, question in enumerate(self.questions):
            said = Table(title=Text(question), title_justify="left", show_lines=True)
            said.add_column("policy", no_wrap=True)
            said.add_column("answer")
            for row, answers in zip(self.rows, self.answers, strict=True):
                said.add_row(row.policy, Text(answers[index]))
            yield said
        title = f"a context of {self.prompt.context.shape[1]} tokens, compressed before the questions were asked"
        yield table.comparison(self.rows, title)
        yield "prefill: of the context, once. per token: from one to the next, median. Both after warm-up."
        yield from self.prompt.remarks
        yield self.explanation


def compare(
    path: Path,
    context: str,
    questions: Sequence[str],
    policies: Sequence[str],
    *,
    backend: str = "inductor",
    new_tokens: int = 64,
    device: str = "cpu",
    console: Console | None = None,
) -> Comparison:
    """Ask `questions` of `context` under the full cache and under `policies`.

    Args:
        path: folder of a transformers checkpoint.
        context: what is compressed.
        questions: what is asked of it, one after the other.
        policies: texts of the policy language; `none` is put in front.
        backend: what runs the graphs.
        new_tokens: most tokens of an answer.
        device: where the model runs, as torch names it.
        console: where progress is shown; nowhere if None.

    Raises:
        InputError: the checkpoint cannot be loaded, or there is nothing to ask.
        PolicyError: a policy is malformed.
        UnsupportedModel: the model is no causal decoder.
    """
    chosen = with_full_cache(policies)  # a misspelt one is found before a large model is loaded
    with table.progress(console or Console(quiet=True), STAGES * len(chosen)) as say:
        model, tokenizer = _load(path, device)
        prompt = cut(tokenizer, context, questions)
        ids, *asked = (part.to(device) for part in (prompt.context, *prompt.questions))
        rows, models, kept = measure(model, chosen, ids, asked, new_tokens=new_tokens, backend=backend, repeats=1, say=say)
        explanation = kvfx.explain(models[-1])
    answers = [[tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in row.answers] for row in rows]
    return Comparison(rows, tuple(questions), answers, prompt, kept, explanation)


def _load(path: Path, device: str) -> tuple[Any, Any]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
        return model.to(device).eval(), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load a causal decoder and its tokenizer from {path}: {error}") from error
