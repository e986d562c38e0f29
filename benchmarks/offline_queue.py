"""A queue of prompts that are served in one fixed memory: who is admitted when, and where the time goes.

Prompts are admitted one by one, each by a prefill of its own, while there is room for what they keep and for all tokens that the
rows which run will still generate; so no row is ever put aside. All rows that run then decode together until some have all their
tokens. Those leave, and the next are admitted. Where all answers are equally long, that is wave after wave.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import kvfx
from kvfx import ragged_step
from kvfx.policy import Policy


@dataclass
class Request:
    """A prompt, `[1, S]`, how many tokens it is to be answered with, and those that there are."""

    ids: Tensor
    output: int
    answer: list[int] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens that a cache is still to see: the last of an answer is fed to nobody."""
        return self.output - max(1, len(self.answer))


class Server(Protocol):
    """A model and the memory of its caches."""

    def check(self, request: Request) -> None:
        """Raise ValueError if it could not be served alone."""

    def has_room(self, cache: Any, running: Sequence[Request], waiting: Sequence[Any], request: Request) -> bool:
        """Whether a request can be admitted beside rows that run and single ones that were admitted, `(cache, request)`."""

    def prefill(self, ids: Tensor) -> tuple[Any, Tensor]:
        """A cache of the prompt, and the logits behind it."""

    def join(self, caches: list[Any]) -> Any:
        """One cache with the rows of all, in order; those given are used up."""

    def step(self, cache: Any, tokens: Tensor) -> tuple[Any, Tensor]:
        """The cache grown by a token of each row, `[B, 1]`, and the logits behind it."""

    def select(self, cache: Any, rows: list[int]) -> Any:
        """The cache with these rows alone."""


# -- where the time goes -----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by what they were spent on. What is timed inside of something else does not count for that."""

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Time a block."""
        start = self.now()
        self._inner.append(0.0)
        yield
        taken = self.now() - start
        self.seconds[what] = self.seconds.get(what, 0.0) + taken - self._inner.pop()
        self._inner[-1] += taken

    @property
    def total(self) -> float:
        """Of all."""
        return sum(self.seconds.values())


@contextmanager
def schedule_timed(clock: Clock) -> Iterator[None]:
    """Let the eviction inside of each prefill count as `schedule`: the schedule itself, and writing what stays to blocks."""
    plain = ragged_step.keep_blocks

    def keep_blocks(*args: Any) -> None:
        with clock("schedule"):
            plain(*args)

    ragged_step.keep_blocks = keep_blocks
    try:
        yield
    finally:
        ragged_step.keep_blocks = plain


# -- the queue ---------------------------------------------------------------------------------------------------------------------


class Queue:
    """Requests that a server answers.

    Attributes:
        batches: rows of each step.
        peak: most rows that ran together.
    """

    def __init__(self, server: Server, requests: Sequence[Request], clock: Clock) -> None:
        for request in requests:
            server.check(request)
        self.server, self.clock, self.requests = server, clock, requests
        self.waiting, self.running = deque(requests), list[Request]()
        self.batches: list[int] = []
        self.cache: Any = None

    @property
    def done(self) -> float:
        """Share of the requests that have all their tokens."""
        return sum(len(request.answer) == request.output for request in self.requests) / len(self.requests)

    @property
    def peak(self) -> int:
        """Rows of the largest batch."""
        return max(self.batches, default=1)

    @torch.no_grad()
    def waves(self) -> Iterator[None]:
        """Serve all; pause whenever rows have left."""
        while self.waiting or self.running:
            with self.clock("rest"):
                self._admit()
                leaving = min(request.remaining for request in self.running)
                for _ in range(leaving):
                    self._step()
                self._leave()
            yield

    def run(self) -> None:
        """Serve all without a pause."""
        for _ in self.waves():
            pass

    def _admit(self) -> None:
        new = list[tuple[Any, Request]]()
        while self.waiting and self.server.has_room(self.cache, self.running, new, self.waiting[0]):
            request = self.waiting.popleft()
            with self.clock("prefill"):
                cache, logits = self.server.prefill(request.ids)
                request.answer += logits.argmax(-1).tolist()
            new.append((cache, request))
            del cache
        caches = [*([self.cache] if self.running else []), *(cache for cache, _ in new)]
        self.running += [request for _, request in new]
        self.cache = None
        new.clear()  # the server is to have the only hold of the caches
        if not self.running:
            raise RuntimeError(f"nothing runs, and there is no room for a prompt of {self.waiting[0].ids.shape[1]} tokens")
        with self.clock("join"):
            self.cache = self.server.join(caches)

    def _step(self) -> None:
        with self.clock("decode"):
            tokens = torch.tensor([[request.answer[-1]] for request in self.running], device=self.requests[0].ids.device)
            self.cache, logits = self.server.step(self.cache, tokens)
            for request, token in zip(self.running, logits.argmax(-1).tolist(), strict=True):
                request.answer.append(token)
        self.batches.append(len(self.running))

    def _leave(self) -> None:
        staying = [row for row, request in enumerate(self.running) if len(request.answer) < request.output]
        with self.clock("join"):
            self.cache = self.server.select(self.cache, staying) if staying else None
        self.running = [self.running[row] for row in staying]


# -- a pool of blocks, and what its rows will need ---------------------------------------------------------------------------------


def blocks_promised(cache: kvfx.RaggedCache, remaining: Sequence[int]) -> int:
    """Blocks that a cache owns or will own when row b has seen `remaining[b]` more tokens, if none is evicted from now on."""
    blocks = 0
    for extents in cache.extents:
        final = -(-(extents.lengths + np.array(remaining)[None, :, None]) // extents.pool.block_size)
        blocks += int(np.maximum(final, extents.owned).sum())
    return blocks


def blocks_kept(length: int, kept: int, protected: int, heads: int, block: int) -> int:
    """Blocks that all heads of a model keep of a prompt.

    Args:
        length: tokens of the prompt.
        kept: of them that each head is to keep in the mean.
        protected: of them that no head may lose, which can be more.
        heads: KV heads of all layers.
        block: slots of a block.
    """
    least = heads * -(-min(protected, length) // block)
    return min(heads * -(-length // block), max(least, -(-heads * kept // block)))


def blocks_at_most(length: int, kept: int, protected: int, heads: int, block: int, remaining: int) -> int:
    """The most blocks that a row can need to the end, known before its prefill: whichever heads keep the blocks.

    Of n slots a head needs no more than ceil(n / block) + ceil(remaining / block) blocks, and just those if its last block is
    full, as it is where a head has given up blocks.
    """
    return blocks_kept(length, kept, protected, heads, block) + heads * -(-remaining // block)


class BlockServer:
    """A model of kvfx under KV-Compress; its caches lie in one pool."""

    def __init__(self, model: Any, pool: kvfx.Pool, policy: Policy, heads: int) -> None:
        """Serve with what `kvfx.compile(..., policy, pool=pool)` has made; `heads` are the KV heads of all layers."""
        self.model, self.pool, self.policy, self.heads = model, pool, policy, heads

    def _needs(self, request: Request) -> int:
        length, protect = request.ids.shape[1], self.policy.protect.total
        kept = self.policy.counts(length, 1)[0]
        return blocks_at_most(length, kept, protect, self.heads, self.pool.block_size, request.remaining)

    def check(self, request: Request) -> None:
        """See `Server`."""
        if self.pool.blocks and self._needs(request) > self.pool.blocks:
            raise ValueError(
                f"a prompt of {request.ids.shape[1]} tokens and {request.output} more need {self._needs(request)} blocks, and the "
                f"pool has {self.pool.blocks}. Make the pool larger."
            )

    def has_room(self, cache: Any, running: Sequence[Request], waiting: Sequence[Any], request: Request) -> bool:
        """See `Server`."""
        self._collect([*([cache] if running else []), *(one for one, _ in waiting)])
        promised = sum(blocks_promised(one, [its.remaining]) for one, its in waiting)
        if running:
            promised += blocks_promised(cache, [its.remaining for its in running])
        if not self.pool.blocks:  # which takes its memory when the first cache asks
            return not waiting
        return promised + self._needs(request) <= self.pool.blocks

    def _collect(self, caches: Sequence[kvfx.RaggedCache]) -> None:
        """Free the blocks of dropped caches: the trace of a first step is garbage, and holds its cache until collected."""
        owned = sum(int(extents.owned.sum()) for cache in caches for extents in cache.extents)
        if self.pool.blocks - self.pool.free > owned:
            gc.collect()

    def prefill(self, ids: Tensor) -> tuple[Any, Tensor]:
        """See `Server`."""
        cache = kvfx.RaggedCache(pool=self.pool)
        return cache, self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    def join(self, caches: list[Any]) -> Any:
        """See `Server`."""
        self._collect(caches)  # a row whose blocks somebody else has too needs copies of them
        return caches[0] if len(caches) == 1 else kvfx.RaggedCache.join(caches)

    def step(self, cache: Any, tokens: Tensor) -> tuple[Any, Tensor]:
        """See `Server`."""
        return cache, self.model(input_ids=tokens, past_key_values=cache).logits[:, -1]

    def select(self, cache: Any, rows: list[int]) -> Any:
        """See `Server`."""
        if len(rows) < cache.batch_size:
            cache.batch_select_indices(torch.tensor(rows))
        return cache
