"""The trained model as a folder that transformers loads, and its way into the package."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from kvfx.demo.notes import MODEL
from retriever import log

RESULTS = Path(__file__).parents[1] / "results"
MADE = ("config.json", "generation_config.json", "model.safetensors")
LANGUAGE = ("tokenizer.json", "tokenizer_config.json", "prose.txt")  # what training reads; they stay as they are


def save(model: Any, folder: Path) -> None:
    """Write a model's weights in float16, its configuration and the tokenizer; all files or none of them."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        half.to(torch.float16).save_pretrained(made)
        for name in LANGUAGE:
            shutil.copy(MODEL / name, made)
        for name in MADE + LANGUAGE:
            (Path(made) / name).chmod(0o644)  # weights are written for their owner alone
            os.replace(Path(made) / name, folder / name)


def install(trained: Path, records: Path, *, package: Path = MODEL, results: Path = RESULTS) -> None:
    """Put a trained model into the package, and its log beside the other results."""
    for name in MADE:
        shutil.copy(trained / name, package / f"{name}.partial")
    for name in MADE:
        os.replace(package / f"{name}.partial", package / name)
    shutil.copy(records, results / "retriever_training.jsonl")
    (results / "retriever_training.md").write_text(log.page(log.read(records)), encoding="utf-8")
