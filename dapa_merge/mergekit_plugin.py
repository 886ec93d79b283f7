"""The merge method `dapa`; importing this module registers it with mergekit.

`mergekit-yaml` needs no import: see `pydantic_hook`. Written against mergekit 0.1.5.

Where mergekit keeps the units of a model: it names and fuses tensors as transformers does in memory.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import yaml
from mergekit import merge_methods
from mergekit.architecture import arch_info_for_config
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import (
    BasePolicy,
    BatchOptions,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    OptionalTensorPolicy,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import BaseModel
from transformers import AutoConfig

from dapa_merge.checkpoint.convert import MergeCache
from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Box, Region, Shapes
from dapa_merge.checkpoint.units import Unit, find_units
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.files import file_state
from dapa_merge.measure.live import mapped_values
from dapa_merge.measure.prompts.sets import check_prompts
from dapa_merge.plan.edit import Rounding, not_finite
from dapa_merge.plan.plan import Plan, join
from dapa_merge.plan.selection import given_selection, make_plan
from dapa_merge.progress import LOG, shown
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import PARAMETERS, spans
from dapa_merge.recipe.parse import load_recipe, recipe_from
from dapa_merge.recipe.recipe import METHOD, Recipe
from dapa_merge.search.search import search_plan

TORCH_DTYPES = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}

SPEC = MergeMethodSpec(
    name=METHOD,
    pretty_name="DAPA",
    reference_url="https://arxiv.org/abs/2406.01514",
    parameters=tuple(ParameterSpec(name, Any, ParameterScope.SHARED, default=None) for name in PARAMETERS),
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, max_inputs=2),
    # A weight that only the target has is the target's.
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    # Tensors are handed through; moving them to an accelerator and back would only cost time.
    uses_accelerator=False,
)


@dataclass(frozen=True)
class _Selected:
    """What was selected, what the target stores, and what the weight files were then.

    So a model that was replaced is not taken for the old one.

    Attributes:
        boxes: For each tensor that changes, which boxes of it, each with its place in the models' files.
        plan: The models and the edit.
        dtypes: What the target stores each tensor as.
        files: The weight files of both models.
        stamps: Their states then.
        rounding: What is lost by rounding so far.
    """

    boxes: Mapping[str, Sequence[EditedBox]]
    plan: Plan
    dtypes: Mapping[str, torch.dtype]
    files: tuple[Path, ...]
    stamps: tuple[tuple[int, ...], ...]
    rounding: Rounding

    def is_stale(self) -> bool:
        return _stamps(self.files) != self.stamps


class DapaMerge(MergeMethod):  # type: ignore[misc]  # mergekit is not typed
    """Hands through the target's tensors, with the edit's values where a unit was selected.

    The selection is found once per recipe, however many threads ask, and before mergekit writes anything if the recipe
    was announced by `accept`.
    """

    spec = SPEC

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By what mergekit will bind, which is a recipe without its dtype.
        self._announced: dict[Recipe, Recipe] = {}
        self._selected: dict[Recipe, _Selected] = {}

    def announce(self, recipe: Recipe) -> None:
        """Remember a recipe, so that its search can start when mergekit plans the merge of its models."""
        self._announced[replace(recipe, dtype=None, keeps_tokenizer=False)] = recipe

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        # mergekit validates the inputs of the whole merge while it plans, before there is an output folder. It does not
        # say which recipe it plans: if several have these models, each searches when its first tensor comes.
        models = {str(base_id), *map(str, input_ids)}
        recipes = [recipe for recipe in self._announced.values() if {str(recipe.target), str(recipe.source)} == models]
        if len(recipes) == 1:
            self.selected_tensors(recipes[0])

    def selected_tensors(self, recipe: Recipe) -> _Selected:
        """What to take from the source; searched for once if the recipe asks for it."""
        with self._lock:
            selected = self._selected.get(recipe)
            if selected is None or selected.is_stale():
                with shown():
                    selected = self._selected[recipe] = _select(recipe)
            return selected

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """One tensor per group, in the target's own dtype; `input_dtypes`, the promoted ones, are not used."""
        results = []
        for group, given in zip(groups, parameters, strict=True):
            base, (other,) = group.base, group.non_base
            assert base is not None
            name = group.metadata.name
            selected = self.selected_tensors(self._recipe_of(str(base.id), str(other.id), given))
            # mergekit promotes a vocabulary's tensors when it aligns tokenizers, which loses nothing; this undoes it.
            dtype = selected.dtypes.get(name, base.tensor.dtype)
            tensor = base.tensor
            if name in selected.boxes:
                tensor = _with_boxes(name, tensor.to(dtype), other.tensor, selected)
            results.append(tensor.to(out_dtype or dtype))
        return tuple(results)

    def _recipe_of(self, target: str, source: str, given: Mapping[str, Any]) -> Recipe:
        content = {
            "merge_method": METHOD,
            "base_model": target,
            "models": [{"model": source}],
            "parameters": {name: value for name, value in given.items() if value is not None},
        }
        recipe = recipe_from(content)
        return self._announced.get(recipe, recipe)


def accept(raw: Mapping[str, Any]) -> None:
    """Check a merge configuration before mergekit does, and announce it to the method.

    Args:
        raw: What mergekit is about to validate, with `merge_method: dapa`.

    Raises:
        DapaError: If it is not a recipe that can be followed; names the line if mergekit's command line reads it.
    """
    file = _file_being_read(raw)
    recipe = load_recipe(file) if file is not None else recipe_from(_plain(raw))
    _check_has_place_to_merge(recipe)
    METHOD_INSTANCE.announce(recipe)


def register() -> None:
    """Make `dapa` known to mergekit; a second call does nothing."""
    if all(method.spec.name != METHOD for method in merge_methods.registered_methods()):
        merge_methods.register(METHOD_INSTANCE)


def _with_boxes(name: str, ours: torch.Tensor, theirs: torch.Tensor, selected: _Selected) -> torch.Tensor:
    """A new tensor: `ours` with the edit's values in some boxes.

    mergekit gives the values of target and source; a further model that the edit reads is read here.
    """
    result, plan = ours.clone(), selected.plan
    for box, regions in selected.boxes[name]:
        place = tuple(slice(first, stop) for first, stop in box)
        values = {"target": ours[place], "source": theirs[place]}
        for model in plan.edit.inputs:
            if model not in values:
                values[model] = mapped_values(plan.models[model], regions[model]).view(values["target"].shape)
            if model != "target" and not bool(values[model].isfinite().all()):
                raise not_finite(name, plan.models, model)
        result[place] = plan.edit.new_values(values, ours.dtype, selected.rounding)
        if not bool(result[place].isfinite().all()):
            raise not_finite(name, plan.models, "target")
        selected.rounding.check(name, plan.source, TORCH_DTYPES[ours.dtype])
    return result


def _select(recipe: Recipe) -> _Selected:
    # mergekit computes on the CPU unless told otherwise; a search does so only if there is nothing better.
    given = _command_line()
    options = Options.from_environment(
        given.get("device") or ("cuda" if given.get("cuda") or given.get("gpu_rich") else "auto")
    )
    plan = make_plan(recipe, allow_pickle=options.allow_pickle, merge_cache=_merge_cache())
    check_prompts(recipe)
    # A commit on the Hub does not change; what is here of it may grow.
    local = [checkpoint for checkpoint in plan.models.values() if checkpoint.commit is None]
    files = tuple(checkpoint.path(shard) for checkpoint in local for shard in checkpoint.shards)
    stamps = _stamps(files)
    selection = given_selection(recipe, plan)
    if selection is None:
        selection = join(plan, search_plan(recipe, plan, options).minimum.units)
    LOG.info(f"dapa: transplanting {spans(selection)} from {recipe.source}")
    return _Selected(
        boxes=boxes_in_merge(plan, selection),
        plan=plan,
        dtypes={
            tensor.name: getattr(torch, TORCH_NAMES[tensor.dtype])
            for tensor in plan.target.tensors.values()
            if tensor.dtype in TORCH_NAMES
        },
        files=files,
        stamps=stamps,
        rounding=Rounding(plan.max_overflow),
    )


def _merge_cache() -> MergeCache | None:
    """Where the running mergekit keeps merged LoRAs; None where it is not known, as in another thread of it."""
    options = LoaderCache()
    return MergeCache(Path(options.lora_cache_dir), options.lora_merge_dtype) if options.lora_cache_dir else None


def _check_has_place_to_merge(recipe: Recipe) -> None:
    options = _command_line()
    for key, location in (("base_model", recipe.target), ("models", recipe.source)):
        if location.adapter is not None and options.get("lora_merge_cache", "") is None:
            raise UsageError(
                f"{recipe.where(key)} is a LoRA, {location}; name a folder with --lora-merge-cache to merge it in"
            )


def _stamps(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(file_state(path)) for path in files)


def _command_line() -> dict[str, Any]:
    """The options of a running mergekit command; nothing where it is used from Python."""
    context = click.get_current_context(silent=True)
    return dict(context.params) if context is not None else {}


def _file_being_read(raw: Mapping[str, Any]) -> Path | None:
    """The recipe file of a running `mergekit-yaml`, whose lines its parsed content no longer knows."""
    name = _command_line().get("config_file")
    if not isinstance(name, str):
        return None
    try:
        same = yaml.safe_load(Path(name).read_text(encoding="utf-8")) == raw
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return Path(name) if same else None


def _plain(value: object) -> Any:
    """Mergekit's own objects as the YAML that they stand for."""
    if isinstance(value, ModelReference):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, BaseModel):
        return {key: _plain(item) for key, item in value if item is not None}
    return value


METHOD_INSTANCE = DapaMerge()
register()

_NUMBER = re.compile(r"\d+")


# A box of a tensor as mergekit has it, and by model where its values are in the files.
EditedBox = tuple[Box, Mapping[str, Region]]


def boxes_in_merge(plan: Plan, selection: Iterable[Unit]) -> dict[str, list[EditedBox]]:
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
        return _boxes(plan, units, as_in_files)
    defined = arch_info_for_config(config)
    if defined is not None:
        names = {weight.name for weight in defined.all_weights(config)}
        if all(name in names for unit in units for name in unit.tensors):
            return _boxes(plan, units, as_in_files)
    shapes = _model_shapes(config)
    if defined is None:
        if shapes is None:
            return _boxes(plan, units, as_in_files)
        names = _names_that_are_inferred(plan.target, shapes)
    modules = tuple(dict.fromkeys(unit.module for unit in plan.twins))
    found = {} if shapes is None else {unit: unit for unit in find_units(plan.target.config, shapes, modules)}
    for unit in units:
        if unit.whole not in found or not all(name in names for name in found[unit.whole].tensors):
            raise CheckpointError(
                f"mergekit does not know the tensors of {plan.target.name} in which {unit} is; use `dapa-merge run`"
            )
    return _boxes(plan, units, found)


def _boxes(plan: Plan, units: Iterable[Unit], twins: Mapping[Unit, Unit]) -> dict[str, list[EditedBox]]:
    boxes: dict[str, list[EditedBox]] = {}
    for unit in units:
        parts = replace(twins[unit.whole], rows=unit.rows).parts
        for part, regions in zip(parts, plan.regions((unit,)), strict=True):
            boxes.setdefault(part.tensor, []).append((part.box, regions))
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
