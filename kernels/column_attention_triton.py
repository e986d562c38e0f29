"""Score by the attention received from every query of a prompt, in one causal product or two."""

from torch import Tensor

from .columns import COLUMN_REDUCE, distance, joined, known
from .rows import ranks
from .softmax_columns_triton import columns
from .softmax_rows_triton import log_sum_exp
from .softmax_tiles_triton import asked_of, refused


def refusal(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, lse: Tensor | None, buffer: int,
    scale: float | None, reduce: str, heads: str, pool: int, pool_kind: str,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    return refused(query, key, scale)


def column_attention(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, lse: Tensor | None, buffer: int,
    scale: float | None, reduce: str, heads: str, pool: int, pool_kind: str,
) -> Tensor:  # fmt: skip
    """Launch the kernel of columns, and before it, without `lse`, that of rows.

    Behind them counts divide, heads join, and values, which are read once for their norms, weigh.
    Floor: B*Hq*S*S*D flops and B*Hq*S*S/2 exponentials each, which take an H100 the same time at D = 128; 4 bytes per token and
    query head leave each kernel.
    """
    known("reduce", reduce, COLUMN_REDUCE)
    buffer = distance(buffer)
    asked = asked_of(query, key, valid, key.shape[2], scale)
    if lse is None:
        lse = log_sum_exp(asked, split=False)
    received = columns(asked, lse, buffer, reduce, together=False)
    if reduce == "count":
        rank, length = ranks(valid, key.shape[2], key.device)
        received = received / (length - rank - buffer).clamp(min=1)[:, None, None]
    return joined(received, heads, value, valid, pool, pool_kind)
