"""Publishing a result: verified, with its card, in one commit, and checked afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dapa_merge import __version__
from dapa_merge.card_flow import CardOptions, card_facts, existing_card, parents_of, require_result, settle
from dapa_merge.checkpoint.writing.manifest import CARD_NAME, PRIVATE, read_manifest
from dapa_merge.checkpoint.writing.manifest import FILE_NAME as MANIFEST_NAME
from dapa_merge.errors import CheckpointError, HubError
from dapa_merge.hub.card_facts import CardFacts
from dapa_merge.hub.card_file import CardFile, read_card, render_card
from dapa_merge.hub.client import ask, find, require_token
from dapa_merge.hub.commit import CopySource, Published
from dapa_merge.hub.licence import inherited
from dapa_merge.hub.offer import LocalFile, files_of, of_content
from dapa_merge.hub.place import Place, check_place
from dapa_merge.hub.publish import publish
from dapa_merge.hub.upstream import parts
from dapa_merge.new_file import replace_file
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Location, Recipe
from dapa_merge.recipe_file import load_recipe
from dapa_merge.report import change_lines, spans
from dapa_merge.run import RECIPE_NAME
from dapa_merge.shown_paths import is_path
from dapa_merge.verify_flow import Check, verify_result


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
        HubError: If there is no token, or it may not write there, the repository holds another model, or the Hub does
            not answer.
    """
    require_token()
    check_place(options.place)
    if recipe is not None and options.card.licence is None:
        inherited([(parent.name, parent.licence) for parent in parents_of(recipe, options.card)])


def push(out: Path, options: PushOptions, reporter: Reporter) -> Published:
    """Verify a result, write its card unless it has one of somebody else's, and publish it.

    Raises:
        UsageError: If it is no result, options do not fit, or the licences of its models differ.
        CheckpointError: If it is not what its recipe and its manifest say; nothing is published.
        HubError: If the Hub says no, or does not answer; the repository has all of it or nothing.
    """
    recipe = load_recipe(require_result(out))
    check_push(options)
    before = existing_card(out)
    card = settle(options.card, before)
    check: Check | None = None
    if not options.is_proved:
        check = verify_result(out, None, reporter, target=card.target, source=card.source)
        if check.faults:
            raise CheckpointError(f"{out} is not published, since it is wrong: {check.faults[0]}")
    facts: CardFacts | None = None
    if before.is_anothers:
        reporter.say(f"{out / CARD_NAME} was not written by dapa-merge, and is published as it is")
    else:
        facts = card_facts(out, reporter, card, check)
        text = render_card(facts, before, card.to_said()).encode()
        if text != before.text.encode():
            replace_file(out / CARD_NAME, text)
    for note in _notes(out, recipe):
        reporter.say(note)
    manifest = read_manifest(out) if (out / MANIFEST_NAME).is_file() else None
    known = {name: file.sha256 for name, file in manifest.files.items()} if manifest else {}
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name not in known)
    with reporter.task("reading what is published", total) as read:
        files = files_of(out, known, read)
    if facts is not None:
        files[CARD_NAME] = _joined_card(facts, read_card(text.decode()), card, options.place, files[CARD_NAME])
    message = options.message or _message(recipe, facts)
    description = "\n".join(_description(facts)) if facts else ""
    return publish(files, options.place, message, _copy_source(recipe), reporter, description=description)


def _joined_card(facts: CardFacts, ours: CardFile, card: CardOptions, place: Place, file: LocalFile) -> LocalFile:
    """The card with what somebody wrote on the Hub, unless there is something of the kind here."""
    there = _card_there(place)
    if not (there.is_ours or there.is_anothers) or (ours.above + ours.below).strip():
        return file
    kept = replace(there, metadata={**there.metadata, **ours.metadata})
    return of_content(file.path, render_card(facts, kept, card.to_said()).encode())


def _card_there(place: Place) -> CardFile:
    from huggingface_hub import hf_hub_download

    info = find(place.repository, place.branch) if place.branch in (None, "main") else None
    if info is None or CARD_NAME not in {file.rfilename for file in info.siblings or ()}:
        return CardFile()
    what = f"get the card of {place.repository}"
    path = ask(what, lambda: hf_hub_download(place.repository, CARD_NAME, revision=str(info.sha)))
    try:
        return read_card(Path(path).read_bytes().decode())
    except UnicodeDecodeError:
        raise HubError(f"the card of {place.repository} is not UTF-8; mend it there first") from None


def _message(recipe: Recipe, facts: CardFacts | None) -> str:
    what = f": {spans(facts.units)} of {_name(recipe.source)}" if facts else ""
    return f"{_name(recipe.target)} repaired by dapa-merge {__version__}{what}"[:200]


def _description(facts: CardFacts) -> Iterator[str]:
    """What a reader of the commit, or of the pull request, wants to know first."""
    for parent in facts.parents:
        yield f"- {parent.role}: {parent.place or parent.name}"
    yield f"- transplanted: {spans(facts.units)}, {100 * facts.share_changed:.2f} % of the parameters"
    if facts.report is None or facts.report.after is None:
        yield "- not measured"
    else:
        yield from (f"- {label}: {fact}" for label, fact in change_lines(facts.report))


def _name(location: Location) -> str:
    return Path(location.path).name if os.path.isdir(location.path) else location.path


def _notes(out: Path, recipe: Recipe) -> Iterator[str]:
    """What a user may not expect to be published, or not to be."""
    for name in PRIVATE:
        if (out / name).is_file():
            yield f"{name} stays here: it holds harmful answers"
    models = [part.path for place in (recipe.target, recipe.source) for part in parts(place)]
    local = [path for path in models if os.path.isdir(path) or is_path(path)]
    texts = (recipe.prompts, recipe.text or "", recipe.skills or "")
    local += [one.strip() for text in texts for one in text.split(",") if one.strip() and is_path(one)]
    if local:
        yield f"note: {RECIPE_NAME} and the other files of the result tell readers of {', '.join(local)}"


def _copy_source(recipe: Recipe) -> CopySource | None:
    """The repository that most of the files came from: the target's, if it is on the Hub."""
    target = recipe.target
    if target.adapter is not None or os.path.isdir(target.path) or target.revision is None:
        return None
    return CopySource(target.path, target.revision) if re.fullmatch(r"[0-9a-f]{40}", target.revision) else None


def published_json(published: Published) -> dict[str, Any]:
    """Plain data for a program."""
    return {
        "url": published.url,
        "commit": published.commit,
        "pull_request": published.pull_request,
        "changed": published.changed,
        "tag": published.tag,
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
        number, sent = len(change.written), len(change.written) - len(published.copied)
        copied = f", {len(published.copied)} copied on the Hub from the target" if published.copied else ""
        files = f"published {number} file{'' if number == 1 else 's'}"
        yield f"{files} ({sent} sent{copied}); the Hub has the same checksums"
        if change.kept:
            yield f"left as they are: {', '.join(change.kept)}"
    if published.tag:
        yield f"tagged {published.tag}"
    yield published.url
