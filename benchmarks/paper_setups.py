"""The set-ups in which KV-Compress was measured (arXiv:2410.00161, section 6), as the cost model sees them, and what came out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cost_model import Load, Machine, Prediction, Shape, predict

RATES = (1, 2, 4, 8, 16, 32, 64)
LEAST = 128  # slots of a head that each request may keep at any rate, in the authors' code
GIGA, GIB = 1e9, 2**30

# What is assumed of every device, because no datasheet says it.
ARITHMETIC = 0.5  # of the datasheet's dense FLOP/s, in a prefill
BANDWIDTH = 0.8  # of its bytes/s, in decode
LAUNCH, LAUNCHES = 5e-6, 12  # seconds of a launch; launches of a layer, in a step and in a prefill
SORTS = 20  # times that the schedule goes through 8 bytes for each slot: sorts of 64-bit keys, and what leads to them
PLAIN = 8e-5  # seconds for a row that joins: its tables
ACTIVATIONS = 3  # tensors of the MLP's width, for all tokens of a prompt, in 16 bits, beside weights and cache

LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128, 128256, weight_bytes=2, channel_bytes=2)
LLAMA_70B_FP8 = Shape(80, 8192, 28672, 64, 8, 128, 128256, weight_bytes=1, channel_bytes=2)


@dataclass(frozen=True)
class Setup:
    """A model on one GPU.

    Attributes:
        name: of both.
        memory: bytes that the device shows.
        share: of them that an engine may use.
        flops: of the datasheet, dense, in the type of the weights.
        bandwidth: of the datasheet, bytes/s.
        paper: the paper's figures by rate; 0 is its uncompressed engine: tokens/s, or None where only the multiple is known, and
            that multiple.
        batches: its batches by rate, at 6000 tokens.
        own: tokens/s of the authors' engine at rate 1, over those of the uncompressed one, at 6000 tokens.
    """

    name: str
    shape: Shape
    memory: float
    share: float
    flops: float
    bandwidth: float
    paper: dict[int, tuple[float | None, float]]
    batches: dict[int, int]
    own: float

    @property
    def machine(self) -> Machine:
        """The device at what is assumed of it."""
        bandwidth = BANDWIDTH * self.bandwidth
        launches = LAUNCHES * self.shape.layers
        return Machine(
            LAUNCH, launches, launches, ARITHMETIC * self.flops, ARITHMETIC * self.flops, bandwidth, bandwidth, bandwidth,
            schedule=SORTS * 8 / bandwidth, join=PLAIN, overlap=True,
        )  # fmt: skip

    @property
    def load(self) -> Load:
        """256 prompts of 6000 tokens, 500 more of each; what weights and activations leave is for keys and values."""
        activations = ACTIVATIONS * 6000 * self.shape.intermediate * 2
        return Load(256, 6000, 500, self.share * self.memory - self.shape.model_bytes - activations)

    def kept(self, rate: float) -> int:
        """Slots of a head: the authors' rule, whole blocks."""
        blocks = math.ceil(max(LEAST, self.load.input / rate) / self.load.block)
        return min(blocks * self.load.block, self.load.input)


SETUPS = (
    Setup(
        "Llama-3.1-8B, one L4", LLAMA_8B, 22.0 * GIB, 0.9, 121e12, 300 * GIGA,
        # Best multiples of each rate but for 32 and 64, which are those at 6000 tokens.
        {0: (362, 1.0), 1: (None, 1.38), 2: (None, 2.00), 4: (None, 2.54), 8: (None, 3.44), 16: (None, 3.90), 32: (None, 4.93),
         64: (1875, 5.18)},
        {0: 3, 64: 91}, 0.73,
    ),
    Setup(
        "Llama-3.1-70B in FP8, one H100", LLAMA_70B_FP8, 79.1 * GIB, 0.96, 1979e12, 3350 * GIGA,
        {0: (None, 1.0), 1: (None, 0.77), 2: (None, 1.01), 8: (None, 1.80), 64: (None, 2.14)}, {0: 6, 64: 224}, 0.66,
    ),
)  # fmt: skip


def predictions(setup: Setup) -> Iterator[tuple[int, Prediction, Prediction | None]]:
    """Of every rate, and again with the paper's own batch where that is known; 0 is without compression: nothing is scored."""
    for rate in (0, *RATES):
        load = replace(setup.load, beside=0) if rate == 0 else setup.load
        kept = setup.kept(max(1, rate))
        given = (setup.shape, setup.machine, load, kept)
        batch = setup.batches.get(rate)
        yield rate, predict(*given, evicts=rate > 0), predict(*given, evicts=rate > 0, rows=batch) if batch else None
