"""Estimates of a comparison, before it begins: how many prompts, steps and parameters each row asks for.

Counted without a model in memory, by how many results each method has, how many settings are tried, and about how many
tests a search makes. What the row's journal has is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.compare.measuring import Besides
from dapa_merge.compare.methods import AUTO, BLEND, CONTROLS, DAPA, DIRECTIONS, METHODS, TRAINING, TUNED, Method
from dapa_merge.compare.result import CompareOptions
from dapa_merge.compare.selections import auto_of, directions_of, part_of
from dapa_merge.compare.training import BATCH_SIZE, TRAINING_STEPS
from dapa_merge.compare.tuning import thinned
from dapa_merge.errors import DapaError
from dapa_merge.measure.expected import Calibration, Expected, bytes_to_fetch
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.prompts.parts import Parts, split_prompts
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.forecast import BACKWARD, TOKENS_OF_ROW, Work, memory_of, rates_of, work_of
from dapa_merge.search.journal import noted

# The beginnings of notes that are not figures of a result with the report's prompts.
OTHER_NOTES = ("trial ", "score ", "search ", "attribution ", "refusals", "direction", "own answers")


@dataclass(frozen=True)
class RowForecast:
    """The estimate of a row.

    Attributes:
        amounts: By part of the job, and by unit.
        rates: Seconds for each unit.
        memory_bytes: On the device, beside activations.
        models: Some of whose bytes may have to be fetched.
    """

    amounts: Mapping[str, Mapping[str, float]]
    rates: Mapping[str, float]
    memory_bytes: int
    models: tuple[Checkpoint, ...]


def forecast_row(
    name: str,
    given: Recipe,
    recipe: Recipe,
    plan: Plan,
    parts: Parts,
    meter: Meter,
    also: Collection[Besides],
    pretrained: Checkpoint | None,
    journal: Path,
    wanted: CompareOptions,
    options: Options,
) -> RowForecast:
    """Estimate what a row takes.

    Args:
        name: The row's.
        given: Its recipe as it was written.
        recipe: The recipe of all methods but `directions`.
        plan: Its plan.
        parts: Its prompts.
        meter: The report's.
        also: What else is measured of each result.
        pretrained: What some methods subtract.
        journal: Of the row; what it has is not asked again.
        wanted: What is compared.
        options: The device.
    """
    known = noted(journal)
    tried = len(parts.search.harmful) + len(parts.search.harmless)
    each = meter.num_prompts + sum(len(one.prompts.harmful) + len(one.prompts.harmless) for one in also)
    works = _searches(given, recipe, plan, parts, wanted)
    results, trials, scores = 2.0, 0, 0
    for method in map(METHODS.__getitem__, wanted.methods):
        if method.kind in TUNED:
            settings = _settings(method, wanted)
            results += len(settings) if _is_fixed(method, wanted) else 1
            trials += 0 if _is_fixed(method, wanted) else len(settings)
        elif method.key not in CONTROLS:
            results += 1
        else:
            for search in [works[key] for key in (DAPA, AUTO) if key in works]:
                results += wanted.num_seeds if method.key == "random" else 1
                scores += search.tests if method.key == "random-search" else 0
    # Limits come from target and source.
    trials += 2 if trials else 0
    if wanted.draws_curve:
        results += wanted.num_points * (1 + wanted.num_seeds)
    results -= sum(" besides " not in note and not note.startswith(OTHER_NOTES) for note in known)
    trials -= sum(note.startswith("trial ") for note in known)
    scores -= sum(note.startswith("score ") for note in known)
    passes = Calibration(plan.target, choose_device(options.device), options.dtype)
    step = (1 + BACKWARD) * passes.pass_seconds(BATCH_SIZE * TOKENS_OF_ROW, BATCH_SIZE * TOKENS_OF_ROW // 2)
    own = {
        "prompts": max(results, 0) * each + (max(trials, 0) + max(scores, 0)) * tried,
        TRAINING_STEPS: _training_steps(wanted) if trials > 0 else 0,
    }
    searches = {part_of(name, key): work.amounts for key, work in works.items() if f"search {key}" not in known}
    return RowForecast(
        {name: own, **searches},
        {**rates_of(passes, recipe.max_new_tokens), TRAINING_STEPS: step},
        memory_of(plan, options),
        (*plan.models.values(), *([] if pretrained is None else [pretrained])),
    )


def _searches(given: Recipe, recipe: Recipe, plan: Plan, parts: Parts, wanted: CompareOptions) -> dict[str, Work]:
    """The estimates of the searches, by method; none where the recipe names its layers."""
    if recipe.layers is not None:
        return {}
    found: dict[str, Work] = {}
    # What cannot be searched costs nothing, and the row says why.
    with suppress(DapaError):
        if wanted.draws_curve or {DAPA, AUTO, *CONTROLS} & set(wanted.methods):
            found[DAPA] = work_of(recipe, plan, parts)
            if AUTO in wanted.methods and (auto := auto_of(recipe, plan)) is not None:
                found[AUTO] = work_of(*auto, parts)
        if DIRECTIONS in wanted.methods:
            one = directions_of(given)
            found[DIRECTIONS] = work_of(one, make_plan(one, opened=plan.models), split_prompts(one))
    return found


def _is_fixed(method: Method, wanted: CompareOptions) -> bool:
    """Whether each setting of a method is a row of its own."""
    return method.kind == BLEND and wanted.weights is not None


def _settings(method: Method, wanted: CompareOptions) -> tuple[tuple[float, ...], ...]:
    if _is_fixed(method, wanted):
        return tuple((weight,) for weight in wanted.weights or ())
    return thinned(method.grid, wanted.num_tries)


def _training_steps(wanted: CompareOptions) -> int:
    """Steps of all trainings: of one rate, those of fewer steps are the beginning of those of more."""
    total = 0
    for method in map(METHODS.__getitem__, wanted.methods):
        if method.kind == TRAINING:
            most: dict[float, float] = {}
            for rate, steps in _settings(method, wanted):
                most[rate] = max(most.get(rate, 0), steps)
            total += int(sum(most.values()))
    return total


def forecast(rows: Collection[RowForecast], options: Options) -> Expected:
    """The estimate of all rows together; workers measure several at once."""
    parts = {part: amounts for row in rows for part, amounts in row.amounts.items()}
    totals: dict[str, list[float]] = {}
    for row in rows:
        for amounts in row.amounts.values():
            for unit, amount in amounts.items():
                spent = totals.setdefault(unit, [0.0, 0.0])
                spent[0] += amount * row.rates[unit]
                spent[1] += amount
    at_once = (options.num_workers or 1) if options.uses_ray else 1
    models = {model.folder: model for row in rows for model in row.models}
    return Expected(
        parts,
        {unit: seconds / amount / at_once for unit, (seconds, amount) in totals.items() if amount},
        max(row.memory_bytes for row in rows),
        bytes_to_fetch(models.values()),
        choose_device(options.device).type,
    )
