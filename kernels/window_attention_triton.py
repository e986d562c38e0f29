"""Score by the attention received from the last queries of a prompt, in two passes over the keys."""

import torch
from torch import Tensor

from .columns import WINDOW_REDUCE, distance, joined, known
from .rows import ranks
from .softmax_columns_triton import columns
from .softmax_rows_triton import log_sum_exp
from .softmax_tiles_triton import asked_of, refused


def refusal(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, window: int, buffer: int,
    scale: float | None, reduce: str, heads: str, pool: int, pool_kind: str,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    return refused(query, key, scale)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor | None, valid: Tensor | None, window: int, buffer: int,
    scale: float | None, reduce: str, heads: str, pool: int, pool_kind: str,
) -> Tensor:  # fmt: skip
    """Launch two kernels: the log-sum-exp of each query over pieces of the keys, and what each tile of keys received.

    Between them the pieces are put together, B*Hq*window*S/256 floats; behind them counts divide, heads join, and values, which
    are read once for their norms, weigh.
    Floor: keys are read twice, 2 * D * itemsize bytes per token and KV head; 4*B*Hq*window*S*D flops and as many exponentials
    as 2*B*Hq*window*S, at window = 64 and G = 4 about as long as the reading.
    """
    known("reduce", reduce, WINDOW_REDUCE)
    buffer = distance(buffer)
    asked = asked_of(query, key, valid, window, scale)
    lse = log_sum_exp(asked, split=True)
    received = columns(asked, lse, buffer, reduce, together=True)
    rank, length = ranks(valid, key.shape[2], key.device)
    count = length.clamp(1, window)
    if reduce == "mean":
        received = received / count[:, None, None]
    elif reduce == "count":
        received = received / torch.minimum(count, length - rank - buffer).clamp(min=1)[:, None, None]
    return joined(received, heads, value, valid, pool, pool_kind)
