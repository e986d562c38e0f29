"""Bytes alive during a prefill: plain torch.compile against kvfx, 16 layers, from a trace of every allocation and free.

    python benchmarks/memory.py                     # about five minutes, nearly all of it compilation
    python benchmarks/memory.py --plot-only         # draws results/memory.csv again

K/V bytes are those of storages as large as a layer's K, V or pre-RoPE K, or as what is kept of one. The prompt's length is such
that only one other tensor has such a size: the K with rotated halves that RoPE makes on its way, in both runs, so the bound allows
for it. A storage counts from its allocation to its free, also while Inductor keeps it for the next tensor of its size: the figures
are upper bounds. Writes results/memory.csv, .png and .svg.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from method import read, save, write
from prefill import plain_prefill
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import kvfx

matplotlib.use("Agg")
LAYERS, KV_HEADS, HEAD_DIM = 16, 2, 32
TOKENS = 4000  # no multiple of a chunk, so that copies cut into chunks have sizes of their own
KEEP = 0.25
FULL = KV_HEADS * TOKENS * HEAD_DIM * 4  # bytes of one layer's K, V or pre-RoPE K
KEPT = int(FULL * KEEP)
WORKING = 4 * FULL  # of the layer at work: K, V, pre-RoPE K, and RoPE's rotated K
PLAIN, COMPRESSED = "torch.compile", f"compactor:{KEEP}"


@dataclass(frozen=True)
class Row:
    """What is alive at one moment of a run.

    Attributes:
        run: which one.
        progress: share of the run's time, 0 to 1.
        full: bytes of storages that hold a layer's whole K, V or pre-RoPE K.
        kept: bytes of storages that hold what is kept of a K or V.
        total: bytes of all storages that were allocated since the run began.
    """

    run: str
    progress: float
    full: int
    kept: int
    total: int


def model() -> LlamaForCausalLM:
    """16 narrow layers: beside the K/V of 4000 tokens everything else is small."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        num_hidden_layers=LAYERS, vocab_size=1024, max_position_embeddings=2 * TOKENS, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure() -> list[Row]:
    """Both runs, traced once they are compiled."""
    torch.set_num_threads(1)
    plain = model()
    ids = torch.randint(3, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    compiled = kvfx.compile(plain, COMPRESSED)
    return trace(PLAIN, plain_prefill(plain, ids)) + trace(COMPRESSED, lambda: compiled.compress(ids))


def trace(name: str, run: Callable[[], object]) -> list[Row]:
    """Follow each storage of a compiled run from its allocation to its free, or to the end, which the caches outlive."""
    run()  # compiles
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        caches = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    del caches
    events.sort(key=lambda event: event["ts"])
    start, length = events[0]["ts"], events[-1]["ts"] - events[0]["ts"]
    alive: dict[int, int] = {}
    rows = []
    for event in events:
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            alive[address] = size
        else:
            alive.pop(address, None)  # None: it is older than the run
        sizes = list(alive.values())
        full, kept = (sum(size for size in sizes if size == wanted) for wanted in (FULL, KEPT))
        rows.append(Row(name, (event["ts"] - start) / length, full, kept, sum(sizes)))
    return rows


def peaks(rows: Sequence[Row], name: str) -> tuple[int, int]:
    """Largest K/V bytes, full and kept together, and largest total, of one run."""
    of = [row for row in rows if row.run == name]
    return max(row.full + row.kept for row in of), max(row.total for row in of)


def plot() -> None:
    """Draw `results/memory.csv`."""
    where, rows = read("memory")
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6))

    def draw(panel: Axes, name: str, bytes_of: Callable[[dict[str, Any]], float], **style: str) -> None:
        of = [row for row in rows if row["run"] == name]
        panel.step([row["progress"] for row in of], [bytes_of(row) / 2**20 for row in of], where="post", **style)

    for name, color in ((PLAIN, "0.45"), (COMPRESSED, "tab:blue")):
        draw(panels[0], name, lambda row: row["full"] + row["kept"], color=color, label=name)
        draw(panels[1], name, lambda row: row["total"], color=color, label=name)
    bound = {"color": "tab:green", "linestyle": "--", "label": "kept + working set of one layer"}
    draw(panels[0], COMPRESSED, lambda row: row["kept"] + WORKING, **bound)
    for panel, title in zip(panels, ("K/V bytes alive", "all bytes alive"), strict=True):
        panel.set(title=title, xlabel="share of the run's time", ylabel="MiB", xlim=(0, 1), ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Prefill of {TOKENS} tokens, {LAYERS} layers, Inductor\n{where}", fontsize=8)
    figure.tight_layout()
    save(figure, "memory")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true", help="draw the results that are there")
    if not parser.parse_args().plot_only:
        rows = measure()
        write("memory", rows, "python " + shlex.join(sys.argv))
        for name in (PLAIN, COMPRESSED):
            cache, total = peaks(rows, name)
            most = max(row.full for row in rows if row.run == name) / FULL
            print(f"{name:16} peak {cache / 2**20:6.2f} MiB K/V, {total / 2**20:6.2f} MiB in all; {most:.0f} whole K or V at once")
    plot()


if __name__ == "__main__":
    main()
