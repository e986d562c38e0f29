"""The slots of a pool where kept tokens go, when blocks for them have been taken."""

import torch
from torch import Tensor

from .op import KernelOp
from .shares import listed


def place_kept(kept: Tensor, held: Tensor, table: Tensor, places: int, block: int) -> tuple[Tensor, Tensor]:
    """List the kept tokens of each row of heads, and where in a pool of blocks each is written: behind those held.

    Args:
        kept: which tokens stay, [B, Hkv, S] bool.
        held: slots that each head has filled before, [B, Hkv] int64.
        table: blocks of each head, in order, [B, Hkv, m] int32; those for what is kept are among them.
        places: length of the lists, at least the most tokens that a row keeps.
        block: slots of a block.

    Returns:
        Slots, [B, places] int64, head*S + token, ascending, -1 behind them; and where they go, [B, places] int64, block*P + slot in
        it, without meaning behind them. As `pack` takes them.

    Cost: a few sweeps over B*Hkv*S flags.
    """
    slots = listed(kept, places)
    pair = slots.clamp(min=0)
    head = pair // kept.shape[2]
    index = (held[..., None] + kept.cumsum(-1) - 1).flatten(1).gather(1, pair)  # in the extent
    within = (index // block).clamp(0, table.shape[2] - 1)
    blocks = table.flatten(1).gather(1, head * table.shape[2] + within)
    return slots, blocks.long() * block + index % block


def _inputs(dims, dtype, device, seed):
    B, H, _, S, _ = dims
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(B, H, S, generator=generator) < 0.5
    held = torch.randint(0, 9, (B, H), generator=generator)
    blocks = (9 + S) // 4 + 1
    table = torch.randperm(B * H * blocks, generator=generator).view(B, H, blocks).int()
    return *(tensor.to(device) for tensor in (kept, held, table)), H * S, 4


OP = KernelOp(
    "place_kept",
    "(Tensor kept, Tensor held, Tensor table, SymInt places, int block) -> (Tensor, Tensor)",
    place_kept,
    _inputs,
    cost="sweeps over B*Hkv*S flags",
)
