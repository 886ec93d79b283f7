"""Everything that a trace found, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapa_merge.checkpoint.units import Unit
from dapa_merge.plan.plan import Plan
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.result import Search
from dapa_merge.trace.edits import CurvePoint
from dapa_merge.trace.options import TraceOptions

if TYPE_CHECKING:
    from dapa_merge.search.attribution import Contrast
    from dapa_merge.trace.case import Settings
    from dapa_merge.trace.causal import Trace
    from dapa_merge.trace.edits import Finding
    from dapa_merge.trace.influence import Influence


@dataclass(frozen=True)
class Traced:
    """Everything that was found.

    Attributes:
        recipe: What was traced.
        wanted: How.
        settings: How the model was traced causally.
        plan: Target and source, with the units of all modules.
        units: Those of them that are no part of another: gate, up, down and attention of every layer.
        candidates: Those that a search of the recipe chooses from.
        selection: What the search selected, or the recipe names; None if neither.
        why_none: Why nothing was selected.
        search: The search, if there was one.
        num_prompts: Harmful prompts that were asked.
        contrasts: Those of them that the source refuses and the target answers, with both responses.
        attribution: The first-order effect of each of the plan's units, in nats.
        influence: What each of the plan's units does alone.
        measure: What the score is of which `target_score` and the findings are.
        target_score: The target's, in [0, 1].
        findings: What groups of units do.
        curve: What edits of different sizes do.
        traces: What was traced of each prompt.
        seconds: What each of them took.
    """

    recipe: Recipe
    wanted: TraceOptions
    settings: Settings
    plan: Plan
    units: tuple[Unit, ...]
    candidates: tuple[Unit, ...]
    selection: tuple[Unit, ...] | None
    why_none: str | None
    search: Search | None
    num_prompts: int
    contrasts: tuple[Contrast, ...]
    attribution: dict[Unit, float]
    influence: Influence
    measure: str
    target_score: float
    findings: tuple[Finding, ...]
    curve: tuple[CurvePoint, ...]
    traces: tuple[Trace, ...]
    seconds: tuple[float, ...]
