"""The flow of `dapa-merge trace`: its stages, and the folder that they fill. The same command resumes a killed one."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from dapa_merge.checkpoint.units import WHOLES, Unit
from dapa_merge.errors import CannotRepair
from dapa_merge.files import forget_pictures, replace_file
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import upcast_linear
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.figures import Response
from dapa_merge.measure.live import choose_device, load_model
from dapa_merge.measure.meter import Meter, search_meter, skills_of
from dapa_merge.measure.prompts.parts import all_prompts, check_prompts
from dapa_merge.plan.plan import Plan, join
from dapa_merge.plan.selection import changing_selection, check_any_units, given_selection, make_plan, plan_of_all
from dapa_merge.progress import LOG, advance, quiet, task
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.charts import draw_all, plotting
from dapa_merge.search.attribution import MAX_BACKWARD, Contrast, attribute, sides_of
from dapa_merge.search.bench import Bench
from dapa_merge.search.identity import data_digest, models_parts
from dapa_merge.search.journal import Journal
from dapa_merge.search.requirement import settings_of
from dapa_merge.search.result import Search
from dapa_merge.search.search import search_plan
from dapa_merge.trace.case import Case, Settings, embedding_deviation, make_settings, read_case, with_subject
from dapa_merge.trace.causal import Trace, Tracer
from dapa_merge.trace.charts import CHARTS
from dapa_merge.trace.edits import Edits, groups_of
from dapa_merge.trace.influence import Influence, influence
from dapa_merge.trace.options import MAX_ATTRIBUTION_PROMPTS, MAX_INFLUENCE_PROMPTS, TraceOptions
from dapa_merge.trace.store import (
    FIGURES_NAME,
    INFLUENCE_NAME,
    PAGE_NAME,
    SUMMARY_NAME,
    check_folder,
    forget_page,
    opened,
    page,
    read_arrays,
    read_trace,
    trace_path,
    write_arrays,
    write_trace,
)
from dapa_merge.trace.summary import Traced, summarize


def units_apart(plan: Plan) -> tuple[Unit, ...]:
    """The units of a model that do not overlap, as small as possible: a whole MLP if its gate and up are one tensor."""
    modules = {unit.module for unit in plan.units}
    is_whole = "mlp" in modules and not modules & {"gate", "up"}
    mlp = ("mlp",) if is_whole else WHOLES["mlp"]
    attention = ("attention",) if "attention" in modules else WHOLES["attention"]
    return tuple(unit for unit in plan.units if unit.module in (*mlp, *attention))


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """At most `number` of the items, evenly spread."""
    number = min(number, len(items))
    return [items[index * len(items) // number] for index in range(number)]


@dataclass(frozen=True)
class TraceSession:
    """A trace in progress, with one model in memory at a time.

    Results that take long are saved in the folder's journal, or in their own files, before they are used.

    Attributes:
        chosen: The recipe's plan.
        plan: The same models, with the units of all modules.
        meter: Measures responses as the search does.
        edit_meter: Measures edits: skills, and DSR as in a report, whatever evaluator the search uses.
    """

    recipe: Recipe
    chosen: Plan
    plan: Plan
    meter: Meter
    edit_meter: Meter
    out: Path
    wanted: TraceOptions
    options: Options
    journal: Journal

    def run(self) -> Traced:
        units = units_apart(self.plan)
        search, selection, why_none = self._select()
        refused = None if self.wanted.responses else self._answers("source", self._load_source)
        with closing(self._bench()) as bench:
            contrasts = self._contrasts(bench, refused)
            self._check_tracing(bench, contrasts)
            attribution = self._attribution(bench, contrasts)
            influences = self._influence(bench, contrasts)
            edits = Edits(bench, self.journal)
            findings, target_score = edits.findings(groups_of(units, self.chosen, selection or ()), self.wanted)
            curve = edits.curve(self.chosen.units, selection or (), attribution, self.edit_meter)
            if self.wanted.traced == "target":
                traces, seconds, settings = self._traces(bench.live.model, bench.live.tokenizer, contrasts)
        if self.wanted.traced == "source":
            model, tokenizer = self._load_source()
            traces, seconds, settings = self._traces(model, tokenizer, contrasts)
        return Traced(
            recipe=self.recipe,
            wanted=self.wanted,
            settings=settings,
            plan=self.plan,
            units=units,
            candidates=self.chosen.units,
            selection=selection,
            why_none=why_none,
            search=search,
            num_prompts=len(self.meter.prompts.harmful),
            contrasts=tuple(contrasts),
            attribution=attribution,
            influence=influences,
            measure=bench.measure,
            target_score=target_score,
            findings=tuple(findings),
            curve=tuple(curve),
            traces=tuple(traces),
            seconds=tuple(seconds),
        )

    def _bench(self) -> Bench:
        told = functools.partial(LOG.info, f"loading the target {self.plan.target.name}")
        return Bench(self.plan, self.meter, self.options.device, settings_of(self.recipe), told)

    def _load_source(self) -> tuple[Any, Any]:
        LOG.info(f"loading the source {self.plan.source.name}")
        return load_model(self.plan.source, choose_device(self.options.device))

    def _select(self) -> tuple[Search | None, tuple[Unit, ...] | None, str | None]:
        """The search, the selection, and the reason if nothing was selected."""
        given = given_selection(self.recipe, self.chosen)
        if given is None and not self.wanted.searches:
            return None, None, "no search was wanted"
        try:
            if given is not None:
                return None, changing_selection(self.recipe, self.chosen, given), None
            found = search_plan(self.recipe, self.chosen, self.options)
        except CannotRepair as error:
            # The trace goes on: it is then even more useful to see where the alignment is.
            LOG.info(f"nothing was selected: {error}")
            return None, None, str(error)
        return found, join(self.chosen, found.minimum.units), None

    def _contrasts(self, bench: Bench, source: Sequence[Response] | None) -> list[Contrast]:
        """The prompts that only the source refuses, with both responses; all prompts if the responses are given."""
        if source is None:
            assert self.wanted.responses is not None
            # `read_case` raises if a response does not fit.
            return [Contrast(prompt, *self.wanted.responses) for prompt in self.meter.prompts.harmful]
        target = self._answers("target", lambda: (bench.live.model, bench.live.tokenizer))
        contrasts = [
            Contrast(refused.prompt, refused.response, answered.response)
            for refused, answered in zip(source, target, strict=True)
            if refused.outcome == "refused" and answered.outcome in ("complied", "degenerate")
        ]
        # Responses cannot be compared if one is the beginning of the other.
        contrasts = [one for one in contrasts if sides_of(bench.live.tokenizer, one, self.wanted.num_tokens)]
        if not contrasts:
            num_refused = [sum(one.outcome == "refused" for one in said) for said in (source, target)]
            raise CannotRepair(
                f"of {len(source)} harmful prompts the source refuses {num_refused[0]} and the target "
                f"{num_refused[1]}, but none is refused by the source alone, so there is no difference to trace; use "
                f"other prompts, or give two responses to compare with --refusal and --answer"
            )
        LOG.info(f"{len(contrasts)} of {len(source)} harmful prompts are refused by the source alone")
        return contrasts

    def _answers(self, name: str, load: Callable[[], tuple[Any, Any]]) -> list[Response]:
        """Ask a model the harmful prompts, and classify its responses."""
        note = f"responses of the {name}"
        if note not in self.journal.notes:
            model, tokenizer = load()
            with task(f"asking the {name}", len(self.meter.prompts.harmful), "prompts"), quiet("transformers"):
                measurement = self.meter.measure(model, tokenizer)
                said = measurement.judge("harmful", self.meter.prompts.harmful)
            self.journal.note(note, [asdict(response) for response in said])
        return [Response(**response) for response in self.journal.notes[note]]

    def _check_tracing(self, bench: Bench, contrasts: Sequence[Contrast]) -> None:
        """Read the cases with the target, so that errors show before hours of work."""
        note = f"checked {data_digest(asdict(self.wanted))}"
        if note not in self.journal.notes:
            self._cases(bench.live.model, bench.live.tokenizer, contrasts)
            # Attribution and influence read them all.
            for contrast in contrasts:
                read_case(bench.live.model, bench.live.tokenizer, contrast, (), self.wanted.num_tokens)
            self.journal.note(note, True)

    def _attribution(self, bench: Bench, contrasts: Sequence[Contrast]) -> dict[Unit, float]:
        note = f"attribution {self._compared}"
        if note not in self.journal.notes:
            few = spread(contrasts, MAX_ATTRIBUTION_PROMPTS)
            with task("weighing the units by one backward pass", 2 * len(few), "responses"):
                batch_size = BatchSize(min(MAX_BACKWARD, self.meter.batch_size.limit))
                found = attribute(
                    bench.live, few, units=self.plan.units, batch_size=batch_size, num_tokens=self.wanted.num_tokens
                )  # fmt: skip
            self.journal.note(note, {str(unit): effect for unit, effect in found.items()})
        effects = self.journal.notes[note]
        return {unit: effects[str(unit)] for unit in self.plan.units}

    def _influence(self, bench: Bench, contrasts: Sequence[Contrast]) -> Influence:
        path = self.out / INFLUENCE_NAME
        names = [str(unit) for unit in self.plan.units]
        arrays = read_arrays(path)
        if arrays is None or (str(arrays.get("compared")), list(arrays.get("units", ()))) != (self._compared, names):
            chosen = spread(contrasts, MAX_INFLUENCE_PROMPTS)
            pairs = [sides_of(bench.live.tokenizer, contrast, self.wanted.num_tokens) for contrast in chosen]
            size = self.meter.batch_size.limit
            total = len(self.plan.units) * math.ceil(len(pairs) / size)
            with task("transplanting each unit alone", total, "units"), upcast_linear(bench.live.model):
                found = influence(bench.live, pairs, self.plan.units, batch_size=BatchSize(size))
            arrays = {**asdict(found), "units": numpy.array(names), "compared": self._compared}
            write_arrays(path, arrays)
        hidden, refusing, before = (arrays[name] for name in ("hidden", "refusing", "before"))
        return Influence(self.plan.units, hidden, refusing, before, float(arrays["num_passes"]))

    @property
    def _compared(self) -> str:
        """Names the compared responses in the journal."""
        return f"{self.wanted.responses} {self.wanted.num_tokens}"

    def _cases(self, model: Any, tokenizer: Any, contrasts: Sequence[Contrast]) -> tuple[Settings, dict[int, Case]]:
        """The settings for a model, and the prompts that it can trace, by number from 1."""
        wanted, prompts = self.wanted, [contrast.prompt for contrast in contrasts]
        settings = make_settings(
            model, wanted.kinds, noise=wanted.noise, num_samples=wanted.num_samples, window=wanted.window,
            num_tokens=wanted.num_tokens, seed=wanted.seed,
        )  # fmt: skip
        kept = set(with_subject(prompts, wanted.subjects) if wanted.subjects else prompts)
        return settings, {
            number: read_case(model, tokenizer, contrast, wanted.subjects, wanted.num_tokens)
            for number, contrast in enumerate(contrasts, 1)
            if contrast.prompt in kept
        }

    def _traces(
        self, model: Any, tokenizer: Any, contrasts: Sequence[Contrast]
    ) -> tuple[list[Trace], list[float], Settings]:
        settings, readable = self._cases(model, tokenizer, contrasts)
        batch_size = BatchSize(self.recipe.batch_size)
        # Computed from all cases, so that the noise does not depend on how many are traced.
        deviation = embedding_deviation(model, list(readable.values()))
        cases = {number: readable[number] for number in spread(list(readable), self.wanted.num_prompts)}
        tracer = Tracer(model, tokenizer.pad_token_id, settings, deviation, batch_size)
        described = json.dumps({**asdict(settings), "model": self.wanted.traced, "deviation": deviation})
        traces, seconds = [], []
        total = sum(map(tracer.num_runs, cases.values()))
        LOG.info(f"tracing {len(cases)} prompts of the {self.wanted.traced} with {total:,} runs")
        with task(f"tracing {len(cases)} prompts", total, "runs"), quiet("transformers"), upcast_linear(model):
            for number, case in cases.items():
                path = trace_path(self.out, number)
                if (kept := read_trace(path, case, described, settings.kinds)) is None:
                    # The page of an earlier run is out of date.
                    forget_page(self.out)
                    start = time.perf_counter()
                    found = tracer.trace(case, number)
                    kept = found, time.perf_counter() - start
                    write_trace(path, found, case, described, kept[1])
                else:
                    advance(tracer.num_runs(case), "runs")
                traces.append(kept[0])
                seconds.append(kept[1])
        return traces, seconds, settings


def trace_recipe(recipe: Recipe, out: Path, wanted: TraceOptions, options: Options) -> dict[str, Any]:
    """Trace a recipe's models, and fill the folder `out` with traces, charts, a summary and a page.

    A folder with an earlier trace of the same models is resumed.

    Returns:
        The summary as plain data.

    Raises:
        CannotRepair: If no prompt is refused by the source and answered by the target.
        UsageError: If matplotlib is not installed, or the folder holds something else.
        DapaError: For any other error; finished results are kept.
    """
    # A trace may take hours, so a missing matplotlib is reported first.
    plotting()
    check_folder(out)
    check_any_units(recipe)
    chosen = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
    check_prompts(recipe)
    # The selection of a search is judged with prompts that the search did not ask.
    prompts = all_prompts(recipe).report
    asking = search_meter(recipe, prompts, options, chosen.models.values())
    meter = replace(asking, skills=skills_of(prompts, recipe.skills, options))
    if wanted.subjects:
        with_subject(prompts.harmful, wanted.subjects)
    plan = plan_of_all(chosen)
    with opened(out, models_parts(recipe, plan.models, meter, options.device)) as journal:
        meters = replace(meter, skills=()), replace(meter, classifiers=(RULES,), scorer=None)
        return _write(TraceSession(recipe, chosen, plan, *meters, out, wanted, options, journal).run(), out)


def _write(found: Traced, out: Path) -> dict[str, Any]:
    """Write charts, summary and page; returns the summary."""
    summary, pictures = summarize(found), draw_all(CHARTS, found)
    # Remove only the pictures of an earlier run, and no others in the folder.
    forget_pictures(out / FIGURES_NAME, tuple(chart.beginning for chart in CHARTS))
    for picture in pictures:
        for ending, content in picture.files.items():
            replace_file(out / FIGURES_NAME / f"{picture.name}{ending}", content)
    replace_file(out / SUMMARY_NAME, (json.dumps(summary, indent=2) + "\n").encode())
    replace_file(out / PAGE_NAME, page(summary, pictures).encode())
    return summary
