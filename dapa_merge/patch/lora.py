"""A repair by directions as a LoRA adapter, which peft, and programs that read its format, add to the target.

LoRA adds B A to a linear layer's weight (E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685), here with scale 1 and ranks that differ. peft rounds B A to the target's dtype before it adds it, and
this project the sum only: merged weights differ by at most one unit in the last place of the larger of both.

Left out: experts that transformers holds in one parameter, to which peft adds another kind of adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors.numpy import save
from transformers.pytorch_utils import Conv1D

from dapa_merge.checkpoint.location import without_paths
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Box, whole_box
from dapa_merge.checkpoint.units import MODULES, find_units
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.files import make_folder, replace_files
from dapa_merge.measure.live import empty_model, units_in
from dapa_merge.patch.computed import find_misfit
from dapa_merge.patch.extract import check_layouts
from dapa_merge.plan.edit import Edit

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


class _Matrix(NamedTuple):
    """A matrix in memory, by the name of its parameter, and what is added to it: B `[m, r]` and A `[r, n]`."""

    parameter: str
    box: Box
    left: numpy.ndarray
    right: numpy.ndarray


def write_adapter(edit: Edit, result: Checkpoint, base: Checkpoint, folder: Path) -> dict[str, int]:
    """Write what an edit adds to a base as an adapter into a new folder.

    Args:
        edit: Adds low-rank matrices.
        result: Checked to be the base with what the edit adds.
        base: The model that the adapter is for.
        folder: The folder to make, or an empty one.

    Returns:
        The rank of each adapted module, by its name in the model of transformers.

    Raises:
        CheckpointError: If the result is not what the edit makes of the base, or transformers does not know the base.
        UsageError: If peft cannot add it, or the folder exists or cannot be made.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; name another folder or remove it")
    if what := edit.unfit(base.shapes):
        raise CheckpointError(f"the edit of {result.name} {what}; name its base with --base")
    check_layouts(result, base)
    model = empty_model(base)
    matrices = _in_memory(edit, base, model)
    if (name := find_misfit(edit, result, base)) is not None:
        raise CheckpointError(
            f"{name} of {result.name} is not that of {base.name} with its directions; check it with `dapa-merge verify`"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    arrays: dict[str, numpy.ndarray] = {}
    ranks: dict[str, int] = {}
    is_transposed = False
    for parameter, found in _by_parameter(matrices).items():
        module = parameter.removesuffix(".weight")
        left, right = _joined(found, shapes[parameter])
        if isinstance(model.get_submodule(module), Conv1D):
            # Its weight is stored transposed.
            is_transposed, left, right = True, right.T, left.T
        ranks[module] = len(right)
        arrays[f"base_model.model.{module}.lora_A.weight"] = numpy.ascontiguousarray(right)
        arrays[f"base_model.model.{module}.lora_B.weight"] = numpy.ascontiguousarray(left)
    config = _config(base, ranks, is_transposed)
    make_folder(folder)
    contents = {
        CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_NAME: save(arrays, {"format": "pt"}),
    }
    replace_files({folder / name: content for name, content in contents.items()})
    return ranks


def _in_memory(edit: Edit, base: Checkpoint, model: torch.nn.Module) -> list[_Matrix]:
    """The matrices that an edit adds to, as transformers has them; raises `UsageError` if one is not a linear layer."""
    places: dict[tuple[str, Box], tuple[str, Box]] = {}
    for module in MODULES:
        # A model has some of them only.
        with suppress(CheckpointError):
            for unit, twin in zip(
                find_units(base.config, base.shapes, (module,)), units_in(model, (module,)), strict=True
            ):
                pairs = zip(unit.parts, twin.parts, strict=True)
                places |= {(part.tensor, part.box): (other.tensor, other.box) for part, other in pairs}
    matrices = []
    for tensor, box, left, right in edit.loras():
        where = places.get((tensor, box or whole_box(base.shapes[tensor])))
        layer = where and where[0].endswith(".weight") and model.get_submodule(where[0].removesuffix(".weight"))
        if where is None or not isinstance(layer, (torch.nn.Linear, Conv1D)):
            held = f"is in {where[0]}, which is not a linear layer" if where else "has no place"
            raise UsageError(
                f"{tensor} of {base.name} {held} in transformers, so that no LoRA can be added to it; extract a patch, "
                f"without --lora"
            )
        matrices.append(_Matrix(*where, left, right))
    return matrices


def _by_parameter(matrices: list[_Matrix]) -> dict[str, list[_Matrix]]:
    found: dict[str, list[_Matrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.parameter, []).append(matrix)
    return dict(sorted(found.items()))


def _joined(matrices: list[_Matrix], shape: tuple[int, ...]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """B and A of a whole parameter: zero outside the boxes of its matrices."""
    rank = sum(len(matrix.right) for matrix in matrices)
    left = numpy.zeros((shape[0], rank), numpy.float32)
    right = numpy.zeros((rank, shape[1]), numpy.float32)
    first = 0
    for matrix in matrices:
        rows, columns = (slice(*ends) for ends in matrix.box)
        stop = first + len(matrix.right)
        left[rows, first:stop] = matrix.left
        right[first:stop, columns] = matrix.right
        first = stop
    return left, right


def _config(base: Checkpoint, ranks: Mapping[str, int], is_transposed: bool) -> dict[str, object]:
    """The content of `adapter_config.json`; alpha equals the rank, so that the scale is 1."""
    rank = max(ranks.values())
    others = {module: number for module, number in ranks.items() if number != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # Of a folder only its name, which is nobody's path.
        "base_model_name_or_path": base.name if base.commit else without_paths(str(base.folder.absolute())),
        "revision": base.commit,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
