"""Export: a compressed decoder as a package, compiled by AOTInductor, that runs without Python."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from kvfx import package
from kvfx.errors import InputError, UnsupportedModel
from kvfx.package import PROGRAMS, WEIGHTS, Entry
from kvfx.passes import aoti
from kvfx.policy import Policy
from kvfx.written import Calls
from kvfx.written_entry_points import entry_points

# What turns text into ids and back, where the model was loaded from; its names are transformers'.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export(
    model: Any,
    path: str | Path,
    policy: str | Mapping[str, Any] | Policy | None = None,
    *,
    max_prompt: int,
    max_new_tokens: int,
    batch: int = 1,
    tokenizer: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    call: Calls | None = None,
) -> Path:
    """Write a decoder whose prefill compresses its cache as a folder that runs without Python; see docs/export.md.

    The folder holds machine code of entry points that share one file of weights: `prefill` compresses a prompt, `extend` appends a
    block of tokens whole, `decode` appends one. `kvfx.load` runs it, as does C++.

    Args:
        model: what `compile` returned, or with `policy` any decoder that `compile` takes.
        path: the folder to make; nothing may stand there.
        policy: what to keep; the default is the policy of a compiled model.
        max_prompt: tokens of the longest prompt, padding included.
        max_new_tokens: tokens that may follow a prompt, asked or generated.
        batch: rows of every call. With several, rows of a prompt may be padded on the left.
        tokenizer: a folder with `tokenizer.json`, which is copied; the default is where the model was loaded from.
        settings: further settings of Inductor, such as `{"aot_inductor.compile_wrapper_opt_level": "O0"}`.
        call: how a decoder without transformers code is called: `(ids, past, seen) -> arguments by name`, with new ids [B, S], the
            past in the decoder's own form, None if it holds none or is no argument, and the number of tokens seen. The default
            takes the first argument for the ids and the only other one for the past. Where the past stands in arguments that the
            decoder writes to, give empty ones.

    Returns:
        The path.

    Raises:
        InputError: the numbers make no sense together, `model` is not compiled and there is no policy, or it is not known how it
            is called.
        PolicyError: how many slots the policy keeps follows from data; the message says which part of it.
        UnsupportedModel: the model cannot be traced, or not for all lengths.
        SiteRefused: an attention is not understood.
        ArtifactError: something stands at `path`, or it cannot be written.

    Cost: three traces and three runs of a C++ compiler, five for a decoder without transformers code, a minute or two for a few
        layers; bytes of the weights on disk.
    """
    package.check_free(path)
    files = _tokenizer_files(model, tokenizer)
    points = entry_points(model, policy, max_prompt, max_new_tokens, batch, settings or {}, call)
    with package.building(path) as folder:
        made = points.programs()
        aoti.write_archive(folder / PROGRAMS, {kind: points.compile(kind, *each) for kind, each in made.items()})
        entries = _share_weights(folder, made)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        package.write_about(folder, points.about(entries))
    return Path(path)


def _share_weights(folder: Path, made: Mapping[str, tuple[Entry, ExportedProgram]]) -> dict[str, Entry]:
    """Write each tensor that entry points need once, and say of each of their constants which it is."""
    stored: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    entries = {}
    for kind, (entry, program) in made.items():
        values = {**program.state_dict, **program.constants}
        weights = {}
        for constant in aoti.constants_of(folder / PROGRAMS, kind):
            tensor = values[constant].detach()
            if not tensor.is_contiguous():
                raise UnsupportedModel(
                    f"the weight {constant} is stored with strides {tensor.stride()}, which a file does not keep. Make it "
                    "contiguous"
                )
            same = (tensor.data_ptr(), tensor.dtype, tensor.shape)  # tied weights, and those of the other entry points
            if same not in names:
                names[same] = constant if constant not in stored else f"{kind}.{constant}"
                stored[names[same]] = tensor.cpu()
            weights[constant] = names[same]
        entries[kind] = replace(entry, weights=weights)
    save_file(stored, folder / WEIGHTS)
    shutil.copymode(folder / PROGRAMS, folder / WEIGHTS)  # which is otherwise for its owner only
    return entries


def _tokenizer_files(model: Any, given: str | Path | None) -> list[Path]:
    """What a package holds of a tokenizer: that of a given folder, or of the one that the model was loaded from, if it was."""
    source = given or getattr(model, "name_or_path", "")
    found = [file for name in TOKENIZER if source and (file := Path(source) / name).is_file()]
    if given is not None and Path(given) / TOKENIZER[0] not in found:
        raise InputError(f"tokenizer={given} holds no {TOKENIZER[0]}; expected the folder of a transformers tokenizer")
    return found
