"""The slots of a pool where kept tokens go."""

import torch
from torch import Tensor

from .op import KernelOp


def place(slots: Tensor, new: Tensor, held: Tensor, table: Tensor, fresh: Tensor, tokens: int, block: int) -> Tensor:
    """Say where in a pool of blocks the kept tokens of each head are written: behind those held, then to fresh blocks.

    Extents take fresh blocks in order of rows, then heads, each as many as it needs.

    Args:
        slots: kept tokens, [B, M] int64, head*tokens + token, ascending, -1 behind them; from `select_heads`.
        new: how many of them each head keeps, [B, Hkv] int64.
        held: slots that each head has filled before, [B, Hkv] int64.
        table: blocks of those, in order, [B, Hkv, m], any integers.
        fresh: blocks to fill, [R], any integers; R is enough.
        tokens: new tokens of a row.
        block: slots of a block.

    Returns:
        Slots of the pool, block*n + its place there, [B, M] int64; some slot of block 0 for -1.

    Cost: a few sweeps over B*M indices.
    """
    head = slots.clamp(min=0) // tokens
    begin = (new.cumsum(1) - new).gather(1, head)
    index = held.gather(1, head) + torch.arange(slots.shape[1], device=slots.device) - begin  # in the extent
    owned = (held + block - 1) // block
    more = ((held + new + block - 1) // block - owned).flatten()
    first = (more.cumsum(0) - more).view_as(held)
    tail = table.gather(2, (owned - 1).clamp(min=0)[..., None])[..., 0].long()
    behind = (index // block) - owned.gather(1, head)  # -1: in the last block held
    fresh_block = fresh.long()[(first.gather(1, head) + behind).clamp(0, fresh.shape[0] - 1)]
    chosen = torch.where(behind < 0, tail.gather(1, head), fresh_block)
    return torch.where(slots < 0, 0, chosen * block + index % block)


def _inputs(dims, dtype, device, seed):
    B, H, _, S, _ = dims
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(B, H * S, generator=generator).argsort(-1)[:, : (H * S + 1) // 2].sort(-1).values
    new = torch.stack([(chosen // S == head).sum(-1) for head in range(H)], 1)
    held = torch.randint(0, 40, (B, H), generator=generator)
    table = torch.randint(1, 99, (B, H, 3), generator=generator, dtype=torch.int32)
    fresh = torch.randperm(B * H * (S // 16 + 2), generator=generator).int() + 100
    return *(tensor.to(device) for tensor in (chosen, new, held, table, fresh)), S, 16


OP = KernelOp(
    "place",
    "(Tensor slots, Tensor new, Tensor held, Tensor table, Tensor fresh, SymInt tokens, int block) -> Tensor",
    place,
    _inputs,
    cost="sweeps over B*M indices",
)
