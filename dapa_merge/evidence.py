"""What speaks for a selection: figures of target, result and source, with prompts that the search did not ask.

A search picks among many selections one that does well on its own prompts, partly by luck; on others the luck is gone.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.evaluate.chance import Change, compare
from dapa_merge.evaluate.prompts import load_prompts
from dapa_merge.evaluate.refusal import Outcome
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.report import Searched
from dapa_merge.selection import (
    Search,
    find_selection,
    load_live,
    make_meter,
    measure_checkpoint,
    measurement_live,
    split_prompts,
)

if TYPE_CHECKING:
    from dapa_merge.evaluate.live import LiveModel
    from dapa_merge.evaluate.measure import Figures, Measurement, Meter


@dataclass(frozen=True)
class Evidence:
    """What was found and measured; `Report` says what each figure is.

    Attributes:
        selection: What was given, or found.
        search: How it was found; None if it was given, as the next.
        searched: What the search saw.
        before: Figures of the target.
        after: Figures of the result.
        source_alone: Figures of the source.
        dsr_change: From `before` to `after`.
        over_refusal_change: From `before` to `after`.
    """

    selection: tuple[Unit, ...]
    search: Search | None
    searched: Searched | None
    before: Figures
    after: Figures
    source_alone: Figures
    dsr_change: Change
    over_refusal_change: Change


def gather_evidence(
    recipe: Recipe, plan: Plan, selection: tuple[Unit, ...] | None, device: str, reporter: Reporter
) -> Evidence:
    """Search, unless a selection is given, and measure; a given selection with all prompts.

    Raises:
        CannotRepair: If a search finds that the source makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit.
    """
    if selection is None:
        searching, confirming = split_prompts(recipe)
    else:
        searching = confirming = load_prompts(recipe.prompts)
    meter = make_meter(recipe, confirming)
    # First, because a source that cannot even be loaded should not be noticed after the search.
    source_alone = measure_checkpoint(plan.source, meter, device, "source", reporter).figures()
    search: Search | None = None
    searched: Searched | None = None
    with closing(load_live(plan, device, reporter)) as live:
        if selection is None:
            # With the same batch size, which is halved for good where memory is short.
            search_meter = replace(meter, prompts=searching)
            search = find_selection(recipe, plan, live, search_meter, reporter)
            selection = search.minimum.units
            searched = _searched(search, live, search_meter, reporter)
            reporter.say("confirming it with prompts that the search has not asked")
        before = measurement_live(live, (), meter, "target", reporter)
        after = measurement_live(live, selection, meter, "result", reporter)
    return Evidence(
        selection=selection,
        search=search,
        searched=searched,
        before=before.figures(),
        after=after.figures(),
        source_alone=source_alone,
        dsr_change=_change("harmful", before, after),
        over_refusal_change=_change("harmless", before, after),
    )


def _searched(search: Search, live: LiveModel, meter: Meter, reporter: Reporter) -> Searched:
    """What the search could see of its own result, which it need not have measured in full."""
    prompts = meter.prompts
    with (
        live.transplanted(search.minimum.units) as candidate,
        reporter.task("measuring the result as the search saw it", len(prompts.harmful)) as answered,
    ):
        dsr = replace(meter, progress=answered).measure(candidate, live.tokenizer).dsr
    return Searched(len(prompts.harmful), len(prompts.harmless), dsr_before=search.target.dsr, dsr_after=dsr)


def _change(kind: str, before: Measurement, after: Measurement) -> Change:
    """What became of the prompts of one kind."""

    def refused(measurement: Measurement) -> list[bool]:
        return [answer.outcome == Outcome.REFUSED.value for answer in measurement.responses() if answer.kind == kind]

    return compare(refused(before), refused(after))
