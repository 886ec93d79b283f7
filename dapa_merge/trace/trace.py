"""The flow of `dapa-merge trace`: its stages, and the folder that they fill. The same command resumes a killed one."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from dapa_merge.checkpoint.units import WHOLES, Unit, auto_modules
from dapa_merge.errors import CannotRepair, UsageError
from dapa_merge.files import forget_pictures, replace_file
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import batch_invariant
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.figures import Response
from dapa_merge.measure.live import load_model
from dapa_merge.measure.meter import Meter, search_meter, skills_of
from dapa_merge.measure.perplexity import losses
from dapa_merge.measure.prompts.parts import all_prompts, check_prompts, refuse_turns
from dapa_merge.plan.edit import EDITS, Directions, Edit
from dapa_merge.plan.plan import Plan, join, reduced, with_modules
from dapa_merge.plan.selection import changing_selection, given_selection, make_plan, plan_of_all
from dapa_merge.progress import LOG, begin, duration, end, expect, pace, quiet, task
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.drawing import Picture, draw_all, plotting
from dapa_merge.search.attribution import MAX_BACKWARD, Contrast, attribute, sides_of
from dapa_merge.search.bench import Bench
from dapa_merge.search.identity import data_digest, models_parts
from dapa_merge.search.journal import Journal
from dapa_merge.search.requirement import settings_of
from dapa_merge.search.search import search_plan
from dapa_merge.trace.case import Case, Settings, embedding_deviation, make_settings, read_case, with_subject
from dapa_merge.trace.causal import Trace, Tracer
from dapa_merge.trace.charts import CHARTS, STAGES_OF_CHARTS
from dapa_merge.trace.edits import Edits, UnitGroup, curve_sizes, groups_of
from dapa_merge.trace.forecast import ANSWERS, forecast
from dapa_merge.trace.influence import Influence, PutBack, influence, share, squared_norms
from dapa_merge.trace.options import (
    MAX_ATTRIBUTION_PROMPTS,
    MAX_INFLUENCE_PROMPTS,
    PROMPTS_AT_ONCE,
    STAGE_NAMES,
    STAGES,
    TraceOptions,
)
from dapa_merge.trace.store import (
    FIGURES_NAME,
    INFLUENCE_NAME,
    PAGE_NAME,
    SUMMARY_NAME,
    check_folder,
    opened,
    page,
    read_arrays,
    read_trace,
    trace_path,
    write_arrays,
    write_trace,
)
from dapa_merge.trace.summary import Traced, summarize

# While prompts are traced, the page is written as often.
SECONDS_BETWEEN_PAGES = 120.0
# In the journal: how long a model took to answer all harmful prompts.
SECONDS_NOTE = "seconds of asking"


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
        candidates: The units that could be selected, with the edit that tries them: a copy where the recipe's chooses.
        plan: The same models, with the units of all modules.
        meter: Measures responses as the search does.
        edit_meter: Measures edits: skills, and DSR as in a report, whatever evaluator the search uses.
        stages: Names of those to make, in order.
    """

    recipe: Recipe
    chosen: Plan
    candidates: Plan
    plan: Plan
    meter: Meter
    edit_meter: Meter
    out: Path
    wanted: TraceOptions
    options: Options
    journal: Journal
    stages: tuple[str, ...]

    def run(self) -> Iterator[Traced]:
        """Make the stages one after the other; yields what is found so far, before the first and after each of them."""
        found = Traced(
            recipe=self.recipe,
            wanted=self.wanted,
            plan=self.plan,
            units=units_apart(self.plan),
            candidates=self.candidates.units,
            arithmetic=self.options.where.arithmetic,
            num_prompts=len(self.meter.prompts.harmful),
            stages=self.stages,
        )
        yield found
        begin("search")
        found, directions = self._select(found)
        end()
        if "search" in self.stages:
            yield (found := found.having("search"))
        compares = any(stage.compares and stage.name in self.stages for stage in STAGES)
        begin(ANSWERS)
        refused = self._answers("source", self._load_source) if compares and not self.wanted.responses else None
        with closing(self._bench()) as bench:
            contrasts = self._contrasts(bench, refused) if compares else []
            found = replace(found, contrasts=tuple(contrasts), measure=bench.measure)
            if compares:
                self._check_tracing(bench, contrasts)
            end()
            self._tell_times(bench, found)
            begin("influence")
            if "influence" in self.stages or "edits" in self.stages:
                found = replace(found, attribution=self._attribution(bench, contrasts))
            if "influence" in self.stages:
                yield (found := replace(found, influence=self._influence(bench, contrasts)).having("influence"))
            end()
            begin("directions")
            if "directions" in self.stages:
                if directions is not None:
                    found = replace(found, put_back=self._directions(bench, directions, contrasts))
                yield (found := found.having("directions"))
            end()
            edits = Edits(bench, self.journal)
            begin("groups")
            if "groups" in self.stages:
                findings, score = edits.findings(self._groups(found), self.wanted)
                found = replace(found, findings=tuple(findings), target_score=score)
                yield (found := found.having("groups"))
            end()
            begin("edits")
            if "edits" in self.stages:
                curve = edits.curve(found.candidates, found.copied, found.attribution or {}, self.edit_meter)
                yield (found := replace(found, curve=tuple(curve)).having("edits"))
            end()
            begin("traces")
            if "traces" in self.stages and self.wanted.traced == "target":
                yield from self._traced(found, bench.live.model, bench.live.tokenizer)
        if "traces" in self.stages and self.wanted.traced == "source":
            yield from self._traced(found, *self._load_source())

    def _groups(self, found: Traced) -> list[UnitGroup]:
        return groups_of(found.units, self.candidates, found.copied)

    def _traced(self, found: Traced, model: Any, tokenizer: Any) -> Iterator[Traced]:
        """Trace prompt after prompt; yields what is found so far now and then, and in the end."""
        written = time.monotonic()
        for settings, trace, seconds in self._traces(model, tokenizer, found.contrasts):
            traces, times = (*found.traces, trace), (*found.seconds, seconds)
            found = replace(found, settings=settings, traces=traces, seconds=times, begun="traces")
            if time.monotonic() - written > SECONDS_BETWEEN_PAGES:
                yield found
                written = time.monotonic()
        yield replace(found, begun=None).having("traces")

    def _bench(self) -> Bench:
        told = functools.partial(LOG.info, f"loading the target, {self.plan.target.name}")
        return Bench(self.plan, self.meter, self.options.where, settings_of(self.recipe), told)

    def _load_source(self) -> tuple[Any, Any]:
        LOG.info(f"loading the source, {self.plan.source.name}")
        return load_model(self.plan.source, self.options.where)

    def _select(self, found: Traced) -> tuple[Traced, Plan | None]:
        """Add the selection, the search that found it, or why nothing was selected; with the plan of directions."""
        given = given_selection(self.recipe, self.chosen)
        if given is None and "search" not in self.stages:
            return replace(found, why_none="no search was wanted"), None
        try:
            if given is not None:
                selection = changing_selection(self.recipe, self.chosen, given)
                found, plan = replace(found, selection=selection), self.chosen
            else:
                search = search_plan(self.recipe, self.chosen, self.options)
                selection, plan = join(search.plan, search.minimum.units), search.plan
                found = replace(found, search=search, selection=selection)
        except CannotRepair as error:
            # The trace goes on: it is then even more useful to see where the alignment is.
            LOG.info(f"nothing was selected: {error}")
            return replace(found, why_none=str(error)), None
        return found, reduced(plan, selection) if plan.edit.chooses else None

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
            start = time.perf_counter()
            with task(f"asking the {name}", len(self.meter.prompts.harmful), "prompts"), quiet("transformers"):
                measurement = self.meter.measure(model, tokenizer)
                said = measurement.judge("harmful", self.meter.prompts.harmful)
            self.journal.note(note, [asdict(response) for response in said])
            self.journal.note(SECONDS_NOTE, time.perf_counter() - start)
        return [Response.from_json(response) for response in self.journal.notes[note]]

    def _check_tracing(self, bench: Bench, contrasts: Sequence[Contrast]) -> None:
        """Read the cases with the target, so that errors show before hours of work."""
        note = f"checked {data_digest(asdict(self.wanted))}"
        if note not in self.journal.notes:
            self._cases(bench.live.model, bench.live.tokenizer, contrasts)
            # Attribution and influence read them all.
            for contrast in contrasts:
                read_case(bench.live.model, bench.live.tokenizer, contrast, (), self.wanted.num_tokens)
            self.journal.note(note, True)

    def _tell_times(self, bench: Bench, found: Traced) -> None:
        """Estimate the stages that follow, from one timed pass and from how long the models took to answer."""
        told: dict[str, float] = {}
        sizes: dict[str, str] = {}
        num_layers = 1 + max(unit.layer for unit in self.plan.units)
        if found.contrasts:
            seconds = self._seconds_of_row(bench, found.contrasts[0])
            if "influence" in self.stages:
                number = min(len(found.contrasts), MAX_INFLUENCE_PROMPTS) - _num_known(self._known_influence())
                told["influence"] = 2 * number * self._passes_of_influence * seconds
                units = len(self.plan.units) * math.ceil(number / PROMPTS_AT_ONCE)
                expect("influence", units=units)
                pace(**({"units": told["influence"] / units} if units else {}))
                sizes["influence"] = f"{len(self.plan.units)} units x {number} prompts"
            if "traces" in self.stages:
                settings, readable = self._cases(bench.live.model, bench.live.tokenizer, found.contrasts)
                tracer = Tracer(bench.live.model, 0, settings, 0.0, BatchSize(None))
                cases = [case for number, case in self._few(readable) if not trace_path(self.out, number).exists()]
                told["traces"] = seconds * sum(map(tracer.num_passes, cases))
                runs = sum(map(tracer.num_runs, cases))
                expect("traces", runs=runs)
                pace(**({"runs": told["traces"] / runs} if runs else {}))
                sizes["traces"] = f"{len(cases)} prompts x {num_layers} layers x {len(settings.kinds)} kinds"
        if SECONDS_NOTE in self.journal.notes:
            seconds = float(self.journal.notes[SECONDS_NOTE])
            pace(edits=seconds, prompts=seconds / found.num_prompts)
            edits = Edits(bench, self.journal)
            if "groups" in self.stages:
                number = edits.num_unscored(self._groups(found), self.wanted)
                told["groups"] = number * seconds
                expect("groups", edits=number)
                sizes["groups"] = f"{number} selections x {found.num_prompts} prompts"
            if "edits" in self.stages:
                prompts = self.edit_meter.prompts
                each = len(prompts.harmful) + len(prompts.harmless)
                each += sum(skill.num_questions for skill in self.edit_meter.skills)
                number = len(curve_sizes(len(found.candidates), len(found.copied)))
                told["edits"] = number * seconds * each / len(prompts.harmful)
                sizes["edits"] = f"{number} sizes x {each} prompts"
        for name in filter(told.get, self.stages):
            LOG.info(f"about {duration(told[name])} for {name} ({sizes[name]})")
        if len(told) > 1 and any(told.values()):
            LOG.info(f"about {duration(sum(told.values()))} in all")

    def _seconds_of_row(self, bench: Bench, contrast: Contrast) -> float:
        """The seconds that a row takes for a pass through all layers, measured with one prompt's two sides."""
        model, padding = bench.live.model, bench.live.tokenizer.pad_token_id
        rows = [side.row for side in sides_of(bench.live.tokenizer, contrast, self.wanted.num_tokens)]
        with torch.inference_mode(), batch_invariant(model):
            # The first pass of a process takes longer.
            losses(model, padding, rows)
            start = time.perf_counter()
            losses(model, padding, rows)
            return (time.perf_counter() - start) / len(rows)

    def _attribution(
        self, bench: Bench, contrasts: Sequence[Contrast], units: Sequence[Unit] | None = None, of_what: str = ""
    ) -> dict[Unit, float]:
        """The first-order effect of some units, by the edit of the bench; None for all units of the session's plan."""
        units = self.plan.units if units is None else units
        note = f"attribution {self._compared}{of_what}"
        if note not in self.journal.notes:
            few = spread(contrasts, MAX_ATTRIBUTION_PROMPTS)
            with task("weighing the units by one backward pass", 2 * len(few), "responses"):
                batch_size = BatchSize(min(MAX_BACKWARD, self.meter.batch_size.limit))
                found = attribute(
                    bench.live, few, units=units, batch_size=batch_size, num_tokens=self.wanted.num_tokens
                )  # fmt: skip
            self.journal.note(note, {str(unit): effect for unit, effect in found.items()})
        effects = self.journal.notes[note]
        return {unit: effects[str(unit)] for unit in units}

    def _influence(self, bench: Bench, contrasts: Sequence[Contrast]) -> Influence:
        """The influence on some prompts, a few at a time; each few are written before the next are begun."""
        chosen, units = spread(contrasts, MAX_INFLUENCE_PROMPTS), self.plan.units
        pairs = [sides_of(bench.live.tokenizer, contrast, self.wanted.num_tokens) for contrast in chosen]
        arrays, batch_size = self._known_influence(), BatchSize(self.meter.batch_size.limit)
        parts = math.ceil((len(pairs) - _num_known(arrays)) / PROMPTS_AT_ONCE)
        with (
            task("editing each unit alone", len(units) * parts, "units"),
            batch_invariant(bench.live.model),
        ):
            while (known := _num_known(arrays)) < len(pairs):
                few = pairs[known : known + PROMPTS_AT_ONCE]
                arrays = joined(arrays, influence(bench.live, few, units, batch_size=batch_size))
                told = {"units": numpy.array(list(map(str, units))), "compared": self._compared}
                write_arrays(self.out / INFLUENCE_NAME, {**arrays, **told})
        assert arrays is not None
        hidden, refusing, before = (arrays[name] for name in ("hidden", "refusing", "before"))
        return Influence(units, hidden, refusing, before, float(arrays["num_passes"]))

    @property
    def _passes_of_influence(self) -> float:
        """The cost of one prompt's influence, in passes of one row through all layers, for one of its two sides."""
        num_layers = 1 + max(unit.layer for unit in self.plan.units)
        return sum(share(unit, num_layers) for unit in self.plan.units)

    def _known_influence(self) -> dict[str, Any] | None:
        """The influence on prompts that were measured before; None if absent, or of other responses or units."""
        arrays, names = read_arrays(self.out / INFLUENCE_NAME), [str(unit) for unit in self.plan.units]
        if arrays is None or (str(arrays.get("compared")), list(arrays.get("units", ()))) != (self._compared, names):
            return None
        return arrays

    def _directions(self, bench: Bench, plan: Plan, contrasts: Sequence[Contrast]) -> PutBack:
        """What the directions of a plan put back of each unit, and what they do for refusing."""
        edit, units = plan.edit, self.candidates.units
        assert isinstance(edit, Directions)
        with task("comparing the models with the directions", len(units), "units"):
            changes, differences = squared_norms(self.candidates, units, edit.factors)
        bench.use(plan)
        gains = self._attribution(bench, contrasts, plan.units, f" of {edit.digest}")
        if (note := f"score of {edit.digest}") not in self.journal.notes:
            with task("scoring the directions", bench.num_of_kind["harmful"], "prompts"):
                self.journal.note(note, bench.score(plan.units))
        bench.use(self.plan)
        return PutBack(
            units,
            changes * edit.strength**2,
            differences,
            edit.factors.num_directions,
            numpy.array([gains.get(unit, 0.0) for unit in units]),
            float(self.journal.notes[note]),
        )

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

    def _few(self, readable: Mapping[int, Case]) -> list[tuple[int, Case]]:
        """The cases to trace of those that can be traced, with their numbers."""
        return spread(list(readable.items()), self.wanted.num_prompts)

    def _traces(
        self, model: Any, tokenizer: Any, contrasts: Sequence[Contrast]
    ) -> Iterator[tuple[Settings, Trace, float]]:
        """Yield the settings, the trace and its seconds for each prompt."""
        settings, readable = self._cases(model, tokenizer, contrasts)
        batch_size = BatchSize(self.recipe.batch_size)
        # Computed from all cases, so that the noise does not depend on how many are traced.
        deviation = embedding_deviation(model, list(readable.values()))
        cases = dict(self._few(readable))
        tracer = Tracer(model, tokenizer.pad_token_id, settings, deviation, batch_size)
        described = json.dumps({**asdict(settings), "model": self.wanted.traced, "deviation": deviation})
        total = sum(map(tracer.num_runs, cases.values()))
        kept_runs = sum(
            tracer.num_runs(case) for number, case in cases.items() if trace_path(self.out, number).exists()
        )
        LOG.info(f"tracing {len(cases)} prompts of the {self.wanted.traced} with {total:,} runs")
        with (
            task(f"tracing {len(cases)} prompts", total - kept_runs, "runs"),
            quiet("transformers"),
            batch_invariant(model),
        ):
            for number, case in cases.items():
                path = trace_path(self.out, number)
                if (kept := read_trace(path, case, described, settings.kinds)) is None:
                    start = time.perf_counter()
                    found = tracer.trace(case, number)
                    kept = found, time.perf_counter() - start
                    write_trace(path, found, case, described, kept[1])
                yield settings, *kept


def _num_known(arrays: Mapping[str, Any] | None) -> int:
    """The number of prompts of which an influence is known."""
    return 0 if arrays is None else len(arrays["before"])


def joined(arrays: Mapping[str, Any] | None, more: Influence) -> dict[str, Any]:
    """An influence on some prompts, as arrays, together with that on others."""
    found = {name: getattr(more, name) for name in ("hidden", "refusing", "before", "num_passes")}
    if arrays is None:
        return found
    both = {name: numpy.concatenate([arrays[name], found[name]]) for name in ("hidden", "refusing", "before")}
    return {**both, "num_passes": float(arrays["num_passes"]) + more.num_passes}


def stages_of(recipe: Recipe, wanted: TraceOptions) -> tuple[str, ...]:
    """The names of the stages to make, in order.

    Raises:
        UsageError: If one was named that the recipe does not have.
    """
    chooses = EDITS.get(recipe.edit, Edit).chooses
    missing = set() if chooses else {"directions"}
    if recipe.layers is not None:
        missing.add("search")
    if named := [name for name in wanted.stages or () if name in missing]:
        why = "names its layers" if named[0] == "search" else f"has the edit {recipe.edit}, which chooses none"
        raise UsageError(f"--stages: the stage {named[0]} is not one of this recipe, which {why}; leave it out")
    stages = tuple(name for name in wanted.stages or STAGE_NAMES if name not in missing)
    if "directions" in stages and recipe.layers is None and "search" not in stages:
        raise UsageError("--stages: directions are chosen by the stage search; add it, or leave directions out")
    return stages


def trace_recipe(recipe: Recipe, out: Path, wanted: TraceOptions, options: Options) -> dict[str, Any]:
    """Trace a recipe's models, and fill the folder `out` with traces, charts, a summary and a page.

    Charts, summary and page are written after each stage. A folder with an earlier trace of the same models is resumed.

    Returns:
        The summary as plain data.

    Raises:
        CannotRepair: If no prompt is refused by the source and answered by the target.
        UsageError: If matplotlib is not installed, or the folder holds something else.
        DapaError: For any other error; finished results are kept.
    """
    # A trace may take hours, so a missing matplotlib is reported first.
    plotting()
    stages = stages_of(recipe, wanted)
    check_folder(out)
    # Of models on the Hub the headers only, until it was told how much is to fetch.
    planned = make_plan(recipe, partial_target=True, allow_pickle=options.allow_pickle)
    check_prompts(recipe)
    # The selection of a search is judged with prompts that the search did not ask.
    prompts = all_prompts(recipe).report
    refuse_turns(recipe, prompts)
    asking = search_meter(recipe, prompts, options, planned.models.values())
    meter = replace(asking, skills=skills_of(prompts, recipe.skills, options))
    if wanted.subjects:
        with_subject(prompts.harmful, wanted.subjects)
    with forecast(recipe, planned, meter, wanted, stages, out, options).told():
        return _trace(recipe, meter, out, wanted, options, stages)


def _trace(
    recipe: Recipe, meter: Meter, out: Path, wanted: TraceOptions, options: Options, stages: tuple[str, ...]
) -> dict[str, Any]:
    chosen = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
    candidates = chosen.reference
    if recipe.directions is not None:
        # The file holds directions of some units; they were chosen among all.
        candidates = with_modules(candidates, auto_modules(chosen.target.config, chosen.target.shapes))
    plan = plan_of_all(candidates)
    with opened(out, models_parts(recipe, plan.models, meter, options.where)) as journal:
        meters = replace(meter, skills=()), replace(meter, classifiers=(RULES,), scorer=None)
        session = TraceSession(recipe, chosen, candidates, plan, *meters, out, wanted, options, journal, stages)
        folder = TraceFolder(out)
        for found in session.run():
            folder.write(found)
    return folder.summary


class TraceFolder:
    """What people read of a trace, kept up to date: charts, summary and page.

    Attributes:
        summary: The last one written.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._drawn: dict[str, Picture] = {}
        self.summary: dict[str, Any] = {}

    def write(self, found: Traced) -> None:
        """Write what is found so far, and draw what the last stage added."""
        if not self.summary:
            # Remove only the pictures of an earlier run, and no others in the folder.
            forget_pictures(self._out / FIGURES_NAME, tuple(chart.beginning for chart in CHARTS))
        self.summary = summarize(found)
        last = found.begun or (found.done[-1] if found.done else None)
        changed = [chart for chart in CHARTS if last in STAGES_OF_CHARTS[chart.name]]
        for picture in draw_all(changed, found):
            self._drawn[picture.name] = picture
            for ending, content in picture.files.items():
                replace_file(self._out / FIGURES_NAME / f"{picture.name}{ending}", content)
        names = [name for chart in CHARTS for name in chart.shown(found)]
        pictures = [self._drawn[name] for name in names if name in self._drawn]
        replace_file(self._out / SUMMARY_NAME, (json.dumps(self.summary, indent=2) + "\n").encode())
        replace_file(self._out / PAGE_NAME, page(self.summary, pictures).encode())
