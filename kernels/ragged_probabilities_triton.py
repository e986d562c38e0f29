"""Attention of a single query over a pool of blocks, and the probabilities that each slot got."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import ragged_attention_triton


def refusal(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pool_keys: Tensor, pool_values: Tensor, pool_positions: Tensor,
    table: Tensor, lengths: Tensor, owner: Tensor, first: Tensor, blocks: Tensor, merge: Tensor, shift: Tensor, chunk: int,
    power: int, scale: float | None, softcap: float | None = None, sinks: Tensor | None = None,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    return ragged_attention_triton.refusal(
        query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, owner, first, blocks, merge, shift, chunk,
        scale, softcap, sinks,
    )  # fmt: skip


def ragged_probabilities(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pool_keys: Tensor, pool_values: Tensor, pool_positions: Tensor,
    table: Tensor, lengths: Tensor, owner: Tensor, first: Tensor, blocks: Tensor, merge: Tensor, shift: Tensor, chunk: int,
    power: int, scale: float | None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the two kernels of `ragged_attention`, which leave their logits, and one that turns these into probabilities.

    Floor: that of `ragged_attention`, and logits, 4 * G bytes of each slot, written and read: for 4 query heads of 128 channels in
    16 bits 6 % of it, mostly within the L2 cache; and 4 bytes of each slot for the answer.
    """
    asking, heads, chunks = query.shape[1], key.shape[1], owner.shape[0]
    group = asking // heads
    logit = query.new_empty((chunks, group, chunk), dtype=torch.float32)
    of_all = query.new_empty((3, query.shape[0] * asking), dtype=torch.float32)
    out = ragged_attention_triton.launch(
        query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, owner, first, blocks, merge, shift, chunk,
        scale, softcap, sinks, logit, of_all,
    )  # fmt: skip
    held = torch.empty_like(logit[:, 0])
    wrap_triton(_probability_kernel)[(chunks,)](
        logit, of_all, lengths.contiguous(), owner.contiguous(), first.contiguous(), held, query.shape[0] * asking,
        GROUP=group, CHUNK=chunk, SQUARED=power == 2, BLOCK_S=triton.next_power_of_2(chunk), num_warps=4,
    )  # fmt: skip
    new = of_all[2].view(query.shape[0], heads, group)
    return out, held, (new * new if power == 2 else new).sum(2)


@triton.jit
def _probability_kernel(
    logit_ptr, all_ptr, length_ptr, owner_ptr, first_ptr, held_ptr, count,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, SQUARED: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    extent = tl.load(owner_ptr + number).to(tl.int64)
    slot = tl.arange(0, BLOCK_S)
    live = (slot < CHUNK) & (slot < tl.load(length_ptr + extent) - tl.load(first_ptr + number))
    total = tl.zeros((BLOCK_S,), tl.float32)
    for one in range(GROUP):
        logits = tl.load(logit_ptr + (number * GROUP + one) * CHUNK + slot, mask=live, other=-float("inf"))
        at = extent * GROUP + one
        share = tl.exp(logits - tl.load(all_ptr + at)) / tl.load(all_ptr + count + at)
        total += share * share if SQUARED else share
    tl.store(held_ptr + number * CHUNK + slot, total, mask=slot < CHUNK)
