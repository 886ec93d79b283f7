"""Publishing a result: verified, with its card, in one commit, and checked afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapa_merge import __version__
from dapa_merge.card_flow import CardOptions, existing_card, is_made, write_card
from dapa_merge.checkpoint.writing.manifest import FILE_NAME as MANIFEST_NAME
from dapa_merge.checkpoint.writing.manifest import PRIVATE, read_manifest
from dapa_merge.errors import CheckpointError
from dapa_merge.hub.client import require_token
from dapa_merge.hub.commit import Parent, Published
from dapa_merge.hub.licence import Licence, inherited
from dapa_merge.hub.offer import files_of
from dapa_merge.hub.parent import describe_parent
from dapa_merge.hub.place import Place, check_place
from dapa_merge.hub.publish import publish
from dapa_merge.hub.upstream import parts
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Location, Recipe
from dapa_merge.recipe_file import load_recipe
from dapa_merge.report import spans
from dapa_merge.run import RECIPE_NAME
from dapa_merge.verify_flow import verify_result


@dataclass(frozen=True)
class PushOptions:
    """How a result is published.

    Attributes:
        place: Where.
        card: What the user says about its card.
        message: Of the commit; None for one that says what it is.
        is_proved: Whether every byte was compared with target and source just now.
    """

    place: Place
    card: CardOptions = field(default_factory=CardOptions)
    message: str | None = None
    is_proved: bool = False


def check_push(options: PushOptions, recipe: Recipe | None = None) -> None:
    """Say now what would be in the way of a push, rather than after hours of work for it.

    Args:
        options: How it will be published.
        recipe: What will be followed, if its result is not there yet.

    Raises:
        UsageError: If options do not fit, or the licences of the recipe's models differ.
        HubError: If there is no token, the repository holds another model, or the Hub does not answer.
    """
    require_token()
    check_place(options.place)
    if recipe is not None and options.card.licence is None:
        _licence_of(recipe, options.card)


def _licence_of(recipe: Recipe, card: CardOptions) -> Licence | None:
    locations = (("target", card.target or recipe.target), ("source", card.source or recipe.source))
    found = [describe_parent(role, part) for role, location in locations for part in parts(location)]
    return inherited([(parent.name, parent.licence) for parent in found])


def push(out: Path, options: PushOptions, reporter: Reporter) -> Published:
    """Verify a result, write its card unless it has one of somebody else's, and publish it.

    Raises:
        UsageError: If it is no result, options do not fit, or the licences of its models differ.
        CheckpointError: If it is not what its recipe and its manifest say; nothing is published.
        HubError: If the Hub says no, or does not answer; the repository has all of it or nothing.
    """
    check_push(options)
    if not options.is_proved:
        check = verify_result(out, None, reporter, target=options.card.target, source=options.card.source)
        if check.faults:
            raise CheckpointError(f"{out} is not published, since it is wrong: {check.faults[0]}")
    card = existing_card(out)
    if is_made(card):
        write_card(out, reporter, options.card)
    else:
        reporter.say(f"the card of {out} is somebody else's, and published as it is")
    recipe = load_recipe(out / RECIPE_NAME)
    for note in _notes(out, recipe):
        reporter.say(note)
    manifest = read_manifest(out) if (out / MANIFEST_NAME).is_file() else None
    known = {name: file.sha256 for name, file in manifest.files.items()} if manifest else {}
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    with reporter.task("reading what is published", total) as read:
        files = files_of(out, known, read)
    units = manifest.units if manifest else ()
    message = options.message or _message(recipe, units)
    return publish(files, options.place, message, _parent(recipe), reporter)


def _message(recipe: Recipe, units: tuple[str, ...]) -> str:
    what = f": {spans(units)} of {_name(recipe.source)}" if units else ""
    return f"{_name(recipe.target)} repaired by dapa-merge {__version__}{what}"[:200]


def _name(location: Location) -> str:
    return Path(location.path).name if os.path.isdir(location.path) else location.path


def _notes(out: Path, recipe: Recipe) -> Iterator[str]:
    """What a user may not expect to be published, or not to be."""
    for name in PRIVATE:
        if (out / name).is_file():
            yield f"{name} is not published: it holds harmful answers"
    if any(os.path.isabs(part.path) for place in (recipe.target, recipe.source) for part in parts(place)):
        yield (
            f"note: {RECIPE_NAME} and other files name folders of this machine, which readers will see; make the "
            f"result of models on the Hub if they should not"
        )


def _parent(recipe: Recipe) -> Parent | None:
    """The repository that most of the files came from: the target's, if it is on the Hub."""
    target = recipe.target
    if target.adapter is not None or os.path.isdir(target.path) or target.revision is None:
        return None
    return Parent(target.path, target.revision) if re.fullmatch(r"[0-9a-f]{40}", target.revision) else None


def published_json(published: Published) -> dict[str, Any]:
    """Plain data for a program."""
    return {
        "url": published.url,
        "commit": published.commit,
        "pull_request": published.pull_request,
        "changed": published.changed,
        "tagged": published.tagged,
        "written": list(published.difference.written),
        "copied": list(published.copied),
        "deleted": list(published.difference.deleted),
        "kept": list(published.difference.kept),
    }


def published_lines(published: Published) -> Iterator[str]:
    """What became of a push, for people."""
    change = published.difference
    if not published.changed:
        what = "a pull request offers exactly this already" if published.pull_request else "nothing to do: it is there"
        yield f"{what}, with every checksum the same"
    else:
        sent = len(change.written) - len(published.copied)
        copied = f", {len(published.copied)} copied on the Hub from the target" if published.copied else ""
        yield f"published {len(change.written)} files ({sent} sent{copied}); the Hub has the same checksums"
        if change.deleted:
            yield f"deleted, since they are no part of this model: {', '.join(change.deleted)}"
        if change.kept:
            yield f"left as they are: {', '.join(change.kept)}"
    if published.tagged:
        yield "tagged"
    yield published.url
