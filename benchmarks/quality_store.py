"""Results of `quality.py`, a line of JSON for each question: appended while it runs, resumed, and packed to be committed.

Two kinds of lines. A *setting* is a policy at a keep, on weights, in a series of problems; its name is a digest of all that its
answers depend on, so that a policy whose numbers were changed, or other weights, are another one. An *answer* names its setting:

    {"setting": "1f0c...", "policy": "compactor", "keep": 0.5, "text": "zscore(...) | ...", "weights": "...", ...}
    {"at": "1f0c...", "task": "trace", "tokens": 512, "index": 7, "right": 1, "kl": 0.0123, "gold": 0.75, "bytes": 536424}
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from method import RESULTS


@dataclass(frozen=True)
class Setting:
    """What answers depend on, beside task, length and index.

    Attributes:
        policy: its name, without the keep; "none" is the full cache.
        keep: the fraction kept.
        text: the canonical text of the policy at this keep.
        weights: sha256 of the model's file.
        problems: sha256 of the first problem of each task, and the seed of all.
        where: the machine and versions, and the command; not part of the digest.
    """

    policy: str
    keep: float
    text: str
    weights: str
    problems: str
    where: str = field(default="", compare=False)

    @property
    def digest(self) -> str:
        """The setting's name in answers, 12 hexadecimal digits."""
        named = json.dumps([self.text, self.weights, self.problems])
        return hashlib.sha256(named.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Answer:
    """One question, answered.

    Attributes:
        at: digest of the setting.
        task, tokens, index: of the problem.
        right: 1 if every token of the answer was right, else 0.
        kl: KL divergence in nats from the full cache's next-token distribution, mean over the reference answer's tokens.
        gold: share of the answer's statements that was kept, mean over layers and heads.
        bytes: held for the context.
    """

    at: str
    task: str
    tokens: int
    index: int
    right: int
    kl: float
    gold: float
    bytes: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What there is one answer of."""
        return self.at, self.task, self.tokens, self.index


class Store:
    """The lines of `NAME.jsonl` in a folder; of `NAME.jsonl.gz`, which is committed, as long as the former is not there.

    A last line without its end, of a run that was killed, is dropped. A line that is neither kind raises ValueError.
    """

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.name, self.folder = name, folder
        self.path = folder / f"{name}.jsonl"
        self.packed = folder / f"{name}.jsonl.gz"
        self.settings: dict[str, Setting] = {}
        self.answers: dict[tuple[str, str, int, int], Answer] = {}
        self._take(self._read())

    def _read(self) -> str:
        if self.path.exists():
            return self.path.read_text(encoding="utf-8")
        return gzip.decompress(self.packed.read_bytes()).decode() if self.packed.exists() else ""

    def _take(self, text: str) -> None:
        whole, _, torn = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                data = json.loads(line)
                if "setting" in data:
                    digest = data.pop("setting")
                    self.settings[digest] = Setting(**data)
                else:
                    answer = Answer(**data)
                    self.answers[answer.key] = answer
            except (TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{self.path.name}, line {number} is no result: {line[:80]}. Mend or remove it.") from error
        if torn and self.path.exists():
            _replace(self.path, (whole + "\n" if whole else "").encode())

    def has(self, setting: Setting, task: str, tokens: int, index: int) -> bool:
        """Whether this question was answered before."""
        return (setting.digest, task, tokens, index) in self.answers

    def forget_all_but(self, today: Callable[[str, float], Setting | None]) -> None:
        """Forget answers under settings that are no longer what `today` makes of their policy and keep; no file is changed."""
        self.settings = {digest: each for digest, each in self.settings.items() if today(each.policy, each.keep) == each}
        self.answers = {key: each for key, each in self.answers.items() if each.at in self.settings}

    def add(self, setting: Setting, answers: Iterable[Answer]) -> None:
        """Append answers in one write, their setting in front if it is new."""
        if not self.path.exists() and self.packed.exists():
            _replace(self.path, gzip.decompress(self.packed.read_bytes()))
        lines = []
        if setting.digest not in self.settings:
            self.settings[setting.digest] = setting
            lines.append(_setting_line(setting))
        for answer in answers:
            self.answers[answer.key] = answer
            lines.append(_line(asdict(answer)))
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def pack(self) -> Path:
        """Write `NAME.jsonl.gz` in place of `NAME.jsonl`, sorted: equal results are equal files, in whatever order they came."""
        used = {answer.at for answer in self.answers.values()}
        order = sorted((s.policy, -s.keep, digest) for digest, s in self.settings.items() if digest in used)
        lines = [_setting_line(self.settings[digest]) for *_, digest in order]
        lines += [_line(asdict(self.answers[key])) for key in sorted(self.answers)]
        _replace(self.packed, gzip.compress("".join(lines).encode(), mtime=0))
        self.path.unlink(missing_ok=True)
        return self.packed


def _setting_line(setting: Setting) -> str:
    return _line({"setting": setting.digest, **asdict(setting)})


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":")) + "\n"


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
