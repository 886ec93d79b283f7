"""Where mergekit keeps the units of a model: it names and fuses tensors as transformers does in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from mergekit.architecture import arch_info_for_config
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from transformers import AutoConfig

from dapa_merge.checkpoint.architecture import Unit, find_units
from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.region import Box, Shapes
from dapa_merge.errors import CheckpointError

_NUMBER = re.compile(r"\d+")


def boxes_in_merge(plan: Plan, selection: Iterable[Unit]) -> dict[str, list[Box]]:
    """For each tensor that mergekit will ask for, the boxes of it that a selection is.

    Raises:
        CheckpointError: If mergekit would leave a selected unit, or another part of the MLPs, out without a word.
    """
    units = tuple(selection)
    as_in_files = {unit: unit for unit in plan.twins}
    try:
        config = AutoConfig.from_pretrained(plan.target.folder, trust_remote_code=False)
    except Exception:
        # Remote code, which only mergekit's user may allow; its tensors have the names that they have in the files.
        return _boxes(units, as_in_files)
    defined = arch_info_for_config(config)
    if defined is not None:
        names = {weight.name for weight in defined.all_weights(config)}
        if all(name in names for unit in units for name in unit.tensors):
            return _boxes(units, as_in_files)
    shapes = _model_shapes(config)
    if defined is None:
        if shapes is None:
            return _boxes(units, as_in_files)
        names = _names_that_are_inferred(plan.target, shapes)
    modules = tuple(dict.fromkeys(unit.module for unit in plan.twins))
    found = {} if shapes is None else {unit: unit for unit in find_units(plan.target.config, shapes, modules)}
    for unit in units:
        if unit.whole not in found or not all(name in names for name in found[unit.whole].tensors):
            raise CheckpointError(
                f"mergekit does not know the tensors of {plan.target.name} in which {unit} is; use `dapa-merge run`"
            )
    return _boxes(units, found)


def _boxes(units: Iterable[Unit], twins: Mapping[Unit, Unit]) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = {}
    for unit in units:
        for part in replace(twins[unit.whole], rows=unit.rows).parts:
            boxes.setdefault(part.tensor, []).append(part.box)
    return boxes


def _names_that_are_inferred(target: Checkpoint, shapes: Shapes) -> set[str]:
    """What mergekit finds without a definition of the architecture: transformers' parameters.

    It converts what the files name otherwise only if it can do so for every layer, and leaves it out if not.
    """
    by_kind: dict[str, list[str]] = {}
    for name in shapes:
        by_kind.setdefault(_NUMBER.sub("*", name), []).append(name)
    num_layers = len(find_units(target.config, shapes, ("mlp",)))
    in_files, model_type = set(target.tensors), target.config.get("model_type")
    for kind, names in by_kind.items():
        if "*" not in kind or set(names) <= in_files:
            continue
        if len(names) < num_layers or not can_convert_checkpoint_keys(model_type, in_files, names[0]):
            raise CheckpointError(
                f"mergekit has no definition of {target.config['architectures'][0]}, and would leave {names[0]} out of "
                f"its result; use `dapa-merge run`"
            )
    return set(shapes)


def _model_shapes(config: Any) -> dict[str, tuple[int, ...]] | None:
    """The parameters of a model of this config, which takes no memory; None if transformers cannot make one."""
    try:
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except Exception:
        return None
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
