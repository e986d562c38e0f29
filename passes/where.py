"""Where in a model's source a node of its graph was written, and in which module it stands."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import fx

from kvfx.passes.report import Report

FRAME = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)')


def locate(module: fx.GraphModule, report: Report) -> None:
    """Fill in `where` of the sites and refusals that do not have it yet, while their nodes still stand."""
    for site in report.sites:
        if not site.where and "attention" in site.nodes:
            site.where = where(site.nodes["attention"])
    if not all(refusal.where for refusal in report.refusals):
        nodes = {node.name: node for node in module.graph.nodes}
        report.refusals = [
            refusal if refusal.where or refusal.node not in nodes else replace(refusal, where=where(nodes[refusal.node]))
            for refusal in report.refusals
        ]


def where(node: fx.Node) -> str:
    """`module: file:line: code` of the innermost line that is not of torch or kvfx; empty if the graph does not say."""
    frames = [frame for frame in FRAME.finditer(node.meta.get("stack_trace") or "") if not _is_ours(frame["file"])]
    if not frames:
        return ""
    frame, path = frames[-1], _module_path(node)
    line = f"{_short(frame['file'])}:{frame['line']}: {frame['code'].strip()}"
    return f"{path}: {line}" if path else line


def _module_path(node: fx.Node) -> str:
    """The path of the module whose forward made `node`, as `named_modules` of the model calls it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    # Dynamo writes L['model'].model.layers.0, and behind a wrapper L['model']._modules['inner'].
    path = re.sub(r"(?:\._modules)?\['?(\w+)'?\]", r".\1", path.removeprefix("L"))
    return path.split(".", 2)[2] if path.count(".") > 1 else ""


def _is_ours(file: str) -> bool:
    package = sys.modules[__name__.partition(".")[0]]
    ours = [*torch.__path__, *package.__path__, str(Path(__file__).parent)]
    return any(Path(file).is_relative_to(folder) for folder in ours)


def _short(file: str) -> str:
    """`file` as it is imported, without the folder that Python found it in."""
    folders = [folder for folder in sys.path if folder and Path(file).is_relative_to(folder)]
    return str(Path(file).relative_to(max(folders, key=len))) if folders else file
