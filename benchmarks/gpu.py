"""Everything that only a GPU can tell, in one call: of less than 8 minutes, if it takes as long as it is meant to.

    python benchmarks/gpu.py                 # tests of all kernels, their times, prefill and decode of layers like an 8B model's
    python benchmarks/gpu.py --quick         # the same at small sizes
    python benchmarks/gpu.py --only kernels  # one part: tests, kernels, prefill or decode
    python benchmarks/gpu.py --predict       # without a GPU: what the datasheets' ceilings allow, measured cells empty

Writes gpu_kernels, gpu_policies, gpu_prefill and gpu_decode (.csv, .md) to results/, after each row, so that a run that is cut
short keeps what it has. `--device cpu` runs the same code on tiny sizes, to see that it works, and writes to another folder.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_models
import method
import torch
import transformers
import triton
from kernel_floors import DATASHEETS, Ceilings

PARTS = ("tests", "kernels", "prefill", "decode")
LENGTHS = (8192, 32768, 131072)
KEEPS = [
    ("none", "static"),
    ("knorm:0.5", "static"),
    ("knorm:0.25", "static"),
    ("none", "ragged"),
    ("compactor@engine:0.5", "ragged"),
]


def run_tests() -> None:
    """Every test that judges a kernel, natively; stops if one fails."""
    root = Path(__file__).parents[1]
    tests = sorted(str(path) for path in (root / "tests").glob("test_kernels*.py"))
    tests += [str(root / "tests" / name) for name in ("test_ragged_attention.py", "test_triton.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton and not compile and not committed", *tests]
    if subprocess.run(command, cwd=root, check=False).returncode:
        raise SystemExit("a kernel is wrong on this device, so nothing was timed: see the failures above")


def keep(name: str, rows: Iterable[Any], where: str, table: Callable[[str], str]) -> None:
    """Write rows as they come, and show the table of all."""
    kept: list[Any] = []
    for row in rows:
        kept.append(row)
        method.write(name, kept, "python " + shlex.join(sys.argv), where)
        (method.RESULTS / f"{name}.md").write_text(table(name))
    print(table(name), flush=True)


def versions() -> str:
    libraries = (torch, triton, transformers)
    return ", ".join(f"{library.__name__} {library.__version__}" for library in libraries) + f", Python {platform.python_version()}"


def described(ceilings: Ceilings) -> str:
    return f"{ceilings.bandwidth / 1e12:.2f} TB/s copied, {ceilings.matmul / 1e12:.0f} TFLOP/s in bf16 products"


def predict() -> None:
    """Write the table of kernels with nothing measured."""
    ceilings = DATASHEETS[-1]
    where = f"Predicted for {ceilings.name} from its datasheet ({described(ceilings)}), nothing measured: no GPU was at hand"
    keep("gpu_kernels", gpu_kernels.predicted(LENGTHS, ceilings), where, gpu_kernels.table)
    keep("gpu_policies", gpu_kernels.policy_floors(LENGTHS, ceilings), where, gpu_kernels.policy_table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--predict", action="store_true", help="floors alone; needs no GPU")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code")
    parser.add_argument("--layers", type=int, default=4, help="of the model of prefill and decode")
    given = parser.parse_args()
    if given.predict:
        return predict()
    if given.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --predict writes what can be said without one")
    tiny = given.device == "cpu"
    if tiny:
        method.RESULTS = Path(".") / "results_of_a_trial"
    ceilings = gpu_kernels.ceilings_of(given.device)
    where = f"{ceilings.name}, {described(ceilings)}; {versions()}"
    print(where, flush=True)
    lengths = (64, 128) if tiny else (4096,) if given.quick else LENGTHS
    prompts = (64,) if tiny else (4096,) if given.quick else (8192, 32768)
    if "tests" in given.only and not tiny:
        run_tests()
    if "kernels" in given.only:
        keep("gpu_policies", gpu_kernels.policy_floors(lengths, ceilings), where, gpu_kernels.policy_table)
        keep("gpu_kernels", gpu_kernels.measured(lengths, ceilings, given.device, not tiny), where, gpu_kernels.table)
    if "prefill" in given.only:
        policies = gpu_models.POLICIES[:1] if tiny else gpu_models.POLICIES
        rows = gpu_models.prefills(given.layers, prompts, policies, given.device, 2 if tiny else 11)
        keep("gpu_prefill", rows, where, gpu_models.prefill_table)
    if "decode" in given.only:
        batches, steps = ((1, 2), 2) if tiny else ((1, 8), 64)
        decodes = gpu_models.decodes(given.layers, prompts[-1], batches, KEEPS, given.device, steps)
        keep("gpu_decode", decodes, where, gpu_models.decode_table)
    return None


if __name__ == "__main__":
    main()
