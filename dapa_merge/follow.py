"""A recipe file, followed to its end: locked, repaired, given a card, and published."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.errors import DapaError
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.report import Report
from dapa_merge.run import repair

if TYPE_CHECKING:
    from dapa_merge.card_flow import CardOptions
    from dapa_merge.hub.commit import Published
    from dapa_merge.hub.lock import Lock
    from dapa_merge.push_flow import PushOptions


@dataclass(frozen=True)
class FollowOptions:
    """How a recipe file is followed.

    Attributes:
        keeps_lock: Write a lock beside the recipe, and into the result.
        is_locked: Use exactly what the lock beside the recipe says.
        card: What the user says about the card.
        push: Where to publish the result; None for nowhere.
    """

    keeps_lock: bool = True
    is_locked: bool = False
    card: CardOptions | None = None
    push: PushOptions | None = None


def follow(
    recipe: Recipe, path: Path, out: Path, how: FollowOptions, reporter: Reporter, **settings: Any
) -> tuple[Report, Published | None]:
    """Follow a recipe.

    Args:
        recipe: What the file says.
        path: The file.
        out: The folder to make.
        how: How.
        reporter: Hears of the steps.
        settings: Further arguments of `repair`.

    Returns:
        The report, and what became of the push, if there is one.

    Raises:
        DapaError: Of whatever does not fit; if the push fails, the result is there all the same.
    """
    lock: Lock | None = None
    if how.is_locked:
        from dapa_merge.lock_flow import follow_lock

        recipe, lock = follow_lock(recipe, path, reporter)
    if how.push is not None:
        from dapa_merge.push_flow import check_push

        check_push(how.push, recipe)
    if how.keeps_lock and lock is None:
        lock = _lock(recipe, reporter)
    report = repair(recipe, out, lock=lock, is_locked=how.is_locked, reporter=reporter, **settings)
    if lock is not None and not how.is_locked:
        from dapa_merge.lock_flow import keep_lock

        keep_lock(lock.with_units(report.units), path, reporter)
    if how.push is None:
        _describe(out, how, reporter)
        return report, None
    return report, _publish(out, how.push, reporter)


def _lock(recipe: Recipe, reporter: Reporter) -> Lock | None:
    from dapa_merge.lock_flow import make_lock

    try:
        return make_lock(recipe, reporter)
    except DapaError as error:
        # A repair from the caches needs no Hub; a model that cannot be read is told better where it is read.
        reporter.say(f"not locked: {error}")
        return None


def _describe(out: Path, how: FollowOptions, reporter: Reporter) -> None:
    """Give the result its card; where that cannot be, it is a result all the same."""
    from dapa_merge.card_flow import write_card

    try:
        write_card(out, reporter, how.card)
    except DapaError as error:
        reporter.say(f"no card yet: {error}; `dapa-merge card {out}` writes it")


def _command(out: Path, options: PushOptions) -> str:
    """The command that publishes a result as it was meant to be."""
    place, licence = options.place, options.card.licence
    flags = {"--private": place.private, "--create-pr": place.create_pr, "--replace": place.replaces}
    values = {"--revision": place.branch, "--tag": place.tag, "--message": options.message}
    values |= {f"--{key.replace('_', '-')}": value for key, value in (licence.to_metadata() if licence else {}).items()}
    given = [flag for flag, is_set in flags.items() if is_set]
    given += [word for option, value in values.items() if value is not None for word in (option, value)]
    return shlex.join(["dapa-merge", "push", str(out), place.repository, *given])


def _publish(out: Path, options: PushOptions, reporter: Reporter) -> Published:
    from dapa_merge.push_flow import push

    try:
        return push(out, replace(options, is_proved=True), reporter)
    except BaseException:
        reporter.say(f"{out} is complete; publish it with: {_command(out, options)}")
        raise
