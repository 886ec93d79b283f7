"""Recipes and values of the packaged pair, for tests of edits that read a third model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import write_few

from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint, read_bytes

GATES = tuple(f"model.layers.{layer}.mlp.gate_proj.weight" for layer in range(8))


def write(folder: Path, models: dict[str, Path], **parameters: object) -> Path:
    prompts = folder / "prompts"
    if not prompts.exists():
        write_few(prompts, 16)
    path = folder / f"{len(list(folder.iterdir()))}.yml"
    asked = {"prompts": str(prompts), "max_new_tokens": 12, "batch_size": 128}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in {**asked, **parameters}.items()}
    path.write_text(
        f"merge_method: dapa\nbase_model: {models['target']}\nmodels: [{{model: {models['source']}}}]\n"
        f"parameters: {json.dumps(plain)}\n"
    )
    return path


def assert_same_bytes(one: Path, other: Path) -> None:
    """Both checkpoints hold the tensors of the first with the same bytes."""
    ours, theirs = open_checkpoint(str(one)), open_checkpoint(str(other))
    for name, tensor in ours.tensors.items():
        assert read_bytes(ours, tensor) == read_bytes(theirs, theirs.tensors[name]), name


def values_of(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.tensors[name]
    return torch.frombuffer(bytearray(read_bytes(checkpoint, tensor)), dtype=torch.bfloat16).view(tensor.shape)
