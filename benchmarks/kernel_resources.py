"""Registers, spills and shared memory of every kernel on every chip, compiled without one.

python benchmarks/kernel_resources.py --out benchmarks/results/kernel_resources.csv
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kernel_cases import CASES, Case
from launches import Launch, launches, serves_every_length
from triton import knobs

from kvfx.kernels import OPS

CHIPS = (80, 90, 100)  # sm_80 and so on


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of one chip, for one kind of arguments.

    Attributes:
        op, case: of the table of cases.
        kernel: name.
        chip: e.g. sm_90.
        warps, stages: of a program.
        registers: of a thread.
        spills: bytes that do not fit there, written or read.
        shared: bytes of shared memory of a program.
        writes: its arguments that it writes to, as torch.compile finds out.
        given: those of its arguments that are the operator's own.
        lengths: "any" if one graph serves all, else "few".
    """

    op: str
    case: str
    kernel: str
    chip: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    writes: str
    given: str
    lengths: str


def resources(case: Case, chips: Iterable[int]) -> Iterator[Resources]:
    """Compile what a case launches."""
    arguments = case.arguments()
    lengths = "any" if serves_every_length(OPS[case.op], arguments) else "few"
    for launch in launches(OPS[case.op], arguments):
        for chip in chips:
            yield measure(case, launch, chip, lengths)


def measure(case: Case, launch: Launch, chip: int, lengths: str) -> Resources:
    """Compile one launch for one chip."""
    compiled = launch.compile(chip)
    registers, spills = _assembled(compiled.asm["ptx"], chip)
    options = launch.options
    return Resources(
        case.op, case.name, launch.name, f"sm_{chip}", options.get("num_warps", 4), options.get("num_stages", 3), registers, spills,
        compiled.metadata.shared, " ".join(sorted(launch.writes())), " ".join(sorted(launch.given)),
        lengths,
    )  # fmt: skip


@functools.cache  # operators that share a kernel share its code
def _assembled(ptx: str, chip: int) -> tuple[int, int]:
    """Registers and bytes of spills, as ptxas tells."""
    ptxas: Any = knobs.nvidia.ptxas_blackwell if chip >= 100 and hasattr(knobs.nvidia, "ptxas_blackwell") else knobs.nvidia.ptxas
    version = re.search(r"\.target (sm_\w+)", ptx)
    assert version is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas.path, "-v", f"--gpu-name={version[1]}", str(source), "-o", str(source.with_suffix(".cubin"))]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.returncode and hasattr(knobs.nvidia, "ptxas_blackwell"):  # the older assembler does not know newer PTX
            command[0] = knobs.nvidia.ptxas_blackwell.path
            told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise RuntimeError(f"{command[0]} cannot assemble a kernel for sm_{chip}: {told.stderr[-500:]}")
    registers = re.search(r"Used (\d+) registers", told.stderr)
    assert registers is not None, told.stderr
    return int(registers[1]), sum(int(size) for size in re.findall(r"(\d+) bytes spill", told.stderr))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="CSV to write; the default is to print it")
    parser.add_argument("--ops", nargs="*", default=sorted({case.op for case in CASES}))
    parser.add_argument("--cases", nargs="*", default=sorted({case.name for case in CASES}))
    parser.add_argument("--chips", nargs="*", type=int, default=list(CHIPS))
    given = parser.parse_args()
    chosen = [case for case in CASES if case.op in given.ops and case.name in given.cases]
    with given.out.open("w", newline="") if given.out else sys.stdout as file:
        table = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        table.writeheader()
        for case in chosen:
            for row in resources(case, given.chips):
                table.writerow(asdict(row))
                file.flush()


if __name__ == "__main__":
    main()
