"""Everything that a trace found, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.recipe import Recipe
from dapa_merge.search_flow import Search
from dapa_merge.trace_options import TraceOptions

if TYPE_CHECKING:
    from dapa_merge.trace.causal import Trace
    from dapa_merge.trace.contrast import Contrast
    from dapa_merge.trace.groups import Finding
    from dapa_merge.trace.influence import Influence
    from dapa_merge.trace.settings import Settings


@dataclass(frozen=True)
class CurvePoint:
    """One size of the edit, and what it does; rates in [0, 1].

    Attributes:
        units: What was transplanted.
        share: Of the target's parameters.
        dsr: Share of the harmful prompts refused, with its 95 % interval.
        over_refusal: Share of the harmless prompts refused, with its 95 % interval.
        skills: By name, the score, with its 95 % interval if it has one.
    """

    units: tuple[str, ...]
    share: float
    dsr: tuple[float, tuple[float, float]]
    over_refusal: tuple[float, tuple[float, float]]
    skills: dict[str, tuple[float, tuple[float, float] | None]]


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
