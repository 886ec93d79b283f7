"""What speaks for a selection: figures of target, result and source, with prompts that the search did not ask.

A search picks among many selections one that does well on its own prompts, partly by luck; on others the luck is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.figures import Change
from dapa_merge.measure.meter import MeasuredModel, measure_checkpoint, measure_live
from dapa_merge.measure.prompts.sets import load_prompts, split_prompts
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.statistics import mcnemar
from dapa_merge.plan.plan import Plan, join
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.report import Searched
from dapa_merge.search.identity import open_journal
from dapa_merge.search.journal import Journal
from dapa_merge.search.result import Search
from dapa_merge.search.search import Session, search
from dapa_merge.search.workers import in_order, make_bench

if TYPE_CHECKING:
    from dapa_merge.measure.figures import Figures, Response
    from dapa_merge.search.bench import Bench


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
        responses: What `target`, `result` and `source` said.
    """

    selection: tuple[Unit, ...]
    search: Search | None
    searched: Searched | None
    before: Figures
    after: Figures
    source_alone: Figures
    dsr_change: Change
    over_refusal_change: Change
    responses: Mapping[str, Sequence[Response]]


def gather_evidence(recipe: Recipe, plan: Plan, selection: tuple[Unit, ...] | None, options: Options) -> Evidence:
    """Search, unless a selection is given, and measure; one that the recipe names with all prompts.

    One that another search found, and a lock gives, is measured with the prompts that a search would not have asked.

    Raises:
        CannotRepair: If a search finds that the source makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit.
    """
    from dapa_merge.measure.meter import report_meter

    if recipe.layers is None:
        searching, confirming = split_prompts(recipe)
    else:
        searching = confirming = load_prompts(recipe.prompts)
    meter = report_meter(recipe, confirming, options)
    found: Search | None = None
    searched: Searched | None = None
    with ExitStack() as stack:
        bench = stack.enter_context(closing(make_bench(recipe, plan, searching, options)))
        # What cannot work is noticed before the search, not after it: a wrong journal, a source that does not load.
        journal = Journal()
        if selection is None:
            journal = stack.enter_context(closing(open_journal(recipe, plan, bench, options.journal)))
        source_alone = measure_checkpoint(plan.source, meter, options.device, "source")
        if selection is None:
            found = search(Session(recipe, plan, bench, journal, options))
            selection = join(plan, found.minimum.units)
            searched = _searched(found, bench)
            LOG.info("confirming it with prompts that the search has not asked")
        # What the search learned of the memory holds for the confirmation as well.
        meter = replace(meter, batch_size=bench.meter.batch_size)
        before = measure_live(bench.live, (), meter, "target")
        after = measure_live(bench.live, selection, meter, "result")
    return Evidence(
        selection=selection,
        search=found,
        searched=searched,
        before=before.figures,
        after=after.figures,
        source_alone=source_alone.figures,
        dsr_change=_change("harmful", before, after),
        over_refusal_change=_change("harmless", before, after),
        responses={"target": before.responses, "result": after.responses, "source": source_alone.responses},
    )


def _searched(found: Search, bench: Bench) -> Searched:
    """What the search could see of its own result, which it need not have measured in full."""
    prompts = bench.meter.prompts
    with task("measuring the result as the search saw it", len(prompts.harmful), "prompts"):
        after = bench.score(in_order(found.minimum.units))
    return Searched(bench.measure, len(prompts.harmful), len(prompts.harmless), found.target.score, after)


def _change(kind: str, before: MeasuredModel, after: MeasuredModel) -> Change:
    """What became of the prompts of one kind."""

    def refused(measured: MeasuredModel) -> list[bool]:
        return [answer.outcome == Outcome.REFUSED.value for answer in measured.responses if answer.kind == kind]

    return mcnemar(refused(before), refused(after))
