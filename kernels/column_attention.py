"""Score by the attention received from every query of a prompt."""

import torch
from torch import Tensor

from .columns import COLUMN_REDUCE, distance, joined, known
from .op import KernelOp, samples
from .rows import from_front, places, ranks, to_front


def column_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    lse: Tensor | None,
    buffer: int,
    scale: float | None,
    reduce: str,
    heads: str,
    pool: int,
    pool_kind: str,
) -> Tensor:
    """Score each token by the causal attention that all queries of its row pay to it.

    The accumulated attention of H2O (Zhang et al., arXiv:2306.14048), over the prompt. No [S, S] is made: with L_i the
    log-sum-exp of query i, key j receives sum over i >= j of exp(q_i k_j - L_i), which is the exponential of a
    log-sum-exp again, of an attention in which keys ask queries. One more channel carries -L_i against 1, and the
    reversed order turns i >= j into a causal mask; so both log-sum-exps come from flash attention. With a buffer, which
    KV-Compress (Rehg, arXiv:2410.00161) has, query i stands in the place of i - buffer.

    Args:
        query: [B, Hq, S, D], any float dtype and strides; head h*G + g belongs to KV head h.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv]; if given, scores are multiplied by the L2 norm of the token's value before pooling.
        valid: [B, S] bool, False at padding; None means every token is real.
        lse: log-sum-exp of the row's own causal attention with this scale, [B, Hq, S] float32, for rows without padding;
            None computes it.
        buffer: queries that do not count for a key, itself and those right behind it, though they pay: of tokens i and j,
            numbered in their row, query i counts for key j if i >= j + buffer. 0 counts all that see it.
        scale: factor on the logits; None means 1/sqrt(D).
        reduce: over the queries: `sum`, `count` (the mean over those that count for the token) or `squares`. A token for
            which none counts gets 0.
        heads: over query heads, then: `mean` or `max` of the group, or `layer`, the mean over all query heads, the
            same for every KV head; or at the very end, behind the pooling of each query head, `sum` over the group.
        pool: odd width of the pooling over neighbouring real tokens at the end; 1 means none.
        pool_kind: `avg` (the number of real taps divides) or `max`.

    Returns:
        Scores, [B, Hkv, S] float32, not negative, higher = keep; 0 at padding.

    Numerics: float32 throughout; a weight's relative error is that of its logit plus that of L_i, as in any softmax
    from a stored log-sum-exp.
    Cost: one causal attention over float32 queries and keys, 2*B*Hq*S*S*D flops, and one more without `lse`; O(S) scratch
    beside copies of both,
    with a buffer one more of the queries.
    The device decides which flash attention gives the log-sum-exp: on a CPU `_scaled_dot_product_flash_attention_for_
    cpu`, which exists nowhere else; on CUDA the memory-efficient one, which takes float32 where flash does not.
    """
    known("reduce", reduce, COLUMN_REDUCE)
    buffer = distance(buffer)
    groups, tokens, width = key.shape[1:]
    rank, length = ranks(valid, tokens, key.device)
    place = places(valid)
    query, key = to_front(query, place).float(), to_front(key, place).float()
    query = query * (width**-0.5 if scale is None else scale)
    if place is not None:  # padding may hold NaN
        absent = (torch.arange(tokens, device=key.device) >= length)[:, None]  # [B, 1, S]
        query, key = query.masked_fill(absent[..., None], 0), key.masked_fill(absent[..., None], 0)
    key = key[:, :, None].expand(-1, -1, query.shape[1] // groups, -1, -1).flatten(1, 2)  # keys of each query head
    total = _causal_log_sum_exp(query, key) if lse is None else lse
    if place is not None:
        total = total.masked_fill(absent, 1e30)  # absent queries pay nothing, and absent keys have no other asker
    if buffer:  # the first leave, and at the end others that pay nothing take their places; no slice, whose length is a guard
        slot = torch.arange(tokens, device=key.device) + buffer
        within = slot.clamp(max=tokens - 1)
        query, total = query[:, :, within], total[:, :, within].masked_fill(slot >= tokens, 1e30)
    factor = 2 if reduce == "squares" else 1
    extra = 8 - width % 8  # flash attention likes multiples of 8
    channels = torch.nn.functional.pad(-total[..., None], (0, extra - 1))
    asked = torch.cat([query, channels], -1) * factor
    asking = torch.cat([key, torch.nn.functional.pad(torch.ones_like(channels[..., :1]), (0, extra - 1))], -1)
    columns = _causal_log_sum_exp(asking.flip(2), asked.flip(2)).flip(2).exp()
    columns = from_front(columns, place).unflatten(1, (groups, -1))
    if reduce == "count":
        columns = columns / (length - rank - buffer).clamp(min=1)[:, None, None]
    return joined(columns, heads, value, valid, pool, pool_kind)


def _causal_log_sum_exp(query: Tensor, key: Tensor) -> Tensor:
    """Log-sum-exp of each query's logits over the keys it sees, [B, H, S] float32; no scale."""
    # Both kernels take it for granted, unchecked, that the channels of a token lie side by side.
    query, key = (x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format) for x in (query, key))
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, 0.0, True, scale=1.0)[1]
    total = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, key, None, True, 0.0, True, scale=1.0)[1]
    return total[..., : query.shape[2]]  # it comes padded to whole tiles


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    query, key, value = samples(dtype, device, seed, (B, H * G, S, D), (B, H, S, D), (B, H, S, D))
    return query, key, value, None, None, 0, None, "count", "mean", 1, "avg"


OP = KernelOp(
    "column_attention",
    "(Tensor query, Tensor key, Tensor? value, Tensor? valid, Tensor? lse, int buffer, float? scale, str reduce, "
    "str heads, int pool, str pool_kind) -> Tensor",
    column_attention,
    _inputs,
    triton="column_attention_triton:column_attention",
    cost="2*B*Hq*S*S*D flops, twice without lse",
)
