"""The flow, top to bottom: lock, plan, search and measure, transplant and verify, describe and publish."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge import __version__
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import DapaError, RecipeError, UsageError, one_line
from dapa_merge.imports import lasting
from dapa_merge.measure.figures import Response, responses_text
from dapa_merge.measure.prompts.parts import check_prompts
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.plan.plan import Plan, reduced
from dapa_merge.plan.selection import (
    RECIPE_NAME,
    changing_selection,
    confirm_units,
    fetch_units,
    given_selection,
    shift_of,
)
from dapa_merge.progress import LOG, task
from dapa_merge.publish import lock as locks
from dapa_merge.publish.commit import Published
from dapa_merge.publish.options import CardOptions, Destination
from dapa_merge.publish.push import check_push, push
from dapa_merge.publish.write_card import parents_of, write_card
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report import charts
from dapa_merge.report.drawing import draw_all
from dapa_merge.report.replay import replay_text
from dapa_merge.report.report import REPORT_NAME, Report
from dapa_merge.search.result import readable_certificate
from dapa_merge.transplant.manifest import PAGE_NAME, RESPONSES_NAME, TEMPLATE_NAME
from dapa_merge.transplant.result import check_absent, check_destination, transplant

if TYPE_CHECKING:
    from dapa_merge.report.evidence import Evidence

# The fields of a report that evidence fills.
MEASURED = ("before", "after", "source_alone", "dsr_change", "over_refusal_change", "searched", "beside_source")


def run_recipe(
    recipe: Recipe,
    path: Path | None,
    out: Path,
    *,
    keeps_lock: bool = True,
    is_locked: bool = False,
    card: CardOptions | None = None,
    destination: Destination | None = None,
    **settings: Any,
) -> tuple[Report, Published | None]:
    """Run all steps of a recipe: lock, repair, describe, publish.

    Args:
        recipe: The parsed recipe.
        path: Its file; None, without a lock, if it has none.
        out: The output folder.
        keeps_lock: Write a lock next to the recipe and into the result.
        is_locked: Use exactly what the lock next to the recipe records.
        card: The user's options for the card.
        destination: Where to publish the result; None for nowhere.
        settings: Further arguments of `repair`.

    Returns:
        The report, and the outcome of the push, if any.

    Raises:
        DapaError: If a step fails; if only the push fails, the result is kept.
    """
    card = card or CardOptions()
    lock: locks.Lock | None = None
    keeps_lock = keeps_lock and path is not None and not is_locked
    if is_locked:
        assert path is not None
        recipe, lock = locks.locked_recipe(recipe, path)
    if destination is not None:
        check_push(destination, card, recipe)
    elif card.target or card.source:
        # A model that is not there is told before hours of work.
        parents_of(recipe, card)
    # The title that `push` gives it, so that `push` does not write the card again.
    titled = replace(card, title=destination.repository) if destination else card
    report = repair(recipe, out, keeps_lock=keeps_lock, lock=lock, is_locked=is_locked, card=titled, **settings)
    if keeps_lock and path is not None and (written := locks.read_lock(out / locks.LOCK_NAME)) is not None:
        locks.write_lock(written, path)
    if destination is not None:
        return report, _publish(out, destination, card)
    return report, None


def repair(
    recipe: Recipe,
    out: Path,
    *,
    evaluate: bool = True,
    link: bool = False,
    manifest: bool = True,
    keeps_lock: bool = False,
    lock: locks.Lock | None = None,
    is_locked: bool = False,
    card: CardOptions | None = None,
    options: Options | None = None,
) -> Report:
    """Repair the target and write the result to `out`, with a report and the recipe that replays it.

    Steps are logged to `logging.getLogger("dapa_merge")` at level INFO; listen with a handler of your own, or
    `logging.basicConfig(level=logging.INFO)`.

    ```python
    report = dapa_merge.repair(dapa_merge.load_recipe(Path("recipe.yml")), Path("out"))
    print(report.after.dsr, report.units)
    ```

    Args:
        recipe: Target, source and parameters.
        out: The output folder, which must be absent or empty.
        evaluate: Measure target, result and source on held-out prompts, or on all prompts if the recipe names its
            layers. If false, the recipe must name them.
        link: Hard-link unchanged weight files instead of copying them.
        manifest: Write `dapa.json` into the result, with a digest of everything.
        keeps_lock: Lock the models as they are now, and write that into the result.
        lock: An earlier lock, which the models must match, to write into the result.
        is_locked: Transplant the units in the lock instead of searching; measures on the prompts that a search would
            hold out.
        card: The user's options for the card; None for no card.
        options: Device, journal, judge and other machine settings.

    Raises:
        CannotRepair: If the source does not improve the target; nothing is written.
        DapaError: If anything else fails; nothing is written.
    """
    start = time.monotonic()
    options = options or Options()
    # Before models are opened, which may take minutes of fetching.
    check_absent(out)
    # An evaluation also loads the whole source.
    ladder = make_ladder(recipe, partial=not evaluate, allow_pickle=options.allow_pickle)
    check_prompts(recipe)
    if lock is not None:
        locks.check_lock(lock, ladder.models)
        if is_locked:
            ladder = locks.locked_ladder(ladder, lock)
    given, plan = ladder.rungs[0]
    # Checked now rather than after hours of search.
    check_destination(out, plan.target, 0 if link else None)
    selection = locks.locked_selection(given, plan, lock) if lock and is_locked else given_selection(given, plan)
    # In seconds: before all of the models is read for a lock, and before torch is loaded.
    if selection is not None:
        selection = changing_selection(given, plan, selection)
    else:
        ladder = ladder.without_equal_units()
    if keeps_lock and (lock := _lock(recipe)) is not None:
        locks.check_lock(lock, ladder.models)
    recipe, plan = ladder.rungs[0]
    evidence: Evidence | None = None
    extras: dict[str, str | bytes] = {}
    if evaluate:
        # Imported here: a transplant alone does not need torch, and starts in half the time without it.
        with lasting():
            from dapa_merge.report.evidence import gather_evidence

        evidence = gather_evidence(ladder, selection, options)
        recipe, plan, selection = evidence.recipe, evidence.plan, evidence.selection
        extras[RESPONSES_NAME] = responses_text(evidence.responses)
    elif selection is None:
        raise RecipeError(f"{recipe.where('parameters.layers')}: without an evaluation, layers must be named, not auto")
    assert selection is not None
    plan = reduced(plan, selection)
    report = replace(_report(recipe, plan, selection, evidence), seconds=time.monotonic() - start)
    if evidence is not None:
        pictures = _pictures(charts.Run(report, plan, evidence.search))
        extras |= {**pictures, **_page(out, evidence.responses, report, pictures)}
    if lock is not None:
        extras[locks.LOCK_NAME] = locks.lock_text(lock.with_result(report))
    write(recipe, plan, selection, out, report, extras, link=link, manifest=manifest, card=card)
    return report


def write(
    recipe: Recipe,
    plan: Plan,
    selection: Sequence[Unit],
    out: Path,
    report: Report,
    extras: Mapping[str, str | bytes],
    *,
    link: bool = False,
    manifest: bool = True,
    card: CardOptions | None = None,
) -> None:
    """Transplant on disk, verify the result and write its card; it appears in `out` only afterwards."""
    fetch_units(plan, selection)
    confirm_units(plan, selection)
    template = {TEMPLATE_NAME: plan.target.chat_template} if plan.target.chat_template else {}
    added: dict[str, str | bytes] = {
        **extras,
        **template,
        **plan.edit.files(),
        REPORT_NAME: json.dumps(report.to_json(), indent=2) + "\n",
        RECIPE_NAME: replay_text(recipe, plan, selection),
    }
    with task("copying and verifying", plan.target.num_bytes, "bytes"):
        rounding = transplant(
            plan, selection, out, extras=added, link=link, manifest=manifest, finish=partial(_describe, out, card)
        )
    if rounding.overflowed:
        LOG.info(f"{rounding.overflowed} values overflowed and became the largest value of the target's dtype")
    if rounding.subnormal:
        LOG.info(f"{rounding.subnormal} values lost digits: they are too small for the target's dtype")
    num_tensors = len(plan.target.tensors)
    LOG.info(f"wrote {out}: each of its {num_tensors} tensors is the target's or {plan.edit.result}")


def _report(recipe: Recipe, plan: Plan, selection: Sequence[Unit], evidence: Evidence | None) -> Report:
    """The report of a run, without its time."""
    search = evidence.search if evidence else None
    counts, shift = plan.edit.counts(), shift_of(plan, selection)
    return Report(
        version=__version__,
        target=str(recipe.target),
        source=str(recipe.source),
        prompts=recipe.prompts,
        keep=recipe.keep,
        system=recipe.system,
        chat_template=TEMPLATE_NAME if recipe.template_file is not None else recipe.chat_template,
        evaluator=recipe.evaluator,
        units=tuple(map(str, selection)),
        layers=tuple(sorted({unit.layer for unit in selection})),
        num_candidates=search.num_candidates if search else len(plan.units),
        parameters_changed=shift.number,
        share_changed=shift.number / plan.target.num_parameters,
        size_of_change=shift.share,
        **{name: getattr(evidence, name, None) for name in MEASURED},
        requirement=search.requirement.to_json() if search else None,
        tests=search.minimum.tests if search else 0,
        tests_recorded=search.num_recorded if search else 0,
        tests_unneeded=search.num_unneeded if search else 0,
        share_of_prompts_saved=search.share_saved if search else 0.0,
        prior={str(unit): score for unit, score in search.prior.items()} if search and search.prior else None,
        one_minimal=search.minimum.one_minimal if search and not search.by_hand else None,
        certificate=readable_certificate(search.minimum) if search else {},
        num_tensors=len(plan.target.tensors),
        seconds=0.0,
        directions=counts.get("directions"),
        degrees_of_freedom=counts.get("degrees_of_freedom"),
        rungs=evidence.rungs if evidence else (),
        points=search.points if search else (),
        picked=search.picked if search else None,
        resumed=search is not None and search.measured is not None,
        arithmetic=evidence.arithmetic if evidence else None,
        held_out=evidence is not None and evidence.held_out,
        limits=evidence.limits if evidence else (),
        edit=plan.edit.name,
    )


def _pictures(run: charts.Run) -> dict[str, bytes]:
    """Draw the charts of a run, by file name; empty without matplotlib."""
    try:
        return {
            f"{picture.name}{ending}": content
            for picture in draw_all(charts.CHARTS, run)
            for ending, content in picture.files.items()
        }
    except Exception as error:
        # A chart that fails must not cost the model.
        LOG.info(f"no pictures next to the model: {error if isinstance(error, UsageError) else one_line(error)}")
        return {}


def _page(
    out: Path, responses: Mapping[str, Sequence[Response]], report: Report, pictures: Mapping[str, bytes]
) -> dict[str, str]:
    """The page of the responses, by file name; empty if it cannot be made."""
    try:
        # Imported here: it takes longer than a small transplant without an evaluation, which writes no page.
        from dapa_merge.report.page import page_text

        return {PAGE_NAME: page_text(out.resolve().name, responses, report, pictures)}
    except Exception as error:
        # Nor must a page.
        LOG.info(f"no page of the responses: {error if isinstance(error, UsageError) else one_line(error)}")
        return {}


def _lock(recipe: Recipe) -> locks.Lock | None:
    try:
        return locks.make_lock(recipe)
    except DapaError as error:
        # A repair from the caches does not need the Hub; reading an unreadable model gives a better message later.
        LOG.info(f"not locked: {error}")
        return None


def _describe(out: Path, card: CardOptions | None, made: Path) -> None:
    """Write the card of the result `out` into the folder in which it is made; a failure is only logged."""
    if card is None:
        return
    try:
        write_card(made, card)
    except Exception as error:
        why = error if isinstance(error, DapaError) else one_line(error)
        LOG.info(f"no card yet: {why}; `dapa-merge card {out}` writes it")


def _publish(out: Path, destination: Destination, card: CardOptions) -> Published:
    try:
        # With other models than the recipe's nothing was compared yet.
        return push(out, destination, card, is_verified=not (card.target or card.source))
    except BaseException:
        LOG.info(f"{out} is complete; publish it with: {_command(out, destination, card)}")
        raise


def _command(out: Path, destination: Destination, card: CardOptions) -> str:
    """Return the command that publishes a result with the same options."""
    license = card.license.to_metadata() if card.license else {}
    options = {
        "--private": destination.private,
        "--create-pr": destination.create_pr,
        "--replace": destination.replaces,
        "--revision": destination.branch,
        "--tag": destination.tag,
        "--message": destination.message,
        "--target": card.target,
        "--source": card.source,
    } | {f"--{key.replace('_', '-')}": value for key, value in license.items()}
    words = ["dapa-merge", "push", str(out), destination.repository]
    for option, value in options.items():
        if value:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)
