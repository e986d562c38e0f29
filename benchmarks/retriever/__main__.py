"""Train the packaged model: what `make train` runs.

From benchmarks/:

    python -m retriever             # train, from the last checkpoint on; then write the model, its log and its accuracy
    python -m retriever --fresh     # train from the beginning
    python -m retriever --finish    # do not train: write what the last checkpoint holds

A GPU is used if there is one, else two processes of one thread each. What is written: kvfx/demo/model and
benchmarks/results/retriever_training.{jsonl,md}.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from retriever.export import install
from retriever.recipe import RECIPE
from retriever.run import LOG, Run

# Freed memory is kept, not handed back and faulted in again with each step: up to 40 % of the time on a CPU.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}


def main() -> None:
    """Read the command line and run."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="drop the checkpoint and begin again")
    parser.add_argument("--finish", action="store_true", help="write and measure the last checkpoint without training")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "build" / "retriever")
    parser.add_argument("--processes", type=int, default=1 if gpu else 2)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers: slower, and no compiler is needed")
    options = parser.parse_args()
    if options.fresh and options.finish:
        parser.error("--fresh drops what --finish writes; give one of them")
    if options.device != "cpu" and options.processes > 1:
        parser.error(f"{options.processes} processes on {options.device}; expected 1, several are for CPUs")
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)  # read by processes when they start
    command = "python -m retriever" + (" --eager" if options.eager else "")
    run = Run(RECIPE, options.folder, command, options.processes, options.device, not options.eager)
    try:
        trained = run.start(fresh=options.fresh, training=not options.finish)
    except ValueError as error:
        parser.error(str(error))
    install(trained, options.folder / LOG)


if __name__ == "__main__":
    main()
