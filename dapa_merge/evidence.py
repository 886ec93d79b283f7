"""What speaks for a selection: figures of target, result and source, with prompts that the search did not ask.

A search picks among many selections one that does well on its own prompts, partly by luck; on others the luck is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.plan import Plan, join
from dapa_merge.evaluate.callback import Candidate
from dapa_merge.evaluate.chance import Change, compare
from dapa_merge.evaluate.prompts import load_prompts
from dapa_merge.evaluate.refusal import Outcome
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.report import Searched
from dapa_merge.search.journal import Journal
from dapa_merge.search_flow import Search, search
from dapa_merge.search_options import SearchOptions
from dapa_merge.search_record import open_journal
from dapa_merge.search_testers import in_order, make_bench
from dapa_merge.selection import split_prompts

if TYPE_CHECKING:
    from dapa_merge.bench import Bench
    from dapa_merge.evaluate.figures import Figures, Response
    from dapa_merge.evaluate.live import LiveModel
    from dapa_merge.evaluate.measure import Meter


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


@dataclass(frozen=True)
class Measured:
    """A model's figures, and the responses behind them; the model itself may be gone."""

    figures: Figures
    responses: Sequence[Response]


def gather_evidence(
    recipe: Recipe, plan: Plan, selection: tuple[Unit, ...] | None, options: SearchOptions, reporter: Reporter
) -> Evidence:
    """Search, unless a selection is given, and measure; one that the recipe names with all prompts.

    One that another search found, and a lock gives, is measured with the prompts that a search would not have asked.

    Raises:
        CannotRepair: If a search finds that the source makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit.
    """
    from dapa_merge.meters import report_meter

    if recipe.layers is None:
        searching, confirming = split_prompts(recipe)
    else:
        searching = confirming = load_prompts(recipe.prompts)
    meter = report_meter(recipe, confirming, options.evaluators)
    found: Search | None = None
    searched: Searched | None = None
    with ExitStack() as stack:
        bench = stack.enter_context(closing(make_bench(recipe, plan, searching, options, reporter)))
        # What cannot work is noticed before the search, not after it: a wrong journal, a source that does not load.
        journal = Journal()
        if selection is None:
            journal = stack.enter_context(closing(open_journal(recipe, plan, bench, options.journal, reporter)))
        source_alone = measure_checkpoint(plan.source, meter, options.device, "source", reporter)
        if selection is None:
            found = search(recipe, plan, bench, journal, options, reporter)
            selection = join(plan, found.minimum.units)
            searched = _searched(found, bench, reporter)
            reporter.say("confirming it with prompts that the search has not asked")
        # What the search learned of the memory holds for the confirmation as well.
        meter = replace(meter, batch_size=bench.meter.batch_size)
        before = measure_live(bench.live, (), meter, "target", reporter)
        after = measure_live(bench.live, selection, meter, "result", reporter)
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


def _searched(found: Search, bench: Bench, reporter: Reporter) -> Searched:
    """What the search could see of its own result, which it need not have measured in full."""
    prompts = bench.meter.prompts
    with reporter.task("measuring the result as the search saw it", len(prompts.harmful)) as answered:
        after = bench.score(in_order(found.minimum.units), answered)
    return Searched(bench.measure, len(prompts.harmful), len(prompts.harmless), found.target.score, after)


def _change(kind: str, before: Measured, after: Measured) -> Change:
    """What became of the prompts of one kind."""

    def refused(measured: Measured) -> list[bool]:
        return [answer.outcome == Outcome.REFUSED.value for answer in measured.responses if answer.kind == kind]

    return compare(refused(before), refused(after))


def measure_live(live: LiveModel, selection: Sequence[Unit], meter: Meter, name: str, reporter: Reporter) -> Measured:
    """The target with a selection transplanted, measured in full."""
    with live.transplanted(selection) as model:
        return measure_candidate(Candidate(model, live.tokenizer, tuple(selection)), meter, name, reporter)


def measure_checkpoint(checkpoint: Checkpoint, meter: Meter, device: str, name: str, reporter: Reporter) -> Measured:
    """A model that is loaded for it, measured in full."""
    from dapa_merge.evaluate.live import choose_device, load_model
    from dapa_merge.evaluate.quiet import quiet_transformers

    reporter.say(f"loading the {name} {checkpoint.name}")
    model, tokenizer = load_model(checkpoint, choose_device(device))
    with quiet_transformers():
        return measure_candidate(Candidate(model, tokenizer, ()), meter, name, reporter)


def measure_candidate(candidate: Candidate, meter: Meter, name: str, reporter: Reporter) -> Measured:
    """A model in memory, measured in full."""
    prompts = meter.prompts
    total = len(prompts.harmful) + len(prompts.harmless) + sum(skill.num_questions for skill in meter.skills)
    with reporter.task(f"measuring the {name}", total) as answered:
        measurement = replace(meter, progress=answered).measure(
            candidate.model, candidate.tokenizer, candidate.selection
        )
        figures = measurement.figures()
    reporter.say(f"measured the {name}: DSR {figures.dsr:.3f}, over-refusal {figures.over_refusal:.3f}")
    return Measured(figures, measurement.responses())
