"""Publishes a verified result with its card and a commit message that describes it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dapa_merge import __version__
from dapa_merge.checkpoint.folder import read_regular
from dapa_merge.checkpoint.location import Location
from dapa_merge.errors import CheckpointError, HubError, markdown_code, printable
from dapa_merge.files import replace_file
from dapa_merge.hub_client import check_id, download, find, require_token
from dapa_merge.imports import Shown
from dapa_merge.progress import LOG, task
from dapa_merge.publish.card import CardFacts
from dapa_merge.publish.card_file import CardFile, read_card, render_card
from dapa_merge.publish.commit import (
    MAIN,
    LocalFile,
    Published,
    check_repository,
    files_of,
    of_content,
    publish,
    publishable,
)
from dapa_merge.publish.options import CardOptions, Destination, inherited
from dapa_merge.publish.parents import MAX_CARD_BYTES
from dapa_merge.publish.public import paths_in_headers, private_models, public_files
from dapa_merge.publish.write_card import card_facts, existing_card, parents_of, require_result, settle_facts
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.sentences import meaning_lines
from dapa_merge.report.tables import change_lines, moved_text
from dapa_merge.transplant.manifest import (
    CARD_NAME,
    MANIFEST_NAME,
    PRIVATE,
    files_in,
    is_for_other_programs,
    read_manifest,
)
from dapa_merge.verify.result import Check, verify_result


def check_push(destination: Destination, card: CardOptions, recipe: Recipe | None = None) -> None:
    """Raise now any error that would prevent a push, rather than after hours of work.

    Args:
        destination: Where to publish.
        card: The user's statements about the card.
        recipe: The recipe that will be run; None if its result exists.

    Raises:
        UsageError: If options contradict each other, or the licenses of the recipe's models differ.
        HubError: If the token is missing or may not write there, the repository holds another model, or the Hub does
            not answer.
    """
    check_id(destination.repository)
    require_token()
    check_repository(destination)
    if recipe is not None and card.license is None:
        inherited([(parent.name, parent.license) for parent in parents_of(recipe, card)])


@dataclass(frozen=True)
class Publication(Shown):
    """All that publishing a result would send.

    Attributes:
        files: By their paths in the repository.
        message: The first line of the commit message, or the title of the pull request.
        description: Its further lines.
        rewritten: Those files that are sent without the paths of this machine that the result's own have.
        source: The repository, at a commit, that the Hub may copy files from.
        card: What the card says; None if others wrote it.
        said: The user's statements about it.
    """

    files: Mapping[str, LocalFile] = field(repr=False)
    message: str
    description: str
    rewritten: tuple[str, ...]
    source: Location | None
    card: CardFacts | None = field(repr=False)
    said: CardOptions = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a program."""
        return {
            "files": {name: file.num_bytes for name, file in self.files.items()},
            "rewritten": list(self.rewritten),
            "message": self.message,
            "description": self.description,
        }

    def lines(self, destination: Destination) -> Iterator[str]:
        """The files with their sizes, and the commit, as text."""
        what = "a pull request" if destination.create_pr else "one commit"
        size = sum(file.num_bytes for file in self.files.values())
        yield f"{destination.repository} would get {len(self.files)} files of {size:,} bytes in {what}:"
        for name, file in sorted(self.files.items()):
            without = ", without this machine's paths" if name in self.rewritten else ""
            yield f"{file.num_bytes:>18,}  {name}{without}"
        if self.card is not None:
            yield f"its licence: {self.card.license or 'unknown, since no card states one; --license ID says it'}"
        yield f"its message: {self.message}"
        yield from self.description.splitlines()
        yield "nothing was sent, and no token was read; what the repository has already was not compared"


def push(out: Path, destination: Destination, card: CardOptions, *, is_verified: bool = False) -> Published:
    """Verify a result, write its card unless others wrote one, and publish it.

    Args:
        out: The result's folder.
        destination: Where to publish.
        card: The user's statements about the card; its title is the repository's id.
        is_verified: Whether every byte was compared with target and source just now.

    Raises:
        UsageError: If it is not a result, options contradict each other, or the licenses of its models differ.
        CheckpointError: If it does not match its recipe and manifest; nothing is published.
        HubError: If the Hub refuses, or does not answer; the repository has all of it or nothing.
    """
    # A folder that cannot be published is told before a token that is missing.
    require_result(out)
    publishable(out)
    check_push(destination, card)
    ready = prepare(out, destination, card, is_verified=is_verified)
    files = dict(ready.files)
    if ready.card is not None:
        text = files[CARD_NAME].content
        assert text is not None
        if text != existing_card(out).text.encode():
            replace_file(out / CARD_NAME, text)
        files[CARD_NAME] = _joined_card(ready.card, read_card(text.decode()), ready.said, destination, files[CARD_NAME])
    return publish(files, destination, ready.message, ready.source, description=ready.description)


def prepare(out: Path, destination: Destination, card: CardOptions, *, is_verified: bool = False) -> Publication:
    """Verify a result and put together what `push` would send; writes and sends nothing, and needs no token.

    Raises:
        UsageError: As `push` does.
        CheckpointError: As `push` does.
    """
    recipe = load_recipe(require_result(out))
    publishable(out)
    check_id(destination.repository)
    before = existing_card(out)
    card = settle_facts(replace(card, title=destination.repository), before)
    check: Check | None = None
    if not is_verified:
        check = verify_result(out, None, target=card.target, source=card.source)
        if check.faults:
            raise CheckpointError(f"{out} was not published, because it is wrong: {check.faults[0]}")
    facts: CardFacts | None = None
    if before.is_anothers:
        LOG.info(f"{out / CARD_NAME} was not written by dapa-merge; it is published unchanged")
    else:
        facts = card_facts(out, card, check)
    for note in _notes(out):
        LOG.info(note)
    manifest = read_manifest(out) if (out / MANIFEST_NAME).is_file() else None
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    with task("reading the files to publish", total, "bytes"):
        files = files_of(out, manifest)
    parents = parents_of(recipe, card) if facts is None else facts.parents
    public = public_files(out, recipe, parents)
    files |= {name: of_content(out / name, content) for name, content in public.items()}
    if facts is not None:
        files[CARD_NAME] = of_content(out / CARD_NAME, render_card(facts, before, card.to_said()).encode())
    if private := private_models(recipe, parents):
        LOG.info(
            f"published as {' and '.join(private)}, which nobody else has: name where they are published with --target "
            f"and --source, so that others can verify and repeat it"
        )
    message = destination.message or _message(recipe, facts)
    description = "\n".join(_description(facts)) if facts else ""
    return Publication(files, message, description, tuple(public), _copy_source(recipe), facts, card)


def _joined_card(
    facts: CardFacts, ours: CardFile, card: CardOptions, destination: Destination, file: LocalFile
) -> LocalFile:
    """The card with the text that users wrote on the Hub, unless the local card has such text."""
    there = _card_there(destination)
    if not (there.is_ours or there.is_anothers) or (ours.above + ours.below).strip():
        return file
    kept = replace(there, metadata={**there.metadata, **ours.metadata})
    return of_content(file.path, render_card(facts, kept, card.to_said()).encode())


def _card_there(destination: Destination) -> CardFile:
    info = find(destination.repository, destination.branch) if destination.branch in (None, MAIN) else None
    if info is None or CARD_NAME not in {file.rfilename for file in info.siblings or ()}:
        return CardFile()
    path = download(destination.repository, CARD_NAME, str(info.sha))
    try:
        return read_card(read_regular(path, MAX_CARD_BYTES).decode())
    except OSError as error:
        raise HubError(f"cannot read the card of {destination.repository}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise HubError(f"the card of {destination.repository} is not UTF-8; correct it there first") from None


def _message(recipe: Recipe, facts: CardFacts | None) -> str:
    what = f": {spans(facts.units)} of {_name(recipe.source)}" if facts else ""
    return printable(f"{_name(recipe.target)} repaired by dapa-merge {__version__}{what}")[:200]


def _description(facts: CardFacts) -> Iterator[str]:
    """Yields the lines of the commit's or pull request's description."""
    for parent in facts.parents:
        yield f"- {parent.role}: {markdown_code(parent.public_name or parent.name)}"
    share = f"{100 * facts.share_changed:.2f} % of the parameters{moved_text(facts.report)}"
    yield f"- {facts.edit.done}: {spans(facts.units)}, {share}"
    if facts.report is None or facts.report.after is None:
        yield "- not measured"
    else:
        lines = [*change_lines(facts.report), *meaning_lines(facts.report)]
        yield from (f"- {label}: {fact}" if label else f"- {fact}" for label, fact in lines)


def _name(location: Location) -> str:
    return Path(location.path).name if os.path.isdir(location.path) else location.path


def _notes(out: Path) -> Iterator[str]:
    """Yields notes about files that are published, or left out, perhaps unexpectedly."""
    for name in PRIVATE:
        if (out / name).is_file():
            yield f"{name} stays here: it holds harmful answers"
    for name in filter(is_for_other_programs, files_in(out)):
        yield f"{name} stays here: nothing compared it with the repaired weights"
    for name, path in paths_in_headers(out):
        yield f"{name} is published with the target's header, which names {path}; save the target anew without it"


def _copy_source(recipe: Recipe) -> Location | None:
    """The repository that most of the files came from: the target's, if it is on the Hub."""
    target = recipe.target
    is_copyable = target.adapter is None and re.fullmatch(r"[0-9a-f]{40}", target.revision or "")
    return target if is_copyable and not os.path.isdir(target.path) else None
