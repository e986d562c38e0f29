"""The tensor operators of kvfx: contract, plain reference, and later a Triton kernel beside it.

This room knows tensors. It imports torch and nothing else (Triton only in `*_triton.py`): no graph, policy or model.
One file holds one operator; `OPS` lists them all, and tests and benchmarks read the list.
"""

from . import (
    attention,
    attention_lse,
    chunk_attention,
    chunk_mean,
    chunk_rank,
    column_attention,
    column_mask,
    compact,
    expected_attention,
    key_diff,
    key_norm,
    kvpress_compactor,
    kvpress_expected_attention,
    kvpress_window_attention,
    lag,
    leverage,
    position,
    protect,
    random_score,
    redundancy,
    select,
    slot_mask,
    splice,
    value_projection,
    window_attention,
    zscore,
)
from .op import Dims, KernelOp

OPS: dict[str, KernelOp] = {
    "attention": attention.OP,
    "attention_lse": attention_lse.OP,
    "key_norm": key_norm.OP,
    "chunk_attention": chunk_attention.OP,
    "window_attention": window_attention.OP,
    "column_attention": column_attention.OP,
    "expected_attention": expected_attention.OP,
    "leverage": leverage.OP,
    "key_diff": key_diff.OP,
    "redundancy": redundancy.OP,
    "lag": lag.OP,
    "position": position.OP,
    "random": random_score.OP,
    "value_projection": value_projection.OP,
    "zscore": zscore.OP,
    "chunk_mean": chunk_mean.OP,
    "chunk_rank": chunk_rank.OP,
    "protect": protect.OP,
    "splice": splice.OP,
    "select": select.OP,
    "compact": compact.OP,
    "slot_mask": slot_mask.OP,
    "column_mask": column_mask.OP,
    "kvpress_compactor": kvpress_compactor.OP,
    "kvpress_expected_attention": kvpress_expected_attention.OP,
    "kvpress_window_attention": kvpress_window_attention.OP,
}

__all__ = ["OPS", "Dims", "KernelOp"]
