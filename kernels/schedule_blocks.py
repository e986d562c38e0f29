"""Choose the blocks of slots that heads give up where all heads of all layers compete for blocks."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def schedule_blocks(scores: Tensor, positions: Tensor | None, held: Tensor, evictions: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Say what stays of each head's tokens when each row gives up a number of whole blocks, wherever they cost least.

    The schedule of KV-Compress (arXiv:2410.00161, section 4). A head fills its blocks one after the other, so it frees one by
    losing what its last block holds, and every further one by losing `block` tokens more; it loses its lowest scores, wherever
    they lie. The price of a block is the highest score lost for it, and the cheapest blocks of all heads of a row go, as many as
    asked for or as there are with a price. A head keeps a block at least. Of equal scores a head loses the later token; of equal
    prices the lower head gives up its block. No row sees another.

    Args:
        scores: [B, U, S] float32, no NaN, what each head of all layers is to choose from; +inf where a token may not be lost,
            -inf where there is none.
        positions: [B, U, S] int32, of each token in its row, not negative; None means that tokens are in order.
        held: [B, U] int64, slots that each head fills besides, and does not give up.
        evictions: [B] int64, blocks that each row is to give up; 0 or less means none.
        block: slots of a block.

    Returns:
        Which tokens stay, [B, U, S] bool, and how many of each head, [B, U] int64. A head that gives up blocks ends with a full
        one.

    Numerics: exact. Cost: a sort of each head's tokens as 64-bit keys, and one of a row's blocks.
    """
    tokens = scores.shape[2]
    there = scores > -torch.inf
    new = there.sum(-1)
    order = _losing_order(scores, there, positions)
    ranked = scores.gather(2, order)

    # Prices of the first, second, ... block that a head gives up.
    total = held + new
    hang = (total - 1) % block + 1  # tokens in the last block
    number = torch.arange(tokens // block + 1, device=scores.device)
    lost = number * block + hang[..., None]  # [B, U, M], in all, for that block and those before it
    price = ranked.gather(2, (lost - 1).clamp(max=tokens - 1))
    price = price.masked_fill((lost > new[..., None]) | (lost >= total[..., None]), torch.inf)

    # The cheapest of all, heads in order where prices are equal; of one head they come in order by themselves.
    flat = price.flatten(1)
    cheapest = flat.argsort(dim=-1, stable=True)
    rank = torch.empty_like(cheapest).scatter(1, cheapest, torch.arange(flat.shape[1], device=flat.device).expand_as(flat))
    given = ((rank < evictions[:, None]) & (flat < torch.inf)).view_as(price).sum(-1)
    count = torch.where(given > 0, (given - 1) * block + hang, 0)
    stay = torch.arange(tokens, device=scores.device) >= count[..., None]
    return torch.empty_like(there).scatter(2, order, stay) & there, new - count


def _losing_order(scores: Tensor, there: Tensor, positions: Tensor | None) -> Tensor:
    """Tokens of each head, [B, U, S] int64, the first to lose first; those that are not there come last."""
    bits = (scores + 0.0).view(torch.int32)  # of the two zeros one
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    key = torch.where(there, key, 0x7FFFFFFF)
    place = torch.arange(scores.shape[2], device=scores.device) if positions is None else positions.long()
    return ((key.long() << 32) - place).argsort(-1)


def _inputs(dims, dtype, device, seed):
    B, H, _, S, _ = dims
    (scores,) = samples(torch.float32, device, seed, (B, H, S))
    scores[..., : min(2, S)] = torch.inf
    generator = torch.Generator().manual_seed(seed)
    held = torch.randint(0, 9, (B, H), generator=generator).to(device)
    return scores, None, held, torch.full((B,), max(1, H * S // 10), device=device), 4


OP = KernelOp(
    "schedule_blocks",
    "(Tensor scores, Tensor? positions, Tensor held, Tensor evictions, int block) -> (Tensor, Tensor)",
    schedule_blocks,
    _inputs,
    cost="sorts B*U rows of S, and B rows of U*S/block",
)
