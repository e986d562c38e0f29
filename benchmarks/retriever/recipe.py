"""What is trained, on what and how long: all numbers of the training."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from retriever.samples import Mix
from retriever.vocabulary import BEGIN, END, PAD, WORDS

REACH = 2304  # positions that gaps stretch samples to: contexts of 2,048 tokens and what is asked behind them
MODEL = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": REACH,
    # With 10,000 only 4 of 16 channel pairs turn slowly enough to agree over 1,000 positions; so do 8 with this.
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        steps: how many.
        batch: samples of a step, of all processes together.
        mix: what they are like.
    """

    steps: int
    batch: int
    mix: Mix


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the machine and its number of processes.

    Attributes:
        stages: one after the other.
        seed: of the initial weights and of the samples.
        muon_rate: largest learning rate of the matrices, by Muon.
        adam_rate: largest learning rate of embeddings, head and norms, by AdamW.
        weight_decay: of the matrices.
        warm_up: steps in which the rates rise.
        decay: share of the steps, at the end, in which the rates fall to a fiftieth.
        prose_share: share of the prose words that the loss is taken of.
        prose_weight: of their loss, beside that of the answers.
    """

    stages: tuple[Stage, ...]
    seed: int = 0
    muon_rate: float = 0.02
    adam_rate: float = 5e-3
    weight_decay: float = 0.01
    warm_up: int = 100
    decay: float = 0.5
    prose_share: float = 0.25
    prose_weight: float = 0.1

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The one that step number `step`, counted from 0, belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"the recipe has {self.steps} steps; there is no step {self.steps + step}")

    def rate(self, step: int) -> float:
        """What the learning rates are multiplied with: a rise, a plateau, a fall."""
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warm_up) * min(1.0, max(0.02, left))


RECIPE = Recipe(
    stages=(
        # To look something up is learned at one go, and much sooner where nothing but that lowers the loss: among few
        # values, guessing one that the document has used is a first step that leads nowhere.
        Stage(600, 32, Mix(96, kinds=("note",), casts=(96,), decoys=0.0)),
        Stage(1800, 32, Mix(128, reach=REACH)),
        Stage(1500, 16, Mix(256, reach=REACH)),
        Stage(1300, 8, Mix(512, reach=REACH)),
        Stage(600, 4, Mix(1024, reach=REACH)),
    )
)


def configuration() -> LlamaConfig:
    """Of the model, a stock Llama."""
    return LlamaConfig(**MODEL, attn_implementation="sdpa")
