"""What holds for every Triton kernel, beside its answers, which the tests of its operator judge."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, MAKE
from kernel_floors import FLOORS
from torch import Tensor
from torch.utils._pytree import tree_leaves

from forms import kernel_answers, run_kernel
from kvfx.kernels import OPS, Dims
from test_kernels import DTYPES, argument_names, replaced, rows_are_independent, variants
from yardstick import assert_within_rounding

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "kernel_resources.csv"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes that one program may take
KERNELS = [op for op in OPS.values() if op.triton is not None]


def resources(*options: str) -> str:
    """The table of what kernels take of each chip. Compiled in a process of its own, since kernels of this one are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_fits(table: str, cases: list[str]) -> None:
    """Every kernel of every operator runs on every chip, from registers and shared memory alone, in graphs of any length."""
    rows = list(csv.DictReader(io.StringIO(table)))
    assert {(row["op"], row["case"], row["chip"]) for row in rows} == {
        (case.op, case.name, chip) for case in CASES if case.name in cases for chip in SHARED
    }
    for row in rows:
        assert int(row["spills"]) == 0, row
        assert int(row["shared"]) <= SHARED[row["chip"]], row
        assert row["lengths"] == "any", row
        # What torch takes to be written it copies first: that must never be the keys of a prompt.
        taken = set(row["writes"].split()) & set(row["given"].split())
        assert len(taken) == len(OPS[row["op"]].written), row
        assert row["writes"], row


@pytest.mark.parametrize("op", KERNELS, ids=str)
def test_a_kernel_has_the_schema_of_its_operator(op):
    schemas = (str(op.overload._schema), str(op.kernel._schema).replace(f"{op.name}_triton", op.name))
    # Of a kernel every size may be a symbol; and what is written goes by another letter.
    own, other = (re.sub(r"\(\w+!\)", "(!)", schema.replace("SymInt", "int")) for schema in schemas)
    assert own == other


def test_every_kernel_has_sizes_at_which_it_is_compiled_and_timed():
    names = {op.name for op in KERNELS}
    assert names == set(MAKE)
    assert names == set(FLOORS)


def test_kernels_compile_for_every_chip_without_spills():
    assert_fits(resources("--cases", "bf16"), ["bf16"])


@pytest.mark.slow
def test_kernels_of_every_size_compile_for_every_chip_without_spills():
    table = resources()
    if os.environ.get("KVFX_WRITE_RESOURCES"):
        TABLE.write_text(table)
    assert_fits(table, [case.name for case in CASES])


def test_the_committed_table_of_resources_holds_every_kernel_and_size():
    assert_fits(TABLE.read_text(), [case.name for case in CASES])


@pytest.mark.sample(6)
@pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op in KERNELS for dtype in DTYPES if not op.written], ids=str)
def test_finite_input_never_gives_nan(op, dtype):
    for size in (0.0, 1e-4, 300.0):
        for _, arguments in variants(op, Dims(S=17), dtype):
            scaled = [x * size if isinstance(x, Tensor) and x.dtype == dtype else x for x in arguments]
            outputs = tree_leaves(run_kernel(op.name, *scaled))
            assert not any(x.isnan().any() for x in outputs)


@pytest.mark.sample(4)
@pytest.mark.parametrize("op", [op for op in KERNELS if rows_are_independent(op)], ids=str)
def test_rows_of_a_batch_do_not_see_each_other(op):
    dims = Dims(B=3, Hkv=2)
    for _, arguments in variants(op, dims):
        together = kernel_answers(op.name, *arguments)
        for b in range(dims.B):
            row = [x[b : b + 1] if isinstance(x, Tensor) and len(x) == dims.B else x for x in arguments]
            for whole, alone in zip(together, kernel_answers(op.name, *row), strict=True):
                assert_within_rounding(whole[b : b + 1], alone, alone.double())


@pytest.mark.sample(2)
@pytest.mark.parametrize("op", [op for op in KERNELS if "valid" in argument_names(op)], ids=str)
def test_flags_of_padding_may_lie_in_memory_row_by_row_or_token_by_token(op):
    arguments = dict(variants(op, Dims(B=3)))["padded"]
    where = argument_names(op).index("valid")
    by_token = replaced(arguments, where, arguments[where].t().contiguous().t())
    assert torch.equal(run_kernel(op.name, *by_token), run_kernel(op.name, *arguments))
