"""One recipe of a comparison: every method on the same target and the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import AUTO_MODULES, Unit, architecture_name
from dapa_merge.compare.curve import Stages
from dapa_merge.compare.finding import Found, auto_of, find
from dapa_merge.compare.growth import Growth
from dapa_merge.compare.layers import fixed_layers, mlp_units, random_units
from dapa_merge.compare.measuring import Measuring, Seen
from dapa_merge.compare.options import BLENDS, TIES_DENSITY, CompareOptions
from dapa_merge.compare.result import AUTO, DAPA, SOURCE, TARGET, Arm, Point, Row
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.evaluate.prompts import load_prompts
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.report import layer_spans, spans
from dapa_merge.search.journal import Journal
from dapa_merge.search_options import SearchOptions
from dapa_merge.search_record import models_parts
from dapa_merge.selection import make_plan, open_location, plan_of_all, split_prompts

if TYPE_CHECKING:
    from dapa_merge.checkpoint.files import Checkpoint
    from dapa_merge.checkpoint.plan import Plan
    from dapa_merge.compare.blend import Blend, Blender

JOURNAL_NAME = "figures.jsonl"
LABELS = {
    TARGET: "target, untouched",
    SOURCE: "source itself",
    DAPA: "DAPA",
    AUTO: "DAPA, modules: auto",
    "fixed": "fixed middle layers, MLP",
    "gates": "all gates",
    "mlp": "MLP of DAPA's layers",
    "random": "random",
}


def compare_recipe(
    recipe: Recipe, name: str, folder: Path, wanted: CompareOptions, options: SearchOptions, reporter: Reporter
) -> Row:
    """Measure every method on one recipe's target.

    Args:
        recipe: The recipe.
        name: Its name in the table.
        folder: Where its journals are; what is in them is not measured again.
        wanted: What to compare.
        options: Where to evaluate.
        reporter: Hears of the steps.

    Raises:
        UsageError: If the folder is of another recipe, or of other models.
        DapaError: For whatever else does not fit; what was measured is kept.
    """
    return _Comparison(recipe, name, folder, wanted, options, reporter).run()


class _Comparison:
    def __init__(
        self,
        recipe: Recipe,
        name: str,
        folder: Path,
        wanted: CompareOptions,
        options: SearchOptions,
        reporter: Reporter,
    ) -> None:
        from dapa_merge.meters import report_meter

        self.recipe = recipe
        self.name = name
        self.folder = folder
        self.wanted = wanted
        self.options = options
        self.reporter = reporter
        self.chosen = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
        self.plan = plan_of_all(recipe, self.chosen)
        prompts = load_prompts(recipe.prompts)
        self.searching, confirming = split_prompts(recipe) if recipe.layers is None else (prompts, prompts)
        self.meter = report_meter(recipe, confirming, options.evaluators)

    def run(self) -> Row:
        models = {"target": self.plan.target, "source": self.plan.source}
        if self.pretrained is not None:
            models["pretrained"] = self.pretrained
        parts = models_parts(self.recipe, models, self.meter, self.options.device, self.reporter)
        with closing(Journal(self.folder / JOURNAL_NAME, parts, kind="comparison", place="folder")) as journal:
            found = self._find(journal)
            with closing(Measuring(self.plan, self.meter, self.options.device, journal, self.reporter)) as measuring:
                self.measuring = measuring
                growth = self._growth(found, journal) if self.wanted.draws_curve else None
                source = self._source(growth)
                arms = [self._edit(TARGET, TARGET, ()), source, *self._arms(found), *self._blends()]
                curve = tuple(growth.points()) if growth else ()
        return self._row(arms, curve, found)

    @cached_property
    def pretrained(self) -> Checkpoint | None:
        """The model that both come from, if the recipe names it, and it is not the target itself."""
        if self.recipe.pretrained is None:
            return None
        found = open_location(self.recipe.pretrained, allow_pickle=self.options.allow_pickle)
        return None if found.folder.samefile(self.plan.target.folder) else found

    @property
    def _searches(self) -> bool:
        """Whether anything that is wanted needs what DAPA selects."""
        return self.wanted.draws_curve or bool({DAPA, AUTO, "mlp", "random"} & set(self.wanted.methods))

    def _find(self, journal: Journal) -> dict[str, Found]:
        def search(name: str, recipe: Recipe, plan: Plan) -> Found:
            return find(name, recipe, plan, self.folder, journal, self.options, self.reporter)

        if not self._searches:
            return {DAPA: Found(self.chosen)}
        found = {DAPA: search(DAPA, self.recipe, self.chosen)}
        if self.recipe.layers is not None:
            # It is measured with all prompts: none are left for a search that no figure rests on.
            return found
        if AUTO in self.wanted.methods and (auto := auto_of(self.recipe, self.chosen)) is not None:
            self.reporter.say("searching among gate, up and down projections")
            found[AUTO] = search(AUTO, *auto)
        elif set(self.recipe.modules) == set(AUTO_MODULES):
            found[AUTO] = found[DAPA]
        return found

    def _selected(self, found: Mapping[str, Found]) -> Found:
        """DAPA's own selection or, where it has none, that among all projections."""
        return next((one for one in found.values() if one.units is not None), found[DAPA])

    def _growth(self, found: Mapping[str, Found], journal: Journal) -> Growth:
        best = self._selected(found)
        stages = Stages.of(best.units or (), best.plan.units, self.plan.units)
        return Growth(stages, self.searching.harmful, self.measuring, journal, self.wanted, self.reporter)

    def _row(self, arms: Sequence[Arm], curve: tuple[Point, ...], found: Mapping[str, Found]) -> Row:
        recipe, best = self.recipe, self._selected(found)
        return Row(
            name=self.name,
            target=str(recipe.target),
            source=str(recipe.source),
            architecture=architecture_name(self.plan.target.config),
            modules=", ".join(recipe.modules),
            num_parameters=self.plan.target.num_parameters,
            prompts=recipe.prompts,
            retain=recipe.retain,
            max_over_refusal=recipe.max_over_refusal,
            max_perplexity=recipe.max_perplexity,
            arms=tuple(arms),
            curve=curve,
            selected=None if best.units is None else self.plan.share(best.units),
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
        seen = self.measuring.edit(units, key.replace(method, LABELS[method], 1))
        share = self.plan.share(units)
        return self._arm(key, method, LABELS[method], detail or spans(units), seen, share=share, **more)

    def _arms(self, found: Mapping[str, Found]) -> Iterator[Arm]:
        """The methods that transplant units."""
        methods, plan, best = self.wanted.methods, self.plan, self._selected(found)
        for key, one in found.items():
            if key not in methods:
                continue
            if one.units is None:
                yield Arm(key, key, LABELS[key], "nothing", why_not=one.why_not, cost=one.cost)
            else:
                yield self._edit(key, key, one.units, cost=one.cost)
        if "fixed" in methods:
            layers = fixed_layers(_model_type(plan.target.config), plan.units[-1].layer + 1)
            yield self._edit("fixed", "fixed", mlp_units(plan.units, layers), f"MLP of layers {layer_spans(layers)}")
        if "gates" in methods:
            gates = tuple(unit for unit in plan.units if unit.module == "gate")
            yield self._edit("gates", "gates", gates or self.chosen.units)
        if best.units is None:
            why = "there is no selection to go by"
            yield from (
                Arm(key, key, LABELS[key], "nothing", why_not=why) for key in ("mlp", "random") if key in methods
            )
            return
        if "mlp" in methods:
            layers = tuple(sorted({unit.layer for unit in best.units}))
            yield self._edit("mlp", "mlp", mlp_units(plan.units, layers), f"MLP of layers {layer_spans(layers)}")
        if "random" in methods:
            for number in range(self.wanted.seed, self.wanted.seed + self.wanted.num_seeds):
                units = random_units(best.plan, best.plan.units, best.units, number)
                yield self._edit(f"random seed {number}", "random", units)

    def _blends(self) -> Iterator[Arm]:
        """Mergekit's own methods."""
        for method, blend in blends_of(self.wanted, self.pretrained is not None):
            label = f"{blend.method.replace('_', ' ')} {blend.weight:g}"
            key = f"{method} {blend.weight:g}"
            try:
                seen = self.measuring.blend(blend, lambda: self._blender)
            except (UsageError, CheckpointError) as error:
                yield Arm(key, method, label, "nothing", why_not=str(error))
            else:
                yield self._arm(key, method, label, _blend_detail(blend), seen, share=1.0)

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


def _blend_detail(blend: Blend) -> str:
    density = f", density {blend.density:g}" if blend.density != 1 else ""
    return f"weight of the source {blend.weight:g}{density}"


def _model_type(config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    return str(config.get("model_type") or inner.get("model_type") or "")
