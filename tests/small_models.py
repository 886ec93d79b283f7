"""Models of a few arrays, for tests that ask nothing of an architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
from safetensors.numpy import save_file

NAMES = ("embed", "layers.0.gate", "layers.0.gate_up", "layers.0.experts", "norm", "scale", "none", "ids")


def arrays(seed: int = 0) -> dict[str, numpy.ndarray]:
    """A tensor of every kind of shape: a matrix, fused projections, experts, a vector, a scalar, an empty one."""
    random = numpy.random.default_rng(seed)
    return {
        "embed": random.standard_normal((60, 300), dtype=numpy.float32),
        "layers.0.gate": random.standard_normal((64, 320)).astype(numpy.float16),
        "layers.0.gate_up": random.standard_normal((128, 320)).astype(numpy.float16),
        "layers.0.experts": random.standard_normal((4, 32, 320)).astype(numpy.float16),
        "norm": random.standard_normal(320, dtype=numpy.float32),
        "scale": numpy.array(random.standard_normal(), numpy.float64),
        "none": numpy.empty((0, 7), numpy.float32),
        "ids": random.integers(0, 255, 1001, numpy.uint8),
    }


def write_model(
    folder: Path, tensors: Mapping[str, numpy.ndarray], shards: Sequence[Sequence[str]] | None = None
) -> Path:
    """A model folder of these tensors: in one file, or in one for each sequence of names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "any"}')
    if shards is None:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    owners = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        owners |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    return folder


def repaired(tensors: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """These tensors with a whole one changed, and rows of three others, and a vector, a scalar."""
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    changed["layers.0.gate"] += 1
    changed["layers.0.gate_up"][:64] += 1
    changed["layers.0.experts"][1:3, 0:16] += 1
    changed["embed"][[3, 4, 40]] += 1
    changed["norm"][7] += 1
    changed["scale"] += 1
    return changed


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
