"""How much memory a process holds for a prompt's cache at several rates: in each line a rate, bytes of blocks, and bytes resident.

Run in a process of its own, in which large tensors are given back to the system when they are freed.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvfx

RATES = (1, 2, 8)


def resident() -> int:
    """Bytes that the process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    config = LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=2, max_position_embeddings=8192, pad_token_id=0)
    base = LlamaForCausalLM(config).eval()
    model = kvfx.compile(base, "kv_compress(rate=1)", backend="eager")
    ids = torch.randint(1, 64, (1, 4096))
    model.compress(ids)  # builds the graph, which all rates share
    for rate in RATES:
        empty = resident()
        cache = model.compress(ids, keep=1 / rate)
        pool = cache.extents[0].pool
        print(rate, (pool.blocks - pool.free) * pool.block_bytes, resident() - empty)
        del cache, pool
    sys.stdout.flush()


if __name__ == "__main__":
    main()
