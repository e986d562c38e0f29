"""AOTInductor: machine code of exported programs, and the archive that holds several. The only file that calls it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aot_compile
from torch._inductor.package import load_package, package_aoti
from torch.export import ExportedProgram

from kvfx.passes import capture

Files = Any  # paths of what Inductor wrote for one program

# Weights stay outside, so that programs share them. The last as for compiled models, see `capture`.
SETTINGS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "reorder_for_locality": False,
}


class Specialised(Exception):
    """Raised where machine code would be right for some lengths only."""


def compile_ahead(program: ExportedProgram, lengths: Sequence[range], total: int, settings: Mapping[str, Any]) -> Files:
    """Compile a program that is to run at `lengths`.

    Args:
        program: what is compiled, for the device that its tensors are on.
        lengths: of its symbols, if it has any.
        total: the most that they add up to.
        settings: further ones of Inductor.

    Raises:
        Specialised: Inductor took for granted what is not true of all lengths.
    """
    args, kwargs = program.example_inputs
    module = program.module(check_guards=False)
    for name, tensor in program.constants.items():
        owner, _, attribute = name.rpartition(".")
        part = module.get_submodule(owner)
        if isinstance(tensor, torch.Tensor) and attribute not in part._buffers:  # only weights and buffers keep their names
            delattr(part, attribute)
            part.register_buffer(attribute, tensor)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)  # of torch, to itself
        files = aot_compile(module, args, kwargs, options={**SETTINGS, **settings})
    false = capture.untrue(program, *lengths, total=total)
    if false:
        raise Specialised("; ".join(false))
    return files


def write_archive(path: Path, programs: dict[str, Files]) -> None:
    """Put compiled programs, by name, into one archive."""
    package_aoti(str(path), programs)


def constants_of(path: Path, name: str) -> list[str]:
    """Names of the constants that a program of an archive is to be given before it runs."""
    return sorted(load_package(str(path), name).get_constant_fqns())
