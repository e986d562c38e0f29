"""Standardise scores: mean and deviation in one sweep over them, the rest left to what follows."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import protected

TILE = 4096  # scores of a program


def refusal(scores: Tensor, valid: Tensor | None, sinks: int, recent: int) -> str | None:
    """See `KernelOp.refusal`."""
    return None if scores.is_floating_point() else f"{scores.dtype} is no floating-point type"


def zscore(scores: Tensor, valid: Tensor | None, sinks: int, recent: int) -> Tensor:
    """Launch the sweep; put its pieces together in float64, of which there are few; the last step is elementwise.

    A compiler joins that step with whatever is done to the scores next, and the sweep is the only launch of its own.
    Floor: 4 bytes read per score, twice, and 4 written.
    """
    batch, heads, tokens = scores.shape
    counted = ~protected(valid, tokens, scores.device, sinks, recent)
    if valid is not None:
        counted = counted & valid
    pieces = triton.cdiv(tokens, TILE)
    moments = scores.new_empty((4, batch, heads * pieces), dtype=torch.float32)
    wrap_triton(_moments_kernel)[(batch * heads * pieces,)](
        scores, counted, moments, *scores.stride(), counted.stride(0) if valid is not None else 0, counted.stride(1),
        heads, tokens, pieces, batch * heads * pieces, BLOCK=TILE, num_warps=4,
    )  # fmt: skip
    number, pivot, mean, squares = moments.double()
    total = number.sum(-1, keepdim=True)
    centre = (number * (pivot + mean)).sum(-1, keepdim=True) / total.clamp(min=1)
    apart = pivot - centre + mean
    deviation = ((squares + number * apart.square()).sum(-1, keepdim=True) / total.clamp(min=1)).sqrt()[..., None]
    centre = centre[..., None]
    high = centre.float()
    low = (centre - high.double()).float()  # what rounding takes off the mean of scores that are all large
    flat = (deviation < 1e-6) | (total == 0)[..., None]
    answer = torch.where(flat, 0, (scores.float() - high - low) / deviation.float())
    return answer if valid is None else answer.masked_fill(~valid[:, None], 0)


@triton.jit
def _moments_kernel(
    score_ptr, counted_ptr, moment_ptr, stride_b, stride_h, stride_s, stride_row, stride_token, heads, tokens, pieces, programs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a piece of a head: how many scores count; one of them; the mean of the others beside it, and the squares beside that."""
    program = tl.program_id(0).to(tl.int64)
    row, piece = program // (heads * pieces), program % pieces
    head = program // pieces % heads
    token = piece * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(counted_ptr + row * stride_row + token * stride_token, mask=token < tokens, other=0) != 0
    score = tl.load(score_ptr + row * stride_b + head * stride_h + token * stride_s, mask=counts, other=0.0).to(tl.float32)
    number = tl.sum(counts.to(tl.float32), 0)
    # Beside the first of them, scores that are all alike are exactly zero, however large they are.
    first = tl.min(tl.where(counts, token, tokens), 0)
    pivot = tl.sum(tl.where(token == first, score, 0.0), 0)
    beside = tl.where(counts, score - pivot, 0.0)
    mean = tl.sum(beside, 0) / tl.maximum(number, 1.0)
    apart = tl.where(counts, beside - mean, 0.0)
    tl.store(moment_ptr + program, number)
    tl.store(moment_ptr + programs + program, pivot)
    tl.store(moment_ptr + 2 * programs + program, mean)
    tl.store(moment_ptr + 3 * programs + program, tl.sum(apart * apart, 0))
