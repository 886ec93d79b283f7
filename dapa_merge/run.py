"""The flow: recipe, plan, search, transplant, verify, report. `mergekit-yaml` and `dapa-merge` share it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapa_merge import __version__
from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.plan import Plan, join
from dapa_merge.checkpoint.transplant import transplant
from dapa_merge.checkpoint.writing.destination import check_destination
from dapa_merge.checkpoint.writing.manifest import PRIVATE
from dapa_merge.errors import RecipeError, UsageError, one_line
from dapa_merge.evaluate.options import EvaluatorOptions
from dapa_merge.hub.lock import FILE_NAME as LOCK_NAME
from dapa_merge.hub.lock import Lock, check_lock, lock_text
from dapa_merge.progress import Reporter
from dapa_merge.recipe import DEFAULTS, METHOD, Recipe, parse_location
from dapa_merge.report import FILE_NAME as REPORT_NAME
from dapa_merge.report import Report, layer_spans, readable_certificate
from dapa_merge.search_options import SearchOptions
from dapa_merge.selection import fetch_units, given_selection, locked_selection, make_plan, open_location, pinned

if TYPE_CHECKING:
    from dapa_merge.evaluate.figures import Response
    from dapa_merge.evidence import Evidence, Measured

(RESPONSES_NAME,) = PRIVATE
# mergekit's name for the recipe in its output; ours has the layers that were found.
RECIPE_NAME = "mergekit_config.yml"


def repair(
    recipe: Recipe,
    out: Path,
    *,
    evaluate: bool = True,
    link: bool = False,
    manifest: bool = True,
    lock: Lock | None = None,
    is_locked: bool = False,
    options: SearchOptions | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Repair the target and write the result to `out`, with a report and the recipe that replays it.

    Args:
        recipe: What to repair, with what.
        out: The folder to make; it must not exist, or be empty.
        evaluate: Measure target, result and source, with prompts that the search has not seen; with all prompts if the
            recipe names its layers. Without it the recipe must name them.
        link: Hard-link the weight files that do not change rather than copy them.
        manifest: Write `dapa.json` into the result, with the SHA-256 of everything.
        lock: What the models are, for the result.
        is_locked: Transplant what the lock says, rather than search; it is measured with the prompts that a search
            would not have asked.
        options: Where to evaluate, how many at once, and where to keep the journal.
        reporter: Hears of the steps.

    Raises:
        CannotRepair: If the source makes nothing better; nothing is written.
        DapaError: For whatever else does not fit; nothing is written.
    """
    start = time.monotonic()
    reporter = reporter or Reporter()
    options = options or SearchOptions()
    # An evaluation loads the whole source too.
    plan = make_plan(recipe, partial=not evaluate, allow_pickle=options.allow_pickle)
    if lock is not None:
        check_lock(lock, plan)
    # Now rather than after hours of search.
    check_destination(out, plan.target, 0 if link else None)
    selection = locked_selection(recipe, plan, lock) if lock and is_locked else given_selection(recipe, plan)
    if selection is None and not evaluate:
        raise RecipeError(f"{recipe.where('parameters.layers')}: without an evaluation, layers must be named, not auto")
    evidence: Evidence | None = None
    if evaluate:
        # A mere transplant starts without it, in half the time.
        from dapa_merge.evidence import gather_evidence

        evidence = gather_evidence(recipe, plan, selection, options, reporter)
        selection = evidence.selection
    assert selection is not None
    report = replace(_report(recipe, plan, selection, evidence), seconds=time.monotonic() - start)
    responses = evidence.responses if evidence else {}
    pictures = _pictures(plan, report, evidence, reporter) if evidence else {}
    extras: dict[str, str | bytes] = {**pictures}
    if lock is not None:
        extras[LOCK_NAME] = lock_text(lock.with_units(report.units))
    write(recipe, plan, selection, out, report, reporter, responses, extras, link=link, manifest=manifest)
    return report


def _pictures(plan: Plan, report: Report, evidence: Evidence, reporter: Reporter) -> dict[str, bytes]:
    """What the search did, and before and after, as pictures by their file names; none without matplotlib."""
    try:
        from dapa_merge.trace.plot_style import render
        from dapa_merge.trace_figures import report_figure, search_figure

        figures = {"dapa_figures": report_figure(report)}
        if evidence.search is not None:
            figures["dapa_search"] = search_figure(evidence.search, plan, plan.units)
        return {
            f"{name}.{kind}": render(figure, kind)
            for name, figure in figures.items()
            if figure is not None
            for kind in ("png", "svg")
        }
    except Exception as error:
        # Whatever a picture fails of, it must not cost the model.
        reporter.say(f"no pictures beside the model: {error if isinstance(error, UsageError) else one_line(error)}")
        return {}


def _report(recipe: Recipe, plan: Plan, selection: Sequence[Unit], evidence: Evidence | None) -> Report:
    """What was chosen, why, and what it does; the time is not in it yet."""
    search = evidence.search if evidence else None
    return Report(
        version=__version__,
        target=str(recipe.target),
        source=str(recipe.source),
        prompts=recipe.prompts,
        evaluator=recipe.evaluator,
        units=tuple(map(str, selection)),
        layers=tuple(sorted({unit.layer for unit in selection})),
        num_candidates=search.num_candidates if search else len(plan.units),
        parameters_changed=plan.num_parameters(selection),
        share_changed=plan.share(selection),
        before=evidence.before if evidence else None,
        after=evidence.after if evidence else None,
        source_alone=evidence.source_alone if evidence else None,
        dsr_change=evidence.dsr_change if evidence else None,
        over_refusal_change=evidence.over_refusal_change if evidence else None,
        searched=evidence.searched if evidence else None,
        requirement=asdict(search.requirement) if search else None,
        tests=search.minimum.tests if search else 0,
        tests_recorded=search.num_recorded if search else 0,
        tests_unneeded=search.num_unneeded if search else 0,
        share_of_prompts_saved=search.share_saved if search else 0.0,
        prior={str(unit): score for unit, score in search.prior.items()} if search and search.prior else None,
        one_minimal=search.minimum.one_minimal if search else None,
        certificate=readable_certificate(search.minimum) if search else {},
        num_tensors=len(plan.target.tensors),
        seconds=0.0,
    )


def write(
    recipe: Recipe,
    plan: Plan,
    selection: Sequence[Unit],
    out: Path,
    report: Report,
    reporter: Reporter,
    responses: Mapping[str, Sequence[Response]],
    extras: Mapping[str, str | bytes],
    *,
    link: bool = False,
    manifest: bool = True,
) -> None:
    """Transplant on disk, prove the result, and only then let it appear."""
    fetch_units(plan, selection, reporter)
    added: dict[str, str | bytes] = {
        **extras,
        REPORT_NAME: json.dumps(report.to_json(), indent=2) + "\n",
        RECIPE_NAME: replay_text(recipe, plan, selection),
    }
    if responses:
        added[RESPONSES_NAME] = responses_text(responses)
    with reporter.task("copying and verifying", plan.target.num_bytes) as done:
        rounding = transplant(plan, selection, out, extras=added, link=link, manifest=manifest, progress=done)
    if rounding.overflowed:
        reporter.say(f"{rounding.overflowed} values overflowed, and are the largest that the target's dtype holds")
    if rounding.subnormal:
        reporter.say(f"{rounding.subnormal} values lost digits: they are too small for the target's dtype")
    what = "the target's or the source's" if plan.strength == 1 else "the target's or the blend"
    reporter.say(f"wrote {out}: every one of its {len(plan.target.tensors)} tensors is {what}")


def responses_text(responses: Mapping[str, Sequence[Response]]) -> str:
    """Every prompt, response and verdict as JSON lines, by the names of the models."""
    lines = [
        json.dumps({"model": model} | asdict(response), ensure_ascii=False)
        for model, said in responses.items()
        for response in said
    ]
    return "".join(line + "\n" for line in lines)


def evaluate_model(
    model: str,
    prompts: str,
    device: str,
    reporter: Reporter,
    options: EvaluatorOptions,
    *,
    allow_pickle: bool = False,
    **settings: Any,
) -> Measured:
    """All figures of one model: a folder or a Hub id, as `id@revision` if need be.

    Args:
        model: Where it is.
        prompts: Name of the prompt set.
        device: Where to evaluate.
        reporter: Hears of the steps.
        options: Where evaluators of the user's own are, and which judge to ask.
        allow_pickle: Read weights that there are as pickles only, as nothing but tensors.
        settings: Further arguments of `make_meter`.

    Raises:
        DapaError: If it cannot be read, loaded or asked.
    """
    from dapa_merge.evaluate.prompts import load_prompts

    prompt_set = load_prompts(prompts)
    try:
        checkpoint = open_location(parse_location(model), allow_pickle=allow_pickle)
    except ValueError:
        raise UsageError(f"{model!r} is no model; write a folder, a Hub id or id@revision") from None
    from dapa_merge.evidence import measure_checkpoint
    from dapa_merge.meters import make_meter

    return measure_checkpoint(checkpoint, make_meter(prompt_set, options, **settings), device, "model", reporter)


# Parameters that a recipe with named layers has no use for, or names anew; and what only a comparison asks for.
SEARCH_ONLY = ("layers", "modules", "granularity", "search", "prefer", "max_tests", "pretrained")


def replay_text(recipe: Recipe, plan: Plan, selection: Sequence[Unit]) -> str:
    """A recipe that transplants exactly this selection, without a search, by either entrance.

    What came from the Hub is pinned to its commit; folders and files are named by their absolute paths.
    """
    units = join(plan, selection)
    by_layer = len(recipe.modules) == 1 and all(unit.rows is None for unit in units)
    layers = layer_spans([unit.layer for unit in units]) if by_layer else ",".join(map(str, units))
    parameters: dict[str, Any] = {"layers": layers}
    if by_layer:
        parameters["modules"] = recipe.modules[0]
    parameters |= {
        name: getattr(recipe, name)
        for name, default in DEFAULTS.items()
        if name not in SEARCH_ONLY and getattr(recipe, name) != default
    }
    if "prompts" in parameters:
        from dapa_merge.evaluate.prompt_sources import pinned as pinned_prompts

        parameters["prompts"] = pinned_prompts(recipe.prompts)
    if recipe.text is not None and os.path.exists(recipe.text):
        parameters["text"] = os.path.abspath(recipe.text)
    if recipe.skills is not None:
        from dapa_merge.evaluate.skills import absolute

        parameters["skills"] = absolute(recipe.skills)
    content: dict[str, Any] = {"merge_method": METHOD, "base_model": str(pinned(recipe.target, plan.target))}
    content["models"] = [{"model": str(pinned(recipe.source, plan.source))}]
    if recipe.dtype:
        content["dtype"] = recipe.dtype
    if recipe.keeps_tokenizer:
        content["tokenizer"] = {"source": "base"}
    content["parameters"] = parameters
    return str(yaml.safe_dump(content, sort_keys=False))
