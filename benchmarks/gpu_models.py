"""Prefill and decode of a model with the layers of Llama-3.1-8B and random weights, under policies, on one GPU."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_floors import GOALS
from method import number, table_of, text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kvfx

LAYER = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072 + 4096,
}  # fmt: skip
TINY = LAYER | {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 256,
}  # fmt: skip
POLICIES = ("knorm:0.5", "keydiff:0.5", "snapkv:0.5", "compactor:0.5", "compactor@engine:0.5", "h2o_prefill:0.5")
GIB = 2**30


@dataclass(frozen=True)
class Prefill:
    """One policy at one length.

    Attributes:
        layers, tokens, policy: what ran; policy "none" stores everything.
        seconds: median of the rounds.
        ratio: to "none", median of pairs.
        low, high: the lowest and the highest of the pairs.
        goal: what the ratio is promised to be at most, or "".
        peak_gib: most memory that was allocated at once, weights left out.
        kept_gib: bytes of the cache.
        lowering: what ran the ops: "triton", "reference", or both.
    """

    layers: int
    tokens: int
    policy: str
    seconds: float
    ratio: float
    low: float
    high: float
    goal: float | str
    peak_gib: float
    kept_gib: float
    lowering: str


@dataclass(frozen=True)
class Decode:
    """Steps behind one prompt.

    Attributes:
        layers, tokens, batch, policy, layout: what ran.
        tokens_per_second: of all rows, of a greedy decode.
        ratio: to policy "none" in the same layout.
        cache_gib: bytes of the cache.
    """

    layers: int
    tokens: int
    batch: int
    policy: str
    layout: str
    tokens_per_second: float
    ratio: float
    cache_gib: float


def model_of(layers: int, device: str) -> LlamaForCausalLM:
    """Random weights in bf16."""
    torch.manual_seed(0)
    sizes = LAYER if device != "cpu" else TINY
    config = LlamaConfig(**sizes, num_hidden_layers=layers, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def prompt(model: LlamaForCausalLM, batch: int, tokens: int) -> Tensor:
    """Random ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def prefills(layers: int, lengths: Sequence[int], policies: Sequence[str], device: str, rounds: int) -> Iterator[Prefill]:
    """Each policy beside "none", in alternating pairs."""
    model = model_of(layers, device)
    backend = "inductor" if device != "cpu" else "eager"
    weights = sum(parameter.nbytes for parameter in model.parameters())
    whole = kvfx.compile(model, "none", backend=backend)
    for policy in policies:
        compiled = kvfx.compile(model, policy, backend=backend)
        for tokens in lengths:
            ids = prompt(model, 1, tokens)
            plain, compress = functools.partial(whole.compress, ids), functools.partial(compiled.compress, ids)
            plain(), compress()
            pairs = [(seconds(plain, device), seconds(compress, device)) for _ in range(rounds)]
            ratios = [after / before for before, after in pairs]
            peak, cache = peak_of(compress, device)
            added = GOALS.get(policy.partition(":")[0]) if tokens == 32768 else None
            lowering = ", ".join(sorted({site["lowering"] for site in kvfx.explain(compiled).as_dict()["sites"]}))
            yield Prefill(
                layers, tokens, policy, statistics.median(after for _, after in pairs), statistics.median(ratios), min(ratios),
                max(ratios), "" if added is None else 1 + added, (peak - weights) / GIB, cache.nbytes / GIB, lowering,
            )  # fmt: skip
            del cache
            gc.collect()


def decodes(
    layers: int, tokens: int, batches: Sequence[int], policies: Sequence[tuple[str, str]], device: str, steps: int
) -> Iterator[Decode]:
    """Each policy and layout at each batch; the first policy of a layout is what others are held against."""
    model = model_of(layers, device)
    backend = "inductor" if device != "cpu" else "eager"
    for batch in batches:
        whole: dict[str, float] = {}
        for policy, layout in policies:
            compiled = kvfx.compile(model, policy, backend=backend)
            rate, held = _decode(compiled, model, batch, tokens, layout, steps, device)
            whole.setdefault(layout, rate)
            yield Decode(layers, tokens, batch, policy, layout, rate, rate / whole[layout], held / GIB)
            gc.collect()


def _decode(
    compiled: Any, model: LlamaForCausalLM, batch: int, tokens: int, layout: str, steps: int, device: str
) -> tuple[float, int]:
    ids = prompt(model, batch, tokens)
    cache = compiled.compress(ids)
    room = (
        {"capacity": cache.layers[0].keys.shape[2] + 2 * steps + 2, "tokens": tokens + 2 * steps + 2} if layout == "static" else {}
    )
    cache = cache.to(layout, **room)
    token = ids[:, -1:]

    def run() -> None:
        for _ in range(steps):
            compiled(input_ids=token, past_key_values=cache, use_cache=True)

    run()
    taken = seconds(run, device)
    return batch * steps / taken, cache.nbytes


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of one run, with all that it started."""
    _finish(device)
    start = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - start


def peak_of(run: Callable[[], Any], device: str) -> tuple[int, Any]:
    """Most bytes allocated during a run, and what it returned."""
    if device == "cpu":
        return 0, run()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    _finish(device)
    return torch.cuda.max_memory_allocated(), out


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def prefill_table(name: str) -> str:
    """results/NAME.csv for people."""
    about = [
        "Prefill of one row by a model with the layers of Llama-3.1-8B and random weights in bf16. `ratio`: to storing everything,",
        "median of alternating pairs with their whole range. Memory is beside the weights.",
    ]
    columns = {
        "layers": number("layers", 0), "tokens": number("tokens", 0), "policy": text("policy"), "s": number("seconds", 4),
        "ratio": number("ratio", 4), "range": lambda row: f"{row['low']:.4f}-{row['high']:.4f}", "goal": number("goal", 3),
        "peak, GiB": number("peak_gib", 2), "cache, GiB": number("kept_gib", 2), "ops": text("lowering"),
    }  # fmt: skip
    return table_of(name, about, columns)


def decode_table(name: str) -> str:
    """results/NAME.csv for people."""
    about = ["Greedy decode behind a prompt, random weights in bf16. `ratio`: tokens per second to those with the whole cache."]
    columns = {
        "layers": number("layers", 0), "tokens": number("tokens", 0), "batch": number("batch", 0), "policy": text("policy"),
        "layout": text("layout"), "tokens/s": number("tokens_per_second", 1), "ratio": number("ratio", 2),
        "cache, GiB": number("cache_gib", 3),
    }  # fmt: skip
    return table_of(name, about, columns)
