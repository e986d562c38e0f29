"""Which heads of the packaged model keep what an answer needs, and which of them matter: compactor and its two terms.

    python benchmarks/quality_heads.py              # a few minutes

Writes results/quality_heads.csv, which results/quality_findings.md speaks of. The problems are the first of those that quality.py
asks, at 512 tokens. What one head is worth is seen by giving compactor's cache that head of another policy, and asking again.
Nothing is timed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from method import write
from quality import BASE, SEED, all_policies, answer_logits, greedy, is_right, parts
from retriever.tasks import TASKS, Problem, correct, problem

import kvfx
from kvfx.demo import run
from kvfx.demo.heatmap import kept_tokens

KEEPS, TOKENS, PROBLEMS = (0.1, 0.05), 512, 20


@dataclass(frozen=True)
class Head:
    """One KV head under one policy.

    Attributes:
        policy, keep: what was kept.
        layer, head: whose cache it is.
        gold: share of the tokens of the statements that hold the answer which it kept, mean over problems.
        right: share of the problems that are answered from compactor's cache with this head as `policy` keeps it.
    """

    policy: str
    keep: float
    layer: int
    head: int
    gold: float
    right: float


@dataclass(frozen=True)
class Asked:
    """Problems of one task, and for each policy the model and the cache of their contexts."""

    problems: Sequence[Problem]
    models: dict[str, Any]
    caches: dict[str, Any]

    def gold(self, policy: str) -> np.ndarray:
        """Share of what each answer needs that each head kept, `[problems, L, Hkv]`."""
        shares = [
            [kept[:, list(one.gold)].mean(1) for kept in kept_tokens(self.caches[policy], row)]
            for row, one in enumerate(self.problems)
        ]
        return np.array(shares)

    def right(self, policy: str, layer: int, head: int) -> list[bool]:
        """Which problems are answered from compactor's cache with one head of another policy, which keeps equally many."""
        cache, model = self.caches[BASE].copy(), self.models[BASE]
        mine, theirs = cache.layers[layer], self.caches[policy].layers[layer]
        for name in ("keys", "values", "prefix"):
            held = getattr(mine, name).clone()
            held[:, head] = getattr(theirs, name)[:, head]
            setattr(mine, name, held)
        cache.mark()
        if not self.problems[0].ordered:
            said = greedy(model, cache, self.problems).tolist()
            return [correct(one, ids) for one, ids in zip(self.problems, said, strict=True)]
        logits = answer_logits(model, cache, self.problems)
        return [is_right(one, found) for one, found in zip(self.problems, logits, strict=True)]


def ask(keep: float, task: str) -> Asked:
    """Compress the contexts of one task by every policy."""
    problems = [problem(task, TOKENS, SEED, index) for index in range(PROBLEMS)]
    contexts, base = torch.tensor([one.context for one in problems]), run.load()[0]
    models = {name: kvfx.compile(base, all_policies()[name].with_keep(keep), backend="eager") for name in (BASE, *parts())}
    return Asked(problems, models, {name: model.compress(contexts) for name, model in models.items()})


def heads(keep: float) -> list[Head]:
    """Every head of every layer under every policy."""
    asked = [ask(keep, task) for task in TASKS]
    rows = []
    for policy in (BASE, *parts()):
        gold = np.concatenate([each.gold(policy) for each in asked]).mean(0)
        for layer, head in np.ndindex(*gold.shape):
            right = [answer for each in asked for answer in each.right(policy, layer, head)]
            rows.append(Head(policy, keep, layer, head, float(gold[layer, head]), sum(right) / len(right)))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(write("quality_heads", [row for keep in KEEPS for row in heads(keep)], f"python {shlex.join(sys.argv)}"))
