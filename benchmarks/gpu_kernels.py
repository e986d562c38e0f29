"""Kernels, each at the sizes of a layer of Llama-3.1-8B: its time beside its floor, its reference, and its reference compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from kernel_cases import LLAMA, MAKE, Case, Sizes, half_of
from kernel_floors import FLOORS, GOALS, POLICIES, Ceilings, policy_seconds, prefill_seconds
from method import number, table_of, text
from ragged_forms import FLEX_BLOCK, block_mask
from torch.nn.attention.flex_attention import flex_attention

from kvfx.kernels import OPS

LONGEST = 32768  # tokens at which references are timed
KINDS = {"memory": "GB/s", "matmul": "TFLOP/s"}


@dataclass(frozen=True)
class KernelTime:
    """One operator at one length; empty where nothing was measured.

    Attributes:
        op, tokens: what ran; names of cases follow the operator.
        bytes, flops: the least that it must read, write and multiply.
        bound: "memory" or "matmul", whichever takes longer.
        floor_us: how long, at the ceilings named in the table; microseconds, as all times.
        kernel_us, eager_us, compiled_us: medians of the kernel, of its reference, and of that behind torch.compile.
        flex_us: of flex_attention over the same slots, where that does the same.
        rate: of the kernel, GB/s or TFLOP/s.
        share: of the ceiling.
        goal: the share that is promised.
    """

    op: str
    tokens: int
    bytes: float
    flops: float
    bound: str
    floor_us: float
    kernel_us: float | str
    eager_us: float | str
    compiled_us: float | str
    flex_us: float | str
    rate: float | str
    share: float | str
    goal: float | str


def cases(lengths: Iterable[int], device: str) -> Iterator[tuple[Case, int]]:
    """Every operator at each length, in bf16."""
    for op in MAKE:
        for tokens in lengths:
            sizes = Sizes(LLAMA._replace(S=tokens), torch.bfloat16, device)
            yield Case(op, "bf16", MAKE[op], sizes), tokens


def predicted(lengths: Iterable[int], ceilings: Ceilings) -> list[KernelTime]:
    """Floors, with nothing measured."""
    return [_row(case, tokens, ceilings) for case, tokens in cases(lengths, "meta")]


def measured(lengths: Iterable[int], ceilings: Ceilings, device: str, compare: bool = True) -> Iterator[KernelTime]:
    """Floors and times. With `compare` those of references too, where their scratch fits and they do not take minutes."""
    compiled = {op: torch.compile(OPS[op].reference, dynamic=True) for op in MAKE}
    for case, tokens in cases(lengths, device):
        arguments = case.arguments()
        times: list[float | str] = [median_us(lambda a=arguments, c=case: OPS[c.op].kernel(*a), device)]
        for form in (OPS[case.op].overload, compiled[case.op]):
            times.append(_or_empty(lambda f=form, a=arguments: f(*a), device) if compare and tokens <= LONGEST else "")
        times.append(flex_us(case.sizes, device) if case.op == "ragged_attention" and compare else "")
        yield _row(case, tokens, ceilings, *times)


def flex_us(sizes: Sizes, device: str) -> float | str:
    """flex_attention over as many slots of the same heads, which lie in one flat pool of blocks; empty where it does not run."""
    B, H, G, S, D = sizes.dims
    held = half_of(np.full((1, B, H), S)).flatten()
    blocks = -(-held // FLEX_BLOCK)
    query = sizes.tensor(1, B * H * G, 1, D)
    key, value = (sizes.tensor(1, 1, int(blocks.sum()) * FLEX_BLOCK, D) for _ in range(2))
    mask = block_mask(held, blocks.cumsum() - blocks, G, len(key[0, 0]) // FLEX_BLOCK, device, 1 if device == "cpu" else FLEX_BLOCK)
    step = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    try:
        return median_us(lambda: step(query, key, value, block_mask=mask, enable_gqa=True), device)
    except Exception as error:  # of many kinds: it is compiled for this one mask, and may refuse it
        print(f"flex_attention over {held.tolist()} slots does not run: {type(error).__name__}: {str(error).splitlines()[0]}")
        return ""


def _row(case: Case, tokens: int, ceilings: Ceilings, *times: float | str) -> KernelTime:
    floor = FLOORS[case.op]
    is_memory = floor.is_memory_bound(case.sizes, ceilings)
    work = floor.read(case.sizes) / 1e9 if is_memory else floor.flops(case.sizes) / 1e12
    ceiling = ceilings.bandwidth / 1e9 if is_memory else ceilings.matmul / 1e12
    kernel, eager, compiled, flex = times or ("", "", "", "")
    rate = work / kernel * 1e6 if isinstance(kernel, float) else ""
    return KernelTime(
        case.op, tokens, floor.read(case.sizes), floor.flops(case.sizes), "memory" if is_memory else "matmul",
        floor.seconds(case.sizes, ceilings) * 1e6, kernel, eager, compiled, flex, rate,
        rate / ceiling if isinstance(rate, float) else "", floor.goal if tokens == 32768 and floor.goal else "",
    )  # fmt: skip


def _or_empty(run: Callable[[], object], device: str) -> float | str:
    """The time of a reference; empty where its scratch does not fit."""
    try:
        return median_us(run, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return ""


def median_us(run: Callable[[], object], device: str) -> float:
    """Median time of a run, with a cold L2 cache on CUDA."""
    if device != "cpu":
        return triton.testing.do_bench(run, warmup=20, rep=80, return_mode="median") * 1e3
    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def ceilings_of(device: str) -> Ceilings:
    """What the device does when it does nothing else: a copy of 2 GiB, and a product of two bf16 matrices of 8192 rows."""
    size, rows = (2**30, 8192) if device != "cpu" else (2**20, 64)
    source = torch.zeros(size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(rows, rows, device=device, dtype=torch.bfloat16) for _ in range(2))
    copied = 2 * source.nbytes / median_us(lambda: target.copy_(source), device) * 1e6
    product = 2 * rows**3 / median_us(lambda: left @ right, device) * 1e6
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    return Ceilings(name, copied, product)


@dataclass(frozen=True)
class PolicyFloor:
    """What a policy must at least add to a prefill.

    Attributes:
        policy, tokens: what runs.
        added_us: floors of its kernels, of one layer.
        prefill_us: floor of the layer itself.
        share: the one over the other.
        goal: what the share is promised to be at most.
    """

    policy: str
    tokens: int
    added_us: float
    prefill_us: float
    share: float
    goal: float | str


def policy_floors(lengths: Iterable[int], ceilings: Ceilings) -> Iterator[PolicyFloor]:
    """Every policy at each length; nothing is measured."""
    for policy in POLICIES:
        for tokens in lengths:
            sizes = Sizes(LLAMA._replace(S=tokens), torch.bfloat16)
            added, whole = policy_seconds(policy, sizes, ceilings), prefill_seconds(sizes, ceilings)
            yield PolicyFloor(
                policy, tokens, added * 1e6, whole * 1e6, added / whole, GOALS.get(policy, "") if tokens == 32768 else ""
            )


def policy_table(name: str) -> str:
    """results/NAME.csv for people."""
    about = [
        "What scoring and eviction add to the prefill of one layer of Llama-3.1-8B if every kernel and the prefill run at their",
        "floors, without launches and small steps.",
    ]
    columns: dict[str, Any] = {
        "policy": text("policy"), "tokens": number("tokens", 0), "added, us": number("added_us", 1),
        "prefill, us": number("prefill_us", 0), "share": lambda row: f"{row['share']:.2%}",
        "goal": lambda row: f"{row['goal']:.1%}" if isinstance(row["goal"], float) else "",
    }  # fmt: skip
    return table_of(name, about, columns)


def table(name: str) -> str:
    """results/NAME.csv for people."""
    about = [
        "Each kernel for one layer of Llama-3.1-8B (32 query heads, 8 KV heads, 128 channels, bf16, one row). `floor`: the least",
        "bytes, and flops of matrix products, over the ceilings above. Where nothing could be measured that is the time",
        "**predicted**, and cells of measured times are empty.",
    ]
    columns: dict[str, Any] = {
        "operator": text("op"), "tokens": number("tokens", 0), "bound by": text("bound"), "floor, us": number("floor_us", 1),
        "kernel, us": number("kernel_us", 1), "rate": lambda row: _rate(row), "of the ceiling": number("share", 2),
        "goal": number("goal", 2), "reference, us": number("eager_us", 0), "compiled reference, us": number("compiled_us", 0),
        "flex_attention, us": number("flex_us", 1),
    }  # fmt: skip
    return table_of(name, about, columns)


def _rate(row: Any) -> str:
    return f"{row['rate']:.0f} {KINDS[row['bound']]}" if isinstance(row["rate"], float) else ""
