"""Packages for tests, and what their models are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kvfx.packaged import PackagedModel
from kvfx.written_entry_points import entry_points

GREEDY = {"do_sample": False, "eos_token_id": None}
# What takes least time to compile, of what was tried; the same for all, because each set has precompiled headers of its own.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}


def text(length: int, seed: int = 1, rows: int = 1) -> Tensor:
    """Random token ids, `[rows, length]`, none twice in a row: equal ones score alike, and rounding would choose among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(61, generator=generator)[:length] + 3 for _ in range(rows)])


class Traced:
    """A program of a package before it is compiled: it runs node by node, and takes no time to make."""

    def __init__(self, program: ExportedProgram) -> None:
        self.module = program.module(check_guards=False)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        ids, *held = inputs
        with torch.no_grad():
            return list(self.module(ids, held))


def traced(model: Any, policy: Any, max_prompt: int, max_new_tokens: int, batch: int = 1, call: Any = None) -> PackagedModel:
    """What `kvfx.load` would return of `kvfx.export(model, ...)`, not compiled."""
    points = entry_points(model, policy, max_prompt, max_new_tokens, batch, {}, call)
    made = points.programs()
    about = points.about({kind: entry for kind, (entry, _) in made.items()})
    return PackagedModel(Path("nowhere"), about, {kind: Traced(program) for kind, (_, program) in made.items()})
