"""What the packaged model still answers when its cache was compressed before the question was known.

    python benchmarks/quality.py                    # all of it: half an hour on two cores
    python benchmarks/quality.py --quick            # four policies, 512 tokens, 10 questions a task: minutes
    python benchmarks/quality.py --page-only        # tables and pictures of the results that are there

Each problem has a context of its own, which is compressed alone (`model.compress`); the question, and the answer that is right, are
then read by a copy of that cache. A question counts as answered if each token of the answer is the likeliest one: greedy decoding
would then say just that. Where the answer may come in any order it is decoded greedily. Beside it: the KL divergence from the full
cache's distribution of each of the answer's tokens.

Every answer is a line of results/quality.jsonl. A run goes on where another stopped, and answers again what other weights, policies
or problems had answered. It then packs them, results/quality.jsonl.gz, and writes quality.csv, the pictures and docs/quality.md.
Graphs are run by `eager`: what is kept does not depend on it, and nothing is compiled. Nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import quality_page
import torch
import transformers
from method import RESULTS, machine
from quality_store import Answer, Setting, Store
from retriever.tasks import TASKS, Problem, correct, problem
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import log_softmax

import kvfx
from kvfx.demo import run
from kvfx.demo.heatmap import kept_tokens
from kvfx.demo.notes import MODEL
from kvfx.demo.sweep import policies as presets_with_keep
from kvfx.policy import Policy

KEEPS = (0.5, 0.25, 0.1, 0.05)
SEED = 2_000_003  # of the problems; no other series has it
# Problems of each task, by length: of the policies whose order is claimed, and of the others.
CLAIMED = {512: 80, 1024: 80, 2048: 20}
OTHERS = {512: 20, 1024: 20, 2048: 10}
VARIANTS = 10  # at the shortest length
BATCH = 10
BASE = "compactor"
QUICK = ("compactor", "leverage only", "attention only", "random")


@dataclass(frozen=True)
class Job:
    """Problems that are answered together under one setting."""

    setting: Setting
    task: str
    tokens: int
    indices: tuple[int, ...]


def parts() -> dict[str, Policy]:
    """What compactor is made of, each part alone, all else equal: the paper's ablation."""
    whole = Policy.parse(BASE)
    titles = {"leverage": "leverage only", "attn": "attention only"}
    return {titles[atom.name]: replace(whole, score=atom) for atom in whole.atoms()}


@functools.cache
def all_policies() -> dict[str, Policy]:
    """All that is compared, by name: every preset with a keep, and the parts of compactor."""
    return {name: Policy.parse(name) for name in presets_with_keep()} | parts()


def questions_of(name: str, tokens: int, lengths: Sequence[int]) -> int:
    """Problems of each task. Variants that follow another library are asked little, to show that they agree with their presets."""
    if name.endswith("@kvpress"):
        return VARIANTS if tokens == min(lengths) else 0
    table = CLAIMED if name in ("none", BASE, *parts()) else OTHERS
    return table.get(tokens, min(table.values()))


def setting(name: str, keep: float) -> Setting | None:
    """A policy at a keep as it is today; None if there is no such policy."""
    policy = Policy.parse("none") if name == "none" else all_policies().get(name)
    if policy is None:
        return None
    text = str(policy if name == "none" else policy.with_keep(keep))
    return Setting(name, keep, text, *_digests(), f"{machine()}; python {shlex.join(sys.argv)}")


@functools.cache
def _digests() -> tuple[str, str]:
    """Of the weights, and of the first problem of each task."""
    first = [problem(task, 512, SEED, 0) for task in TASKS]
    problems = json.dumps([SEED, [(one.task, one.context, one.question, one.answer) for one in first]])
    return hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest(), hashlib.sha256(problems.encode()).hexdigest()


def jobs(store: Store, wanted: Sequence[Setting], options: argparse.Namespace) -> list[Job]:
    """What is not in the store yet; problems of a task in batches, the policies of a length one after the other."""
    todo = []
    for tokens in options.lengths:
        for each in wanted:
            count = options.questions or questions_of(each.policy, tokens, options.lengths)
            for task in options.tasks:
                missing = [index for index in range(count) if not store.has(each, task, tokens, index)]
                todo += [Job(each, task, tokens, tuple(missing[at : at + BATCH])) for at in range(0, len(missing), BATCH)]
    return todo


# -- in a process of its own -------------------------------------------------------------------------------------------------------


def begin() -> None:
    """Prepare a process for `answer`."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()


@functools.cache
def _model() -> Any:
    return run.load()[0]


@functools.cache
def _compiled(text: str) -> Any:
    return kvfx.compile(_model(), text, backend="eager")


def answer(job: Job) -> tuple[Setting, list[Answer]]:
    """Answer the problems of a job."""
    problems = [problem(job.task, job.tokens, SEED, index) for index in job.indices]
    full = _full_logits(job.task, job.tokens, job.indices)
    # kvpress's own statistics and counts hold for a batch of one.
    step = 1 if "kvpress" in job.setting.text else len(problems)
    answers = []
    for start in range(0, len(problems), step):
        some = problems[start : start + step]
        model = _compiled(job.setting.text)
        cache = model.compress(torch.tensor([one.context for one in some]))
        nbytes = cache.nbytes // len(some)
        logits = answer_logits(model, cache, some)
        right = [is_right(one, found) for one, found in zip(some, logits, strict=True)]
        if not some[0].ordered:
            said = greedy(model, cache, some)
            right = [correct(one, ids) for one, ids in zip(some, said.tolist(), strict=True)]
        for row, one in enumerate(some):
            kl = divergence(full[start + row], logits[row])
            gold = float(np.concatenate(kept_tokens(cache, row))[:, list(one.gold)].mean())
            at = (job.setting.digest, job.task, job.tokens, job.indices[start + row])
            answers.append(Answer(*at, int(right[row]), round(float(f"{kl:.4g}"), 5), round(gold, 3), nbytes))
    return job.setting, answers


@functools.lru_cache(maxsize=256)
def _full_logits(task: str, tokens: int, indices: tuple[int, ...]) -> list[Tensor]:
    problems = [problem(task, tokens, SEED, index) for index in indices]
    model = _compiled("none")
    return answer_logits(model, model.compress(torch.tensor([one.context for one in problems])), problems)


def answer_logits(model: Any, cache: Any, problems: Sequence[Problem]) -> list[Tensor]:
    """What a copy of `cache` says of each token of the reference answers, `[tokens of the answer, vocabulary]` for each problem."""
    rows = [one.question + one.answer[:-1] for one in problems]
    longest = max(map(len, rows))
    block = torch.tensor([row + (0,) * (longest - len(row)) for row in rows])  # what stands behind cannot be looked at
    logits = model(input_ids=block, past_key_values=cache.copy()).logits
    return [found[len(one.question) - 1 :][: len(one.answer)] for found, one in zip(logits, problems, strict=True)]


def is_right(one: Problem, logits: Tensor) -> bool:
    """Whether each token of the answer is the likeliest behind those before it."""
    return logits.argmax(-1).tolist() == list(one.answer)


def greedy(model: Any, cache: Any, problems: Sequence[Problem]) -> Tensor:
    """The likeliest next tokens, `[B, tokens of the longest answer]`. `generate` would stop at any `;`."""
    mine, tokens = cache.copy(), torch.tensor([one.question for one in problems])
    said: list[Tensor] = []
    for _ in range(max(len(one.answer) for one in problems)):
        tokens = model(input_ids=tokens, past_key_values=mine).logits[:, -1:].argmax(-1)
        said.append(tokens)
    return torch.cat(said, 1)


def divergence(full: Tensor, found: Tensor) -> float:
    """KL(full || found) of logits `[N, V]`, in nats, mean over N."""
    wanted, given = log_softmax(full.double(), -1), log_softmax(found.double(), -1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean().clamp(min=0))


# -- the command -------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Store:
    """Answer what is missing; each batch is written as it comes."""
    store = Store(options.name, options.folder)
    store.forget_all_but(setting)
    wanted = [setting("none", 1.0), *(setting(name, keep) for name in options.policies for keep in options.keeps)]
    todo = jobs(store, [each for each in wanted if each is not None], options)
    numbers = (MofNCompleteColumn(), TextColumn("questions"), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(BarColumn(), *numbers, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=sum(len(job.indices) for job in todo))
        for at, answers in answer_all(todo, options.processes):
            store.add(at, answers)
            bar.update(task, advance=len(answers))
    return store


def answer_all(todo: Sequence[Job], processes: int) -> Iterator[tuple[Setting, list[Answer]]]:
    """Answer jobs as they come to their end, in so many processes; in this one if that is one."""
    if processes == 1:
        begin()
        yield from map(answer, todo)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin) as pool:
        try:
            for done in as_completed([pool.submit(answer, job) for job in todo]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all jobs that wait would be done first
            raise


def parser() -> argparse.ArgumentParser:
    known = all_policies()
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--policies", nargs="+", default=[*known], choices=[*known], metavar="NAME")
    command.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    command.add_argument("--lengths", nargs="+", type=int, default=[*CLAIMED])
    command.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    command.add_argument("--questions", type=int, help="of each task and length, for all policies alike")
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--name", help="of the result files")
    command.add_argument("--folder", type=Path, default=RESULTS, help="where they lie")
    command.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} at 0.5 and 0.1 of 512 tokens, 10 questions")
    command.add_argument("--page-only", action="store_true", help="write tables and pictures of results that are there")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.quick:
        options.policies, options.keeps, options.lengths = QUICK, (0.5, 0.1), [512]
        options.questions = options.questions or 10
    options.name = options.name or ("quality_quick" if options.quick else "quality")
    store = Store(options.name, options.folder) if options.page_only else measure(options)
    quality_page.report(store)


if __name__ == "__main__":
    main()
