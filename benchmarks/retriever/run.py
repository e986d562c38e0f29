"""A run: processes that train together, print how far they are, and leave checkpoints, a log and a model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist
from method import machine
from transformers import LlamaForCausalLM

from retriever import export
from retriever.accuracy import Accuracy, right
from retriever.log import Log, accuracy_row
from retriever.recipe import MODEL, Recipe
from retriever.tasks import TASKS
from retriever.training import Group, State, train

CHECKPOINT, LOG, TRAINED = "checkpoint.pt", "log.jsonl", "model"
LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class Run:
    """How a recipe is run.

    Attributes:
        recipe: what is trained.
        folder: where checkpoint, log and model are written.
        command: that started it, for the log.
        processes: that share the samples of each step.
        device: where the model is, as torch names it.
        compiled: whether Inductor compiles the layers.
        report: steps from one line of the log to the next.
        save: steps from one checkpoint, and look at the accuracy, to the next.
        asked: problems for each task at such a look.
        finally_asked: problems for each task and length at the end.
        lengths: of the contexts at the end; the first of them on the way.
    """

    recipe: Recipe
    folder: Path
    command: str
    processes: int = 2
    device: str = "cpu"
    compiled: bool = True
    report: int = 50
    save: int = 250
    asked: int = 48
    finally_asked: int = 400
    lengths: Sequence[int] = LENGTHS

    def start(self, *, fresh: bool = False, training: bool = True) -> Path:
        """Train from the last checkpoint on, then write the model and measure it.

        Args:
            fresh: begin again; checkpoint and log are dropped.
            training: whether to train; if not, the last checkpoint is written and measured as it is.

        Returns:
            The folder of the model.

        Raises:
            ValueError: the checkpoint is of another recipe, or there is none to go on from.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        checkpoint = self.folder / CHECKPOINT
        if checkpoint.exists():
            State.initial(self.recipe, "cpu").load(checkpoint, self.identity)  # refused here, and not by each process
        elif not training:
            raise ValueError(f"there is no {checkpoint} to finish; expected a run that saved one")
        if self.processes == 1:
            _work(0, self, training, "")
        else:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_work, (self, training, f"file://{folder}/store"), self.processes)
        return self.folder / TRAINED

    @property
    def identity(self) -> str:
        """What a checkpoint must agree with to be gone on from."""
        return json.dumps({"recipe": asdict(self.recipe), "model": MODEL}, sort_keys=True)


def _work(rank: int, run: Run, training: bool, store: str) -> None:
    """What one process does."""
    group = Group(rank, run.processes)
    with _together(group, store):
        state = State.initial(run.recipe, run.device)
        checkpoint = run.folder / CHECKPOINT
        if checkpoint.exists():
            state.load(checkpoint, run.identity)
        log = Log(run.folder / LOG if rank == 0 else None, state.step)
        if training:
            _train(run, state, group, log)
        if rank == 0:
            export.save(state.model, run.folder / TRAINED)
        group.wait()
        model = LlamaForCausalLM.from_pretrained(run.folder / TRAINED, dtype=torch.float32).to(run.device).eval()
        for length in run.lengths:
            results = _accuracy(model, length, run.finally_asked, group)
            log("final", state.step, **accuracy_row(results))


def _train(run: Run, state: State, group: Group, log: Log) -> None:
    recipe = run.recipe
    log("start", state.step, of=recipe.steps, command=run.command, machine=_where(run), recipe=asdict(recipe))
    if run.compiled:
        for layer in state.model.model.layers:
            layer.compile(dynamic=False)
    seen = sum(stage.mix.tokens * stage.batch for stage in map(recipe.stage, range(state.step)))
    recent: list[dict[str, float]] = []
    since = state.seconds
    for measured in train(state, recipe, group):
        recent.append(measured)
        step, last = state.step, state.step == recipe.steps
        if step % run.report == 0 or last:
            tokens = sum(one["tokens"] for one in recent)
            seen += round(tokens)
            log(
                "train", step, length=recipe.stage(step - 1).mix.tokens, loss=mean(one["loss"] for one in recent),
                prose=mean(one["prose"] for one in recent), seen=seen, seconds=state.seconds,
                speed=tokens / (state.seconds - since),
            )  # fmt: skip
            recent, since = [], state.seconds
        if step % run.save == 0 or last:
            log("accuracy", step, **accuracy_row(_accuracy(state.model, run.lengths[0], run.asked, group)))
            if group.rank == 0:
                state.save(run.folder / CHECKPOINT, run.identity)


def _accuracy(model: torch.nn.Module, tokens: int, asked: int, group: Group) -> list[Accuracy]:
    """Of all tasks at one length, the problems shared out among the processes."""
    was_training = model.training
    model.eval()
    mine = range(group.rank, asked, group.size)
    with torch.compiler.set_stance("force_eager"):  # layers were compiled for the shapes of training
        counts = torch.tensor([right(model, task, tokens, mine) for task in TASKS])
    group.sum_(counts)
    model.train(was_training)
    return [Accuracy(task, tokens, int(count), asked) for task, count in zip(TASKS, counts, strict=True)]


def _where(run: Run) -> str:
    device = torch.cuda.get_device_name() if run.device == "cuda" else f"{run.processes} process(es)"
    return f"{device} on {machine()}"


@contextmanager
def _together(group: Group, store: str) -> Iterator[None]:
    """Connect the processes of a group to each other."""
    torch.set_num_threads(1)  # a process for each core: threads of one process mostly wait for each other here
    if group.size == 1:
        yield
        return
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are on this machine
    dist.init_process_group("gloo", init_method=store, rank=group.rank, world_size=group.size)
    try:
        yield
    finally:
        dist.destroy_process_group()
