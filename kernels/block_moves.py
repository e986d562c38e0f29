"""Moves that close the gaps which evicted slots leave, so that whole blocks become free."""

import torch
from torch import Tensor

from .op import KernelOp
from .shares import listed


def block_moves(kept: Tensor, table: Tensor, places: int, block: int) -> tuple[Tensor, Tensor]:
    """Pair the kept slots that lie behind a head's new length with the evicted ones that lie before it.

    A head that keeps n of its slots ends up with them in its first n places (KV-Compress, arXiv:2410.00161). Sources and targets
    have nothing in common, so all moves may be made at once; the order of slots is lost, which is why each has its position.

    Args:
        kept: which slots stay, [U, T] bool, False behind those that a head fills.
        table: blocks of each head, in order, [U, m] int32, m * block >= T.
        places: length of the lists, at least the number of moves.
        block: slots of a block.

    Returns:
        Sources and targets, [2, places] int64: head * T + slot, in order, -1 behind them. And the same as places of the pool,
        [2, places] int64: block*P + slot in it, without meaning behind them.

    Cost: a few sweeps over U*T flags.
    """
    tokens = kept.shape[1]
    before = torch.arange(tokens, device=kept.device) < kept.sum(-1, keepdim=True)
    moves = listed(torch.stack([kept & ~before, before & ~kept]), places)  # of each head as many of one kind as of the other
    pair = moves.clamp(min=0)
    head, slot = pair // tokens, pair % tokens
    blocks = table.flatten()[head * table.shape[1] + slot // block]
    return moves, blocks.long() * block + slot % block


def _inputs(dims, dtype, device, seed):
    B, H, _, S, _ = dims
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(B * H, S, generator=generator) < 0.5
    blocks = S // 4 + 1
    table = torch.randperm(B * H * blocks, generator=generator).view(B * H, blocks).int()
    return kept.to(device), table.to(device), B * H * S, 4


OP = KernelOp(
    "block_moves",
    "(Tensor kept, Tensor table, SymInt places, int block) -> (Tensor, Tensor)",
    block_moves,
    _inputs,
    cost="sweeps over U*T flags",
)
