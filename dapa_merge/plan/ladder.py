"""The plans that a recipe asks for: one, or one for each rung of `edit: auto`.

`LADDER` (plan/edit.py) declares the rungs; `search/ladder.py` climbs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import AUTO, DIVISIBLE_MODULES
from dapa_merge.errors import CannotRepair, RecipeError, UnsupportedArchitecture
from dapa_merge.plan.edit import EDITS, LADDER
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import make_plan, models_of, without_equal_units
from dapa_merge.progress import LOG
from dapa_merge.recipe.recipe import Recipe


@dataclass(frozen=True)
class Tried:
    """A rung that was tried, for people.

    Attributes:
        edit: Its name.
        modules: Those whose units it could change.
        verdict: Whether it repairs, and if not, why not.
    """

    edit: str
    modules: tuple[str, ...]
    verdict: str

    def __str__(self) -> str:
        return f"{self.edit} of {', '.join(self.modules)}: {self.verdict}"


@dataclass(frozen=True)
class Ladder:
    """A recipe and what it asks to try.

    Attributes:
        recipe: As it was written.
        rungs: In order: the recipe of one edit, and its plan. A recipe of one edit is its own and only rung.
        skipped: Rungs that were left out, because their edits would change nothing.
    """

    recipe: Recipe
    rungs: tuple[tuple[Recipe, Plan], ...]
    skipped: tuple[Tried, ...] = ()

    def without_equal_units(self) -> Ladder:
        """The ladder with only the units that each rung's edit would change; loads no model.

        Raises:
            CannotRepair: If no rung has such units.
        """
        rungs: list[tuple[Recipe, Plan]] = []
        skipped: list[Tried] = []
        for recipe, plan in self.rungs:
            try:
                rungs.append((recipe, without_equal_units(recipe, plan)))
            except CannotRepair as error:
                if not self.is_auto:
                    raise
                LOG.info(f"the edit {recipe.edit} does not repair this target: {error.why}")
                skipped.append(Tried(recipe.edit, plan.modules, error.why))
        if not rungs:
            raise self.no_repair(skipped)
        return replace(self, rungs=tuple(rungs), skipped=(*self.skipped, *skipped))

    def no_repair(self, tried: Iterable[Tried]) -> CannotRepair:
        """The error if none of the rungs repairs the target."""
        whys = "; ".join(map(str, tried))
        names = f"{self.recipe.target} from {self.recipe.source}"
        return CannotRepair(f"no edit repairs the target {names} within the limits: {whys}", whys)

    @property
    def is_auto(self) -> bool:
        """Whether there is anything to climb."""
        return self.recipe.edit == AUTO

    @property
    def plan(self) -> Plan:
        """The first rung's plan."""
        return self.rungs[0][1]

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The models that any rung reads, by their names in a recipe."""
        return {name: checkpoint for _, plan in self.rungs for name, checkpoint in plan.models.items()}

    def choosing(self) -> Ladder:
        """The rung alone whose edit chooses what it adds, and so has points to pick; the ladder itself without one."""
        found = [recipe.edit for recipe, plan in self.rungs if plan.edit.chooses]
        return self.only(found[0]) if found else self

    def only(self, edit: str) -> Ladder:
        """The rung with this edit alone.

        Raises:
            RecipeError: If the ladder has no such rung.
        """
        for recipe, plan in self.rungs:
            if recipe.edit == edit:
                return Ladder(recipe, ((recipe, plan),))
        raise RecipeError(f"{self.recipe.where('parameters.edit')} does not lead to the edit {edit!r:.80}")


def rungs_of(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the recipes that `edit: auto` stands for, in order; any other recipe stands for itself.

    Keys that an edit or its modules cannot follow are left out: `granularity`, `prefer`.

    Raises:
        RecipeError: If the recipe names its layers.
    """
    if recipe.edit != AUTO:
        yield recipe
        return
    if recipe.layers is not None:
        raise RecipeError(
            f"{recipe.where('parameters.layers')}: which edit repairs is found by a search; write `layers: auto` with "
            f"`edit: auto`, or name the edit"
        )
    for rung in LADDER:
        if not rung.can_try(models_of(recipe)):
            continue
        modules = recipe.modules or rung.modules
        divides = EDITS[rung.edit].divides and set(modules) <= set(DIVISIBLE_MODULES)
        yield replace(
            recipe,
            edit=rung.edit,
            modules=modules,
            granularity=recipe.granularity if divides else "layer",
            prefer=recipe.prefer if recipe.prefer in modules or modules == (AUTO,) else None,
        )


def make_ladder(recipe: Recipe, **how: Any) -> Ladder:
    """Open the checkpoints and make the plan of every rung; takes the arguments of `make_plan`.

    A rung whose modules the models do not have is left out.

    Raises:
        DapaError: If a model or the recipe is not usable.
    """
    rungs: list[tuple[Recipe, Plan]] = []
    opened: dict[str, Checkpoint] = {}
    lacking: UnsupportedArchitecture | None = None
    for rung in rungs_of(recipe):
        try:
            plan = make_plan(rung, opened=opened, **how)
        except UnsupportedArchitecture as error:
            lacking = error
            continue
        opened |= plan.models
        rungs.append((rung, plan))
    if not rungs:
        assert lacking is not None
        raise lacking
    return Ladder(recipe, tuple(rungs))
