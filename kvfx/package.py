"""Packages on disk: a folder of compiled programs, their weights, and a description that says what they take and seals it all.

Reading one needs neither transformers nor torch's compilers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvfx.errors import ArtifactError

FORMAT = "1.1"
ABOUT, PROGRAMS, WEIGHTS = "kvfx.json", "programs.pt2", "weights.safetensors"
VECTORS = ("DEFAULT", "AVX2", "AVX512")  # what x86 processors may have, each with all before it


@dataclass(frozen=True)
class Held:
    """A tensor of the cache, which every entry point takes and writes in place.

    Attributes:
        name: as `StaticCache.tensors` names it.
        dtype: of torch, without "torch.".
        shape: its sizes.
        empty: what an empty cache is filled with.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    empty: int


@dataclass(frozen=True)
class Entry:
    """What an entry point takes and gives; see `entry_point.EntryPoint` and `written_entry_point`.

    Attributes:
        shortest: the fewest new tokens.
        longest: the most.
        masked: whether it takes a mask of real tokens behind the ids.
        checks: whether it also returns if all scores were finite.
        weights: for the name of each constant, the name of a tensor in the weights file.
        counted: whether it takes, in front of the cache, an empty tensor [L + 1, 0] float32, where L is the number of tokens seen.
    """

    shortest: int
    longest: int
    masked: bool
    checks: bool
    weights: Mapping[str, str]
    counted: bool = False


@dataclass(frozen=True)
class About:
    """What a package says of itself.

    Attributes:
        model: class of the decoder.
        policy: canonical text of what it keeps.
        batch: rows of every call.
        vocabulary: token ids are below it.
        max_prompt: tokens of the longest prompt.
        max_new_tokens: tokens that may follow one, asked or generated.
        stop: token ids that end a text.
        pad: token id that rows are filled up with.
        device: type of the device that the programs run on.
        versions: of what made the package.
        machine: what the programs were compiled for.
        fingerprint: what identifies the model, see `kvfx.fingerprint`.
        state: tensors of the cache, in the order in which they are given.
        entries: "prefill", "extend" and "decode"; "first" where decode does not read a prompt of one token.
        files: sha256 of each file beside this description.
        format: of the package.
    """

    model: str
    policy: str
    batch: int
    vocabulary: int
    max_prompt: int
    max_new_tokens: int
    stop: tuple[int, ...]
    pad: int
    device: str
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    fingerprint: Mapping[str, Any]
    state: tuple[Held, ...]
    entries: Mapping[str, Entry]
    files: Mapping[str, str]
    format: str = FORMAT

    def text(self) -> str:
        """As it stands in a package, its own sha256 last."""
        data = asdict(self)
        return json.dumps({**data, "sha256": _seal(data)}, indent=1) + "\n"


def this_machine() -> dict[str, str]:
    """What machine code depends on."""
    return {"system": platform.system(), "processor": platform.machine(), "vectors": torch.backends.cpu.get_cpu_capability()}


def read(path: str | Path) -> About:
    """Read and check the description of a package, and the checksums of all its files.

    Raises:
        ArtifactError: the package is missing, damaged, of an unknown format, or for another machine or version of torch.

    Cost: reads every file once.
    """
    path = Path(path)
    damaged = f"{path} is damaged or no kvfx package"
    try:
        data = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        major = data["format"].split(".")[0]
    except OSError as error:
        raise ArtifactError(
            f"cannot read the package {path}: its {ABOUT} {(error.strerror or str(error)).lower()}. Expected a folder that "
            "kvfx.export wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{damaged}: {ABOUT} cannot be read ({type(error).__name__}). Export it again") from error
    if major != FORMAT.split(".")[0]:
        raise ArtifactError(f"{path} has format {data['format']}, this version reads {FORMAT}. Update kvfx or export again")
    seal = data.pop("sha256", None)
    if seal != _seal(data):
        raise ArtifactError(f"{damaged}: {ABOUT} does not match its checksum. Export it again")
    try:
        data["stop"] = tuple(data["stop"])
        data["state"] = tuple(Held(**{**held, "shape": tuple(held["shape"])}) for held in data["state"])
        data["entries"] = {name: Entry(**entry) for name, entry in data["entries"].items()}
        about = About(**data)
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{path} has fields that this version does not know ({error}). Update kvfx or export again") from error
    _check_machine(path, about)
    for name, digest in about.files.items():
        if not (path / name).is_file():
            raise ArtifactError(f"{damaged}: {name} is missing. Export it again")
        if _digest(path / name) != digest:
            raise ArtifactError(f"{damaged}: {name} does not match its checksum. Export it again")
    return about


def _check_machine(path: Path, about: About) -> None:
    """Machine code does not say by itself where it cannot run."""
    made, here = about.versions["torch"], torch.__version__
    if made.split(".")[:2] != here.split(".")[:2]:
        raise ArtifactError(f"{path} was compiled for torch {made}, and this is {here}. Export it again, or install that version")
    machine = this_machine()
    for name in ("system", "processor"):
        if about.machine[name] != machine[name]:
            raise ArtifactError(f"{path} was compiled for {about.machine[name]}, and this is {machine[name]}. Export it again here")
    needed, there = about.machine["vectors"], machine["vectors"]
    if needed != there and not (needed in VECTORS and there in VECTORS and VECTORS.index(needed) < VECTORS.index(there)):
        raise ArtifactError(f"{path} was compiled for processors with {needed}, and this one has {there}. Export it again here")


@contextlib.contextmanager
def building(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which stands at `path` once the context ends, or nowhere if it fails.

    Raises:
        ArtifactError: something stands there already, or the folder cannot be written.
    """
    path = Path(path)
    check_free(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_free(path)
        os.rename(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write the package {path}: {error.strerror or error}. Nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: str | Path) -> None:
    """Make sure that nothing stands at `path`.

    Raises:
        ArtifactError: something does.
    """
    if Path(path).exists():
        raise ArtifactError(f"{path} exists. Remove it, or export to another place")


def write_about(folder: Path, about: About) -> None:
    """Describe and seal what `folder` holds."""
    files = {file.name: _digest(file) for file in sorted(folder.iterdir())}
    (folder / ABOUT).write_text(replace(about, files=files).text(), encoding="utf-8")


def _seal(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
