"""Named policies, read from `presets.toml`: a policy text with parameters, and the source of every number in it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from kvfx.errors import unknown_name
from kvfx.scores import SCORES


@dataclass(frozen=True)
class Preset:
    """A row of `presets.toml`: the policy's text with `{parameters}`, their defaults, every number's source."""

    summary: str
    paper: str
    policy: str
    params: Mapping[str, str]
    sources: Mapping[str, str]

    @property
    def text(self) -> str:
        """The policy with every parameter at its default."""
        return self.policy.format(**self.params)


def _load() -> dict[str, Preset]:
    rows = tomllib.loads(resources.files("kvfx").joinpath("presets.toml").read_text(encoding="utf-8"))
    for row in rows.values():
        row["params"] = {param: str(default) for param, default in row["params"].items()}
    return {name: Preset(**row) for name, row in rows.items()}


PRESETS: dict[str, Preset] = _load()


def expand(name: str, args: Mapping[str, str]) -> str:
    """Return the policy text of preset `name` (`compactor`, `compactor@kvpress`) with some parameters replaced."""
    preset = PRESETS[name]
    for arg in args:
        if arg not in preset.params:
            raise unknown_name(f"parameter of the preset {name}", arg, preset.params)
    return preset.policy.format(**{**preset.params, **args})


def label(text: str) -> str:
    """Return a canonical policy text as a preset, `compactor:0.5` or `random(seed=3):0.25`; or as it is."""
    for name, preset in PRESETS.items():
        if match := re.fullmatch(_pattern(preset.policy), text):
            args = {param: value for param, value in match.groupdict().items() if value != preset.params[param]}
            keep = match.groupdict().get("keep")
            changed = ", ".join(f"{param}={args[param]}" for param in preset.params if param in args and param != "keep")
            return name + (f"({changed})" if changed else "") + (f":{keep}" if keep else "")
    return text


def _pattern(policy: str) -> str:
    """Return the pattern of a preset's texts; a parameter that stands again must stand for the same again."""
    named: set[str] = set()

    def group(match: re.Match[str]) -> str:
        name = match[1]
        if name in named:
            return f"(?P={name})"
        named.add(name)
        return rf"(?P<{name}>\w+|-?[\d.][\w.+/-]*)"

    return re.sub(r"\\\{(\w+)\\\}", group, re.escape(policy))


def table_markdown() -> str:
    """Return the tables of atoms, presets and the presets' numbers, as they stand in `docs/policy.md`."""
    atoms = ["| atom and its parameters | what it favours | reads | cost | source |", "|---|---|---|---|---|"]
    for name, row in SCORES.items():
        params = "".join(f"<br>`{p.name}={p.default}`: {p.takes}" for p in row.params)
        atoms.append(f"| `{name}`{params} | {row.summary} | {', '.join(row.taps)} | {row.cost} | {row.source} |")
    presets = ["| preset | policy | what it is | paper |", "|---|---|---|---|"]
    numbers = ["| preset | number | source |", "|---|---|---|"]
    for name, preset in PRESETS.items():
        text = preset.text.replace("|", "\\|")
        presets.append(f"| `{name}` | `{text}` | {preset.summary} | {preset.paper} |")
        for key, source in preset.sources.items():
            number = f"{key}={preset.params[key]}" if key in preset.params else key
            numbers.append(f"| `{name}` | `{number}` | {source} |")
    return "\n\n".join("\n".join(table) for table in (atoms, presets, numbers))
