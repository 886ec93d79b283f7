"""What DAPA's search finds for a recipe, and at what cost; once, also where it finds nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dapa_merge.checkpoint.architecture import AUTO_MODULES, Unit
from dapa_merge.checkpoint.plan import Plan, join, plan_transplant
from dapa_merge.compare.memory import peak_memory
from dapa_merge.compare.result import Cost
from dapa_merge.errors import CannotRepair, UnsupportedArchitecture
from dapa_merge.parameters import parse_layers
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.search.journal import Journal
from dapa_merge.search_flow import search_plan
from dapa_merge.search_options import SearchOptions
from dapa_merge.selection import given_selection


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plan: The candidates that it had.
        units: What it kept; None if nothing repairs.
        why_not: Why nothing does.
        cost: What the search took; None where the recipe names its layers.
    """

    plan: Plan
    units: tuple[Unit, ...] | None = None
    why_not: str | None = None
    cost: Cost | None = None


def auto_of(recipe: Recipe, chosen: Plan) -> tuple[Recipe, Plan] | None:
    """The recipe with `modules: auto`, of whole projections; None if it has these modules, or the models no such units.

    Args:
        recipe: A recipe.
        chosen: Its plan.
    """
    if set(AUTO_MODULES) <= set(recipe.modules) or "mlp" in recipe.modules:
        return None
    try:
        plan = plan_transplant(
            chosen.target, chosen.source, AUTO_MODULES, strength=chosen.strength, max_overflow=chosen.max_overflow
        )
    except UnsupportedArchitecture:
        return None
    # A row of down is no neuron's, so that there is nothing finer.
    return replace(recipe, layers=None, modules=AUTO_MODULES, granularity="layer", prefer=None), plan


def find(
    name: str, recipe: Recipe, plan: Plan, folder: Path, journal: Journal, options: SearchOptions, reporter: Reporter
) -> Found:
    """Search, or read in the journal what was found before.

    Args:
        name: Of the search, for its files.
        recipe: What to search.
        plan: Its candidates.
        folder: Where the search's own journal is.
        journal: Where the outcome is noted.
        options: Where to evaluate.
        reporter: Hears of the steps.

    Raises:
        DapaError: For whatever does not fit; what was tested is in the search's journal.
    """
    given = given_selection(recipe, plan)
    if given is not None:
        return Found(plan, given)
    note = f"search {name}"
    if note not in journal.notes:
        reporter.say(f"searching among {', '.join(recipe.modules)}")
        journal.note(note, _search(recipe, plan, folder / f"{name}.jsonl", options, reporter))
    found = journal.notes[note]
    cost = Cost(**found["cost"])
    if found["units"] is None:
        return Found(plan, None, found["why_not"], cost)
    choices = parse_layers(",".join(found["units"]))
    return Found(plan, given_selection(replace(recipe, layers=choices), plan), None, cost)


def _search(recipe: Recipe, plan: Plan, path: Path, options: SearchOptions, reporter: Reporter) -> dict[str, object]:
    from dapa_merge.evaluate.live import choose_device

    before = _recorded_seconds(path)
    began = time.perf_counter()
    units: Sequence[Unit] | None = None
    why_not, tests = None, 0
    with peak_memory(choose_device(options.device)) as peak:
        try:
            found = search_plan(recipe, plan, replace(options, journal=path), reporter)
        except CannotRepair as error:
            why_not = str(error)
            reporter.say(why_not)
        else:
            units, tests = join(plan, found.minimum.units), found.minimum.tests
    cost = Cost(tests, round(before + time.perf_counter() - began, 3), peak)
    return {"units": None if units is None else list(map(str, units)), "why_not": why_not, "cost": asdict(cost)}


def _recorded_seconds(path: Path) -> float:
    """What the tests in the journal of a search that was stopped took."""
    total = 0.0
    with suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError, AttributeError, TypeError):
                total += float(json.loads(line).get("seconds", 0))
    return total
