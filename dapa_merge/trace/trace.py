"""The stages of a trace, one after the other, with one model in memory at a time.

What takes long is in the folder's journal, or in a file of its own, before it is used.

The flow of `dapa-merge trace`: what is traced, and the folder that keeps what was found.

The same command goes on with what a killed one left.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.units import SEPARATE_MODULES, Unit
from dapa_merge.errors import CannotRepair
from dapa_merge.files import replace_file
from dapa_merge.measure.prompts.sets import check_prompts, split_prompts
from dapa_merge.plan.plan import Plan, join
from dapa_merge.plan.selection import given_selection, make_plan, plan_of_all
from dapa_merge.progress import LOG, advance, task
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.identity import data_digest, models_parts
from dapa_merge.search.journal import Journal
from dapa_merge.search.search import Search, search_plan
from dapa_merge.trace.edits import Edits, groups_of
from dapa_merge.trace.options import MAX_ATTRIBUTION_PROMPTS, MAX_INFLUENCE_PROMPTS, TraceOptions
from dapa_merge.trace.result import Traced
from dapa_merge.trace.store import (
    FIGURES_NAME,
    INFLUENCE_NAME,
    PAGE_NAME,
    SUMMARY_NAME,
    check_folder,
    forget_figures,
    forget_page,
    opened,
    read_arrays,
    read_trace,
    trace_path,
    write_arrays,
    write_trace,
)

if TYPE_CHECKING:
    from dapa_merge.measure.figures import Response
    from dapa_merge.measure.meter import Meter
    from dapa_merge.search.attribution import Contrast
    from dapa_merge.search.bench import Bench
    from dapa_merge.trace.case import Case, Settings
    from dapa_merge.trace.causal import Trace
    from dapa_merge.trace.influence import Influence


def units_apart(plan: Plan) -> tuple[Unit, ...]:
    """All units of a model, none of which is part of another; the whole MLP where its gate and up are not apart."""
    modules = {unit.module for unit in plan.units}
    wanted = SEPARATE_MODULES if modules & {"gate", "up"} or "mlp" not in modules else ("mlp", "attention")
    return tuple(unit for unit in plan.units if unit.module in wanted)


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """At most so many of the items, evenly spread."""
    number = min(number, len(items))
    return [items[index * len(items) // number] for index in range(number)]


class Stages:
    """One trace on its way."""

    def __init__(
        self,
        recipe: Recipe,
        chosen: Plan,
        plan: Plan,
        meter: Meter,
        out: Path,
        wanted: TraceOptions,
        options: Options,
        journal: Journal,
    ) -> None:
        from dapa_merge.measure.marker import RULES

        self.recipe = recipe
        self.chosen = chosen
        self.plan = plan
        self.prompts = meter.prompts
        self.out = out
        self.wanted = wanted
        self.options = options
        self.journal = journal
        self.meter = replace(meter, skills=())
        # DSR as in a report, whatever the search goes by, and of a response what decides.
        self.edit_meter = replace(meter, markers=(RULES,), scorer=None)
        self.units = units_apart(plan)

    def run(self) -> Traced:
        search, selection, why_none = self._select()
        refused = None if self.wanted.responses else self._answers("source", self._load_source)
        with closing(self._bench()) as bench:
            contrasts = self._contrasts(bench, refused)
            self._check_tracing(bench, contrasts)
            attribution = self._attribution(bench, contrasts)
            influence = self._influence(bench, contrasts)
            edits = Edits(bench, self.journal)
            findings, target_score = edits.findings(groups_of(self.units, self.chosen, selection or ()), self.wanted)
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
            units=self.units,
            candidates=self.chosen.units,
            selection=selection,
            why_none=why_none,
            search=search,
            num_prompts=len(self.prompts.harmful),
            contrasts=tuple(contrasts),
            attribution=attribution,
            influence=influence,
            measure=bench.measure,
            target_score=target_score,
            findings=tuple(findings),
            curve=tuple(curve),
            traces=tuple(traces),
            seconds=tuple(seconds),
        )

    def _bench(self) -> Bench:
        from dapa_merge.search.bench import Bench

        return Bench(
            self.plan, self.meter, self.options.device, lambda: LOG.info(f"loading the target {self.plan.target.name}")
        )

    def _load_source(self) -> tuple[Any, Any]:
        from dapa_merge.measure.live import choose_device, load_model

        LOG.info(f"loading the source {self.plan.source.name}")
        return load_model(self.plan.source, choose_device(self.options.device))

    def _select(self) -> tuple[Search | None, tuple[Unit, ...] | None, str | None]:
        """The search, what it selected or the recipe names, and else why there is nothing."""
        given = given_selection(self.recipe, self.chosen)
        if given is not None:
            return None, given, None
        if not self.wanted.searches:
            return None, None, "no search was wanted"
        try:
            found = search_plan(self.recipe, self.chosen, self.options)
        except CannotRepair as error:
            # Just then people want to see where the alignment is.
            LOG.info(f"there is no selection: {error}")
            return None, None, str(error)
        return found, join(self.chosen, found.minimum.units), None

    def _contrasts(self, bench: Bench, source: Sequence[Response] | None) -> list[Contrast]:
        """The prompts that only the source refuses, with both responses; all prompts, where the responses are given."""
        from dapa_merge.search.attribution import Contrast, sides_of

        if source is None:
            assert self.wanted.responses is not None
            # What does not fit is told of each when it is read.
            return [Contrast(prompt, *self.wanted.responses) for prompt in self.prompts.harmful]
        target = self._answers("target", lambda: (bench.live.model, bench.live.tokenizer))
        contrasts = [
            Contrast(refused.prompt, refused.response, answered.response)
            for refused, answered in zip(source, target, strict=True)
            if refused.outcome == "refused" and answered.outcome != "refused"
        ]
        # Of responses of which one is how the other begins there is nothing to compare.
        contrasts = [
            contrast for contrast in contrasts if sides_of(bench.live.tokenizer, contrast, self.wanted.num_tokens)
        ]
        if not contrasts:
            num_refused = [sum(one.outcome == "refused" for one in said) for said in (source, target)]
            raise CannotRepair(
                f"of {len(source)} harmful prompts the source refuses {num_refused[0]} and the target "
                f"{num_refused[1]}, and none is refused by the source alone, so that there is no difference to trace; "
                f"bring other prompts, or say with --refusal and --answer which two responses to compare"
            )
        LOG.info(f"{len(contrasts)} of {len(source)} harmful prompts are refused by the source alone")
        return contrasts

    def _answers(self, name: str, load: Callable[[], tuple[Any, Any]]) -> list[Response]:
        """What a model says to the harmful prompts, and what that is taken for."""
        from dapa_merge.measure.figures import Response
        from dapa_merge.progress import quiet

        note = f"responses of the {name}"
        if note not in self.journal.notes:
            model, tokenizer = load()
            with task(f"asking the {name}", len(self.prompts.harmful), "prompts"), quiet("transformers"):
                measurement = self.meter.measure(model, tokenizer)
                said = measurement.judge("harmful", self.prompts.harmful)
            self.journal.note(note, [asdict(response) for response in said])
        return [Response(**response) for response in self.journal.notes[note]]

    def _check_tracing(self, bench: Bench, contrasts: Sequence[Contrast]) -> None:
        """Try on the target what is traced in the end: what does not fit is told before the hours until then."""
        from dapa_merge.trace.case import read_case

        note = f"checked {data_digest(asdict(self.wanted))}"
        if note not in self.journal.notes:
            self._cases(bench.live.model, bench.live.tokenizer, contrasts)
            # Attribution and influence read them all.
            for contrast in contrasts:
                read_case(bench.live.model, bench.live.tokenizer, contrast, (), self.wanted.num_tokens)
            self.journal.note(note, True)

    def _attribution(self, bench: Bench, contrasts: Sequence[Contrast]) -> dict[Unit, float]:
        from dapa_merge.measure.decode import BatchSize
        from dapa_merge.search.attribution import attribute
        from dapa_merge.search.bench import MAX_BACKWARD

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
        import numpy

        from dapa_merge.measure.decode import BatchSize
        from dapa_merge.measure.determinism import widened
        from dapa_merge.search.attribution import sides_of
        from dapa_merge.trace.influence import Influence, influence

        path = self.out / INFLUENCE_NAME
        names = [str(unit) for unit in self.plan.units]
        arrays = read_arrays(path)
        if arrays is None or (str(arrays.get("compared")), list(arrays.get("units", ()))) != (self._compared, names):
            chosen = spread(contrasts, MAX_INFLUENCE_PROMPTS)
            pairs = [sides_of(bench.live.tokenizer, contrast, self.wanted.num_tokens) for contrast in chosen]
            size = self.meter.batch_size.limit
            total = len(self.plan.units) * math.ceil(len(pairs) / size)
            with task("transplanting each unit alone", total, "units"), widened(bench.live.model):
                found = influence(bench.live, pairs, self.plan.units, batch_size=BatchSize(size))
            arrays = {**asdict(found), "units": numpy.array(names), "compared": self._compared}
            write_arrays(path, arrays)
        hidden, refusing, before = (arrays[name] for name in ("hidden", "refusing", "before"))
        return Influence(self.plan.units, hidden, refusing, before, float(arrays["num_passes"]))

    @property
    def _compared(self) -> str:
        """What is compared with what, of the options."""
        return f"{self.wanted.responses} {self.wanted.num_tokens}"

    def _cases(self, model: Any, tokenizer: Any, contrasts: Sequence[Contrast]) -> tuple[Settings, dict[int, Case]]:
        """How a model is traced, and by their numbers, from 1, the prompts that can be, as it reads them."""
        from dapa_merge.trace.case import make_settings, read_case, with_subject

        wanted = self.wanted
        settings = make_settings(
            model, wanted.kinds, noise=wanted.noise, num_samples=wanted.num_samples, window=wanted.window,
            num_tokens=wanted.num_tokens, seed=wanted.seed,
        )  # fmt: skip
        subjects = wanted.subjects
        chosen = dict(enumerate(contrasts, 1))
        if subjects:
            kept = set(with_subject([contrast.prompt for contrast in contrasts], subjects))
            chosen = {number: contrast for number, contrast in chosen.items() if contrast.prompt in kept}
        cases = {
            number: read_case(model, tokenizer, contrast, subjects, wanted.num_tokens)
            for number, contrast in chosen.items()
        }
        return settings, cases

    def _traces(
        self, model: Any, tokenizer: Any, contrasts: Sequence[Contrast]
    ) -> tuple[list[Trace], list[float], Settings]:
        from dapa_merge.measure.decode import BatchSize
        from dapa_merge.measure.determinism import widened
        from dapa_merge.progress import quiet
        from dapa_merge.trace.case import embedding_deviation
        from dapa_merge.trace.causal import Tracer

        settings, readable = self._cases(model, tokenizer, contrasts)
        batch_size = BatchSize(self.recipe.batch_size)
        # Of all: so each has the same noise, however many are traced.
        deviation = embedding_deviation(model, list(readable.values()))
        cases = {number: readable[number] for number in spread(list(readable), self.wanted.num_prompts)}
        tracer = Tracer(model, tokenizer.pad_token_id, settings, deviation, batch_size)
        described = json.dumps({**asdict(settings), "model": self.wanted.traced, "deviation": deviation})
        traces, seconds = [], []
        total = sum(map(tracer.num_runs, cases.values()))
        LOG.info(f"tracing {len(cases)} prompts of the {self.wanted.traced} with {total:,} runs")
        with task(f"tracing {len(cases)} prompts", total, "runs"), quiet("transformers"), widened(model):
            for number, case in cases.items():
                path = trace_path(self.out, number)
                if (kept := read_trace(path, case, described, settings.kinds)) is None:
                    # An earlier run's, which says nothing of what comes now.
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
    """Trace a recipe's models, and leave traces, figures, a summary and a page in a folder.

    Args:
        recipe: What to trace.
        out: A new folder, or one of a trace of the same models: what is in it already is not made again.
        wanted: How to trace.
        options: Where to evaluate, and where the journal of the search is.

    Returns:
        The summary, plain data.

    Raises:
        CannotRepair: If no prompt is refused by the source and answered by the target.
        UsageError: If matplotlib is not installed, or the folder is of something else.
        DapaError: For whatever else does not fit; what was found is kept.
    """
    # Before the hours that a trace may take: this raises where matplotlib is not.
    from dapa_merge.measure.meter import search_meter, skills_of
    from dapa_merge.measure.prompts.sets import load_prompts
    from dapa_merge.trace.case import with_subject

    check_folder(out)
    chosen = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
    check_prompts(recipe)
    # What a search picks is judged with prompts that it has not seen.
    prompts = split_prompts(recipe)[1] if recipe.layers is None else load_prompts(recipe.prompts)
    meter = replace(search_meter(recipe, prompts, options), skills=skills_of(prompts, recipe.skills))
    if wanted.subjects:
        with_subject(prompts.harmful, wanted.subjects)
    plan = plan_of_all(recipe, chosen)
    with opened(out, models_parts(recipe, plan.models, meter, options.device)) as journal:
        return _write(Stages(recipe, chosen, plan, meter, out, wanted, options, journal).run(), out)


def _write(found: Traced, out: Path) -> dict[str, Any]:
    """Write figures, summary and page; returns the summary."""
    from dapa_merge.report.charts import render
    from dapa_merge.trace.charts import figures_of
    from dapa_merge.trace.page import Picture, page
    from dapa_merge.trace.summary import summarize

    summary = summarize(found)
    pictures = []
    forget_figures(out)
    for name, caption, figure in figures_of(found):
        for kind in ("png", "svg"):
            content = render(figure, kind)
            replace_file(out / FIGURES_NAME / f"{name}.{kind}", content)
            if kind == "png":
                pictures.append(Picture(name, caption, content))
    replace_file(out / SUMMARY_NAME, (json.dumps(summary, indent=2) + "\n").encode())
    replace_file(out / PAGE_NAME, page(summary, pictures).encode())
    return summary
