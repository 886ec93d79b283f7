"""Makes a recipe's plan: opens its models and finds its edit and units."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from typing import Any

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.header import DTYPE_BITS, FLOAT_NAMES
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.checkpoint.units import AUTO, MODULES, SEPARATE_MODULES, WHOLES, Unit, auto_modules, check_not_quantized
from dapa_merge.errors import CannotRepair, CheckpointError, RecipeError, UnsupportedArchitecture
from dapa_merge.plan.directions import read_factors
from dapa_merge.plan.edit import EDITS, LADDER, MODELS, Directions, Edit, make_edit
from dapa_merge.plan.plan import Plan, divide, join, plan_transplant, with_modules
from dapa_merge.plan.values import Shift
from dapa_merge.progress import LOG, advance, task
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.recipe import Recipe

# mergekit's name for the recipe in its output; ours names the layers that were found.
RECIPE_NAME = "mergekit_config.yml"
# Reading, comparing and computing all let other threads run; each holds a few tiles.
COMPARE_THREADS = 2


def make_plan(
    recipe: Recipe,
    *,
    partial: bool = True,
    partial_target: bool = False,
    allow_pickle: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Open the checkpoints, find their units and check the recipe against them.

    Args:
        recipe: Names the models.
        partial: Fetch only the parts that are read, of every model on the Hub except the target.
        partial_target: The same for the target, which can then not be copied.
        allow_pickle: Read pickled weights, as tensors only, if there are no others.
        opened: Models that are open already, by their names in a recipe.

    Raises:
        DapaError: If a model or the recipe is not usable.
    """
    plan = open_plan(
        recipe,
        partial=partial,
        partial_target=partial_target,
        opened=opened,
        allow_pickle=allow_pickle,
    )
    for (one, first), (other, second) in combinations(plan.models.items(), 2):
        if first.folder.samefile(second.folder):
            # Named differently, such as `id@main` and `id`.
            where = recipe.where("models[0].model" if other == "source" else f"parameters.{other}")
            hint = "its aligned sibling" if other == "source" else "what target and source were both fine-tuned from"
            raise RecipeError(f"{where}: the {MODELS[other]} is the {one} itself, {first.name}; name {hint}")
    _check_dtype(recipe, plan.target)
    where = recipe.where("parameters.granularity")
    if recipe.granularity != "layer" and not plan.edit.divides:
        raise RecipeError(
            f"{where} is {recipe.granularity}, but a unit of the edit {plan.edit.name} is {plan.edit.unit}; write layer"
        )
    if recipe.granularity == "expert" and divide(plan, plan.units, None).units == plan.units:
        raise RecipeError(f"{where} is expert, but {plan.target.name} has none; write layer or block:N")
    if recipe.prefer is not None and recipe.prefer not in plan.modules:
        raise RecipeError(
            f"{recipe.where('parameters.prefer')} is {recipe.prefer}, but the modules of {plan.target.name} are "
            f"{', '.join(plan.modules)}"
        )
    # Rejects layers outside the target now.
    given_selection(recipe, plan)
    return plan


def open_plan(
    recipe: Recipe,
    *,
    partial: bool = True,
    partial_target: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
    **how: Any,
) -> Plan:
    """Open the checkpoints and find their units as `make_plan` does, without its checks of the recipe."""
    edit, opened = edit_of(recipe), opened or {}
    models = {
        name: opened.get(name)
        or open_location(location, partial=partial_target if name == "target" else partial, **how)
        for name, location in models_of(recipe).items()
    }
    if (template := recipe.template()) is not None:
        models = {name: replace(checkpoint, chat_template=template) for name, checkpoint in models.items()}
    modules, target = recipe.modules, models["target"]
    if recipe.is_auto:
        check_not_quantized(target)
        modules = auto_modules(target.config, target.shapes)
    plan = plan_transplant(**models, modules=modules, edit=edit, max_overflow=recipe.max_overflow)
    if (file := recipe.directions_file) is None:
        return plan
    if what := plan.edit.unfit(target.shapes):
        raise CheckpointError(f"{file} {what}; name the file that was made for {target.name}")
    return plan.with_changing_units()


def edit_of(recipe: Recipe) -> Edit:
    """The recipe's edit; raises `RecipeError` if `EDITS` does not have it."""
    where = recipe.where("parameters.directions")
    if recipe.directions is not None and recipe.edit != Directions.name:
        raise RecipeError(
            f"{where}: only the edit {Directions.name} reads a file of directions; write `edit: directions`"
        )
    if (file := recipe.directions_file) is not None:
        if recipe.layers is None:
            raise RecipeError(
                f"{where}: a recipe with a file of directions names its `layers`, as the search found them"
            )
        return Directions.of(read_factors(file), recipe.strength)
    if recipe.edit == Directions.name and recipe.layers is not None:
        raise RecipeError(
            f"{recipe.where('parameters.layers')}: which directions to add must be chosen, or come from a file; write "
            f"`layers: auto`, or name the file with `directions`"
        )
    if recipe.edit == AUTO:
        raise RecipeError(
            f"{recipe.where('parameters.edit')}: auto tries several edits, and this command takes one: "
            f"{', '.join(EDITS)}"
        )
    try:
        return make_edit(recipe.edit, recipe.strength)
    except ValueError as error:
        raise RecipeError(f"{recipe.where('parameters.edit')}: {error}") from None


def check_any_units(recipe: Recipe) -> None:
    """Raise `RecipeError` if the recipe's edit changes only what it chose: for commands that try any units."""
    if EDITS.get(recipe.edit, Edit).chooses:
        others = " or ".join(name for name, edit in EDITS.items() if not edit.chooses)
        raise RecipeError(
            f"{recipe.where('parameters.edit')} is {recipe.edit}, which changes only what it chose, but this command "
            f"tries units of all kinds; write {others}"
        )


def models_of(recipe: Recipe) -> dict[str, Location]:
    """The models that decide the recipe's result, the target first.

    Raises:
        RecipeError: If the recipe does not name a model that its edit reads.
    """
    models = {"target": recipe.target, "source": recipe.source}
    if recipe.edit == AUTO:
        # A rung whose models the recipe does not name is left out.
        is_read = any("pretrained" in EDITS[rung.edit].inputs for rung in LADDER)
        return models | ({"pretrained": recipe.pretrained} if is_read and recipe.pretrained else {})
    edit = edit_of(recipe)
    if "pretrained" in edit.inputs:
        if recipe.pretrained is None:
            raise RecipeError(
                f"{recipe.where('parameters.edit')}: the edit {edit.name} reads the model that target and source were "
                f"both fine-tuned from; name it with `pretrained` under `parameters`"
            )
        models["pretrained"] = recipe.pretrained
    return models


def without_equal_units(recipe: Recipe, plan: Plan) -> Plan:
    """Return the plan without the units in which the edit changes nothing, such as those equal in target and source.

    Reads the models' units as far as the first difference in each; loads no model.

    Raises:
        CannotRepair: If it changes nothing at all.
    """
    fetch_units(plan, plan.units)
    units = units_that_differ(plan, plan.units)
    if not units:
        raise _nothing_to_change(recipe, plan, plan.units)
    if num_equal := len(plan.units) - len(units):
        LOG.info(f"left out {num_equal} of {len(plan.units)} units, which the edit would not change")
    return replace(plan, units=units, twins={unit: plan.twins[unit] for unit in units})


def units_that_differ(plan: Plan, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Those of some units, whole or blocks, whose values the edit changes; reads up to the first change in each."""
    full = _acting(plan, units)

    def differs(unit: Unit) -> bool:
        advance(1, "units")
        return any(full.edit.differs(full.models, regions) for regions in full.regions((unit,)))

    with task("comparing the units of the models", len(units), "units"), ThreadPoolExecutor(COMPARE_THREADS) as pool:
        return tuple(unit for unit, is_different in zip(units, pool.map(differs, units), strict=True) if is_different)


def count_changed(plan: Plan, units: Sequence[Unit]) -> dict[Unit, int | None]:
    """The number of parameters that the edit really changes in each of some units, whole or blocks.

    A parameter counts if its value in the target's dtype becomes another. Reads all of the units; fetches nothing.

    Returns:
        By unit; None where values are on the Hub and were not fetched yet.
    """
    return {unit: None if shift is None else shift.number for unit, shift in _shifts(plan, units).items()}


def _shifts(plan: Plan, units: Sequence[Unit]) -> dict[Unit, Shift | None]:
    full = _acting(plan, units)

    def shift(unit: Unit) -> Shift | None:
        places = list(full.regions((unit,)))
        advance(1, "units")
        for name, checkpoint in full.models.items():
            if checkpoint.num_missing(_ranges(regions[name] for regions in places)):
                return None
        return Shift.total(full.edit.shift(full.models, regions) for regions in places)

    with task("comparing the units of the models", len(units), "units"), ThreadPoolExecutor(COMPARE_THREADS) as pool:
        return dict(zip(units, pool.map(shift, units), strict=True))


def shift_of(plan: Plan, units: Iterable[Unit]) -> Shift:
    """How many of the target's parameters a selection really changes, as `count_changed` counts them, and how much.

    Fetches the units of all models but the target.
    """
    chosen = tuple(units)
    fetch_units(plan, chosen)
    return Shift.total(shift or Shift() for shift in _shifts(plan, chosen).values())


def num_changed(plan: Plan, units: Iterable[Unit]) -> int:
    """The number of the target's parameters that a selection really changes; see `shift_of`."""
    return shift_of(plan, units).number


def changing_selection(recipe: Recipe, plan: Plan, selection: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units of a named selection that the edit changes; says which it does not.

    Raises:
        CannotRepair: If it changes none of them.
    """
    fetch_units(plan, selection)
    units = units_that_differ(plan, selection)
    if not units:
        raise _nothing_to_change(recipe, plan, selection)
    if equal := [unit for unit in selection if unit not in set(units)]:
        LOG.info(f"left out {spans(equal)}, which the edit would not change")
    return units


def _acting(plan: Plan, units: Iterable[Unit]) -> Plan:
    """The plan itself or, before its edit has chosen what to add, that of a full transplant."""
    return plan if plan.changes(units) else plan.reference


def _nothing_to_change(recipe: Recipe, plan: Plan, units: Sequence[Unit]) -> CannotRepair:
    """The error for units that the edit leaves as they are; names the modules in which the models do differ."""
    what = f"would change none of {'its' if set(units) == set(plan.units) else 'the'} {len(units)} units"
    why = why_equal(plan, units)
    return CannotRepair(
        f"the source {recipe.source} cannot repair this target: the edit {plan.edit.name} {what}, because {why}",
        f"it {what}: {why}",
    )


def why_equal(plan: Plan, units: Sequence[Unit]) -> str:
    """Why the edit changes none of some units, and where the models do differ, if that is known."""
    if set(units) == set(plan.units):
        same, where = ", ".join(plan.modules), f"all {len({unit.layer for unit in units})} layers"
    else:
        same, where = "values", spans(units)
    whose = "source and pretrained model" if "pretrained" in plan.edit.inputs else "both models"
    rounded = plan.edit.copies is None and not plan.edit.chooses
    small = ", or differ by less than the target's dtype can hold" if rounded else ""
    return f"{whose} have the same {same} in {where}{small}{_differences(plan, units)}"


def _differences(plan: Plan, units: Sequence[Unit]) -> str:
    """Advice where to look for a difference, given units without one; nothing is fetched for it."""
    every = plan_of_all(plan)
    others = [unit for unit in every.units if unit.module not in plan.modules]
    if any(checkpoint.partial is not None for checkpoint in plan.models.values()):
        return "; other modules may differ: try `modules: auto`" if others else ""
    if elsewhere := units_that_differ(plan, [unit for unit in plan.units if unit not in set(units)]):
        return f"; they differ in {spans(elsewhere)}"
    modules = {unit.module for unit in units_that_differ(every, others)}
    if not modules:
        return ", and no other module differs; name another source"
    return f"; try `modules: {', '.join(module for module in every.modules if module in modules)}`"


def plan_of_all(chosen: Plan, more: Iterable[str] = ()) -> Plan:
    """Return the plan of a recipe's modules, of `more`, and of all other modules that the models have."""
    modules = list(dict.fromkeys((*chosen.modules, *more)))
    for module in SEPARATE_MODULES:
        if module not in modules and not set(WHOLES.get(module, MODULES)) <= set(modules):
            try:
                with_modules(chosen, (module,))
            except UnsupportedArchitecture:
                continue
            modules.append(module)
    if not {"gate", "up", "mlp"} & set(modules):
        # Where gate and up alternate in the rows of one tensor, only the MLP as a whole is a unit.
        modules.append("mlp")
    return with_modules(chosen, modules)


def given_selection(recipe: Recipe, plan: Plan) -> tuple[Unit, ...] | None:
    """The units that a recipe names, in the plan's order, adjacent blocks joined; None if it asks for a search.

    Raises:
        RecipeError: If it names a layer, module or rows that the target does not have.
    """
    if recipe.layers is None:
        return None
    where, num_layers = recipe.where("parameters.layers"), max(unit.layer for unit in plan.twins) + 1
    chosen: list[Unit] = []
    for choice in recipe.layers:
        if choice.layer >= num_layers:
            raise RecipeError(
                f"{where}: layer {choice.layer} is outside the target, which has layers 0 to {num_layers - 1}"
            )
        named = [unit for unit in plan.units if unit.layer == choice.layer and choice.module in (None, unit.module)]
        if not named:
            raise RecipeError(f"{where}: layer {choice.layer} of the target has no {choice.module or 'unit'}")
        if choice.rows is not None and choice.rows[1] > (num_rows := plan.rows(named[0])[1]):
            raise RecipeError(
                f"{where}: {choice} is outside the target, whose {choice.layer}.{choice.module} has rows 0 to "
                f"{num_rows - 1}"
            )
        chosen += [unit if choice.rows is None else plan.part(unit, choice.rows) for unit in named]
    return join(plan, chosen)


def with_pinned_models(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with the plan's models renamed by `pinned_location`."""
    pinned: dict[str, Any] = {
        name: pinned_location(getattr(recipe, name), checkpoint) for name, checkpoint in plan.models.items()
    }
    if recipe.template_file is not None:
        pinned["chat_template"] = os.path.abspath(recipe.template_file)
    return replace(recipe, **pinned)


def pinned_location(location: Location, checkpoint: Checkpoint) -> Location:
    """Return a reproducible name of the same model: its commit on the Hub, or its absolute path.

    In another folder, a relative path names another model or, at worst, a stranger's repository on the Hub.
    """
    if location.adapter is None:
        return _pinned(location, checkpoint.commit)
    base_commit, adapter_commit = checkpoint.merged_from or (None, None)
    return replace(_pinned(location, base_commit), adapter=_pinned(location.adapter, adapter_commit))


def _pinned(location: Location, commit: str | None) -> Location:
    return replace(location, revision=commit) if commit else Location(os.path.abspath(location.path))


def fetch_units(plan: Plan, units: Iterable[Unit]) -> None:
    """Fetch these units of all models except the target in one go.

    Raises:
        HubError: If the download fails; parts that arrived are kept.
    """
    places = list(plan.regions(units))
    for name, checkpoint in plan.others.items():
        ranges = _ranges(regions[name] for regions in places)
        if num_bytes := checkpoint.num_missing(ranges):
            LOG.info(f"fetching {num_bytes / 1e6:.1f} MB of {checkpoint.name}")
            with task(f"fetching the {MODELS[name]}'s units", num_bytes, "bytes"):
                checkpoint.ensure_all(ranges)


def _ranges(regions: Iterable[Region]) -> list[tuple[str, int, int]]:
    """The byte ranges of regions in the files of their model."""
    return [(one.tensor.file, start, start + size) for one in regions for start, size in one.runs()]


# What the bytes of a model on the Hub rest on.
BY_SHA256 = "the Hub's SHA-256s"
BY_TWO_FETCHES = "two fetches of the same bytes"
BY_CACHE = "huggingface_hub's cache"


def confirm_units(plan: Plan, units: Iterable[Unit], *, whole: bool = False) -> dict[str, str]:
    """Make sure that these units of the models on the Hub are what the Hub has: a bad answer would stay unnoticed.

    Args:
        plan: The plan.
        units: The units; fetched if they are not.
        whole: Also read the cached files of models that are here as a whole, the target's among them.

    Returns:
        By the names of the models that are on the Hub, what they rest on: `BY_SHA256`, `BY_TWO_FETCHES` or `BY_CACHE`.

    Raises:
        HubError: If something is not what the Hub has; it is then removed.
    """
    places = list(plan.regions(units))
    found = {}
    for name, checkpoint in plan.models.items():
        if checkpoint.commit is None:
            continue
        regions = [regions[name] for regions in places if name in regions]
        if checkpoint.partial is not None:
            checkpoint.partial.confirm(_ranges(regions))
            found[name] = BY_TWO_FETCHES
        elif whole:
            files = checkpoint.shards if name == "target" else sorted({one.tensor.file for one in regions})
            found[name] = BY_SHA256 if checkpoint.has_hubs_sha256(files) else BY_CACHE
    return found


def _check_dtype(recipe: Recipe, target: Checkpoint) -> None:
    if recipe.dtype is None:
        return
    for tensor in target.tensors.values():
        if tensor.dtype != FLOAT_NAMES[recipe.dtype] and tensor.dtype[0] in "FB" and DTYPE_BITS[tensor.dtype] > 8:
            place = recipe.where("dtype", "out_dtype")
            raise RecipeError(
                f"{place} is {recipe.dtype}, but the target stores {tensor.name} as {tensor.dtype}; "
                f"the result keeps the target's dtypes; remove the key"
            )
