"""The loop: steps of a recipe, data-parallel over processes, from the last checkpoint on."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from retriever.recipe import Recipe, configuration
from retriever.samples import Sample, sample


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over all processes."""
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


@dataclass
class State:
    """What a checkpoint holds, and a run that goes on from it needs.

    Attributes:
        model: a stock Llama.
        optimizers: Muon for the matrices of the layers, AdamW for the rest.
        step: steps done.
        seconds: that they took.
    """

    model: Any
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def initial(cls, recipe: Recipe, device: str) -> State:
        """Transformers' own initialisation, seeded."""
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(configuration()).to(device)
        matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
        rest = [p for name, p in model.named_parameters() if not (".layers." in name and p.dim() == 2)]
        muon = torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay)
        adam = torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        return cls(model, [muon, adam])

    def save(self, path: Path, identity: str) -> None:
        """Write all of it, and what made it; a write that is cut short leaves the file before as it was."""
        partial = path.with_suffix(".partial")
        state = {
            "identity": identity,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path, identity: str) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: something else made it.
        """
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        if state["identity"] != identity:
            raise ValueError(f"{path} was made by another recipe; restore that one, or begin again with --fresh")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def train(state: State, recipe: Recipe, group: Group, until: int | None = None) -> Iterator[dict[str, float]]:
    """Take the steps that are left, or those up to `until`; yields what each of them measured.

    The samples of a step depend on the recipe's seed, the step and their index alone, so that a run that was cut
    short and goes on ends with the weights of one that was not.

    Yields:
        `loss` of the answers and `prose` loss, nats per token; `tokens` of the step, of all processes.
    """
    model = state.model.train()
    parameters = list(model.parameters())
    while state.step < (recipe.steps if until is None else until):
        start = time.perf_counter()
        for optimizer, rate in zip(state.optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
            for parameters_of in optimizer.param_groups:
                parameters_of["lr"] = rate * recipe.rate(state.step)
        stage = recipe.stage(state.step)
        answers, prose = losses(model, batch(recipe, state.step, group), recipe)
        (answers + recipe.prose_weight * prose).backward()
        measured = torch.stack((answers.detach(), prose.detach()))
        group.mean_([measured, *(parameter.grad for parameter in parameters)])
        torch.nn.utils.clip_grad_norm_(state.optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.step += 1
        loss, prose_loss = measured.tolist()
        state.seconds += time.perf_counter() - start
        yield {"loss": loss, "prose": prose_loss, "tokens": stage.mix.tokens * stage.batch}


def batch(recipe: Recipe, step: int, group: Group) -> list[Sample]:
    """The samples of one step that this process takes."""
    stage = recipe.stage(step)
    return [
        sample(random.Random(f"{recipe.seed} {step} {index}"), stage.mix) for index in range(group.rank, stage.batch, group.size)
    ]


def losses(model: Any, samples: list[Sample], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and of a share of the prose words."""
    device = model.device
    ids = torch.tensor([one.ids for one in samples], device=device)
    positions = torch.tensor([one.positions for one in samples], device=device)
    hidden = read(model, ids, positions)

    def mean(indices: Callable[[Sample], list[int]]) -> Tensor:
        at = [(row, index) for row, one in enumerate(samples) for index in indices(one)]
        rows, columns = torch.tensor(at, device=device).T
        return functional.cross_entropy(model.lm_head(hidden[rows, columns - 1]), ids[rows, columns])

    every = round(1 / recipe.prose_share)
    return mean(lambda one: one.answers), mean(lambda one: one.prose[::every])


def read(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Last hidden states, `[B, T, C]`, of tokens at positions with gaps, both `[B, T]`.

    The forward of the model's own parts. The model's forward would take a gap for the border between two packed
    sequences, and mask what lies before it.
    """
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    angles = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=angles)
    return decoder.norm(hidden)
