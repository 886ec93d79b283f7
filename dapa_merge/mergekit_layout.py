"""Where mergekit keeps the units of a model: it names and fuses tensors as transformers does in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from mergekit.architecture import arch_info_for_config
from transformers import AutoConfig

from dapa_merge.checkpoint.architecture import Unit, find_units
from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.region import Box
from dapa_merge.errors import CheckpointError


def boxes_in_merge(plan: Plan, selection: Iterable[Unit]) -> dict[str, list[Box]]:
    """For each tensor that mergekit will ask for, the boxes of it that a selection is.

    Raises:
        CheckpointError: If a selected unit is in none of them, so that mergekit would leave it out without a word.
    """
    units = tuple(selection)
    names, model_shapes = _names_in_merge(plan.target)
    if names is None or all(name in names for unit in units for name in unit.tensors):
        return _boxes(units, {unit: unit for unit in plan.twins})
    modules = tuple(dict.fromkeys(unit.module for unit in plan.twins))
    twins: Mapping[Unit, Unit] = {}
    if model_shapes is not None:
        twins = {unit: unit for unit in find_units(plan.target.config, model_shapes, modules)}
    for unit in units:
        twin = twins.get(unit.whole)
        if twin is None or not all(name in names for name in twin.tensors):
            raise CheckpointError(
                f"mergekit knows the tensors of {plan.target.name} by other names, and {unit} is not among them; use "
                f"`dapa-merge run`"
            )
    return _boxes(units, twins)


def _boxes(units: Iterable[Unit], twins: Mapping[Unit, Unit]) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = {}
    for unit in units:
        for part in replace(twins[unit.whole], rows=unit.rows).parts:
            boxes.setdefault(part.tensor, []).append(part.box)
    return boxes


def _names_in_merge(target: Checkpoint) -> tuple[set[str] | None, dict[str, tuple[int, ...]] | None]:
    """The tensors that mergekit will ask for, if that can be known, and the shapes of transformers' parameters."""
    try:
        config = AutoConfig.from_pretrained(target.folder, trust_remote_code=False)
        defined = arch_info_for_config(config)
    except Exception:
        # Remote code, which only mergekit's user may allow; its tensors have the names that they have in the files.
        return None, None
    shapes = _model_shapes(config)
    if defined is not None:
        return {weight.name for weight in defined.all_weights(config)}, shapes
    return (None, None) if shapes is None else (set(shapes), shapes)


def _model_shapes(config: Any) -> dict[str, tuple[int, ...]] | None:
    """The parameters of a model of this config, which takes no memory."""
    try:
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except Exception:
        return None
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
