"""How many problems a model answers, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from retriever.tasks import Problem, correct, problem

SEED = 1_000_003  # of the problems; training samples are drawn from other texts


@dataclass(frozen=True)
class Accuracy:
    """Problems answered.

    Attributes:
        task: one of `TASKS`.
        tokens: of the context.
        right: answered, every token of the answer.
        asked: in all.
    """

    task: str
    tokens: int
    right: int
    asked: int

    @property
    def share(self) -> float:
        """Of the problems that were answered."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the share."""
        z, n, p = 1.959964, self.asked, self.share
        middle, width = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


def right(model: Any, task: str, tokens: int, indices: Sequence[int], batch: int = 16) -> int:
    """How many of the problems `indices` of a task the model answers with its full cache, decoding greedily.

    Args:
        model: a causal decoder of transformers.
        task: one of `TASKS`.
        tokens: of the contexts.
        indices: of the problems.
        batch: problems answered together.
    """
    count = 0
    for start in range(0, len(indices), batch):
        problems = [problem(task, tokens, SEED, index) for index in indices[start : start + batch]]
        longest = max(len(one.answer) for one in problems)
        answers = greedy(model, _prompts(problems, model.device), longest)
        count += sum(correct(one, answer) for one, answer in zip(problems, answers.tolist(), strict=True))
    return count


def _prompts(problems: Sequence[Problem], device: torch.device) -> Tensor:
    # Equally long: contexts have one length, and so have the questions of a task.
    return torch.tensor([one.context + one.question for one in problems], device=device)


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """The likeliest next tokens, `[B, new_tokens]`, of prompts `[B, S]`.

    `generate` would stop at the first `;`, which closes each part of an answer to `asks`.
    """
    out = model(prompts, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[:, -1:].argmax(-1)]
    while len(tokens) < new_tokens:
        out = model(tokens[-1], past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)
