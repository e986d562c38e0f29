"""What several new tokens pay to each slot of a pool of blocks, and to each other."""

import torch
from torch import Tensor

from . import ragged_attention
from .op import KernelOp

ASKED = 64  # the last queries of a block of new tokens, which ask


def ragged_received(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    pool_keys: Tensor,
    pool_values: Tensor,
    pool_positions: Tensor,
    table: Tensor,
    lengths: Tensor,
    owner: Tensor,
    first: Tensor,
    positions: Tensor,
    shift: Tensor,
    chunk: int,
    power: int,
    buffer: int,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the probabilities that new tokens pay to each slot, over the heads that read it and the queries.

    What `ragged_probabilities` tells of one new token, for a block of them: what they would have paid one after the other. Of more
    than 64 only the last 64 ask, as the window of a prompt does.

    The arguments are those of `ragged_attention`, and:
        positions: of the new tokens in their rows, [B, S] int32, -1 for padding, which asks nothing.
        power: 1 or 2, of the probabilities that are summed.
        buffer: a query counts for tokens at least that far before it.

    Returns:
        Sums of each slot of each chunk, [n, chunk] float32, 0 where it holds nothing; and of each new token, [B, Hkv, S] float32.

    Numerics: float32. Cost: gathers keys as `ragged_attention` does, 64 queries of each head for each slot of the longest extent,
    and as many floats of scratch.
    """
    (B, Hq, S, D), Hkv = query.shape, key.shape[1]
    keys, _, seen = ragged_attention.gathered(
        query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, shift
    )
    tokens = keys.shape[2] - S
    asks = S - ASKED + torch.arange(ASKED, device=query.device)
    row = asks.clamp(min=0)
    asking = query.index_select(2, row).float() * (D**-0.5 if scale is None else scale)
    logits = (asking.unflatten(1, (Hkv, -1)).flatten(2, 3) @ keys.float().mT).view(B, Hq, ASKED, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if seen.shape[2] != 1:
        seen = seen.index_select(2, row)
    if seen.shape[1] not in (1, Hq):
        seen = seen.repeat_interleave(Hq // Hkv, 1)
    logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(B, -1, ASKED, -1)], 3)
    top = logits.amax(3, keepdim=True)
    weights = (logits - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(3, keepdim=True)
    paid = (weights / torch.where(total > 0, total, 1))[..., : tokens + S].pow(power)

    asked_at = positions.gather(1, row.expand(B, -1))  # of each query, [B, W]
    counts = (asks >= 0) & (asked_at >= 0)
    paid = (paid * counts[:, None, :, None]).unflatten(1, (Hkv, -1)).sum(2)  # [B, Hkv, W, T + S]
    if buffer:
        of_slots = pool_positions[table.long()].flatten(2)
        at = torch.cat([of_slots, positions[:, None].expand(-1, Hkv, -1)], 2)[:, :, None]
        paid = paid * (at <= asked_at[:, None, :, None] - buffer)
    received = paid.sum(2)
    # From extents to chunks.
    last = (tokens - 1) // chunk
    held = torch.nn.functional.pad(received[..., :tokens], (0, (last + 1) * chunk - tokens)).unflatten(2, (-1, chunk)).flatten(0, 1)
    number = first.long() // chunk
    here = held[owner.long(), number.clamp(max=last)].masked_fill((number > last)[:, None], 0)
    return here, received[..., tokens:]


def _inputs(dims, dtype, device, seed):
    query, key, value, mask, *pool, table, lengths, owner, first, _, _, shift, chunk, scale, softcap, sinks = (
        ragged_attention.OP.inputs(dims, dtype, device, seed)
    )
    query, key, value = (torch.cat([x, x.flip(0)], 2) for x in (query, key, value))  # two new tokens
    mask = torch.cat([torch.cat([mask, mask[..., :1]], 3)] * 2, 2)
    positions = torch.full((dims.B, 1), dims.S, dtype=torch.int32, device=device) + torch.arange(
        2, dtype=torch.int32, device=device
    )
    return (
        query, key, value, mask, *pool, table, lengths, owner, first, positions, shift, chunk, 2, 0, scale, softcap, sinks,
    )  # fmt: skip


OP = KernelOp(
    "ragged_received",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor pool_keys, Tensor pool_values, Tensor pool_positions,"
    " Tensor table, Tensor lengths, Tensor owner, Tensor first, Tensor positions, Tensor shift, int chunk, int power, int buffer,"
    " float? scale, float? softcap=None, Tensor? sinks=None) -> (Tensor, Tensor)",
    ragged_received,
    _inputs,
    cost="2*B*Hq*64*T*D flops, and a gather of the keys held",
)
