"""The tensor operators of kvfx: contract, plain reference, and later a Triton kernel beside it.

This room knows tensors. It imports torch and nothing else (Triton only in `*_triton.py`): no graph, policy or model.
One file holds one operator; `OPS` lists them all, and tests and benchmarks read the list.
"""

from . import (
    attention,
    chunk_attention,
    compact,
    key_norm,
    kvpress_compactor,
    leverage,
    protect,
    random_score,
    select,
    zscore,
)
from .op import Dims, KernelOp

OPS: dict[str, KernelOp] = {
    "attention": attention.OP,
    "key_norm": key_norm.OP,
    "chunk_attention": chunk_attention.OP,
    "leverage": leverage.OP,
    "random": random_score.OP,
    "zscore": zscore.OP,
    "protect": protect.OP,
    "select": select.OP,
    "compact": compact.OP,
    "kvpress_compactor": kvpress_compactor.OP,
}

__all__ = ["OPS", "Dims", "KernelOp"]
