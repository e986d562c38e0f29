"""Attention over a pool of blocks that also tells how much of it each slot got."""

from torch import Tensor

from . import ragged_attention
from .op import KernelOp


def ragged_probabilities(
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
    power: int,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from one new token of each row, and sum the probabilities of each slot over the heads that read it.

    The by-product by which decode-time policies rank slots: KV-Compress (arXiv:2410.00161) adds up squared probabilities, H2O
    (Zhang et al., arXiv:2306.14048) plain ones. Keys are read once for both answers.

    The arguments are those of `ragged_attention`, with a single query, S = 1; and `power`, 1 or 2, of the probabilities that are
    summed.

    Returns:
        [B, Hq, 1, Dv] as `ragged_attention` gives it; sums over the G heads of each slot of each chunk, [n, chunk] float32, 0
        where a chunk holds nothing; and those of the new token, [B, Hkv] float32. A query that sees nothing gives 0.

    Numerics: float32. Cost: that of `ragged_attention`, and G numbers for each slot, written and read once.
    """
    (B, Hkv), P = key.shape[:2], pool_keys.shape[1]
    made = ragged_attention.one_query(
        query, key, value, mask, pool_keys, pool_values, pool_positions, table, lengths, owner, first, blocks, merge, shift, chunk,
        scale, softcap, sinks,
    )  # fmt: skip
    shares = ((made.tops - made.highest[owner.long()]).exp() / made.norm[owner.long()])[..., None, None]
    held = (made.full * shares).pow(power).sum(1)  # [n, chunk / P, P]
    rest = (made.rest / made.norm[..., None]).pow(power).sum(1)  # [U, P + 1]
    # The last block of an extent that is not full is one of a chunk.
    length = lengths.flatten()
    number = (length // chunk).clamp(max=merge.shape[2] - 1)
    which = merge.flatten(0, 1).gather(1, number[:, None])[:, 0].long()
    part = rest[:, :-1].masked_fill(((length % P == 0) | (which < 0))[:, None], 0)
    held = held.index_put((which.clamp(min=0), length % chunk // P), part, accumulate=True)
    return made.out, held.flatten(1), rest[:, -1].view(B, Hkv)


def _inputs(dims, dtype, device, seed):
    *arguments, chunk, scale, softcap, sinks = ragged_attention.OP.inputs(dims, dtype, device, seed)
    return *arguments, chunk, 2, scale, softcap, sinks


OP = KernelOp(
    "ragged_probabilities",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor pool_keys, Tensor pool_values, Tensor pool_positions,"
    " Tensor table, Tensor lengths, Tensor owner, Tensor first, Tensor blocks, Tensor merge, Tensor shift, int chunk, int power,"
    " float? scale, float? softcap=None, Tensor? sinks=None) -> (Tensor, Tensor, Tensor)",
    ragged_probabilities,
    _inputs,
    triton="ragged_probabilities_triton:ragged_probabilities",
    cost="reads the keys and values of the slots held once",
)
