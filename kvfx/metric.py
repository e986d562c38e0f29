"""What attention each slot has received so far, by which blocks are evicted while tokens are generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvfx.passes.capture import mark_dynamic


class Metric:
    """A number for each slot of extents, laid out as a work list cuts them into chunks, which is how attention gives it.

    Attributes:
        received: `[L, n, chunk]` float32, 0 in slots that nobody fills. Never written in place: a step that fails leaves it.
        merge: chunks of each extent in order, `[L, B, Hkv, k]`, -1 behind them, as of `WorkList`.
    """

    def __init__(self, received: Tensor, merge: np.ndarray) -> None:
        self.received, self.merge = received, merge
        mark_dynamic(received, 1)

    @classmethod
    def of_slots(cls, numbers: Tensor, lengths: np.ndarray, chunk: int) -> Metric:
        """Lay out the numbers of slots, `[L, B, Hkv, T]`, of extents of these lengths, `[L, B, Hkv]`."""
        chunks = -(-lengths // chunk)
        first = chunks.reshape(len(chunks), -1).cumsum(1).reshape(chunks.shape) - chunks
        number = np.arange(max(2, int(chunks.max())))  # a graph takes a size of one for a constant
        merge = np.where(number < chunks[..., None], first[..., None] + number, -1).astype(np.int32)
        return cls._cut(numbers, merge, chunk)

    @classmethod
    def _cut(cls, numbers: Tensor, merge: np.ndarray, chunk: int) -> Metric:
        """Lay out numbers as a work list with these chunks does."""
        missing = merge.shape[3] * chunk - numbers.shape[3]
        pieces = torch.nn.functional.pad(numbers, (0, missing)).unflatten(3, (-1, chunk))  # [L, B, Hkv, k, chunk]
        width = max(2, int(merge.max()) + 1)
        place = torch.from_numpy(np.where(merge < 0, width, merge).astype(np.int64)).to(numbers.device)  # the last is thrown away
        received = numbers.new_zeros(len(merge), width + 1, chunk)
        layer = torch.arange(len(merge), device=numbers.device)[:, None]
        received[layer, place.flatten(1)] = pieces.flatten(1, 3)
        return cls(received[:, :width].contiguous(), merge)

    @property
    def chunk(self) -> int:
        """Slots of a chunk."""
        return self.received.shape[2]

    def slots(self, tokens: int) -> Tensor:
        """The numbers of the first `tokens` slots of each extent, `[L, B, Hkv, tokens]`; 0 where there are no chunks for them."""
        merge = torch.from_numpy(self.merge).to(self.received.device).long()
        layer = torch.arange(len(merge), device=merge.device).view(-1, 1, 1, 1)
        pieces = self.received[layer, merge.clamp(min=0)].masked_fill((merge < 0)[..., None], 0).flatten(3)
        return torch.nn.functional.pad(pieces, (0, max(0, tokens - pieces.shape[3])))[..., :tokens]

    def rows(self, index: Sequence[int], lengths: np.ndarray) -> Metric:
        """The same for rows of which row i was row `index[i]`; extents then have `lengths`."""
        slots = self.slots(max(1, int(lengths.max())))[:, torch.as_tensor(index, device=self.received.device)]
        return Metric.of_slots(slots, lengths, self.chunk)

    def laid_out(self, merge: np.ndarray) -> Metric:
        """The same numbers as another work list cuts the same extents; itself where that is the same."""
        if merge.shape == self.merge.shape and bool((merge == self.merge).all()):
            return self
        return Metric._cut(self.slots(merge.shape[3] * self.chunk), merge, self.chunk)
