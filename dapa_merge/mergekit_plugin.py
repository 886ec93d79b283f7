"""The merge method `dapa`; importing this module registers it with mergekit (tried with 0.1.5).

`mergekit-yaml` does not need an import: see `pydantic_hook`. mergekit names and fuses tensors as transformers does in
memory, so units are looked up there.
"""

from __future__ import annotations

import filecmp
import os
import re
import tempfile
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
from mergekit.common import ModelPath, ModelReference
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
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dapa_merge.checkpoint.convert import link_files, open_location
from dapa_merge.checkpoint.header import TORCH_NAMES, read_json
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Box, Region, Shapes
from dapa_merge.checkpoint.units import Unit, architecture_name, find_units
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.files import file_state
from dapa_merge.measure.live import forget_kernels, mapped_values
from dapa_merge.plan.edit import not_finite
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.plan.plan import Plan, join
from dapa_merge.plan.selection import changing_selection, given_selection, models_of
from dapa_merge.plan.values import Rounding
from dapa_merge.progress import LOG, shown
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import PARAMETERS, spans
from dapa_merge.recipe.parse import load_recipe, recipe_from
from dapa_merge.recipe.recipe import METHOD, Recipe
from dapa_merge.search.choose import check_pick
from dapa_merge.search.ladder import search_ladder

# A box of a tensor in mergekit, and the regions of the same values in each model's files.
EditedBox = tuple[Box, Mapping[str, Region]]
_NUMBER = re.compile(r"\d+")
# Tensors that transformers computes itself: frequencies of positions, and masks of attention.
_CONSTANTS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
TORCH_DTYPES = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}

SPEC = MergeMethodSpec(
    name=METHOD,
    pretty_name="DAPA",
    reference_url="https://arxiv.org/abs/2406.01514",
    parameters=tuple(ParameterSpec(name, Any, ParameterScope.SHARED, default=None) for name in PARAMETERS),
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, max_inputs=2),
    # Weights that only the target has are kept.
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    # Tensors pass through; moving them to an accelerator and back would only cost time.
    uses_accelerator=False,
)


@dataclass(frozen=True)
class _Selected:
    """A recipe's selection, with the state of the weight files to detect a replaced model.

    Attributes:
        boxes: The boxes that change, by tensor.
        plan: The models and the edit.
        dtypes: The target's dtypes, by tensor.
        files: The models' weight files.
        stamps: The state of `files` when the selection was made.
        rounding: Losses so far.
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
    """Passes the target's tensors through, with the edit's values in selected units.

    Each recipe is searched once, by the first thread that needs it; before mergekit writes anything, if announced by
    `accept`.
    """

    spec = SPEC

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By the recipe that mergekit will bind, which does not have a dtype.
        self._announced: dict[Recipe, Recipe] = {}
        self._selected: dict[Recipe, _Selected] = {}

    def announce(self, recipe: Recipe) -> None:
        """Remember a recipe, to start its search when mergekit plans the merge of its models."""
        self._announced[replace(recipe, dtype=None, keeps_tokenizer=False)] = recipe

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        # mergekit validates inputs while planning, before it makes the output folder, but does not tell the recipe. If
        # several recipes have these models, each is searched when its first tensor comes.
        models = {str(base_id), *map(str, input_ids)}
        recipes = [recipe for recipe in self._announced.values() if {str(recipe.target), str(recipe.source)} == models]
        if len(recipes) == 1:
            self.selected_tensors(recipes[0])

    def selected_tensors(self, recipe: Recipe) -> _Selected:
        """The recipe's selection; a search runs at most once."""
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
        """Return one tensor per group, in the target's dtype rather than the promoted `input_dtypes`."""
        results = []
        for group, given in zip(groups, parameters, strict=True):
            base, (other,) = group.base, group.non_base
            assert base is not None
            name = group.metadata.name
            selected = self.selected_tensors(self._recipe_of(str(base.id), str(other.id), given))
            # mergekit promotes a vocabulary's tensors when it aligns tokenizers, without loss; this undoes it.
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
        raw: The configuration that mergekit is about to validate, with `merge_method: dapa`.

    Raises:
        DapaError: If it is not a valid recipe; names the line if mergekit's command line reads it.
    """
    file = _file_being_read(raw)
    recipe = load_recipe(file) if file is not None else recipe_from(_plain(raw))
    _check_lora_cache(recipe)
    _check_one_class(recipe)
    METHOD_INSTANCE.announce(recipe)


def register() -> None:
    """Register `dapa` with mergekit, once."""
    if all(method.spec.name != METHOD for method in merge_methods.registered_methods()):
        merge_methods.register(METHOD_INSTANCE)


def _with_boxes(name: str, ours: torch.Tensor, theirs: torch.Tensor, selected: _Selected) -> torch.Tensor:
    """Return a copy of `ours` with the edit's values in the selected boxes.

    mergekit passes the values of target and source; those of other models are read here.
    """
    result, plan = ours.clone(), selected.plan
    for box, regions in selected.boxes[name]:
        place = tuple(slice(first, stop) for first, stop in box)
        values = {"target": ours[place], "source": theirs[place]}
        for model in plan.edit.inputs:
            if model not in values:
                values[model] = mapped_values(plan.models[model], regions[model]).reshape(values["target"].shape)
            if model != "target" and not bool(values[model].isfinite().all()):
                raise not_finite(name, plan.models, model)
        own = plan.edit.own_values(regions["target"]) if plan.edit.brings else {}
        for brought, array in own.items():
            values[brought] = torch.from_numpy(array).reshape(values["target"].shape)
        result[place] = plan.edit.new_values(values, ours.dtype, selected.rounding)
        if not bool(result[place].isfinite().all()):
            raise not_finite(name, plan.models, "target")
        selected.rounding.check(name, plan.source, TORCH_DTYPES[ours.dtype])
    return result


def _select(recipe: Recipe) -> _Selected:
    # mergekit defaults to the CPU, a search to an accelerator.
    given = _command_line()
    options = Options.from_environment(
        given.get("device") or ("cuda" if given.get("cuda") or given.get("gpu_rich") else "auto")
    )
    ladder = make_ladder(recipe, allow_pickle=options.allow_pickle)
    if cache := LoaderCache().lora_cache_dir:
        # mergekit, used from Python, has merged by now what was not lent to it.
        _lend_merged(recipe, Path(cache))
    check_nothing_lost(ladder.models["target"])
    # Local models only: a commit on the Hub does not change, although the cached part of it may grow.
    local = [checkpoint for checkpoint in ladder.models.values() if checkpoint.commit is None]
    files = tuple(checkpoint.path(shard) for checkpoint in local for shard in checkpoint.shards)
    stamps = _stamps(files)
    recipe, plan = ladder.rungs[0]
    selection = given_selection(recipe, plan)
    check_pick(options.pick, ladder.choosing().plan, selection)
    if selection is None:
        found = search_ladder(ladder, options).search
        plan, selection = found.plan, join(found.plan, found.minimum.units)
    else:
        selection = changing_selection(recipe, plan, selection)
    LOG.info(f"dapa: editing {spans(selection)} by {plan.edit.name}, with {recipe.source}")
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


def _check_lora_cache(recipe: Recipe) -> None:
    options = _command_line()
    keys = {"target": "base_model", "source": "models"}
    merged = {name: location for name, location in models_of(recipe).items() if location.adapter is not None}
    for name, location in merged.items():
        if options.get("lora_merge_cache", "") is None:
            raise UsageError(
                f"{recipe.where(keys.get(name, f'parameters.{name}'))} is a LoRA, {location}; name a folder with "
                f"--lora-merge-cache to merge it in"
            )
    if merged and options.get("lora_merge_dtype"):
        raise UsageError("--lora-merge-dtype would round the base, whose dtypes a merged LoRA keeps; remove the option")
    if cache := options.get("lora_merge_cache"):
        _lend_merged(recipe, Path(cache))


def _lend_merged(recipe: Recipe, cache: Path) -> None:
    """Put our merges of the recipe's LoRAs where mergekit keeps its own, which lose what transformers does not load.

    mergekit merges only what its folder lacks.

    Raises:
        UsageError: If the folder holds another merge.
    """
    for location in (recipe.target, recipe.source):
        if location.adapter is None:
            continue
        ours = open_location(location, allow_pickle=Options.from_environment("auto").allow_pickle).folder
        # mergekit's name of the folder.
        base, adapter = (ModelPath(path=part.path, revision=part.revision) for part in (location, location.adapter))
        folder = cache / f"{base._unique_id()}_{adapter._unique_id()}"
        try:
            if not folder.exists():
                cache.mkdir(parents=True, exist_ok=True)
                unfinished = Path(tempfile.mkdtemp(prefix=".dapa-merge-", dir=cache))
                link_files(ours, unfinished, os.listdir(ours))
                unfinished.rename(folder)
        except OSError as error:
            raise UsageError(f"cannot write {folder}, in the --lora-merge-cache: {error.strerror}") from error
        for file in ours.glob("*.safetensors"):
            twin = folder / file.name
            if not twin.is_file() or not (file.samefile(twin) or filecmp.cmp(file, twin, shallow=False)):
                raise UsageError(
                    f"{folder} holds another merge of {location} than `dapa-merge run` would make; remove it, and name "
                    f"its parent with --lora-merge-cache"
                )


def _check_one_class(recipe: Recipe) -> None:
    """Raise `CheckpointError` if target and source are folders of two classes.

    mergekit asks both for tensors of the same names, and ends in a traceback. It reports models on the Hub itself.
    """
    found: dict[str, str] = {}
    for location in (recipe.target, recipe.source):
        if (path := Path(location.path) / "config.json").is_file():
            found.setdefault(architecture_name(read_json(path)), str(location))
    if len(found) > 1:
        (ours, target), (theirs, source) = found.items()
        raise CheckpointError(
            f"mergekit merges models of one class only, but the source {source} is a {theirs} and the target {target} "
            f"a {ours}; use `dapa-merge run`, which compares their language towers"
        )


def _stamps(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(file_state(path)) for path in files)


def _command_line() -> dict[str, Any]:
    """The options of the running mergekit command; empty if mergekit is used from Python."""
    context = click.get_current_context(silent=True)
    return dict(context.params) if context is not None else {}


def _file_being_read(raw: Mapping[str, Any]) -> Path | None:
    """The recipe file of a running `mergekit-yaml`, for line numbers, which `raw` does not have."""
    name = _command_line().get("config_file")
    if not isinstance(name, str):
        return None
    try:
        same = yaml.safe_load(Path(name).read_text(encoding="utf-8")) == raw
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return Path(name) if same else None


def _plain(value: object) -> Any:
    """Convert objects of mergekit to plain YAML values."""
    if isinstance(value, ModelReference):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, BaseModel):
        return {key: _plain(item) for key, item in value if item is not None}
    return value


def boxes_in_merge(plan: Plan, selection: Iterable[Unit]) -> dict[str, list[EditedBox]]:
    """Return the boxes of a selection, by the tensors that mergekit will request.

    Raises:
        CheckpointError: If mergekit would silently lose a selected unit or another part of the MLPs.
    """
    units = tuple(selection)
    as_in_files = {unit: unit for unit in plan.twins}
    try:
        config = AutoConfig.from_pretrained(plan.target.folder, trust_remote_code=False)
        forget_kernels(config, plan.target.name)
    except Exception:
        # Remote code, which only mergekit's user may allow; its tensors are named as in the files.
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
        names = _inferred_names(plan.target, shapes)
    modules = tuple(dict.fromkeys(unit.module for unit in plan.twins))
    found = {} if shapes is None else {unit: unit for unit in find_units(plan.target.config, shapes, modules)}
    for unit in units:
        if unit.whole not in found or not all(name in names for name in found[unit.whole].tensors):
            raise CheckpointError(
                f"mergekit does not know the tensors of {unit} in {plan.target.name}; use `dapa-merge run`"
            )
    return _boxes(plan, units, found)


def check_nothing_lost(target: Checkpoint) -> None:
    """Refuse a target with tensors that mergekit would leave out, such as layers that predict further tokens.

    Raises:
        CheckpointError: If it has any, apart from constants that some old files hold.
    """
    try:
        config = AutoConfig.from_pretrained(target.folder, trust_remote_code=False)
    except Exception:
        # Remote code: mergekit takes all tensors as they are named in the files.
        return
    if (defined := arch_info_for_config(config)) is not None:
        weights = defined.all_weights(config)
        written = {name for one in weights for name in (one.name, *(one.aliases or ()), *(one.tied_names or ()))}
    elif (shapes := _model_shapes(config)) is not None:
        written = set(shapes)
    else:
        return
    lost = [
        name
        for name in target.tensors
        if not name.endswith(_CONSTANTS) and not _names_in_memory(name, target) & written
    ]
    if lost:
        raise CheckpointError(
            f"mergekit would leave {len(lost)} of {len(target.tensors)} tensors of {target.name} out of its result, "
            f"{lost[0]} the first; use `dapa-merge run`"
        )


def _names_in_memory(name: str, target: Checkpoint) -> set[str]:
    """All names that transformers may give to a tensor of the files, or to what it makes of it and others."""
    names = {name}
    for transform in get_checkpoint_conversion_mapping(target.config.get("model_type")) or ():
        for known in tuple(names):
            renamed, pattern = transform.rename_source_key(known)
            if pattern is None:
                continue
            first = transform.target_patterns[0] if transform.target_patterns else ""
            # One tensor may become several, side by side.
            names |= {renamed, *(renamed.replace(first, other, 1) for other in transform.target_patterns if first)}
    return names


def _boxes(plan: Plan, units: Iterable[Unit], twins: Mapping[Unit, Unit]) -> dict[str, list[EditedBox]]:
    boxes: dict[str, list[EditedBox]] = {}
    for unit in units:
        parts = replace(twins[unit.whole], rows=unit.rows).parts
        for part, regions in zip(parts, plan.regions((unit,)), strict=True):
            boxes.setdefault(part.tensor, []).append((part.box, regions))
    return boxes


def _inferred_names(target: Checkpoint, shapes: Shapes) -> set[str]:
    """The tensors that mergekit finds without a definition of the architecture: transformers' parameters.

    It converts differing names in the files if it can do so for every layer, and otherwise loses the tensors.
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
    """The shapes of a config's parameters, without allocating them; None if transformers cannot build the model."""
    try:
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except Exception:
        return None
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


METHOD_INSTANCE = DapaMerge()
register()
