"""Attention over a pool of blocks, in which every head of every row holds as many slots as it likes."""

import torch
from torch import Tensor

from .attention import attention
from .op import KernelOp, samples


def ragged_attention(
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
    merge: Tensor,
    shift: Tensor,
    chunk: int,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from new tokens to the slots that their heads hold, and to each other.

    What one KV head of one row holds is an extent: blocks of P slots, in any order in the pool, listed in `table`. A single query
    goes through a list of chunks, pieces of extents of equal size, and merges what they give; so its cost is that of the slots
    held, however they are spread over heads and rows. `kvfx.work_list` makes the list.

    Args:
        query: [B, Hq, S, D], any float dtype and strides; head h*G + g reads KV head h.
        key: of the new tokens, which the pool does not hold, [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        mask: over the text, M tokens seen and the new ones: [1 or B, 1 or Hq, 1 or S, M + S] or one column for all; bool (True
            takes part) or additive. None hides nothing.
        pool_keys: [N, P, D]. What no extent holds may be anything, and is not seen.
        pool_values: [N, P, Dv].
        pool_positions: position of each slot's token, [N, P] int32.
        table: blocks of each extent, in order, [B, Hkv, m] int32, 0 behind them.
        lengths: slots that each extent holds, [B, Hkv] int64, 0 to m * P.
        owner: b * Hkv + h of the extent that each chunk is of, [n] int32. This and the next two are read for S = 1 alone.
        first: its first slot within the extent, a multiple of `chunk`, [n] int32; of a chunk of nothing at least m * P.
        merge: chunks of each extent, in order, [B, Hkv, k] int32, -1 behind them.
        shift: the token at position p of row b has column p + shift[b] of the mask, [B] int64.
        chunk: slots of a chunk, a multiple of P.
        scale: factor on the logits; None means 1/sqrt(D).
        softcap: if given, logits become softcap * tanh(logits / softcap) before the mask.
        sinks: [Hq], one more logit per head that takes probability and gives no value.

    Returns:
        [B, Hq, S, Dv], query's dtype. A query that sees nothing gets 0.

    Numerics: of a single query float32 throughout; of several those of `attention`.
    Cost: a single query reads the keys and values of its chunks once, at most `chunk` - 1 slots of each extent in vain; more
    queries read m * P slots of each head, twice.
    """
    if isinstance(query.shape[2], int) and query.shape[2] == 1:
        chunks = _Chunks(pool_keys, pool_positions, table, lengths, owner, first, shift, chunk)
        return _attend_once(query, key, value, mask, pool_keys, pool_values, chunks, merge, scale, softcap, sinks)
    return _attend(query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, shift, scale, softcap, sinks)


class _Chunks:
    """Where the slots of chunks stand.

    Attributes:
        owner: [n] int64.
        held: slots that each chunk holds, 0 to C, [n] int64.
        there: which of its places hold a slot, [n, C].
        rows: of each place the row of the pool, [n, C] int64; the first slot's where there is none.
        columns: of the mask, [n, C] int64.
        row: of the batch, [n] int64.
    """

    def __init__(self, pool, positions, table, lengths, owner, first, shift, chunk):
        heads, blocks, slots = table.shape[1], table.shape[2], pool.shape[1]
        device = pool.device
        self.owner = owner.long()
        self.row = self.owner // heads
        self.held = (lengths.flatten()[self.owner] - first).clamp(0, chunk)
        self.there = torch.arange(chunk, device=device) < self.held[:, None]
        block = first[:, None].long() // slots + torch.arange(chunk // slots, device=device)
        block = table.flatten(0, 1)[self.owner[:, None], block.clamp(max=blocks - 1)].long()
        rows = (block[:, :, None] * slots + torch.arange(slots, device=device)).flatten(1)
        self.rows = torch.where(self.there, rows, rows[:, :1])
        self.columns = positions.flatten()[self.rows] + shift[self.row][:, None]


def _attend_once(query, key, value, mask, pool_keys, pool_values, chunks, merge, scale, softcap, sinks):
    (B, Hq, _, D), Hkv = query.shape, key.shape[1]
    G = Hq // Hkv
    asks = query.reshape(B, Hkv, G, D).float() * (D**-0.5 if scale is None else scale)
    asked = asks.flatten(0, 1)[chunks.owner]  # [n, G, D]
    keys = pool_keys.flatten(0, 1)[chunks.rows].float()  # [n, C, D]
    logits = _capped((asked[:, :, None] * keys[:, None]).sum(-1), softcap)  # [n, G, C]
    own = _capped((asks * key.float()).sum(-1), softcap)  # [B, Hkv, G]
    if mask is not None:
        logits = _masked(logits, _of_chunks(mask, chunks, Hkv, G))
        own = _masked(own, mask[:, :, 0, -1].expand(B, Hq).unflatten(1, (Hkv, G)))
    logits = logits.masked_fill(~chunks.there[:, None], -torch.inf)
    top = _above(logits.amax(-1))  # [n, G]
    weights = (logits - top[..., None]).exp()
    total = weights.sum(-1)
    values = pool_values.flatten(0, 1)[chunks.rows].float()
    parts = (weights[..., None] * values[:, None]).sum(2)  # [n, G, Dv]

    # Extents are put together from their chunks, always in the same order.
    which = merge.clamp(min=0).long()
    alive = ((merge >= 0) & (chunks.held[which] > 0))[..., None]  # [B, Hkv, k, 1]
    tops = top[which].masked_fill(~alive, -torch.inf)
    highest = torch.maximum(tops.amax(2), own)
    if sinks is not None:
        sinks = sinks.float().view(Hkv, G)
        highest = torch.maximum(highest, sinks)
    highest = _above(highest)  # [B, Hkv, G]
    share, own = (tops - highest[:, :, None]).exp(), (own - highest).exp()
    norm = (share * total[which]).sum(2) + own
    if sinks is not None:
        norm = norm + (sinks - highest).exp()
    out = (share[..., None] * parts[which].masked_fill(~alive[..., None], 0)).sum(2) + own[..., None] * value.float()
    out = out / torch.where(norm > 0, norm, 1)[..., None]
    return out.to(query.dtype).view(B, Hq, 1, -1)


def _capped(logits, softcap):
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _masked(logits, mask):
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask


def _above(top):
    """A number to subtract before the exponential, which is the maximum, if there is one."""
    return top.masked_fill(top == -torch.inf, 0)


def _of_chunks(mask, chunks, heads, group):
    """Look up what a mask over tokens says of the places of chunks: [n, 1 or G, C]."""
    if isinstance(mask.shape[3], int) and mask.shape[3] == 1:
        columns = torch.zeros_like(chunks.columns)
    else:
        columns = chunks.columns.clamp(0, mask.shape[3] - 2)
    row = torch.zeros_like(chunks.row) if isinstance(mask.shape[0], int) and mask.shape[0] == 1 else chunks.row
    if mask.shape[1] == 1:
        return mask[row[:, None], 0, 0, columns][:, None]
    mask = mask[:, :, 0].unflatten(1, (heads, group))
    each = torch.arange(group, device=mask.device)[:, None]
    return mask[row[:, None, None], (chunks.owner % heads)[:, None, None], each, columns[:, None]]


def _attend(query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, shift, scale, softcap, sinks):
    """The same for several queries: extents are gathered and padded, and are keys and values like others."""
    (B, Hq, S, _), Hkv = query.shape, key.shape[1]
    block = table.long()
    columns = pool_positions[block].flatten(2) + shift[:, None, None]  # [B, Hkv, T]
    there = torch.arange(columns.shape[2], device=query.device) < lengths[..., None]
    keys, values = (pool[block].flatten(2, 3).masked_fill(~there[..., None], 0) for pool in (pool_keys, pool_values))
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    if mask is None:
        seen = there[:, :, None].expand(-1, -1, S, -1)
        mask = torch.cat([seen, seen.new_ones(B, Hkv, S, S)], 3)
        return attention(query, key, value, mask, 0.0, False, scale, softcap, sinks)
    if isinstance(mask.shape[3], int) and mask.shape[3] == 1:
        held, behind = mask.expand(-1, -1, -1, columns.shape[2]), mask.expand(-1, -1, -1, S)
        held = held.expand(B, -1, -1, -1)
    else:
        columns = columns.clamp(0, mask.shape[3] - S - 1)[:, :, None]
        if mask.shape[1] != 1:
            columns = columns.repeat_interleave(Hq // Hkv, 1)
        held = mask.expand(B, columns.shape[1], -1, -1).gather(3, columns.expand(-1, -1, mask.shape[2], -1))
        behind = mask[..., -S:]
    if mask.shape[1] != 1:
        there = there.repeat_interleave(Hq // Hkv, 1)
    there = there[:, :, None]
    held = held & there if mask.dtype == torch.bool else held.masked_fill(~there, -torch.inf)
    mask = torch.cat([held, behind.expand(B, held.shape[1], -1, -1)], 3)
    return attention(query, key, value, mask, 0.0, False, scale, softcap, sinks)


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    block, chunk, blocks = 4, 8, -(-S // 4) + 1
    generator = torch.Generator().manual_seed(seed)
    query, key, value = samples(dtype, device, seed, (B, H * G, 1, D), (B, H, 1, D), (B, H, 1, D))
    pool_keys, pool_values = samples(dtype, device, seed, *[(1 + B * H * blocks, block, D)] * 2)
    table = 1 + torch.randperm(B * H * blocks, generator=generator).view(B, H, blocks).int()
    lengths = torch.randint(0, S + 1, (B, H), generator=generator)
    pool_positions = torch.randint(0, S, pool_keys.shape[:2], generator=generator).int()
    each = -(-S // chunk) + 1
    owner = torch.arange(B * H).repeat_interleave(each).int()
    first = torch.arange(each).mul(chunk).repeat(B * H).int()
    merge = torch.arange(B * H * each).view(B, H, each).int()
    mask = torch.rand(B, H * G, 1, S + 1, generator=generator) < 0.7
    shift = torch.zeros(B, dtype=torch.int64)
    host = (mask, pool_positions, table, lengths, owner, first, merge, shift)
    mask, pool_positions, table, lengths, owner, first, merge, shift = (x.to(device) for x in host)
    places = (pool_keys, pool_values, pool_positions, table, lengths, owner, first, merge, shift)
    return query, key, value, mask, *places, chunk, None, None, None


OP = KernelOp(
    "ragged_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor pool_keys, Tensor pool_values, Tensor pool_positions,"
    " Tensor table, Tensor lengths, Tensor owner, Tensor first, Tensor merge, Tensor shift, int chunk, float? scale,"
    " float? softcap=None, Tensor? sinks=None) -> Tensor",
    ragged_attention,
    _inputs,
    cost="reads the keys and values of the slots held once",
)
