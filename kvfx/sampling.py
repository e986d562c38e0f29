"""The choice of the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfx.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; what `generate` of transformers does with the same numbers.

    Attributes:
        temperature: what logits are divided by; 0 takes the token of the highest logit, and the others are not looked at.
        top_k: draw among so many tokens of the highest logits, and those that equal the last of them; 0 means all.
        top_p: draw among the fewest tokens whose probabilities sum up to at least this.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature={self.temperature}: expected 0, which takes the likeliest token, or more")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: expected a number of tokens to draw among, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected a probability in (0, 1]")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise InputError(
                f"top_k={self.top_k} and top_p={self.top_p} say among which tokens to draw, but temperature=0 draws none. Give a "
                "temperature, such as 1"
            )

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token of each row, `[B]` int64.

        Args:
            logits: `[B, V]` float32.
            generator: what draws; the default is torch's own.
        """
        if not self.temperature:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """What each token is drawn with, `[B, V]`."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            ordered, index = logits.sort()
            rest = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p  # the tokens without which enough is left
            rest[:, -1] = False
            logits = logits.masked_fill(torch.empty_like(rest).scatter_(1, index, rest), -torch.inf)
        return logits.softmax(-1)
