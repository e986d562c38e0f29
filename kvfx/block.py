"""The new tokens of a forward: their shape, which are real, and whether they go on from what a cache has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfx.cache import Cache
from kvfx.errors import CacheMismatch, InputError


@dataclass(frozen=True)
class Block:
    """The new tokens of a forward: their shape, and which are real."""

    batch: int
    length: int
    device: torch.device
    valid: Tensor | None
    lengths: Sequence[int]

    @classmethod
    def of(cls, tokens: Tensor, mask: Any, cache: Cache) -> Block:
        """The new tokens `[B, S]` or `[B, S, hidden]` behind a cache, with the attention mask of a forward."""
        if tokens.dim() < 2 or tokens.numel() == 0:
            raise InputError(f"the prompt is {tuple(tokens.shape)}, expected [B, S] with B, S > 0: empty, or no batch axis")
        batch, length = tokens.shape[:2]
        held = cache.get_seq_length()
        if cache.batch_size not in (-1, batch):
            raise CacheMismatch(f"the cache has {cache.batch_size} rows, the new tokens {batch}")
        if mask is None:
            return cls(batch, length, tokens.device, None, [length] * batch)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"attention_mask is {shape}, expected [B, S]: which tokens are padding. Causality is the model's own")
        if tuple(mask.shape) != (batch, held + length):
            raise InputError(
                f"attention_mask is {tuple(mask.shape)}, expected {(batch, held + length)}: the {held} tokens that the cache has "
                f"seen (not the slots it holds) and {length} new ones"
            )
        past, valid = mask[:, :held].bool(), mask[:, held:].bool().contiguous()
        if not bool((past if cache.real is None else past == cache.real).all()):
            raise CacheMismatch(
                "attention_mask differs from the one that the cache was built with; padding cannot change afterwards. Pass "
                "the mask of the context, followed by that of the new tokens."
            )
        if bool(valid.all()):
            return cls(batch, length, tokens.device, None, [length] * batch)
        lengths = valid.sum(1).tolist()
        if min(lengths) == 0:
            raise InputError(f"row {lengths.index(0)} of the batch is all padding; leave it out")
        return cls(batch, length, tokens.device, valid, lengths)

    def check_positions(self, position_ids: Tensor | None, cache: Cache) -> None:
        """Positions count a row's real tokens; others would be recorded wrongly, so they are refused."""
        if position_ids is None:
            return
        start = 0 if cache.lengths_seen is None else cache.lengths_seen[:, None]
        valid = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device) if self.valid is None else self.valid
        expected = start + valid.long().cumsum(-1) - 1
        if not bool(((position_ids == expected) | ~valid).all()):
            raise InputError(
                "position_ids do not count on from the tokens that each row has seen, padding left out. Leave them out: the cache "
                "knows the positions."
            )


def uneven_turn(block: Block, part: str) -> InputError:
    """Why padded rows are refused behind a cache."""
    return InputError(
        f"rows of different lengths, {list(block.lengths)}, after the first turn: padding would count as {part}. Feed the rows one "
        "by one, or with equally many new tokens."
    )
