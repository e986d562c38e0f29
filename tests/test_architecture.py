"""The rooms and the one direction between them, read from the source: kvfx -> passes -> kernels -> torch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvfx
from kvfx.kernels import OPS

ROOT = Path(__file__).parents[1]

# A room's name in imports, and what its files may import besides the standard library.
ROOMS = {
    "kvfx": (
        "kvfx",
        (
            "kvfx",
            "torch",
            "numpy",
            "transformers",
            "optree",
            "safetensors",
            "lark",
            "yaml",
            "rich",
            "tokenizers",
            "typer",
            "matplotlib",
        ),
    ),
    "passes": ("kvfx.passes", ("kvfx.passes", "kvfx.kernels", "torch")),
    "kernels": ("kvfx.kernels", ("kvfx.kernels", "torch")),
}
# The only files that reach into what torch and transformers do not promise to keep: how far, and for what.
PRIVATE = {
    "passes/capture.py": ("torch", "Dynamo's graph, its fake tensors, make_fx and the backends"),
    "passes/aoti.py": ("torch._inductor", "AOTInductor has no public name"),
    "kvfx/packaged.py": ("torch._C._aoti", "the C++ loader; its public callers import torch's compilers"),
    "kernels/op.py": ("torch._ops", "OpOverload, the type of a registered operator, has no public name"),
    "kvfx/hf.py": ("transformers", "how a model is put together differs between its versions"),
}
MAX_LINES = 300
LONGER: dict[str, str] = {}  # file: why it is not two files

FILES = {str(path.relative_to(ROOT)): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
INNER = [file for file in FILES if not file.startswith("kvfx/")]


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(path: Path) -> Iterator[tuple[str, str, str]]:
    """Of each name that a file imports: the name it goes by, the module, and its full name."""
    folder = path.relative_to(ROOT).parent.parts
    package = [*ROOMS[folder[0]][0].split("."), *folder[1:]] if folder[0] in ROOMS else []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                top = name.name.split(".")[0]
                yield name.asname or top, name.name, name.name if name.asname else top
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, node.module] if node.module else above)
            yield from ((name.asname or name.name, module, f"{module}.{name.name}") for name in node.names)


def full_names(path: Path) -> Iterator[str]:
    """What a file imports, and every attribute it reads of that."""
    local = {}
    for name, module, full in imports(path):
        local[name] = full
        yield from (module, full)
    for node in ast.walk(ast.parse(path.read_text())):
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id in local:
            yield ".".join([local[node.id], *attributes])


def is_private(name: str) -> bool:
    library, *parts = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    if library == "torch":
        return (hidden or is_within(name, "torch.fx.experimental")) and not is_within(name, "torch.ops", "torch._check")
    if library == "transformers":
        return hidden or (len(parts) > 1 and parts[0].islower() and parts[0] not in ("cache_utils", "logging"))
    return False


def calls(file: str) -> Iterator[ast.expr]:
    return (node.func for node in ast.walk(ast.parse(FILES[file].read_text())) if isinstance(node, ast.Call))


def test_imports_go_one_way():
    wrong = []
    for file, path in FILES.items():
        allowed = ROOMS[Path(file).parts[0]][1] + (("triton",) if file.endswith("_triton.py") else ())
        modules = sorted({module for _, module, _ in imports(path)})
        wrong += [f"{file} imports {m}" for m in modules if not is_within(m, *allowed, *sys.stdlib_module_names)]
    assert wrong == []


def test_private_parts_are_used_in_one_place():
    wrong = []
    for file, path in FILES.items():
        allowed = PRIVATE[file][0] if file in PRIVATE else "nothing"
        names = sorted({name for name in full_names(path) if is_private(name)})
        wrong += [f"{file} uses {name}" for name in names if not is_within(name, allowed)]
    assert wrong == []


def test_files_are_small_and_named_for_their_subject():
    lines = {file: path.read_text().count("\n") for file, path in FILES.items()}
    assert {file: count for file, count in lines.items() if count > MAX_LINES and file not in LONGER} == {}
    assert [file for file in FILES if Path(file).stem in ("utils", "helpers", "common")] == []


def test_graphs_and_kernels_neither_print_nor_wait_for_the_device():
    assert [f for f in INNER for call in calls(f) if isinstance(call, ast.Name) and call.id == "print"] == []
    assert [f for f in INNER for call in calls(f) if isinstance(call, ast.Attribute) and call.attr == "item"] == []


def test_public_names_say_what_they_are():
    assert [name for name in kvfx.__all__ if not getattr(kvfx, name).__doc__] == []


def test_every_operator_file_has_its_row():
    files = {Path(file).stem for file in FILES if file.startswith("kernels/") and "\nOP = " in FILES[file].read_text()}
    assert files == {row.reference.__module__.removeprefix("kvfx.kernels.") for row in OPS.values()}


@pytest.mark.parametrize("name", OPS)
def test_row_names_the_reference_and_the_kernel_beside_it(name):
    row = OPS[name]
    stem = row.reference.__module__.rpartition(".")[2]
    assert row.name == row.reference.__name__ == name
    assert row.reference.__doc__
    beside = (ROOT / "kernels" / f"{stem}_triton.py").exists()
    assert row.triton == (f"{stem}_triton:{name}" if beside else None)


def test_the_reference_shares_nothing_with_what_it_judges():
    files = (ROOT / "tests").glob("reference*.py")
    assert [m for file in files for _, m, full in imports(file) if is_within(full, "kvfx.passes", "triton")] == []
