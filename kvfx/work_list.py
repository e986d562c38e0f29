"""How attention over extents of unequal length is cut into pieces of equal size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class WorkList(NamedTuple):
    """The chunks of every layer, as `kernels.ragged_attention` reads them.

    Attributes:
        owner: extent that each chunk is of, `[L, n]` int32.
        first: its first slot within the extent, `[L, n]` int32.
        blocks: its blocks, in order, `[L, n, chunk / P]` int32; 0 behind them.
        merge: chunks of each extent, in order, `[L, B, Hkv, k]` int32; -1 behind them.
    """

    owner: Tensor
    first: Tensor
    blocks: Tensor
    merge: Tensor


CHUNK = 128  # slots of a chunk, about: small enough that few are read in vain, large enough that a list of them is short
NOWHERE = 2**30  # where chunks of nothing begin: behind the end of every extent


def chunk_of(block: int) -> int:
    """Slots of a chunk where blocks have `block`: `CHUNK`, or the next whole number of blocks."""
    return -(-CHUNK // block) * block


def work_list(lengths: np.ndarray, table: np.ndarray, block: int, chunk: int) -> WorkList:
    """Cut extents into chunks.

    Args:
        lengths: slots that each extent holds, `[L, B, Hkv]`.
        table: blocks of each extent, in order, `[L, B, Hkv, m]`; 0 behind them.
        block: slots of a block.
        chunk: slots of a chunk, a multiple of `block`; the last one of an extent may hold fewer.

    Returns:
        Tensors on the host. All layers have as many chunks as the one that needs most, and at least two: a graph takes a size of
        one for a constant. The list stays right until some extent needs another chunk or has another block.
    """
    layers, batch, heads = lengths.shape
    needs = -(lengths // -chunk).reshape(layers, -1)
    width, depth = (max(2, int(most)) for most in (needs.sum(1).max(), needs.max()))
    extent = np.repeat(np.arange(needs.size), needs.flatten())  # of each chunk of all layers, in order
    layer = extent // needs.shape[1]
    number = np.arange(len(extent))
    within = number - (needs.cumsum() - needs.flatten())[extent]  # its place among the chunks of its extent
    place = number - (needs.sum(1).cumsum() - needs.sum(1))[layer]  # and among those of its layer
    owner = np.zeros((layers, width), dtype=np.int32)
    first = np.full((layers, width), NOWHERE, dtype=np.int32)
    merge = np.full((layers * batch * heads, depth), -1, dtype=np.int32)
    each = chunk // block
    padded = np.zeros((len(merge), depth * each), dtype=np.int32)  # the table, cut where chunks end
    columns = min(table.shape[3], depth * each)
    padded[:, :columns] = table.reshape(len(merge), -1)[:, :columns]
    blocks = np.zeros((layers, width, each), dtype=np.int32)
    blocks[layer, place] = padded.reshape(-1, depth, each)[extent, within]
    owner[layer, place] = extent % needs.shape[1]
    first[layer, place] = within * chunk
    merge[extent, within] = place
    return WorkList(*map(torch.from_numpy, (owner, first, blocks, merge.reshape(layers, batch, heads, depth))))
