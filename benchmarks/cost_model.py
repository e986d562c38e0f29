"""What a queue of prompts costs in a fixed memory: bytes, FLOPs and launches of each phase, at the rates of a machine.

A phase takes the time of its launches, and beside it that of its arithmetic and of the bytes that it moves: both where a machine
does one after the other, the longer of them where it does both at once. Rates come from a machine's own micro-measurements, or
from a datasheet and stated shares of it. Nothing here runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BLOCK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama: what a token costs and what a slot holds.

    Attributes:
        weight_bytes: of one weight.
        channel_bytes: of one channel of a key or a value in the cache.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    weight_bytes: float
    channel_bytes: float

    @property
    def weights(self) -> int:
        """Of all products that a token goes through in the layers."""
        attention = self.hidden * self.dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Of the product that gives logits, of which a prefill needs one row."""
        return self.hidden * self.vocabulary

    @property
    def model_bytes(self) -> float:
        """Of all weights, with the embedding."""
        return (self.weights + 2 * self.head_weights) * self.weight_bytes

    @property
    def extents(self) -> int:
        """KV heads of all layers."""
        return self.layers * self.kv_heads

    @property
    def slot_bytes(self) -> float:
        """Of the key and the value of one head."""
        return 2 * self.dim * self.channel_bytes

    def prefill_flops(self, tokens: int) -> float:
        """Of one row: products of all tokens, causal attention, and one row of logits."""
        attention = 2 * self.layers * self.heads * self.dim * tokens**2  # half of the two products
        return 2 * (self.weights * tokens + self.head_weights) + attention

    def row_flops(self) -> float:
        """Of one row in a step, attention left out."""
        return 2 * (self.weights + self.head_weights)

    def slot_flops(self) -> float:
        """Of attention to one slot of one head, by all query heads that share it."""
        return 4 * self.dim * self.heads / self.kv_heads


@dataclass(frozen=True)
class Machine:
    """How fast phases are.

    Attributes:
        launch: seconds of a launch.
        step_launches: launches of a decode step.
        prefill_launches: of a prefill, whose kernels run while the next are launched where `overlap` is set.
        prefill: FLOP/s.
        products: FLOP/s of the products of a step.
        weights: bytes/s at which a step reads weights; infinite where `launch` has it.
        slots: bytes/s at which a step goes through keys and values.
        kept: bytes/s at which what a prefill keeps is written.
        schedule: seconds of scoring a prompt and choosing its blocks, per token and head.
        join: seconds for each row that joins a batch.
        overlap: whether arithmetic, bytes and launches of a prefill hide behind each other, and arithmetic and bytes of a step.
    """

    launch: float
    step_launches: float
    prefill_launches: float
    prefill: float
    products: float
    weights: float
    slots: float
    kept: float
    schedule: float
    join: float
    overlap: bool

    def together(self, *seconds: float) -> float:
        """Of things that overlap or not."""
        return max(seconds) if self.overlap else sum(seconds)


@dataclass(frozen=True)
class Load:
    """A queue.

    Attributes:
        prompts: how many.
        input, output: tokens of each, and of each answer.
        bytes: for keys and values.
        block: slots of a block; 1 where rows are not in blocks.
        beside: bytes of a slot beside its key and its value, such as its position.
    """

    prompts: int
    input: int
    output: int
    bytes: float
    block: int = BLOCK
    beside: float = 4

    @property
    def tokens(self) -> int:
        """Read and generated."""
        return self.prompts * (self.input + self.output)


@dataclass(frozen=True)
class Prediction:
    """Seconds of all prompts by phase, and the rows of a batch."""

    batch: int
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())


def slots_needed(load: Load, kept: float) -> float:
    """Slots that a head owns at the end of a row in the mean, if it kept `kept` of them, in full blocks."""
    return kept - (-(load.output - 1) // load.block) * load.block


def rows_that_fit(shape: Shape, load: Load, kept: float) -> int:
    """Rows whose last token fits as well, beside the block that is nobody's."""
    slot = shape.slot_bytes + load.beside
    spare = load.bytes - (load.block * slot if load.block > 1 else 0)
    return int(spare // (shape.extents * slots_needed(load, kept) * slot))


def step_seconds(shape: Shape, machine: Machine, rows: float, slots: float) -> float:
    """Of a decode step of so many rows; `slots` are those of each head, the new one's among them."""
    held = rows * shape.extents * slots
    weights = (shape.weights + shape.head_weights) * shape.weight_bytes / machine.weights
    moved = weights + held * shape.slot_bytes / machine.slots
    arithmetic = rows * shape.row_flops() / machine.products
    if machine.overlap:  # else the speed of slots has been measured with its arithmetic
        arithmetic += held * shape.slot_flops() / machine.products
    return machine.step_launches * machine.launch + machine.together(arithmetic, moved)


def prefill_seconds(shape: Shape, machine: Machine, tokens: int) -> float:
    """Of one row, without what eviction costs."""
    launches = machine.prefill_launches * machine.launch
    return machine.together(launches, shape.prefill_flops(tokens) / machine.prefill)


def predict(shape: Shape, machine: Machine, load: Load, kept: float, *, evicts: bool = True, rows: int | None = None) -> Prediction:
    """The time of a queue that is served wave after wave, see `offline_queue`.

    Args:
        shape: of the model.
        machine: that runs it.
        load: the queue.
        kept: slots that a head keeps of a prompt in the mean.
        evicts: whether prompts are scored, and what is kept of them is written again.
        rows: of a batch, by default as many as fit.

    Raises:
        ValueError: not even one row fits.
    """
    batch = min(rows or rows_that_fit(shape, load, kept), load.prompts)
    if batch < 1:
        raise ValueError(f"{load.bytes:.3g} bytes do not hold a row of {kept} and {load.output} tokens")
    full, rest = divmod(load.prompts, batch)
    waves = [(batch, full), (rest, 1 if rest else 0)]
    # A step finds what was kept and what was generated before it, and adds its own; the mean of a line is that of its ends.
    slots = kept + load.output / 2
    decode = sum(count * (load.output - 1) * step_seconds(shape, machine, wave, slots) for wave, count in waves if wave)
    schedule = load.input * shape.extents * machine.schedule + kept * shape.extents * shape.slot_bytes / machine.kept
    seconds = {
        "prefill": load.prompts * prefill_seconds(shape, machine, load.input),
        "schedule": load.prompts * schedule if evicts else 0.0,
        "join": load.prompts * machine.join,
        "decode": decode,
    }
    return Prediction(batch, seconds)
