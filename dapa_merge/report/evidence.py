"""Before/after measurements on held-out prompts: the figures of target, result and source.

A search picks one of many selections partly by luck on its own prompts; held-out prompts remove that bias.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial

from dapa_merge.checkpoint.digest import hash_bytes
from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.figures import HELD_OUT, KEEP, SEARCH_PROMPTS, BesideSource, Change, Figures, Response
from dapa_merge.measure.live import Resident
from dapa_merge.measure.meter import MeasuredModel, Meter, measure_checkpoint, measure_live
from dapa_merge.measure.placement import fits, weight_bytes
from dapa_merge.measure.prompts.parts import all_prompts
from dapa_merge.measure.statistics import beside_source, change_of, kept_figure
from dapa_merge.plan.ladder import Ladder, Tried
from dapa_merge.plan.plan import Plan, join, reduced
from dapa_merge.progress import LOG, begin, end, remain, task
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.recipe.options import Options, Where
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.report import Searched, jsonable, read_figures
from dapa_merge.search.bench import Bench, make_bench
from dapa_merge.search.choose import check_pick
from dapa_merge.search.forecast import REPORT, forecast, meter_of_run
from dapa_merge.search.identity import data_digest, models_parts, open_journal
from dapa_merge.search.journal import Journal
from dapa_merge.search.ladder import Attempt, climb
from dapa_merge.search.requirement import settings_of
from dapa_merge.search.result import Limit, Search
from dapa_merge.search.search import search
from dapa_merge.search.session import Session
from dapa_merge.search.workers import in_order


@dataclass(frozen=True)
class Evidence:
    """A selection and its measurements, as `Report` describes them.

    Attributes:
        recipe: The recipe of one edit; of the one that repairs, if several were tried.
        plan: The plan of the selection, with what the edit chose.
        selection: As given, or found by the search.
        search: The search; None, with `searched`, if the selection was given.
        searched: The search's own view of the result.
        held_out: Whether the figures are of prompts that neither a choice nor a search asks.
        limits: The recipe's limits, on the prompts of the search and on those of the report; none without a search.
        responses: The responses of `target`, `result` and `source`.
        rungs: The edits that were tried, if the recipe's is `auto`.
        arithmetic: In what the search and the measurements were made; None if as the target's config says.
    """

    recipe: Recipe
    plan: Plan
    selection: tuple[Unit, ...]
    search: Search | None
    searched: Searched | None
    before: Figures
    after: Figures
    source_alone: Figures
    dsr_change: Change
    over_refusal_change: Change
    beside_source: BesideSource
    held_out: bool
    limits: tuple[Limit, ...]
    responses: Mapping[str, Sequence[Response]]
    rungs: tuple[Tried, ...] = ()
    arithmetic: str | None = None


def gather_evidence(ladder: Ladder, selection: tuple[Unit, ...] | None, options: Options) -> Evidence:
    """Search, unless a selection is given, and measure.

    The measurements use prompts that the search does not ask, or all prompts if the recipe names its layers.

    Raises:
        CannotRepair: If a search finds that the source does not improve the target, or violates a limit.
        DapaError: For any other error.
    """
    shared: list[tuple[Meter, str, MeasuredModel]] = []
    expected = forecast(ladder, options)
    meter = expected.meter
    assert meter is not None
    with expected.told():
        found, rungs = climb(ladder, options, lambda attempt: _gather(attempt, selection, meter, shared))
    return replace(found, rungs=rungs)


def _gather(
    attempt: Attempt,
    selection: tuple[Unit, ...] | None,
    meter: Meter,
    shared: list[tuple[Meter, str, MeasuredModel]],
) -> Evidence:
    """The evidence of one rung; `shared` keeps what is the same for all: meter, digest, the source's figures."""
    recipe, plan, options = attempt.recipe, attempt.plan, attempt.options
    check_pick(options.pick, plan, selection)
    parts = all_prompts(recipe, is_rung=attempt.possible is not None)
    held_out = parts.report is not parts.search
    if shared:
        meter = shared[0][0]
    elif meter.prompts != parts.report:
        # The only edit that is left may part the prompts otherwise.
        meter = meter_of_run(recipe, plan, parts.report, options)
    meter = replace(meter, called=HELD_OUT if held_out else meter.called)
    found: Search | None = None
    searched: Searched | None = None
    with ExitStack() as stack:
        bench = stack.enter_context(closing(make_bench(recipe, plan, parts.search, options)))
        # Before the search, detect a wrong journal, or a source that does not load.
        journal = Journal()
        if selection is None:
            journal = stack.enter_context(closing(open_journal(recipe, plan, bench, options.journal, attempt.possible)))
            stack.enter_context(journal.telling())
        resident = stack.enter_context(closing(_resident(plan, bench, options)))
        if not shared:
            meter = meter.referring(resident.live.model, resident.live.tokenizer, keeps_logits=True)
            # The source may not fit in memory next to it.
            resident.close()
            begin(REPORT)
            # What the journal's own parts do not have: all of the source's weights, and how the report measures.
            how = "" if journal.path is None else _way_of_measuring(recipe, plan, meter, resident.where)
            measure = partial(measure_checkpoint, plan.source, meter, resident.where, "source")
            shared.append((meter, how, _once(f"source {how}", journal, meter, measure)))
            remain(prompts=2 * meter.num_prompts)
            begin(recipe.edit)
        meter, how, source_alone = shared[0]
        if selection is None:
            found = search(Session(recipe, plan, bench, journal, options, parts.choice, attempt.possible))
            selection = join(found.plan, found.minimum.units)
            plan = reduced(found.plan, selection)
            bench.use(plan)
            searched = _searched(found, bench)
            end()
            LOG.info(f"measuring it on the {HELD_OUT}")
        # The batch size that fits in memory is known from the search.
        meter = replace(meter, batch_size=bench.meter.batch_size)
        begin(REPORT)
        if resident is not bench:
            bench.close()
            resident.use(plan)
        brought = {name: hash_bytes(content, "sha256") for name, content in plan.edit.files().items()}
        before = _once(f"target {how}", journal, meter, lambda: measure_live(resident.live, (), meter, "target"))
        measure = partial(measure_live, resident.live, selection, meter, "result")
        after = _once(f"result {data_digest([how, [*map(str, selection)], brought])}", journal, meter, measure)
    target, result, source = before.responses, after.responses, source_alone.responses
    # By definition a divergence of 0: what is measured is rounding.
    told_before = replace(before.figures, divergence=0.0, kept=kept_figure(target, target))
    told_after = replace(after.figures, kept=kept_figure(target, result))
    return Evidence(
        recipe=recipe,
        plan=plan,
        selection=selection,
        search=found,
        searched=searched,
        before=told_before,
        after=told_after,
        source_alone=replace(source_alone.figures, kept=kept_figure(target, source)),
        dsr_change=change_of("harmful", target, result),
        over_refusal_change=change_of("harmless", target, result),
        beside_source=beside_source(result, source),
        held_out=held_out,
        limits=tuple(_limits(found, searched, told_before, told_after, recipe)) if found and searched else (),
        responses={"target": target, "result": result, "source": source},
        arithmetic=_arithmetic(options.where, resident.where, is_searched=found is not None),
    )


def _way_of_measuring(recipe: Recipe, plan: Plan, meter: Meter, where: Where) -> str:
    """A digest of the source, and of all that decides what the report says of a model."""
    parts = models_parts(recipe, {"source": plan.source}, meter, where)
    asked = [KEEP] if meter.asks_keep else []
    return data_digest([sorted(parts.items()), list(map(asdict, meter.attacks)), meter.keep, *asked])


def _once(name: str, journal: Journal, meter: Meter, measure: Callable[[], MeasuredModel]) -> MeasuredModel:
    """A model's measurement; it comes from the journal if this user's processes recorded it.

    A judge is asked again: what it did not answer may be answered now.
    """
    if journal.path is None or any(one.name == "judge" for one in meter.classifiers):
        return measure()
    if name in journal.notes and name not in journal.foreign:
        noted = journal.notes[name]
        figures = read_figures(noted["figures"])
        LOG.info(f"the {name.partition(' ')[0]} was measured on these {meter.called} before: {figures.brief}")
        return MeasuredModel(figures, [Response.from_json(response) for response in noted["responses"]])
    began, measured = time.monotonic(), measure()
    noted = {"figures": jsonable(asdict(measured.figures)), "responses": list(map(asdict, measured.responses))}
    journal.note(name, noted, time.monotonic() - began)
    return measured


def _resident(plan: Plan, bench: Bench, options: Options) -> Resident:
    """The models to measure for the report: as they are written, where that fits, or else quantized as in a search."""
    if options.quantize is None:
        return bench
    exact = replace(bench.where, quantize=None)
    if fits(plan.target, exact, bench.device):
        return Resident(plan, exact)
    LOG.warning(
        f"the report's figures are of weights in {options.quantize}, and were not checked in 16 bits: those take "
        f"{weight_bytes(plan.target, exact) / 1e9:.1f} GB, which do not fit here; measure the result with "
        f"`dapa-merge evaluate` where they do"
    )
    return bench


def _arithmetic(wanted: Where, measured: Where, *, is_searched: bool) -> str | None:
    """In what candidates were searched and models measured; None if as the config says."""
    own = wanted.dtype or "the target's dtype"
    if wanted.quantize is None:
        return wanted.dtype and f"measured in {wanted.dtype}"
    if measured.quantize is not None:
        return f"measured in {wanted.quantize}, not checked in {own}"
    return f"searched in {wanted.quantize}, measured in {own}" if is_searched else f"measured in {own}"


def _limits(found: Search, searched: Searched, before: Figures, after: Figures, recipe: Recipe) -> Iterator[Limit]:
    """The recipe's limits beside what the search found of the result, and then beside its figures in the report."""
    limits, settings = found.limits or found.requirement, settings_of(recipe)
    # Not what a run that was stopped measures again: its report says the same as that of one that was not.
    known = found.result.figures if found.result else {SCORE.figure: searched.after}
    held = [(one, limit) for one, limit in limits.limits if not math.isnan(limit)]
    for one, limit in held:
        value = known.get(one.figure)
        # A selection that was found by tests meets all limits.
        is_met = one.is_met(value, limit) if value is not None else True
        why = _origin(found, limit, settings[one.key]) if one.figure == SCORE.figure else ""
        yield Limit(SEARCH_PROMPTS, one.label, one.bound == "min", limit, value, is_met, why)
    was, now = (_by_evaluator(figures, limits.measure) for figures in (before, after))
    for one, limit in held:
        own = limit if one.figure == SCORE.figure else one.limit(one.of(was), math.nan, settings[one.key])
        # NaN without anything to measure it on.
        if not math.isnan(own):
            value = one.of(now)
            yield Limit(HELD_OUT, one.label, one.bound == "min", own, value, one.is_met(value, own))


def _origin(found: Search, limit: float, retain: float) -> str:
    """The gain that the least score is a share of, as the rest of a phrase."""
    before = found.target.score
    reached = before + (limit - before) / retain
    all_units = found.reference or found.full
    is_of_all = math.isclose(reached, all_units.score, abs_tol=1e-6)
    whose = "that all units reach" if is_of_all else "that is the most known to be possible"
    return f", {100 * retain:g} % of the way from {before:.3f} to the {reached:.3f} {whose}"


def _by_evaluator(figures: Figures, measure: str) -> Figures:
    """The figures with the refusals that the search's evaluator sees, if that classifies responses otherwise."""
    for marker in figures.markers:
        if measure == f"{SCORE.label} by {marker.name}" and marker.dsr is not None and marker.over_refusal is not None:
            return replace(figures, dsr=marker.dsr, over_refusal=marker.over_refusal)
    return figures


def _searched(found: Search, bench: Bench) -> Searched:
    """The search's measurements of its result, which early verdicts may have left incomplete."""
    prompts = bench.meter.prompts
    if found.measured is not None:
        after = found.measured[SCORE.figure]
    elif found.result is not None:
        after = found.result.figures[SCORE.figure]
    else:
        with task("measuring the result as the search saw it", len(prompts.harmful), "prompts"):
            after = bench.score(in_order(found.minimum.units))
    return Searched(bench.measure, len(prompts.harmful), len(prompts.harmless), found.target.score, after)
