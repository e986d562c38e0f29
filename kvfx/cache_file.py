"""Cache files: safetensors, format 1, readable whole or not at all.

Every tensor has its sha256 in the metadata, and the metadata themselves one over the file's header, so that any changed byte shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from kvfx.cache import Cache
from kvfx.errors import ArtifactError
from kvfx.form import Form
from kvfx.ragged_cache import RaggedCache

FORMAT = "1.0"
BLANK = "0" * 64


def save_cache(cache: Cache, path: str | Path) -> None:
    """Write `cache` to `path`; an existing file is replaced only when the new one is complete.

    Raises:
        ArtifactError: the cache holds nothing yet, or the file cannot be written.
    """
    if cache.is_empty:
        raise ArtifactError(f"nothing to save to {path}: the cache is empty. Fill it by model.compress(ids) first")
    room = {"layout": cache.layout, "capacity": getattr(cache, "capacity", None), "tokens": getattr(cache, "tokens", None)}
    if cache.fingerprint is None and cache.owner is not None:
        cache.fingerprint = cache.owner.fingerprint()
    cache = cache.stored()
    held = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in cache.tensors().items()}
    about = {
        "format": FORMAT,
        **room,
        **cache.about(),
        "form": None if cache.form is None else cache.form.as_data(),
        "store": {"dtype": str(cache.layers[0].dtype).removeprefix("torch."), "scales": None},
        "fingerprint": cache.fingerprint,
        "sha256": {name: _digest(tensor) for name, tensor in held.items()},
    }
    data = write_tensors(held, {"kvfx": json.dumps(about, sort_keys=True), "header_sha256": BLANK})
    _write_whole(Path(path), _seal(data))


def load_cache(path: str | Path, device: str | torch.device = "cpu") -> Cache:
    """Read a cache that `Cache.save` wrote, in the layout that it had.

    Whether it fits a model is checked when it is first given to one.

    Raises:
        ArtifactError: the file is missing, truncated, changed, or of an unknown format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read the cache file {path}: {error.strerror or error}") from error
    about, tensors = _open(data, path)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    cache: Cache = (RaggedCache if about["layout"] == "ragged" else Cache).of_tensors(tensors, about)
    cache.fingerprint = about["fingerprint"]
    if about.get("form") is not None:
        cache.form = Form.of_data(about["form"])
    cache.mark()
    return cache.to(about["layout"], about["capacity"], about["tokens"])


def _open(data: bytes, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    damaged = f"{path} is damaged or no kvfx cache"
    try:
        header = json.loads(_header(data))
        metadata = header["__metadata__"]
        about = json.loads(metadata["kvfx"])
        major = about["format"].split(".")[0]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{damaged}: its header cannot be read ({type(error).__name__}). Save it again") from error
    if major != FORMAT.split(".")[0]:
        raise ArtifactError(f"{path} has format {about['format']}, this version reads {FORMAT}. Update kvfx or compress again")
    if _header_digest(data, metadata.get("header_sha256", BLANK)) != metadata.get("header_sha256"):
        raise ArtifactError(f"{damaged}: the header does not match its checksum. Save it again")
    try:
        tensors = read_tensors(data)
    except Exception as error:  # safetensors raises its own kinds for truncated files
        raise ArtifactError(f"{damaged}: {error}. Save it again") from error
    for name, digest in about["sha256"].items():
        if name not in tensors or _digest(tensors[name]) != digest:
            raise ArtifactError(f"{damaged}: tensor {name} does not match its checksum. Save it again")
    return about, tensors


def _header(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _seal(data: bytes) -> bytes:
    """Fill in the checksum of the header, computed while its place is blank."""
    digest = _header_digest(data, BLANK).encode()
    header = _header(data)
    return (
        data[:8]
        + header.replace(f'"header_sha256":"{BLANK}"'.encode(), b'"header_sha256":"' + digest + b'"')
        + data[8 + len(header) :]
    )


def _header_digest(data: bytes, digest: str) -> str:
    """sha256 over the header's length and bytes, with `digest` blanked."""
    blank = _header(data).replace(f'"header_sha256":"{digest}"'.encode(), f'"header_sha256":"{BLANK}"'.encode())
    return hashlib.sha256(data[:8] + blank).hexdigest()


def _digest(tensor: Tensor) -> str:
    flat = tensor.contiguous().flatten()
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(about + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ArtifactError(
                f"cannot write the cache file {path}: {error.strerror or error}. What was there is untouched"
            ) from error
        raise
