"""Which units to transplant: named by the recipe, or found by a search with the target in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.files import DTYPE_BITS, FLOAT_NAMES, Checkpoint, open_checkpoint
from dapa_merge.checkpoint.plan import Plan, join, plan_transplant
from dapa_merge.errors import CannotRepair, CheckpointError, RecipeError
from dapa_merge.evaluate.prompts import load_prompts, split
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Location, Recipe
from dapa_merge.report import spans
from dapa_merge.search.delta import Minimum, SearchInterrupted, minimize
from dapa_merge.search.oracle import Requirement, requirement

if TYPE_CHECKING:
    from dapa_merge.evaluate.live import LiveModel
    from dapa_merge.evaluate.measure import Figures, Measurement, Meter
    from dapa_merge.evaluate.prompts import PromptSet


@dataclass(frozen=True)
class Search:
    """A finished search: what it found, what had to be met, and the target's own figures."""

    minimum: Minimum[Unit]
    requirement: Requirement
    target: Figures
    seconds: float


def make_plan(recipe: Recipe) -> Plan:
    """Open both checkpoints, find their units and check the recipe against them. Loads no torch.

    Raises:
        DapaError: With the sentence for whatever does not fit.
    """
    target, source = open_location(recipe.target), open_location(recipe.source)
    plan = plan_transplant(target, source, recipe.modules)
    _check_dtype(recipe, target)
    if given_selection(recipe, plan) is None:
        # What a search would stumble over is told now.
        split_prompts(recipe)
    return plan


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
        if choice.rows is not None and choice.rows[1] > (num_rows := plan.rows(named[0])[1]):
            raise RecipeError(
                f"{recipe.where('parameters.layers')}: {choice} is outside the target, "
                f"whose {choice.layer}.{choice.module} has rows 0 to {num_rows - 1}"
            )
        chosen += [unit if choice.rows is None else plan.part(unit, choice.rows) for unit in named]
    return join(plan, chosen)


def search_plan(recipe: Recipe, plan: Plan, device: str, reporter: Reporter) -> Search:
    """Load the target of a recipe's plan, and search, whatever layers the recipe names.

    Raises:
        CannotRepair: If the source makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit.
    """
    searching, _ = split_prompts(recipe)
    meter = make_meter(recipe, searching)
    with closing(load_live(plan, device, reporter)) as live:
        return find_selection(recipe, plan, live, meter, reporter)


def find_selection(recipe: Recipe, plan: Plan, live: LiveModel, meter: Meter, reporter: Reporter) -> Search:
    """Search for a 1-minimal selection that meets the recipe's requirement.

    Raises:
        CannotRepair: If the full transplant makes nothing better, or breaks a limit.
    """
    start = time.monotonic()
    target = measure_live(live, (), meter, "target", reporter)
    full = measure_live(live, plan.units, meter, "target with every unit of the source", reporter)
    _refuse_nan(target, f"the target {recipe.target}")
    _refuse_nan(full, f"the target with every unit of the source {recipe.source}")
    if full.dsr <= target.dsr:
        raise CannotRepair(
            f"the source {recipe.source} makes nothing better: with all {len(plan.units)} units "
            f"({', '.join(recipe.modules)}) transplanted the DSR is {full.dsr:.3f}, and without them {target.dsr:.3f}"
        )
    limits = requirement(
        target,
        full,
        retain=recipe.retain,
        max_over_refusal=recipe.max_over_refusal,
        max_perplexity=recipe.max_perplexity,
    )
    if complaint := limits.complaint(full):
        raise CannotRepair(f"the source {recipe.source} cannot repair this target: with every unit {complaint}")
    known = {frozenset(): target, frozenset(plan.units): full}

    def holds(selection: frozenset[Unit]) -> bool:
        if selection in known:
            return limits.holds(known[selection])
        ordered = [unit for unit in plan.units if unit in selection]
        name = spans(ordered)
        with (
            live.transplanted(ordered) as candidate,
            reporter.task(f"testing {name}", len(meter.prompts.harmful)) as answered,
        ):
            measurement = replace(meter, progress=answered).measure(candidate, live.tokenizer)
            complaint = limits.complaint(measurement)
            verdict = "holds" if complaint is None else "fails"
            why = f": {complaint}" if complaint and measurement.dsr >= limits.min_dsr else ""
            reporter.say(f"  {verdict}  DSR {measurement.dsr:.3f}  {name}{why}")
        return complaint is None

    reporter.say(f"searching among {len(plan.units)} units for the few that keep a DSR of {limits.min_dsr:.3f}")
    try:
        minimum = minimize(plan.units, holds, algorithm=recipe.search)
    except SearchInterrupted as stop:
        reporter.say(f"the best selection so far: {spans(stop.best.units)}")
        raise (stop.__cause__ or stop) from None
    found = spans(minimum.units)
    reporter.say(f"found {found} in {minimum.tests} tests, the full transplant's among them")
    return Search(minimum, limits, target, time.monotonic() - start)


def load_live(plan: Plan, device: str, reporter: Reporter) -> LiveModel:
    """The target in memory, ready for transplants."""
    reporter.say(f"loading the target {plan.target.name}")
    from dapa_merge.evaluate.live import LiveModel, choose_device

    return LiveModel(plan, choose_device(device))


def split_prompts(recipe: Recipe) -> tuple[PromptSet, PromptSet]:
    """The prompts that a search asks, and those that are kept for the report on what it found.

    Raises:
        UsageError: If the recipe's prompts cannot be read, or are too few.
    """
    return split(load_prompts(recipe.prompts), recipe.confirm)


def make_meter(recipe: Recipe, prompts: PromptSet) -> Meter:
    """What measures every model of a recipe in the same way, with these of its prompts."""
    from dapa_merge.evaluate.generate import BatchSize
    from dapa_merge.evaluate.measure import Meter

    return Meter(prompts, recipe.max_new_tokens, BatchSize(recipe.batch_size))


def measure_live(live: LiveModel, selection: Sequence[Unit], meter: Meter, name: str, reporter: Reporter) -> Figures:
    """All figures of the target with a selection transplanted."""
    return measurement_live(live, selection, meter, name, reporter).figures()


def measurement_live(
    live: LiveModel, selection: Sequence[Unit], meter: Meter, name: str, reporter: Reporter
) -> Measurement:
    """The target with a selection transplanted, with all its figures and responses measured."""
    with live.transplanted(selection) as candidate:
        return _measured(candidate, live.tokenizer, meter, name, reporter)


def measure_checkpoint(checkpoint: Checkpoint, meter: Meter, device: str, name: str, reporter: Reporter) -> Measurement:
    """A model that is loaded for it, with all its figures measured."""
    from dapa_merge.evaluate.live import choose_device, load_model

    reporter.say(f"loading the {name} {checkpoint.name}")
    model, tokenizer = load_model(checkpoint, choose_device(device))
    return _measured(model, tokenizer, meter, name, reporter)


def _measured(model: Any, tokenizer: Any, meter: Meter, name: str, reporter: Reporter) -> Measurement:
    prompts = meter.prompts
    total = len(prompts.harmful) + len(prompts.harmless) + len(prompts.skill)
    with reporter.task(f"measuring the {name}", total) as answered:
        measurement = replace(meter, progress=answered).measure(model, tokenizer)
        figures = measurement.figures()
    reporter.say(f"measured the {name}: DSR {figures.dsr:.3f}, over-refusal {figures.over_refusal:.3f}")
    return measurement


def _refuse_nan(figures: Figures, name: str) -> None:
    """Raise `CheckpointError` if a model computes no numbers: its perplexity is infinite."""
    if figures.perplexity == math.inf:
        raise CheckpointError(f"{name} computes infinities or no numbers at all; its weights are damaged")


def open_location(location: Location) -> Checkpoint:
    """The checkpoint that a recipe or a command names."""
    return open_checkpoint(location.path, location.revision)


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
