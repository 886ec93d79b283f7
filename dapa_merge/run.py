"""The flow: recipe, plan, search, transplant, verify, report. `mergekit-yaml` and `dapa-merge` share it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapa_merge import __version__
from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.files import DTYPE_BITS, FLOAT_NAMES, Checkpoint, open_checkpoint
from dapa_merge.checkpoint.plan import Plan, plan_transplant
from dapa_merge.checkpoint.transplant import check_destination, transplant
from dapa_merge.checkpoint.verify import Verification, prove, verify
from dapa_merge.errors import CannotRepair, CheckpointError, RecipeError
from dapa_merge.evaluate.prompts import load_prompts
from dapa_merge.progress import Reporter
from dapa_merge.recipe import DEFAULTS, METHOD, Location, Recipe, load_recipe, parse_location
from dapa_merge.report import FILE_NAME as REPORT_NAME
from dapa_merge.report import Report, layer_spans, spans
from dapa_merge.search.delta import Minimum, SearchInterrupted, minimize
from dapa_merge.search.oracle import Requirement, requirement

if TYPE_CHECKING:
    from dapa_merge.evaluate.live import LiveModel
    from dapa_merge.evaluate.measure import Figures, Meter

# mergekit's name for the recipe in its output; ours has the layers that were found.
RECIPE_NAME = "mergekit_config.yml"


@dataclass(frozen=True)
class Search:
    """A finished search: what it chose from and found, what had to be met, and the target's own figures."""

    plan: Plan
    minimum: Minimum[Unit]
    requirement: Requirement
    target: Figures
    seconds: float


def make_plan(recipe: Recipe) -> Plan:
    """Open both checkpoints, find their units and check the recipe against them. Loads no torch.

    Raises:
        DapaError: With the sentence for whatever does not fit.
    """
    target, source = _open(recipe.target), _open(recipe.source)
    plan = plan_transplant(target, source, recipe.modules)
    _check_dtype(recipe, target)
    given_selection(recipe, plan)
    return plan


def given_selection(recipe: Recipe, plan: Plan) -> tuple[Unit, ...] | None:
    """The units that a recipe names, in the plan's order; None if it wants a search.

    Raises:
        RecipeError: If it names a layer that the model does not have.
    """
    if recipe.layers is None:
        return None
    num_layers = plan.units[-1].layer + 1
    chosen: set[Unit] = set()
    for choice in recipe.layers:
        if choice.layer >= num_layers:
            raise RecipeError(
                f"{recipe.where('parameters.layers')}: layer {choice.layer} is outside the target, "
                f"which has layers 0 to {num_layers - 1}"
            )
        chosen |= {unit for unit in plan.units if unit.layer == choice.layer and choice.module in (None, unit.module)}
    return tuple(unit for unit in plan.units if unit in chosen)


def repair(
    recipe: Recipe,
    out: Path,
    *,
    evaluate: bool = True,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Report:
    """Repair the target and write the result to `out`, with a report and the recipe that replays it.

    Args:
        recipe: What to repair, with what.
        out: The folder to make; it must not exist, or be empty.
        evaluate: Measure target, result and source. Without it the recipe must name its layers.
        device: Where to evaluate; `auto` takes an accelerator if there is one.
        reporter: Hears of the steps.

    Raises:
        CannotRepair: If the source makes nothing better; nothing is written.
        DapaError: For whatever else does not fit; nothing is written.
    """
    start = time.monotonic()
    reporter = reporter or Reporter()
    plan = make_plan(recipe)
    # Now rather than after hours of search.
    check_destination(out, plan.target)
    selection = given_selection(recipe, plan)
    if selection is None and not evaluate:
        raise RecipeError(f"{recipe.where('parameters.layers')}: without an evaluation, layers must be named, not auto")
    search: Search | None = None
    before = after = source_alone = None
    if evaluate:
        meter = make_meter(recipe)
        # First, because a source that cannot even be loaded should not be noticed after the search.
        source_alone = measure_checkpoint(plan.source, meter, device, "source", reporter)
        with closing(load_live(plan, device, reporter)) as live:
            if selection is None:
                search = find_selection(recipe, plan, live, meter, reporter)
                selection = search.minimum.units
            before = search.target if search else measure_live(live, (), meter, "target", reporter)
            after = measure_live(live, selection, meter, "result", reporter)
    assert selection is not None
    report = Report(
        version=__version__,
        target=str(recipe.target),
        source=str(recipe.source),
        prompts=recipe.prompts,
        units=tuple(map(str, selection)),
        layers=tuple(sorted({unit.layer for unit in selection})),
        num_candidates=len(plan.units),
        parameters_changed=plan.num_parameters(selection),
        share_changed=plan.share(selection),
        before=before,
        after=after,
        source_alone=source_alone,
        requirement=asdict(search.requirement) if search else None,
        tests=search.minimum.tests if search else 0,
        one_minimal=search.minimum.one_minimal if search else None,
        certificate=readable_certificate(search.minimum) if search else {},
        num_tensors=len(plan.target.tensors),
        seconds=time.monotonic() - start,
    )
    write(recipe, plan, selection, out, report, reporter)
    return report


def write(recipe: Recipe, plan: Plan, selection: Sequence[Unit], out: Path, report: Report, reporter: Reporter) -> None:
    """Transplant on disk, prove the result, and only then let it appear."""
    size = sum(tensor.num_bytes for tensor in plan.target.tensors.values())

    texts = {
        REPORT_NAME: json.dumps(report.to_json(), indent=2) + "\n",
        RECIPE_NAME: replay_text(recipe, plan, selection),
    }
    # The source's bytes are written over copied ones, so that a little more is done than is promised here.
    with reporter.task("copying and verifying", 2 * size) as done:
        transplant(
            plan,
            selection,
            out,
            texts=texts,
            check=lambda folder: prove(folder, plan, selection, done),
            progress=done,
        )
    reporter.say(f"wrote {out}: every one of its {len(plan.target.tensors)} tensors is the target's or the source's")


def find_selection(recipe: Recipe, plan: Plan, live: LiveModel, meter: Meter, reporter: Reporter) -> Search:
    """Search for a 1-minimal selection that meets the recipe's requirement.

    Raises:
        CannotRepair: If the full transplant makes nothing better, or breaks a limit.
    """
    start = time.monotonic()
    target = measure_live(live, (), meter, "target", reporter)
    full = measure_live(live, plan.units, meter, "target with every unit of the source", reporter)
    _refuse_nan(target, f"the target {recipe.target}")
    _refuse_nan(full, f"the target with every unit of the source {recipe.source}")
    if full.dsr <= target.dsr:
        raise CannotRepair(
            f"the source {recipe.source} makes nothing better: with all {len(plan.units)} units "
            f"({', '.join(recipe.modules)}) transplanted the DSR is {full.dsr:.3f}, and without them {target.dsr:.3f}"
        )
    limits = requirement(
        target,
        full,
        retain=recipe.retain,
        max_over_refusal=recipe.max_over_refusal,
        max_perplexity=recipe.max_perplexity,
    )
    if complaint := limits.complaint(full):
        raise CannotRepair(f"the source {recipe.source} cannot repair this target: with every unit {complaint}")
    known = {frozenset(): target, frozenset(plan.units): full}

    def holds(selection: frozenset[Unit]) -> bool:
        if selection in known:
            return limits.holds(known[selection])
        ordered = [unit for unit in plan.units if unit in selection]
        name = spans(list(map(str, ordered)))
        with (
            live.transplanted(ordered) as candidate,
            reporter.task(f"testing {name}", len(meter.prompts.harmful)) as answered,
        ):
            measurement = replace(meter, progress=answered).measure(candidate, live.tokenizer)
            complaint = limits.complaint(measurement)
            verdict = "holds" if complaint is None else "fails"
            why = f": {complaint}" if complaint and measurement.dsr >= limits.min_dsr else ""
            reporter.say(f"  {verdict}  DSR {measurement.dsr:.3f}  {name}{why}")
        return complaint is None

    reporter.say(f"searching among {len(plan.units)} units for the few that keep a DSR of {limits.min_dsr:.3f}")
    try:
        minimum = minimize(plan.units, holds, algorithm=recipe.search)
    except SearchInterrupted as stop:
        reporter.say(f"the best selection so far: {spans(list(map(str, stop.best.units)))}")
        raise (stop.__cause__ or stop) from None
    reporter.say(f"found {spans(list(map(str, minimum.units)))} in {minimum.tests} tests")
    return Search(plan, minimum, limits, target, time.monotonic() - start)


def search_recipe(recipe: Recipe, device: str, reporter: Reporter) -> Search:
    """Plan, load the target, and search, whatever layers the recipe names.

    Raises:
        CannotRepair: If the source makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit.
    """
    plan = make_plan(recipe)
    meter = make_meter(recipe)
    with closing(load_live(plan, device, reporter)) as live:
        return find_selection(recipe, plan, live, meter, reporter)


def evaluate_model(
    model: str, prompts: str, max_new_tokens: int, batch_size: int, device: str, reporter: Reporter
) -> Figures:
    """All figures of one model: a folder or a Hub id, as `id@revision` if need be.

    Raises:
        DapaError: If it cannot be read, loaded or asked.
    """
    prompt_set = load_prompts(prompts)
    checkpoint = _open(parse_location(model))
    from dapa_merge.evaluate.generate import BatchSize
    from dapa_merge.evaluate.measure import Meter

    meter = Meter(prompt_set, max_new_tokens, BatchSize(batch_size))
    return measure_checkpoint(checkpoint, meter, device, "model", reporter)


def verify_result(out: Path, recipe_path: Path | None, reporter: Reporter) -> tuple[Verification, list[str]]:
    """Compare a result with its target and source; also one that `mergekit-yaml` wrote.

    Returns:
        What it is, and a sentence for each fault.

    Raises:
        DapaError: If the result, its recipe, the target or the source cannot be read.
    """
    if not out.is_dir():
        raise CheckpointError(f"{out} is no folder")
    recipe = load_recipe(recipe_path or out / RECIPE_NAME)
    plan = make_plan(recipe)
    size = sum(tensor.num_bytes for tensor in plan.target.tensors.values())
    with reporter.task("verifying", size) as verified:
        verification = verify(out, plan, verified)
    faults = [f"{name} {what}" for name, what in verification.differences]
    selection = given_selection(recipe, plan)
    if not faults and selection is not None and not verification.is_exactly(selection):
        faults.append(
            f"the recipe says {' '.join(map(str, selection))}, "
            f"but the result has {' '.join(map(str, verification.transplanted)) or 'nothing'} from the source"
        )
    return verification, faults


def load_live(plan: Plan, device: str, reporter: Reporter) -> LiveModel:
    """The target in memory, ready for transplants."""
    reporter.say(f"loading the target {plan.target.name}")
    from dapa_merge.evaluate.live import LiveModel, choose_device

    return LiveModel(plan, choose_device(device))


def make_meter(recipe: Recipe) -> Meter:
    """What measures every model of a recipe in the same way.

    Raises:
        UsageError: If the recipe's prompts cannot be read.
    """
    prompts = load_prompts(recipe.prompts)
    from dapa_merge.evaluate.generate import BatchSize
    from dapa_merge.evaluate.measure import Meter

    return Meter(prompts, recipe.max_new_tokens, BatchSize(recipe.batch_size))


def measure_live(live: LiveModel, selection: Sequence[Unit], meter: Meter, name: str, reporter: Reporter) -> Figures:
    """All figures of the target with a selection transplanted."""
    with live.transplanted(selection) as candidate:
        return _measured(candidate, live.tokenizer, meter, name, reporter)


def measure_checkpoint(checkpoint: Checkpoint, meter: Meter, device: str, name: str, reporter: Reporter) -> Figures:
    """All figures of a model that is loaded for it."""
    from dapa_merge.evaluate.live import choose_device, load_model

    reporter.say(f"loading the {name} {checkpoint.name}")
    model, tokenizer = load_model(checkpoint, choose_device(device))
    return _measured(model, tokenizer, meter, name, reporter)


def replay_text(recipe: Recipe, plan: Plan, selection: Sequence[Unit]) -> str:
    """A recipe that transplants exactly this selection, without a search, by either entrance.

    What came from the Hub is pinned to its commit; folders are named by their absolute paths.
    """
    by_layer = len(recipe.modules) == 1
    layers = layer_spans([unit.layer for unit in selection]) if by_layer else ",".join(map(str, selection))
    parameters: dict[str, Any] = {"layers": layers}
    if by_layer:
        parameters["modules"] = recipe.modules[0]
    parameters |= {
        name: getattr(recipe, name)
        for name, default in DEFAULTS.items()
        if name not in ("layers", "modules") and getattr(recipe, name) != default
    }
    content: dict[str, Any] = {"merge_method": METHOD, "base_model": _pinned(recipe.target, plan.target)}
    content["models"] = [{"model": _pinned(recipe.source, plan.source)}]
    if recipe.dtype:
        content["dtype"] = recipe.dtype
    if recipe.keeps_tokenizer:
        content["tokenizer"] = {"source": "base"}
    content["parameters"] = parameters
    return str(yaml.safe_dump(content, sort_keys=False))


def readable_certificate(minimum: Minimum[Unit]) -> dict[str, list[str]]:
    """For each kept unit, the selection without it, which did not hold."""
    return {str(unit): list(map(str, others)) for unit, others in minimum.certificate.items()}


def _refuse_nan(figures: Figures, name: str) -> None:
    """Raise `CheckpointError` if a model computes no numbers: its perplexity is infinite."""
    if figures.perplexity == math.inf:
        raise CheckpointError(f"{name} computes infinities or no numbers at all; its weights are damaged")


def _measured(model: Any, tokenizer: Any, meter: Meter, name: str, reporter: Reporter) -> Figures:
    prompts = meter.prompts
    total = len(prompts.harmful) + len(prompts.harmless) + len(prompts.skill)
    with reporter.task(f"measuring the {name}", total) as answered:
        figures = replace(meter, progress=answered).measure(model, tokenizer).figures()
    reporter.say(f"measured the {name}: DSR {figures.dsr:.3f}, over-refusal {figures.over_refusal:.3f}")
    return figures


def _pinned(location: Location, checkpoint: Checkpoint) -> str:
    # A relative path would mean another model in another folder, and at worst a stranger's repository on the Hub.
    return f"{location.path}@{checkpoint.commit}" if checkpoint.commit else str(checkpoint.folder.absolute())


def _open(location: Location) -> Checkpoint:
    return open_checkpoint(location.path, location.revision)


def _check_dtype(recipe: Recipe, target: Checkpoint) -> None:
    if recipe.dtype is None:
        return
    for tensor in target.tensors.values():
        if tensor.dtype != FLOAT_NAMES[recipe.dtype] and tensor.dtype[0] in "FB" and DTYPE_BITS[tensor.dtype] > 8:
            place = recipe.where("dtype", "out_dtype")
            raise RecipeError(
                f"{place} is {recipe.dtype}, but the target stores {tensor.name} as {tensor.dtype}; "
                f"the result keeps the target's dtypes, so leave it out"
            )
