"""One recipe of a comparison: every method on the same target and the same prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.digest import tensors_digest
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import Unit, architecture_name, auto_modules
from dapa_merge.compare.blend import BETWEEN, Blender, MergekitBlend, open_pretrained
from dapa_merge.compare.curve import Growth, GrowthOrder
from dapa_merge.compare.measuring import Besides, Measuring, Seen, besides
from dapa_merge.compare.methods import (
    AUTO,
    BLEND,
    CONTROLS,
    DAPA,
    DIRECTIONS,
    LABELS,
    METHODS,
    PRETRAINED,
    SOURCE,
    TARGET,
    TIES_DENSITY,
    TUNED,
    Method,
)
from dapa_merge.compare.result import Arm, CompareOptions, Cost, Row
from dapa_merge.compare.selections import (
    Found,
    auto_of,
    find_directions,
    find_selections,
    fixed_layers,
    mlp_units,
    random_units,
)
from dapa_merge.compare.tuning import MOMENTS, Candidate, Trials, Workbench, thinned
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.meter import Meter, report_meter
from dapa_merge.measure.prompts.parts import Parts, all_prompts
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.plan.edit import EDITS, Copy, Directions, Edit
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import make_plan, num_changed, plan_of_all, units_that_differ
from dapa_merge.progress import advance, task
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import layer_spans, spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.identity import data_digest, models_parts
from dapa_merge.search.journal import Journal, JournalUnavailable, Missing, gathered
from dapa_merge.search.requirement import refers, settings_of

JOURNAL_NAME = "figures.jsonl"


def compare_recipe(recipe: Recipe, name: str, folder: Path, wanted: CompareOptions, options: Options) -> Row:
    """Measure every method on one recipe's target, except for those in the journals of `folder`.

    Raises:
        UsageError: If the folder belongs to another recipe or other models.
        DapaError: For any other error; finished measurements are kept.
    """
    bench = RowBench.of(recipe, name, folder, wanted, options)
    with closing(bench.journal(bench.parts)) as journal, closing(bench.tools(journal)) as tools:
        return bench.row(tools)


@dataclass(frozen=True)
class RowBench:
    """The inputs of one row, with nothing loaded yet.

    Attributes:
        given: The recipe as it was written.
        recipe: The recipe of all methods but `directions`.
        chosen: Its plan.
        plan: The same models, with the units of all modules.
        searching: The prompts of the searches.
        is_rung: As for `split_prompts`.
        also: What else is measured of each result.
        known_base: What identifies the subtracted weights, if it need not be read here.
    """

    given: Recipe
    recipe: Recipe
    name: str
    folder: Path
    wanted: CompareOptions
    options: Options
    chosen: Plan
    plan: Plan
    pretrained: Checkpoint | None
    searching: PromptSet
    is_rung: bool
    meter: Meter
    also: tuple[Besides, ...]
    known_base: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, name: str, folder: Path, wanted: CompareOptions, options: Options) -> RowBench:
        """Open the models; raises `DapaError` if one cannot be used."""
        given, recipe = recipe, copying(recipe)
        chosen = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
        # The search with `modules: auto` selects from these.
        plan = plan_of_all(chosen, auto_modules(chosen.target.config, chosen.target.shapes))
        prompts, is_rung = prompts_of(recipe)
        meter = meter_of(recipe, prompts.report, options, plan.models.values())
        pretrained = open_pretrained(recipe, plan.target, plan.source, allow_pickle=options.allow_pickle)
        return cls(
            given, recipe, name, folder, wanted, options, chosen, plan, pretrained, prompts.search, is_rung, meter,
            besides(wanted, prompts.report),
        )  # fmt: skip

    @property
    def parts(self) -> dict[str, str]:
        """Identity of the row's journal; reads all weights."""
        return models_parts(self.recipe, self.plan.models, self.meter, self.options.where) | {
            "prompts of the search": data_digest([self.searching.harmful, self.searching.harmless]),
            "mergekit": version("mergekit"),
        }

    @cached_property
    def base(self) -> str:
        """Identity of the weights that some methods subtract; reads them all."""
        if self.known_base is not None:
            return self.known_base
        return "target" if self.pretrained is None else tensors_digest(self.pretrained)

    def journal(self, parts: Mapping[str, str]) -> Journal:
        """The journal in the row's folder; raises `UsageError` if it is that of another row."""
        return Journal(self.folder / JOURNAL_NAME, parts, kind="comparison", place="folder")

    def tools(self, journal: Journal) -> Tools:
        """Make the tools that measure the row; the caller closes them."""
        where, is_referring = self.options.where, refers(self.recipe)
        measuring = Measuring(self.plan, self.meter, where, journal, refers=is_referring, also=self.also)
        workbench = Workbench(
            self.plan, self.pretrained, self.searching, measuring, journal, self.wanted, lambda: self.base
        )
        return Tools(self, measuring, workbench, Trials(self.recipe, self.searching, measuring, journal))

    def row(self, tools: Tools) -> Row:
        """Measure what is not in the journal yet, and make the row.

        If the journal gives work away, arms and points whose notes are missing have no figures.
        """
        recipe, plan, wanted, journal = self.recipe, self.plan, self.wanted, tools.measuring.journal
        found, is_whole = self._searches(journal)
        # The curve grows through DAPA's own selection or, without one, through that among all projections.
        followed = next((key for key, one in found.items() if one.units is not None), None)
        best = found.get(followed or DAPA, Found(self.chosen))
        methods = Methods(self, found, tools)
        stages = GrowthOrder.of(best.units or (), best.plan, plan.units)
        draws = wanted.draws_curve and is_whole
        growth = Growth(stages, self.searching.harmful, tools.measuring, journal, wanted) if draws else None
        source = methods.source(growth)
        arms = (methods.edit(TARGET, TARGET, ()), source, *methods.edits(), *methods.tuned())
        curve = tuple(growth.points()) if growth else ()
        return Row(
            name=self.name,
            target=str(recipe.target),
            source=str(recipe.source),
            architecture=architecture_name(plan.target.config),
            modules=", ".join(recipe.modules),
            evaluator=recipe.evaluator,
            edit=plan.edit,
            num_parameters=plan.target.num_parameters,
            prompts=recipe.prompts,
            settings=settings_of(recipe),
            arithmetic=self.options.where.arithmetic,
            arms=arms,
            curve=curve,
            no_curve=growth.why_not if growth else None,
            followed=followed,
            selected=None if best.units is None else plan.share(best.units),
        )

    def _searches(self, journal: Journal) -> tuple[dict[str, Found], bool]:
        """The wanted selections, by search, and whether these are all: others may be missing."""
        recipe, chosen, methods = self.recipe, self.chosen, self.wanted.methods
        if not self.wanted.draws_curve and not {DAPA, AUTO, *CONTROLS} & set(methods):
            return {DAPA: Found(chosen)}, True
        searches = {DAPA: (recipe, chosen)}
        is_same = set(chosen.modules) == set(auto_modules(chosen.target.config, chosen.target.shapes))
        # If the recipe names its layers, all prompts are for measuring, and none are left for a search.
        if recipe.layers is None and AUTO in methods and (auto := auto_of(recipe, chosen)) is not None:
            searches[AUTO] = auto
        found = {}
        for key, search in searches.items():
            with suppress(Missing):
                found[key] = find_selections(key, *search, self.folder, journal, self.options, is_rung=self.is_rung)
        if recipe.layers is None and AUTO not in searches and is_same and DAPA in found:
            found[AUTO] = found[DAPA]
        return found, len(found) >= len(searches)


@dataclass
class Tools:
    """The tools that measure one row and hold its loaded models; the caller closes them."""

    bench: RowBench
    measuring: Measuring
    workbench: Workbench
    trials: Trials

    @cached_property
    def blender(self) -> Blender:
        """Blends into the loaded target."""
        live, plan = self.measuring.live, self.bench.plan
        return Blender(live, plan.target, plan.source, self.bench.pretrained, device=str(live.model.device))

    def close(self) -> None:
        """Let go of the models; nothing here can be used afterwards."""
        self.measuring.close()


def copying(recipe: Recipe) -> Recipe:
    """The recipe for all methods but `directions`: if its own edit chooses what it adds, DAPA's copy of gates."""
    chooses = EDITS.get(recipe.edit, Edit).chooses
    return replace(recipe, edit=Copy.name, strength=1.0, modules=("gate",), directions=None) if chooses else recipe


def meter_of(recipe: Recipe, prompts: PromptSet, options: Options, models: Iterable[Checkpoint]) -> Meter:
    """The meter of a row's results; raises what `report_meter` does."""
    meter = report_meter(recipe, prompts, options, models)
    # Figures are the verdicts of the first classifier: here the recipe's.
    ordered = sorted(meter.classifiers, key=lambda one: (one.name != recipe.evaluator, one is not RULES))
    # Attacks, which would take most of the time, are made only if the comparison wants them.
    return replace(meter, classifiers=tuple(ordered), attacks=())


def prompts_of(recipe: Recipe) -> tuple[Parts, bool]:
    """The prompts, and whether they are parted so that directions are chosen by none of the report's keep prompts.

    They are parted so whatever methods are wanted, so that a row can get more of them later.
    """
    if recipe.keep is not None:
        # With too few for three parts, directions cannot be chosen, and will say so.
        with suppress(UsageError):
            return all_prompts(recipe, is_rung=True), True
    return all_prompts(recipe), False


# The place of an arm whose note is missing.
NOT_YET = Arm("", "", "", "nothing", why_not="not measured yet")


def in_its_place(arm: Callable[..., Arm]) -> Callable[..., Arm]:
    """Let an arm whose note is missing keep no other from being asked for."""

    @functools.wraps(arm)
    def call(*given: Any, **named: Any) -> Arm:
        try:
            return arm(*given, **named)
        except Missing:
            return NOT_YET

    return call


@dataclass
class Methods:
    """Applies the wanted methods to one target."""

    bench: RowBench
    found: Mapping[str, Found]
    tools: Tools

    def __post_init__(self) -> None:
        """Take what is often asked for from bench and tools."""
        self.chosen, self.plan, self.pretrained = self.bench.chosen, self.bench.plan, self.bench.pretrained
        self.wanted = self.bench.wanted
        self.measuring, self.workbench, self.trials = self.tools.measuring, self.tools.workbench, self.tools.trials

    @in_its_place
    def source(self, growth: Growth | None) -> Arm:
        """Measure the source, and ask it all that methods need while it is loaded."""
        tunes = any(METHODS[key].kind in TUNED for key in self.wanted.methods)
        lacking = self.workbench.lacks()
        notes = ["source", *(["trial source"] if tunes else []), *sorted(lacking - {MOMENTS})]
        missing = [note for note in notes if not self.measuring.has(note)] + self.measuring.missing("source")
        # Kept in memory; where work is shared, whoever needs it asks for it.
        unheard = MOMENTS in lacking or (growth is not None and not growth.is_weighed)

        def ask() -> None:
            with self.measuring.source() as model:
                self.measuring.alone(model)
                if growth is not None:
                    growth.hear(model)
                if tunes:
                    self.trials.try_out("source", lambda: nullcontext(model))
                self.workbench.hear(model)

        if missing or (unheard and not self.measuring.journal.is_shared):
            self.measuring.journal.perform((missing or ["source"])[0], ask, alone=True)
        seen = self.measuring.alone((None, None))
        return self._arm(SOURCE, SOURCE, LABELS[SOURCE], "the aligned model", seen, share=1.0)

    @in_its_place
    def edit(self, key: str, method: str, units: Sequence[Unit], detail: str | None = None, **more: Any) -> Arm:
        """Measure the target with some units of the source."""
        group, seed, number = key.partition(" seed ")
        label = LABELS[group]
        seen = self.measuring.edit(units, f"{label}{seed}{number}", counts=True)
        # A point of a curve may have had the same units.
        count = num_changed(self.plan, units) if seen.num_changed is None else seen.num_changed
        share = count / self.plan.target.num_parameters
        return self._arm(key, method, label, detail or spans(units), seen, share=share, **more)

    def _arm(self, key: str, method: str, label: str, detail: str, seen: Seen, *, share: float, **more: Any) -> Arm:
        number = round(share * self.plan.target.num_parameters)
        return Arm(
            key, method, label, detail, seen.figures, None, share, number, seen.refused, seen.over_refused,
            seen.seconds, further=seen.further, **more,
        )  # fmt: skip

    def edits(self) -> Iterator[Arm]:
        """Apply the methods that transplant units."""
        wanted, plan = self.wanted.methods, self.plan
        for key, one in self.found.items():
            if key not in wanted:
                continue
            if one.units is None:
                yield Arm(key, key, LABELS[key], "nothing", why_not=one.why_not, cost=one.cost)
            else:
                yield self.edit(key, key, one.units, cost=one.cost)
        if DIRECTIONS in wanted:
            yield self._directions()
        if "fixed" in wanted:
            layers = fixed_layers(_model_type(plan.target.config), plan.units[-1].layer + 1)
            yield self.edit("fixed", "fixed", mlp_units(plan.units, layers), _mlp_of(layers))
        if "gates" in wanted:
            gates = tuple(unit for unit in plan.units if unit.module == "gate")
            yield self.edit("gates" if gates else "all", "gates", gates or self.chosen.units)
        for key, one in self.found.items():
            yield from self._controls(one, "" if key == DAPA else f" of {key}")

    @in_its_place
    def _directions(self) -> Arm:
        """Apply what `edit: directions` finds; the search is replayed only if its result is not measured yet."""
        label, note, journal = LABELS[DIRECTIONS], "search directions", self.measuring.journal
        bench = self.bench

        def find() -> None:
            found = find_directions(bench.given, self.chosen, bench.folder, bench.options)
            noted = journal.once(note, lambda: _noted_directions(found))
            if found.units is not None:
                made = functools.partial(self.measuring.edited, found.plan, found.units)
                self.measuring.candidate(noted["measured"], made, label)

        measured = journal.notes.get(note, {}).get("measured")
        missing = [] if self.measuring.has(note) else [note]
        missing += [] if measured is None else self.measuring.missing(measured)
        if missing:
            try:
                journal.perform(missing[0], find, alone=True)
            except JournalUnavailable:
                raise
            except (UsageError, CheckpointError) as error:
                # Not recorded: another machine may have enough memory.
                return Arm(DIRECTIONS, DIRECTIONS, label, "nothing", why_not=str(error))
        noted = journal.notes[note]
        cost = Cost(**noted["cost"]) if noted["cost"] else None
        if noted["why_not"] is not None:
            return Arm(DIRECTIONS, DIRECTIONS, label, "nothing", why_not=noted["why_not"], cost=cost)
        seen = self.measuring.candidate(noted["measured"], self.measuring.untouched, label)
        return self._arm(DIRECTIONS, DIRECTIONS, label, noted["detail"], seen, share=noted["share"], cost=cost)

    def _controls(self, found: Found, whose: str) -> Iterator[Arm]:
        """Apply the controls, which a selection should beat."""
        keys = {method: f"{method}{whose}" for method in CONTROLS if method in self.wanted.methods}
        if found.units is None:
            why = "the search selected nothing"
            yield from (Arm(key, method, LABELS[key], "nothing", why_not=why) for method, key in keys.items())
            return
        if "mlp" in keys:
            layers = tuple(sorted({unit.layer for unit in found.units}))
            yield self.edit(keys["mlp"], "mlp", mlp_units(self.plan.units, layers), _mlp_of(layers))
        # A control with units that the edit does not change would be weaker.
        pool = units_that_differ(found.plan, found.plan.units) if {"random", "random-search"} & set(keys) else ()
        if "random" in keys:
            for number in range(self.wanted.seed, self.wanted.seed + self.wanted.num_seeds):
                units = random_units(found.plan, pool, found.units, number)
                yield self.edit(f"{keys['random']} seed {number}", "random", units)
        if "random-search" in keys and found.cost is not None:
            # As many draws as the search made tests, with other seeds than the single draws.
            first = self.wanted.seed + self.wanted.num_seeds
            seeds = range(first, first + max(1, found.cost.tests))
            drawn = [random_units(found.plan, pool, found.units, seed) for seed in seeds]
            yield self._best(keys["random-search"], drawn)

    @in_its_place
    def _best(self, key: str, drawn: Sequence[tuple[Unit, ...]]) -> Arm:
        """Measure the selection with the best score on the prompts of the search."""

        def score(units: tuple[Unit, ...]) -> float:
            found = self.measuring.score(units, self.bench.searching)
            advance(1, "selections")
            return found

        with task("trying random selections", len(drawn), "selections"):
            scores = gathered(functools.partial(score, units) for units in drawn)
        return self.edit(key, "random-search", drawn[scores.index(max(scores))])

    def tuned(self) -> Iterator[Arm]:
        """Apply the methods with settings: blends, and those that rewrite deltas or train."""
        for key in self.wanted.methods:
            method = METHODS[key]
            if method.kind not in TUNED:
                continue
            if PRETRAINED in method.needs and self.pretrained is None:
                # With the target subtracted, task arithmetic would be the linear blend.
                why = "the recipe names no `pretrained` model, or the target itself"
                yield Arm(key, key, method.label, "nothing", why_not=why)
            elif method.kind == BLEND and self.wanted.weights is not None:
                for weight in self.wanted.weights:
                    # A linear blend of weight 1 is the source, which is in every table.
                    if method.grid[-1] == (1.0,) or weight != 1:
                        yield self._measured(method, [self._blend(method, weight)], f" {weight:g}")
            elif method.kind == BLEND:
                weights = thinned(method.grid, self.wanted.num_tries)
                yield self._measured(method, [self._blend(method, weight) for (weight,) in weights])
            else:
                yield self._measured(method, self.workbench.candidates(method))

    @in_its_place
    def _measured(self, method: Method, candidates: Sequence[Candidate], weight: str = "") -> Arm:
        """Measure the best candidate by the prompts of choice and search, or the one with a given weight."""
        names = f"{method.key}{{}}", f"{method.label}{{}}"
        if self.pretrained is None and any(method.without):
            names = method.without
        key, label = (name.format(weight) for name in names)
        if method.kind != BLEND and (lacking := self.workbench.lacks() - {MOMENTS}):
            raise Missing(min(lacking))
        try:
            tuning = None if weight else self.trials.tune(label, candidates)
            chosen = candidates[tuning.chosen if tuning else 0]
            count = None if method.kind == BLEND else lambda: self.workbench.num_changed
            seen = self.measuring.candidate(chosen.note, chosen.make, label, count)
        except JournalUnavailable:
            raise
        except (UsageError, CheckpointError) as error:
            return Arm(key, method.key, label, "nothing", why_not=str(error))
        share = 1.0 if seen.num_changed is None else seen.num_changed / self.plan.target.num_parameters
        cost = Cost(len(tuning.trials), round(sum(one.seconds for one in tuning.trials), 3), {}) if tuning else None
        return self._arm(key, method.key, label, chosen.setting, seen, share=share, cost=cost, tuning=tuning)

    def _blend(self, method: Method, weight: float) -> Candidate:
        density = TIES_DENSITY if method.key == "ties" else 1.0
        blend = MergekitBlend(method.key.replace("-", "_"), weight, density)
        # Identifies the weights that are subtracted.
        base = "" if blend.method in BETWEEN else self.bench.base
        setting = f"weight of the source {weight:g}{f', density {density:g}' if density != 1 else ''}"
        if method.key == "ties" and self.pretrained is None:
            setting += ", of its difference from the target"
        note = f"blend {blend.method} {weight!r} {density!r} {base}"
        return Candidate(note, setting, lambda: self.tools.blender.blended(blend))


def _noted_directions(found: Found) -> dict[str, Any]:
    """The journal's entry for a search for directions."""
    plan = found.plan
    noted: dict[str, Any] = {"why_not": found.why_not, "cost": found.cost and asdict(found.cost)}
    if found.units is None:
        return noted
    edit = plan.edit.reduced(regions["target"] for regions in plan.regions(found.units))
    assert isinstance(edit, Directions)
    detail = f"{edit.factors.num_directions:,} directions in {len(found.units)} matrices"
    if found.complaint is not None:
        detail += f"; nothing keeps to the limits, and of the nearest {found.complaint}"
    return {**noted, "measured": f"directions {edit.digest}", "detail": detail, "share": plan.share(found.units)}


def _mlp_of(layers: Sequence[int]) -> str:
    return f"MLP of layer{'s' if len(layers) > 1 else ''} {layer_spans(layers)}"


def _model_type(config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    return str(config.get("model_type") or inner.get("model_type") or "")
