"""Attention over a pool of blocks, in which every head of every row holds as many slots as it likes."""

from typing import NamedTuple

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
    blocks: Tensor,
    merge: Tensor,
    shift: Tensor,
    chunk: int,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from new tokens to the slots that their heads hold, and to each other.

    What one KV head of one row holds is an extent: blocks of P slots, in any order in the pool, listed in `table`; several extents
    may share a block. A single query goes through a list of chunks, pieces of extents of equal size, and merges what they give; so
    its cost is that of the slots held, however they are spread over heads and rows. `kvfx.work_list` makes the list.

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
        owner: b * Hkv + h of the extent that each chunk is of, [n] int32. This and the next three are read for S = 1 alone.
        first: its first slot within the extent, a multiple of `chunk`, [n] int32; of a chunk of nothing at least m * P.
        blocks: its blocks, in order, [n, chunk / P] int32, 0 behind them.
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
    if not isinstance(query.shape[2], int) or query.shape[2] != 1:
        return _attend(
            query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, shift, scale, softcap, sinks
        )
    return one_query(
        query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, owner, first, blocks, merge, shift, chunk,
        scale, softcap, sinks,
    ).out  # fmt: skip


class OneQuery(NamedTuple):
    """What attention of a single query comes to; U = B * Hkv extents.

    Attributes:
        out: the answer, [B, Hq, 1, Dv].
        full: of slots of full blocks, exp(logit - top of the chunk), [n, G, chunk / P, P]; 0 elsewhere.
        tops: the highest logit of each chunk, [n, G].
        rest: of the last block of each extent that is not full, and of the new token, exp(logit - highest), [U, G, P + 1].
        highest: logit of each extent, or 0 if it sees nothing, [U, G].
        norm: sum of exp(logit - highest), [U, G].
    """

    out: Tensor
    full: Tensor
    tops: Tensor
    rest: Tensor
    highest: Tensor
    norm: Tensor


def one_query(
    query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, owner, first, blocks, merge, shift, chunk,
    scale, softcap, sinks,
) -> OneQuery:  # fmt: skip
    """See `ragged_attention`."""
    (B, Hq, _, D), Hkv, P = query.shape, key.shape[1], pool_keys.shape[1]
    held, owner = lengths.flatten(), owner.long()
    asks = query.reshape(B * Hkv, Hq // Hkv, D).float()
    finish = _Logits(mask, shift, Hkv, D**-0.5 if scale is None else scale, softcap)

    # What is less than a block at the end of each extent, and the new token. It comes first because a matmul makes the compiler
    # work the queries out beforehand, and not once for each key.
    extent = torch.arange(B * Hkv, device=held.device)
    last = table.flatten(0, 1).gather(1, (held // P).clamp(max=table.shape[2] - 1)[:, None])[:, 0]
    there = torch.arange(P + 1, device=held.device)
    there = (there < (held % P)[:, None]) | (there == P)
    keys, values = (
        torch.cat([pool[last].masked_fill(~there[:, :-1, None], 0), new.flatten(0, 1)], 1).float()
        for pool, new in ((pool_keys, key), (pool_values, value))
    )
    rest = finish((asks @ keys.mT)[:, :, None], pool_positions[last][:, None], extent)[:, :, 0].masked_fill(
        ~there[:, None], -torch.inf
    )

    # Full blocks: their places need no test of their own, which would cost as much as the products.
    full = torch.arange(chunk // P, device=held.device) < ((held[owner] - first) // P)[:, None]  # [n, J]
    logits = _products(asks[owner], pool_keys[blocks])  # [n, G, J, P]
    logits = finish(logits, pool_positions[blocks], owner).masked_fill(~full[:, None, :, None], -torch.inf)
    tops = logits.amax((2, 3))
    shown = (logits - _above(tops)[..., None, None]).exp()
    totals, parts = shown.sum((2, 3)), _weighed(shown, pool_values[blocks], full)  # [n, G], [n, G, Dv]

    # Extents are put together from their chunks, always in the same order. (Chunks come first in these tensors: along the last
    # axis of an index the compiler would gather single numbers.)
    which, alive = merge.flatten(0, 1).clamp(min=0).t(), (merge >= 0).flatten(0, 1).t()[..., None]  # [k, U], [k, U, 1]
    each = tops[which].masked_fill(~alive, -torch.inf)
    highest = torch.maximum(each.amax(0), rest.amax(-1))  # [U, G]
    if sinks is not None:
        sinks = sinks.float().view(Hkv, -1).repeat(B, 1)
        highest = torch.maximum(highest, sinks)
    highest = _above(highest)
    shares, weights = (each - highest).exp(), (rest - highest[..., None]).exp()
    norm = (shares * totals[which]).sum(0) + weights.sum(-1)
    if sinks is not None:
        norm = norm + (sinks - highest).exp()
    out = (shares[..., None] * parts[which]).sum(0) + weights @ values
    norm = torch.where(norm > 0, norm, 1)
    out = (out / norm[..., None]).to(query.dtype).view(B, Hq, 1, -1)
    return OneQuery(out, shown, tops, weights, highest, norm)


def _products(asks, keys):
    """[n, G, J, P] products of queries [n, G, D] and keys [n, J, P, D]; each key is read once, and nothing of its size is made."""
    keys = keys.float()
    return torch.stack([(ask[:, None, None] * keys).sum(-1) for ask in asks.unbind(1)], 1)


def _weighed(weights, values, full):
    """[n, G, Dv] sums of values [n, J, P, Dv] over the blocks that are full; what others hold may be NaN."""
    values = values.float()
    sums = ((weight[..., None] * values).sum(2) for weight in weights.unbind(1))
    return torch.stack([torch.where(full[..., None], each, 0).sum(1) for each in sums], 1)


def _above(top):
    """What to subtract before the exponential: the maximum, if there is one."""
    return top.masked_fill(top == -torch.inf, 0)


class _Logits:
    """Products of a query and keys become logits: scale, cap and mask."""

    def __init__(self, mask, shift, heads, scale, softcap):
        self.mask, self.shift, self.heads, self.scale, self.softcap = mask, shift, heads, scale, softcap

    def __call__(self, products, positions, extent):
        """Products [x, G, J, P or P + 1] with the keys of slots at `positions`, [x, J, P], and of the new token behind them."""
        logits = products * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.mask is None:
            return logits
        mask, row = self.mask[:, :, 0], (extent // self.heads)[:, None, None, None]
        columns = torch.zeros_like(positions)
        if not isinstance(mask.shape[2], int) or mask.shape[2] != 1:
            columns = (positions + self.shift[row[..., 0]]).clamp(0, mask.shape[2] - 2)
        if logits.shape[3] != positions.shape[2]:
            columns = torch.cat([columns, columns.new_full((1, 1, 1), mask.shape[2] - 1).expand(columns.shape[0], -1, -1)], 2)
        if isinstance(mask.shape[0], int) and mask.shape[0] == 1:
            row = torch.zeros_like(row)
        head = torch.arange(mask.shape[1], device=mask.device).view(self.heads if mask.shape[1] > 1 else 1, -1)
        head = head[extent % self.heads if mask.shape[1] > 1 else torch.zeros_like(extent)][:, :, None, None]  # [x, 1 or G, 1, 1]
        seen = mask[row, head, columns[:, None]]
        return logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen


def _attend(query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, shift, scale, softcap, sinks):
    """The same for several queries: extents are gathered and padded, and are keys and values like others."""
    keys, values, mask = gathered(query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, shift)
    return attention(query, keys, values, mask, 0.0, False, scale, softcap, sinks)


def gathered(query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, shift):
    """Keys [B, Hkv, T + S, D], values and mask of what is held, T = m * P, and of S new tokens; see `ragged_attention`."""
    (B, Hq, S, _), Hkv = query.shape, key.shape[1]
    block = table.long()
    columns = pool_positions[block].flatten(2) + shift[:, None, None]  # [B, Hkv, T]
    there = torch.arange(columns.shape[2], device=query.device) < lengths[..., None]
    keys, values = (pool[block].flatten(2, 3).masked_fill(~there[..., None], 0) for pool in (pool_keys, pool_values))
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    if mask is None:
        seen = there[:, :, None].expand(-1, -1, S, -1)
        return key, value, torch.cat([seen, seen.new_ones(B, Hkv, S, S)], 3)
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
    return key, value, torch.cat([held, behind.expand(B, held.shape[1], -1, -1)], 3)


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
    listed = torch.zeros(B, H, each * chunk // block, dtype=torch.int32)
    listed[..., :blocks] = table
    listed = listed.view(-1, chunk // block)
    merge = torch.arange(B * H * each).view(B, H, each).int()
    mask = torch.rand(B, H * G, 1, S + 1, generator=generator) < 0.7
    shift = torch.zeros(B, dtype=torch.int64)
    host = (mask, pool_positions, table, lengths, owner, first, listed, merge, shift)
    mask, pool_positions, *places = (x.to(device) for x in host)
    return query, key, value, mask, pool_keys, pool_values, pool_positions, *places, chunk, None, None, None


OP = KernelOp(
    "ragged_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor pool_keys, Tensor pool_values, Tensor pool_positions,"
    " Tensor table, Tensor lengths, Tensor owner, Tensor first, Tensor blocks, Tensor merge, Tensor shift, int chunk, float? scale,"
    " float? softcap=None, Tensor? sinks=None) -> Tensor",
    ragged_attention,
    _inputs,
    triton="ragged_attention_triton:ragged_attention",
    cost="reads the keys and values of the slots held once",
)
