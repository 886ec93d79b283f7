"""One recipe of a comparison: every method on the same target and the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.digest import tensors_digest
from dapa_merge.checkpoint.units import AUTO_MODULES, Unit, architecture_name
from dapa_merge.compare.blend import open_pretrained
from dapa_merge.compare.curve import Growth, GrowthOrder
from dapa_merge.compare.measuring import Measuring, Seen
from dapa_merge.compare.result import AUTO, BLENDS, DAPA, SOURCE, TARGET, TIES_DENSITY, Arm, CompareOptions, Point, Row
from dapa_merge.compare.selections import Found, auto_of, find_selections, fixed_layers, mlp_units, random_units
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.prompts.sets import load_prompts, split_prompts
from dapa_merge.plan.selection import make_plan, plan_of_all
from dapa_merge.progress import advance, task
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import layer_spans, spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.identity import data_digest, models_parts
from dapa_merge.search.journal import Journal, JournalUnavailable
from dapa_merge.search.requirement import settings_of

if TYPE_CHECKING:
    from dapa_merge.compare.blend import Blend, Blender
    from dapa_merge.plan.plan import Plan


JOURNAL_NAME = "figures.jsonl"
# What goes by what a search selected.
CONTROLS = ("mlp", "random", "random-search")
LABELS = {
    TARGET: "target, untouched",
    SOURCE: "source itself",
    DAPA: "DAPA",
    AUTO: "DAPA, modules: auto",
    "fixed": "fixed middle layers, MLP",
    "gates": "all gates",
    "all": "all of the recipe's modules",
    "mlp": "MLP of DAPA's layers",
    "mlp of auto": "MLP of auto's layers",
    "random": "random like DAPA's",
    "random of auto": "random like auto's",
    "random-search": "best random like DAPA's",
    "random-search of auto": "best random like auto's",
}


def compare_recipe(recipe: Recipe, name: str, folder: Path, wanted: CompareOptions, options: Options) -> Row:
    """Measure every method on one recipe's target.

    Args:
        recipe: The recipe.
        name: Its name in the table.
        folder: Where its journals are; what is in them is not measured again.
        wanted: What to compare.
        options: Where to evaluate.

    Raises:
        UsageError: If the folder is of another recipe, or of other models.
        DapaError: For whatever else does not fit; what was measured is kept.
    """
    return _Comparison(recipe, name, folder, wanted, options).run()


class _Comparison:
    def __init__(self, recipe: Recipe, name: str, folder: Path, wanted: CompareOptions, options: Options) -> None:
        from dapa_merge.measure.meter import report_meter

        self.recipe = recipe
        self.name = name
        self.folder = folder
        self.wanted = wanted
        self.options = options
        self.chosen = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
        self.plan = plan_of_all(recipe, self.chosen)
        prompts = load_prompts(recipe.prompts)
        self.searching, confirming = split_prompts(recipe) if recipe.layers is None else (prompts, prompts)
        meter = report_meter(recipe, confirming, options)
        # Figures are the verdicts of the first classifier: here the recipe's.
        ordered = sorted(meter.classifiers, key=lambda one: (one.name != recipe.evaluator, one is not RULES))
        self.meter = replace(meter, classifiers=tuple(ordered))
        self.pretrained = open_pretrained(recipe, self.plan.target, self.plan.source, allow_pickle=options.allow_pickle)

    def run(self) -> Row:
        parts = models_parts(self.recipe, self.plan.models, self.meter, self.options.device) | {
            "prompts of the search": data_digest([self.searching.harmful, self.searching.harmless]),
            "mergekit": version("mergekit"),
        }
        with closing(Journal(self.folder / JOURNAL_NAME, parts, kind="comparison", place="folder")) as journal:
            found = self._find(journal)
            with closing(Measuring(self.plan, self.meter, self.options.device, journal)) as measuring:
                self.measuring = measuring
                growth = self._growth(found, journal) if self.wanted.draws_curve else None
                source = self._source(growth)
                arms = [self._edit(TARGET, TARGET, ()), source, *self._arms(found), *self._blends()]
                curve = tuple(growth.points()) if growth else ()
        return self._row(arms, curve, growth.why_not if growth else None, found)

    @property
    def _searches(self) -> bool:
        """Whether anything that is wanted needs what DAPA selects."""
        return self.wanted.draws_curve or bool({DAPA, AUTO, *CONTROLS} & set(self.wanted.methods))

    def _find(self, journal: Journal) -> dict[str, Found]:
        def search(name: str, recipe: Recipe, plan: Plan) -> Found:
            return find_selections(name, recipe, plan, self.folder, journal, self.options)

        if not self._searches:
            return {DAPA: Found(self.chosen)}
        found = {DAPA: search(DAPA, self.recipe, self.chosen)}
        if self.recipe.layers is not None:
            # It is measured with all prompts: none are left for a search that no figure rests on.
            return found
        if AUTO in self.wanted.methods and (auto := auto_of(self.recipe, self.chosen)) is not None:
            found[AUTO] = search(AUTO, *auto)
        elif set(self.recipe.modules) == set(AUTO_MODULES):
            found[AUTO] = found[DAPA]
        return found

    def _followed(self, found: Mapping[str, Found]) -> str | None:
        """Whose selection the curve grows through: DAPA's own or, where it has none, that among all projections."""
        return next((key for key, one in found.items() if one.units is not None), None)

    def _growth(self, found: Mapping[str, Found], journal: Journal) -> Growth:
        best = found[self._followed(found) or DAPA]
        stages = GrowthOrder.of(best.units or (), best.plan, self.plan.units)
        return Growth(stages, self.searching.harmful, self.measuring, journal, self.wanted)

    def _row(
        self, arms: Sequence[Arm], curve: tuple[Point, ...], no_curve: str | None, found: Mapping[str, Found]
    ) -> Row:
        recipe, followed = self.recipe, self._followed(found)
        units = found[followed].units if followed else None
        return Row(
            name=self.name,
            target=str(recipe.target),
            source=str(recipe.source),
            architecture=architecture_name(self.plan.target.config),
            modules=", ".join(recipe.modules),
            evaluator=recipe.evaluator,
            edit=self.plan.edit,
            num_parameters=self.plan.target.num_parameters,
            prompts=recipe.prompts,
            settings=settings_of(recipe),
            arms=tuple(arms),
            curve=curve,
            no_curve=no_curve,
            followed=followed,
            selected=None if units is None else self.plan.share(units),
        )

    def _source(self, growth: Growth | None) -> Arm:
        """The source's figures; what it says to the search's prompts says how the curve's edits grow."""
        if self.measuring.has("source") and (growth is None or growth.is_weighed):
            seen = self.measuring.alone((None, None))
        else:
            with self.measuring.source() as model:
                seen = self.measuring.alone(model)
                if growth is not None:
                    growth.hear(model)
        return self._arm(SOURCE, SOURCE, LABELS[SOURCE], "the aligned model", seen, share=1.0)

    def _arm(self, key: str, method: str, label: str, detail: str, seen: Seen, *, share: float, **more: Any) -> Arm:
        number = round(share * self.plan.target.num_parameters)
        return Arm(
            key, method, label, detail, seen.figures, None, share, number, seen.refused, seen.over_refused,
            seen.seconds, **more,
        )  # fmt: skip

    def _edit(self, key: str, method: str, units: Sequence[Unit], detail: str | None = None, **more: Any) -> Arm:
        group, seed, number = key.partition(" seed ")
        label = LABELS[group]
        seen = self.measuring.edit(units, f"{label}{seed}{number}")
        share = self.plan.share(units)
        return self._arm(key, method, label, detail or spans(units), seen, share=share, **more)

    def _arms(self, found: Mapping[str, Found]) -> Iterator[Arm]:
        """The methods that transplant units."""
        methods, plan = self.wanted.methods, self.plan
        for key, one in found.items():
            if key not in methods:
                continue
            if one.units is None:
                yield Arm(key, key, LABELS[key], "nothing", why_not=one.why_not, cost=one.cost)
            else:
                yield self._edit(key, key, one.units, cost=one.cost)
        if "fixed" in methods:
            layers = fixed_layers(_model_type(plan.target.config), plan.units[-1].layer + 1)
            yield self._edit("fixed", "fixed", mlp_units(plan.units, layers), _mlp_of(layers))
        if "gates" in methods:
            gates = tuple(unit for unit in plan.units if unit.module == "gate")
            yield self._edit("gates" if gates else "all", "gates", gates or self.chosen.units)
        for key, one in found.items():
            yield from self._controls(one, "" if key == DAPA else f" of {key}")

    def _controls(self, found: Found, whose: str) -> Iterator[Arm]:
        """What a selection has to be better than."""
        keys = {method: f"{method}{whose}" for method in CONTROLS if method in self.wanted.methods}
        if found.units is None:
            why = "there is no selection to go by"
            yield from (Arm(key, method, LABELS[key], "nothing", why_not=why) for method, key in keys.items())
            return
        if "mlp" in keys:
            layers = tuple(sorted({unit.layer for unit in found.units}))
            units = mlp_units(self.plan.units, layers)
            yield self._edit(keys["mlp"], "mlp", units, _mlp_of(layers))
        if "random" in keys:
            for number in range(self.wanted.seed, self.wanted.seed + self.wanted.num_seeds):
                units = random_units(found.plan, found.plan.units, found.units, number)
                yield self._edit(f"{keys['random']} seed {number}", "random", units)
        if "random-search" in keys and found.cost is not None:
            yield self._edit(keys["random-search"], "random-search", self._best_at_random(found))

    def _best_at_random(self, found: Found) -> tuple[Unit, ...]:
        """Of as many random selections as a search tested, the one that its prompts find best: what its luck is worth.

        None of them is one of the seeds that stand for a single draw.
        """
        assert found.units is not None
        assert found.cost is not None
        first = self.wanted.seed + self.wanted.num_seeds
        seeds = range(first, first + max(1, found.cost.tests))
        drawn = [random_units(found.plan, found.plan.units, found.units, seed) for seed in seeds]
        with task("trying random selections", len(drawn), "selections"):
            scores = []
            for units in drawn:
                scores.append(self.measuring.score(units, self.searching))
                advance(1, "selections")
        return drawn[scores.index(max(scores))]

    def _blends(self) -> Iterator[Arm]:
        """Mergekit's own methods."""
        if "task-arithmetic" in self.wanted.methods and self.pretrained is None:
            why = "the recipe names no `pretrained` model, or the target itself"
            yield Arm("task-arithmetic", "task-arithmetic", "task arithmetic", "nothing", why_not=why)
        for method, blend in blends_of(self.wanted, self.pretrained is not None):
            key, label, base = f"{method} {blend.weight:g}", blend.name, ""
            if method != "linear":
                base = self._base
            if method == "ties" and self.pretrained is None:
                # With nothing but the target to subtract it is another method.
                key, label = f"{method} of target {blend.weight:g}", f"{label} on the target"
            try:
                seen = self.measuring.blend(blend, base, lambda: self._blender)
            except JournalUnavailable:
                raise
            except (UsageError, CheckpointError) as error:
                yield Arm(key, method, label, "nothing", why_not=str(error))
            else:
                yield self._arm(key, method, label, _blend_detail(blend, self.pretrained is not None), seen, share=1.0)

    @cached_property
    def _base(self) -> str:
        return "target" if self.pretrained is None else tensors_digest(self.pretrained)

    @cached_property
    def _blender(self) -> Blender:
        from dapa_merge.compare.blend import Blender

        live = self.measuring.live
        device = str(live.model.device)
        return Blender(live, self.plan.target, self.plan.source, self.pretrained, device=device)


def blends_of(wanted: CompareOptions, has_pretrained: bool) -> Iterator[tuple[str, Blend]]:
    """The methods of mergekit that are wanted, with their settings.

    Task arithmetic subtracts what both models come from; with only the target to subtract, it would be the linear
    blend of the same weight.
    """
    for method in BLENDS:
        if method not in wanted.methods or (method == "task-arithmetic" and not has_pretrained):
            continue
        # It loads mergekit.
        from dapa_merge.compare.blend import Blend

        for weight in wanted.weights:
            if method == "linear" and weight == 1:
                # The source itself, which is in every table.
                continue
            density = TIES_DENSITY if method == "ties" else 1.0
            yield method, Blend(method.replace("-", "_"), weight, density)


def _mlp_of(layers: Sequence[int]) -> str:
    return f"MLP of layer{'s' if len(layers) > 1 else ''} {layer_spans(layers)}"


def _blend_detail(blend: Blend, has_pretrained: bool) -> str:
    density = f", density {blend.density:g}" if blend.density != 1 else ""
    subtracted = "" if has_pretrained or blend.method == "linear" else ", of its difference from the target"
    return f"weight of the source {blend.weight:g}{density}{subtracted}"


def _model_type(config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    return str(config.get("model_type") or inner.get("model_type") or "")
