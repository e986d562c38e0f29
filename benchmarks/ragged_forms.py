"""Attention of one token to heads that hold unequally many slots, in many forms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ragged_problem import LAYERS, Problem, after, seen
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kvfx.block_pool import BLOCK, BlockPool
from kvfx.extents import Extents
from kvfx.kernels.attention import attention
from kvfx.kernels.ragged_attention import ragged_attention
from kvfx.work_list import chunk_of

FLEX_BLOCK = 128  # smaller ones took longer; the query's block must be 1
PLAIN = "all tokens, sdpa"
FULL, HALF, FRAGMENTED = "kvfx, keep 1.0", "kvfx, keep 0.5", "kvfx, keep 0.5, fragmented"


Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # queries of a group, keys, values, mask


@dataclass(frozen=True)
class Form:
    """A way to attend.

    Attributes:
        step: compiled; what it returns are the outputs of all layers.
        lengths: slots of each head, `[L, B, Hkv]`.
        held: the tensors that hold them, and all tables.
    """

    step: Callable[[], list[Tensor]]
    lengths: np.ndarray
    held: Sequence[Tensor]

    @property
    def bytes(self) -> int:
        """Of the storages of `held`."""
        storages = [tensor.untyped_storage() for tensor in self.held]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def growing(states: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B, Hkv, T, D], T being no constant of a graph."""
    states = [state.contiguous() for state in states]
    for state in states:
        torch._dynamo.mark_dynamic(state, 2)
    return states


# -- forms: whole steps, for Dynamo keeps graphs by code object --------------------------------------------------------------------


def plain_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value in zip(queries, keys, values, strict=True):
        outs.append(F.scaled_dot_product_attention(after(query, outs), key, value, enable_gqa=True))
    return outs


def dense_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value in zip(queries, keys, values, strict=True):
        outs.append(attention(after(query, outs), key, value, None, 0.0, False, None))
    return outs


def pool_step(
    queries: list[Tensor], news: list[Any], pool: Any, table: Tensor, lengths: Tensor, work: Any, shift: Tensor
) -> list[Tensor]:
    outs: list[Tensor] = []
    for layer, (query, (key, value)) in enumerate(zip(queries, news, strict=True)):
        places = table[layer], lengths[layer], *(part[layer] for part in work), shift
        outs.append(ragged_attention(after(query, outs), key, value, None, *pool, *places, chunk_of(BLOCK), None))
    return outs


def sdpa(asks: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    one = (None,) * (4 - asks.dim())  # with fewer axes it takes another way
    return F.scaled_dot_product_attention(asks[one], keys[one], values[one], mask).view(asks.shape)


def matmuls(asks: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    logits = (asks @ keys.mT).float() * asks.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).to(values.dtype) @ values


def slices(flat: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    """The slots of each head, of lengths that the graph reads from a tensor."""
    for length in lengths:
        torch._check(length >= 2)
    torch._check(sum(lengths) == flat.shape[0])
    return flat.split(lengths)


def sliced_step(queries: list[Tensor], layers: list[Any], attend: Core) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, (keys, values, held) in zip(queries, layers, strict=True):
        lengths = held.tolist()
        asks = after(query, outs).view(len(lengths), -1, query.shape[3])
        heads = zip(asks.unbind(0), slices(keys, lengths), slices(values, lengths), strict=True)
        outs.append(torch.cat([attend(ask, key, value, None) for ask, key, value in heads]).view(query.shape))
    return outs


def padded_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], lengths: Tensor, attend: Core) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value, held in zip(queries, keys, values, lengths.unbind(0), strict=True):
        asks = after(query, outs).view(*key.shape[:2], -1, key.shape[3])
        mask = seen(held, key.shape[2]).expand(-1, -1, asks.shape[2], -1)
        outs.append(attend(asks, key, value, mask).view(query.shape))
    return outs


def flex_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], masks: list[BlockMask]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value, mask in zip(queries, keys, values, masks, strict=True):
        asks = after(query, outs).view(1, -1, 1, query.shape[3])
        outs.append(flex_attention(asks, key, value, block_mask=mask, enable_gqa=True).view(query.shape))
    return outs


# -- their inputs ------------------------------------------------------------------------------------------------------------------


def compiled(step: Callable[..., list[Tensor]], *inputs: Any, **options: Any) -> Callable[[], list[Tensor]]:
    return functools.partial(torch.compile(step, fullgraph=True, **options), *inputs)


def whole(problem: Problem, step: Callable[..., list[Tensor]], tokens: int) -> Form:
    """The first `tokens` of every head."""
    keys, values = (growing([state[:, :, :tokens] for state in states]) for states in (problem.keys, problem.values))
    lengths = np.full_like(problem.full, tokens)
    return Form(compiled(step, problem.queries, keys, values), lengths, [*keys, *values])


def in_pool(problem: Problem, lengths: np.ndarray, fragmented: bool) -> Form:
    """Slots in blocks of kvfx's pool: those of a head behind each other, or anywhere."""
    last = torch.from_numpy(lengths - 1)[..., None, None]
    news = [
        tuple(state.gather(2, last[layer].expand(-1, -1, 1, problem.shape.dim)) for state in (key, value))
        for layer, (key, value) in enumerate(zip(problem.keys, problem.values, strict=True))
    ]
    pool = BlockPool(problem.keys[0], problem.values[0])
    extents = Extents(pool, *lengths.shape)
    extents.fill(lengths - 1)
    if fragmented:
        order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(pool.blocks)]).astype(np.int32)
        extents.table = order[extents.table]
    for layer in range(LAYERS):
        slots = torch.from_numpy(extents.slots(layer))
        for held, states in ((pool.keys, problem.keys), (pool.values, problem.values)):
            held.flatten(0, 1)[slots] = problem.slots(states, layer, lengths - 1)
    shift = torch.zeros(problem.shape.rows, dtype=torch.int64)
    inputs = news, pool.tensors(), extents.device_table, extents.device_lengths, tuple(extents.work), shift
    step = compiled(pool_step, problem.queries, *inputs)
    held = [*pool.tensors(), *extents.tensors()]
    return Form(step, lengths, held)


def sliced(problem: Problem, lengths: np.ndarray, attend: Core) -> Form:
    """Slots of a layer in one tensor, and a loop over its heads in the graph."""
    layers = []
    for layer in range(LAYERS):
        held = torch.from_numpy(lengths[layer].flatten())
        keys, values = (problem.slots(states, layer, lengths) for states in (problem.keys, problem.values))
        torch._dynamo.mark_dynamic(keys, 0)
        torch._dynamo.mark_dynamic(values, 0)
        layers.append((keys, values, held))
    return Form(compiled(sliced_step, problem.queries, layers, attend), lengths, [tensor for layer in layers for tensor in layer])


def padded(problem: Problem, lengths: np.ndarray, attend: Core) -> Form:
    """As many slots for every head as the longest needs."""
    held = torch.from_numpy(lengths)
    keys, values = (
        growing([
            state[:, :, : int(most.max())].masked_fill(~seen(most, int(most.max())).mT, 0)
            for state, most in zip(states, held, strict=True)
        ])
        for states in (problem.keys, problem.values)
    )  # fmt: skip
    return Form(compiled(padded_step, problem.queries, keys, values, held, attend), lengths, [*keys, *values, held])


def flexed(problem: Problem, lengths: np.ndarray) -> Form:
    """Slots of a layer in blocks of 128, which flex_attention takes for one KV head, and for each query head a list of blocks."""
    group, size = problem.shape.heads // problem.shape.kv_heads, FLEX_BLOCK
    keys, values, masks, tables = [], [], [], []
    for layer in range(LAYERS):
        held = lengths[layer].flatten()
        blocks = -(-held // size)
        starts = blocks.cumsum() - blocks
        slots = torch.cat(
            [start * size + torch.arange(length) for start, length in zip(starts.tolist(), held.tolist(), strict=True)]
        )
        for states, filled in ((problem.keys, keys), (problem.values, values)):
            pool = states[layer].new_zeros(int(blocks.sum()) * size, problem.shape.dim)
            pool[slots] = problem.slots(states, layer, lengths)
            filled.append(pool[None, None])
        masks.append(block_mask(held, starts, group, int(blocks.sum())))
        tables += [masks[-1].kv_indices, masks[-1].full_kv_indices, masks[-1].kv_num_blocks, masks[-1].full_kv_num_blocks]
    # Its form for a single query is for shapes that are constants, and cannot take on what reads its output.
    step = compiled(flex_step, problem.queries, keys, values, masks, dynamic=False, options={"epilogue_fusion": False})
    return Form(step, lengths, [*keys, *values, *tables])


def block_mask(held: np.ndarray, starts: np.ndarray, group: int, blocks: int, device: str = "cpu", queries: int = 1) -> BlockMask:
    """Of each head the full blocks, and the last one, of which the end is hidden; for a block of `queries` with one query in it."""

    def rows(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int32)).repeat_interleave(group, 0)[None, :, None].contiguous().to(device)

    full = (held - 1) // FLEX_BLOCK
    every = np.minimum(starts[:, None] + np.arange(blocks), blocks - 1)  # those behind `full` are not read
    last = np.broadcast_to((starts + full)[:, None], every.shape)
    ends = torch.from_numpy((held - 1) % FLEX_BLOCK).repeat_interleave(group).to(device)

    def there(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return slot % FLEX_BLOCK <= ends[head]

    return BlockMask.from_kv_blocks(
        rows(np.ones_like(full)), rows(last), rows(full), rows(every), BLOCK_SIZE=(queries, FLEX_BLOCK), mask_mod=there,
        seq_lengths=(1, blocks * FLEX_BLOCK), compute_q_blocks=False,
    )  # fmt: skip


def forms(problem: Problem) -> dict[str, Form]:
    """All of them by name."""
    drawn, length = problem.drawn(), problem.length
    return {
        PLAIN: whole(problem, plain_step, length),
        "all tokens, sdpa of groups": whole(problem, dense_step, length),
        FULL: in_pool(problem, problem.full, False),
        "equal heads, keep 0.5, sdpa of groups": whole(problem, dense_step, length // 2),
        HALF: in_pool(problem, drawn, False),
        FRAGMENTED: in_pool(problem, drawn, True),
        "sliced, keep 0.5, sdpa": sliced(problem, drawn, sdpa),
        "sliced, keep 0.5, matmuls": sliced(problem, drawn, matmuls),
        "padded, keep 0.5, sdpa": padded(problem, drawn, sdpa),
        "padded, keep 0.5, matmuls": padded(problem, drawn, matmuls),
        "flex_attention, keep 0.5": flexed(problem, drawn),
    }
