"""The rates of this machine, from runs that are no queue: prefills, rows that join, and steps at two batch sizes and two lengths.

They are repeated in rounds, between the waves of the queues, so that both see the same neighbours on a shared machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cost_model import Load, Machine, Shape
from offline_queue import Clock, Queue, Request, Server, schedule_timed
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """Rows that decode behind prompts of which each head holds `slots`."""

    server: Server
    rows: int
    slots: float
    prompts: Sequence[Tensor]


class Calibration:
    """Micro-measurements of one kind of server.

    Attributes:
        points: three or more, not all of one batch size or one length.
        samples: seconds, by what was measured.
    """

    def __init__(self, points: Sequence[Point], output: int, now: Callable[[], float]) -> None:
        self.points, self.output, self.now = points, output, now
        self.samples: dict[tuple[str, int], list[float]] = {}

    def round(self) -> None:
        """Measure everything once more: each point is a wave of its own."""
        for number, point in enumerate(self.points):
            clock = Clock(self.now)
            requests = [Request(ids, self.output) for ids in point.prompts[: point.rows]]
            with schedule_timed(clock):
                queue = Queue(point.server, requests, clock)
                queue.run()
            if queue.batches != [point.rows] * (self.output - 1):
                raise RuntimeError(f"the rows of {point} were to run together, and ran as {queue.batches}")
            for what, count in (
                ("prefill", point.rows),
                ("schedule", point.rows),
                ("join", point.rows),
                ("decode", self.output - 1),
            ):
                self.samples.setdefault((what, number), []).append(clock.seconds.get(what, 0.0) / count)

    def mean(self, what: str, number: int) -> float:
        """Seconds of a prefill, a schedule, a row that joins or a step, at a point."""
        return statistics.mean(self.samples[what, number])

    def machine(self, shape: Shape, load: Load) -> Machine:
        """What the measurements say. A step costs something, and something for each row and for each slot; by least squares."""
        numbers = range(len(self.points))
        held = [point.rows * (point.slots + self.output / 2) * shape.extents for point in self.points]
        system = np.array([[1.0, point.rows, slots] for point, slots in zip(self.points, held, strict=True)])
        steps = np.array([self.mean("decode", number) for number in numbers])
        launch, row, slot = np.linalg.lstsq(system, steps, rcond=None)[0].tolist()
        kept = np.array([[1.0, point.slots] for point in self.points])
        schedules = [self.mean("schedule", number) for number in numbers]
        schedule, written = np.linalg.lstsq(kept, schedules, rcond=None)[0].tolist()
        whole = [number for number in numbers if self.points[number].prompts[0].shape[1] == load.input]
        prefill = statistics.mean(self.mean("prefill", number) for number in whole)
        return Machine(
            launch=max(launch, 0.0), step_launches=1, prefill_launches=0, prefill=shape.prefill_flops(load.input) / prefill,
            products=_rate(shape.row_flops(), row), weights=float("inf"), slots=_rate(shape.slot_bytes, slot),
            kept=_rate(shape.extents * shape.slot_bytes, written), schedule=schedule / (load.input * shape.extents),
            join=statistics.mean(self.mean("join", number) for number in numbers), overlap=False,
        )  # fmt: skip


def _rate(amount: float, seconds: float) -> float:
    """Infinite where noise is larger than what was to be measured."""
    return amount / seconds if seconds > 0 else float("inf")


def drawn(count: int, length: int, vocabulary: int, seed: int, device: str) -> list[Tensor]:
    """Prompts of random ids, each `[1, length]`."""
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return list(ids.split(1))
