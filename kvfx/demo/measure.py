"""What a policy holds, how long it takes and what the model still answers.

One context is compressed before any question is known; every question is asked of a copy of that cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import kvfx
from kvfx.cache import Cache
from kvfx.demo.heatmap import kept_tokens
from kvfx.policy import Policy

STAGES = 3  # how often `measure` says what comes next, for each policy


@dataclass(frozen=True)
class Row:
    """One policy, measured.

    Attributes:
        policy: its short name.
        answers: new tokens of every question, in the order of the questions.
        slots: held per layer of the context.
        nbytes: held by the cache of the context.
        prefill: seconds to read and compress the context, median, nothing compiled in it.
        decode: seconds from one token of a batch of answers to the next, median; None if there was no next.
        first_prefill: seconds of the first prefill, compilation included.
        warm_up: seconds of a first short answer, which compiles what the other policies then share.
    """

    policy: str
    answers: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]
    nbytes: int
    prefill: float
    decode: float | None
    first_prefill: float
    warm_up: float


@dataclass
class Stopwatch(transformers.StoppingCriteria):
    """Notes the time whenever `generate` has a token, and never stops it."""

    ticks: list[float] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note the time; go on in every row, `[B]`."""
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def steps(self) -> list[float]:
        """Seconds from each token to the next. The first token, which reads the question, is not among them."""
        return [after - before for before, after in pairwise(self.ticks)]


def with_full_cache(policies: Sequence[str]) -> list[Policy]:
    """Read `policies`, each once, with `none` in front.

    Raises:
        PolicyError: one of them is malformed.
    """
    return list(dict.fromkeys(Policy.parse(text) for text in ("none", *policies)))


def measure(
    model: transformers.PreTrainedModel,
    policies: Sequence[Policy],
    context: Tensor,
    questions: Sequence[Tensor],
    *,
    new_tokens: int,
    backend: str = "inductor",
    repeats: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Row], list[Any], list[list[np.ndarray]]]:
    """Compress `context` by each policy, then ask every question of a copy of the cache.

    Keeps of one policy share a prefill graph, and all policies share the graphs that read a question and decode, so
    that n policies with any number of keeps compile n + 2 graphs.

    Args:
        model: a causal decoder of transformers in eval mode.
        policies: what to compare.
        context: token ids, `[1, C]`.
        questions: batches of equally long questions, each token ids `[B, S]` that go on behind the context.
        new_tokens: most tokens of an answer.
        backend: what runs the graphs.
        repeats: timed prefills of each policy; answers are timed as they come.
        say: is told what comes next.

    Returns:
        For each policy a row, the compressed model that made it, for `kvfx.explain`, and which tokens each head kept,
        per layer `[Hkv, C]` bool.
    """
    rows, models, kept, seen = [], [], [], set[Any]()
    for policy in policies:
        compressed = kvfx.compile(model, policy, backend=backend)
        compiles = backend != "eager" and policy.score not in seen
        say(f"{policy.name}: {'compiling' if compiles else 'running'} the prefill")
        row, cache = _row(policy.name, compressed, context, questions, new_tokens, repeats, say)
        rows.append(row)
        models.append(compressed)
        kept.append(kept_tokens(cache))
        seen.add(policy.score)
    return rows, models, kept


def _row(
    name: str,
    model: Any,
    context: Tensor,
    questions: Sequence[Tensor],
    new_tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> tuple[Row, Cache]:
    with _clock(context) as first_prefill:
        cache = model.compress(context)
    prefill = []
    for _ in range(repeats):
        with _clock(context) as seconds:
            cache = model.compress(context)
        prefill += seconds
    nbytes = cache.nbytes  # before copies, which share their blocks with a ragged cache, grow its pool
    say(f"{name}: warming up the answers")
    with _clock(context) as warm_up:
        ask(model, cache, questions[0], min(2, new_tokens))
    say(f"{name}: answering")
    answers: list[tuple[int, ...]] = []
    steps: list[float] = []
    for batch in questions:
        watch = Stopwatch()
        answers += map(tuple, ask(model, cache, batch, new_tokens, watch).tolist())
        steps += watch.steps
    row = Row(
        policy=name,
        answers=tuple(answers),
        slots=tuple(layer.slots for layer in cache.layers),
        nbytes=nbytes,
        prefill=median(prefill),
        decode=median(steps) if steps else None,
        first_prefill=first_prefill[0],
        warm_up=warm_up[0],
    )
    return row, cache


def ask(model: Any, cache: Cache, questions: Tensor, new_tokens: int, watch: Stopwatch | None = None) -> Tensor:
    """Answer questions greedily, each on a copy of the one row that `cache` holds.

    Args:
        model: what `kvfx.compile` returned.
        cache: the context, one row.
        questions: token ids, `[B, S]`; all equally long, so that nothing is padded.
        new_tokens: most tokens of an answer.
        watch: notes when there is a token.

    Returns:
        The new tokens, `[B, N]` with N <= `new_tokens`; rows that end earlier are padded.
    """
    rows = cache.copy()
    if len(questions) > 1:
        rows.batch_repeat_interleave(len(questions))
    out = model.generate(
        questions,
        attention_mask=torch.ones_like(questions),
        past_key_values=rows,
        append=True,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=new_tokens,
        stopping_criteria=None if watch is None else [watch],
    )
    return out[:, questions.shape[1] :]


@contextmanager
def _clock(on: Tensor) -> Iterator[list[float]]:
    """Append the seconds that the block takes, work queued on the device of `on` included."""
    taken: list[float] = []
    start = _now(on)
    yield taken
    taken.append(_now(on) - start)


def _now(on: Tensor) -> float:
    if on.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
