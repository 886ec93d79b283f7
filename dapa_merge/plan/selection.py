"""Which units a recipe is about, which of them it names, and what is asked. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.header import DTYPE_BITS, FLOAT_NAMES
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import SEPARATE_MODULES, Unit
from dapa_merge.errors import RecipeError, UnsupportedArchitecture
from dapa_merge.plan.edit import MODELS, Edit, make_edit
from dapa_merge.plan.plan import Plan, divide, join, plan_transplant, with_modules
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from dapa_merge.checkpoint.convert import MergeCache


# mergekit's name for the recipe in its output; ours has the layers that were found.
RECIPE_NAME = "mergekit_config.yml"


def make_plan(
    recipe: Recipe,
    *,
    partial: bool = True,
    partial_target: bool = False,
    allow_pickle: bool = False,
    merge_cache: MergeCache | None = None,
) -> Plan:
    """Open the checkpoints, find their units and check the recipe against them. Loads no torch.

    Args:
        recipe: What to repair, with what.
        partial: Fetch of a source or pretrained model on the Hub only what is read of it.
        partial_target: The same for the target, where nobody is going to copy it.
        allow_pickle: Read weights that there are as pickles only, as nothing but tensors.
        merge_cache: Where a running mergekit keeps merged LoRAs.

    Raises:
        DapaError: With the sentence for whatever does not fit.
    """
    how: dict[str, Any] = {"allow_pickle": allow_pickle, "merge_cache": merge_cache}
    plan = open_plan(recipe, partial=partial, partial_target=partial_target, **how)
    target = plan.target
    for (one, first), (other, second) in combinations(plan.models.items(), 2):
        if first.folder.samefile(second.folder):
            # By another name, as `id@main` for `id`.
            where = recipe.where("models[0].model" if other == "source" else f"parameters.{other}")
            hint = "its aligned sibling" if other == "source" else "what target and source were both fine-tuned from"
            raise RecipeError(f"{where}: the {MODELS[other]} is the {one} itself, {first.name}; name {hint}")
    _check_dtype(recipe, target)
    if recipe.granularity != "layer" and not plan.edit.divides:
        where = recipe.where("parameters.granularity")
        raise RecipeError(
            f"{where} is {recipe.granularity}, but a unit of the edit {plan.edit.name} is {plan.edit.unit}; write layer"
        )
    if recipe.granularity == "expert" and divide(plan, plan.units, None).units == plan.units:
        raise RecipeError(
            f"{recipe.where('parameters.granularity')} is expert, but {target.name} has none; write layer or block:N"
        )
    # A layer that the target does not have is told now.
    given_selection(recipe, plan)
    return plan


def open_plan(recipe: Recipe, *, partial: bool = True, partial_target: bool = False, **how: Any) -> Plan:
    """Open the checkpoints and find their units, as `make_plan` does, but look at nothing else of the recipe."""
    models = {
        name: open_location(location, partial=partial_target if name == "target" else partial, **how)
        for name, location in models_of(recipe).items()
    }
    return plan_transplant(**models, modules=recipe.modules, edit=edit_of(recipe), max_overflow=recipe.max_overflow)


def edit_of(recipe: Recipe) -> Edit:
    """The edit that a recipe means.

    Raises:
        RecipeError: If it is not one of `EDITS`.
    """
    try:
        return make_edit(recipe.edit, recipe.strength)
    except ValueError as error:
        raise RecipeError(f"{recipe.where('parameters.edit')}: {error}") from None


def models_of(recipe: Recipe) -> dict[str, Location]:
    """The models whose values decide a recipe's result, the target first.

    Raises:
        RecipeError: If it does not name one that its edit reads.
    """
    edit = edit_of(recipe)
    models = {"target": recipe.target, "source": recipe.source}
    if "pretrained" in edit.inputs:
        if recipe.pretrained is None:
            raise RecipeError(
                f"{recipe.where('parameters.edit')}: the edit {edit.name} reads the model that target and source were "
                f"both fine-tuned from; name it with `pretrained` under `parameters`"
            )
        models["pretrained"] = recipe.pretrained
    return models


def plan_of_all(recipe: Recipe, chosen: Plan) -> Plan:
    """The same models, with the units of every module that all of them have besides the recipe's."""
    modules = list(recipe.modules)
    for module in SEPARATE_MODULES:
        if module not in modules:
            try:
                with_modules(chosen, (module,))
            except UnsupportedArchitecture:
                continue
            modules.append(module)
    if not {"gate", "up", "mlp"} & set(modules):
        # Gate and up in every second row of one tensor are units together only.
        modules.append("mlp")
    return with_modules(chosen, modules)


def given_selection(recipe: Recipe, plan: Plan) -> tuple[Unit, ...] | None:
    """The units that a recipe names, in the plan's order, blocks that touch as one; None if it wants a search.

    Raises:
        RecipeError: If it names a layer that the model does not have, or rows.
    """
    if recipe.layers is None:
        return None
    num_layers = plan.units[-1].layer + 1
    chosen: list[Unit] = []
    for choice in recipe.layers:
        if choice.layer >= num_layers:
            raise RecipeError(
                f"{recipe.where('parameters.layers')}: layer {choice.layer} is outside the target, "
                f"which has layers 0 to {num_layers - 1}"
            )
        named = [unit for unit in plan.units if unit.layer == choice.layer and choice.module in (None, unit.module)]
        if not named:
            raise RecipeError(
                f"{recipe.where('parameters.layers')}: layer {choice.layer} of the target "
                f"has no {choice.module or 'unit'}"
            )
        if choice.rows is not None and choice.rows[1] > (num_rows := plan.rows(named[0])[1]):
            raise RecipeError(
                f"{recipe.where('parameters.layers')}: {choice} is outside the target, "
                f"whose {choice.layer}.{choice.module} has rows 0 to {num_rows - 1}"
            )
        chosen += [unit if choice.rows is None else plan.part(unit, choice.rows) for unit in named]
    return join(plan, chosen)


def with_pinned_models(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with the plan's models as they are, from any folder and at any later time."""
    models = {name: pinned_location(getattr(recipe, name), checkpoint) for name, checkpoint in plan.models.items()}
    return replace(recipe, **cast("dict[str, Any]", models))


def pinned_location(location: Location, checkpoint: Checkpoint) -> Location:
    """The same model from any folder and at any later time: by its commit on the Hub, or by its absolute path.

    A relative path would mean another model in another folder, and at worst a stranger's repository on the Hub.
    """
    if location.adapter is None:
        return _pinned(location, checkpoint.commit)
    base_commit, adapter_commit = checkpoint.merged_from or (None, None)
    return replace(_pinned(location, base_commit), adapter=_pinned(location.adapter, adapter_commit))


def _pinned(location: Location, commit: str | None) -> Location:
    return replace(location, revision=commit) if commit else Location(os.path.abspath(location.path))


def fetch_units(plan: Plan, units: Iterable[Unit]) -> None:
    """Fetch what is read of these units in other models than the target at once, rather than one by one later.

    Raises:
        HubError: If the Hub does not give them; what came is kept for the next time.
    """
    ranges: dict[str, list[tuple[str, int, int]]] = {name: [] for name in plan.others}
    for regions in plan.regions(units):
        for name, found in ranges.items():
            found += [
                (regions[name].tensor.file, start, start + num_bytes) for start, num_bytes in regions[name].runs()
            ]
    for name, found in ranges.items():
        checkpoint = plan.models[name]
        if num_bytes := checkpoint.num_missing(found):
            LOG.info(f"fetching {num_bytes / 1e6:.1f} MB of {checkpoint.name}")
            with task(f"fetching the {MODELS[name]}'s units", num_bytes, "bytes"):
                checkpoint.ensure_all(found)


def _check_dtype(recipe: Recipe, target: Checkpoint) -> None:
    if recipe.dtype is None:
        return
    for tensor in target.tensors.values():
        if tensor.dtype != FLOAT_NAMES[recipe.dtype] and tensor.dtype[0] in "FB" and DTYPE_BITS[tensor.dtype] > 8:
            place = recipe.where("dtype", "out_dtype")
            raise RecipeError(
                f"{place} is {recipe.dtype}, but the target stores {tensor.name} as {tensor.dtype}; "
                f"the result keeps the target's dtypes, so leave it out"
            )
