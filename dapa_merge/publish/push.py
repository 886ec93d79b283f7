"""Publishes a result: verified, with its card, in one commit, and compared with the Hub's checksums afterwards.

The comparison uses the checksums that are known already; huggingface_hub's `verify_repo_checksums` would read every
weight again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from dapa_merge import __version__
from dapa_merge.checkpoint.location import Location, is_path
from dapa_merge.errors import CheckpointError, HubError, UsageError
from dapa_merge.files import replace_file
from dapa_merge.hub_client import api, ask, check_id, find, require_token
from dapa_merge.plan.selection import RECIPE_NAME
from dapa_merge.progress import LOG, task
from dapa_merge.publish.card import CardFacts
from dapa_merge.publish.card_file import CardFile, read_card, render_card
from dapa_merge.publish.commit import (
    MAIN,
    CopySource,
    Difference,
    Head,
    Job,
    LocalFile,
    Published,
    check_destination,
    commit,
    commit_url,
    files_of,
    head_of,
    needed_changes,
    of_content,
    refuse_other_model,
    waiting,
)
from dapa_merge.publish.lock import base_and_adapter
from dapa_merge.publish.options import CardOptions, Destination, inherited
from dapa_merge.publish.write_card import card_facts, existing_card, parents_of, require_result, settle_facts
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.tables import change_lines
from dapa_merge.transplant.manifest import CARD_NAME, MANIFEST_NAME, PRIVATE, read_manifest
from dapa_merge.verify.result import Check, verify_result


def check_push(destination: Destination, card: CardOptions, recipe: Recipe | None = None) -> None:
    """Say now what would prevent a push, rather than after hours of work for it.

    Args:
        destination: Where to publish.
        card: What the user says about the card.
        recipe: The recipe that will be run, if its result does not exist yet.

    Raises:
        UsageError: If options do not fit, or the licenses of the recipe's models differ.
        HubError: If there is no token, or it may not write there, the repository holds another model, or the Hub does
            not answer.
    """
    check_id(destination.repository)
    require_token()
    check_destination(destination)
    if recipe is not None and card.license is None:
        inherited([(parent.name, parent.license) for parent in parents_of(recipe, card)])


def push(out: Path, destination: Destination, card: CardOptions, *, is_verified: bool = False) -> Published:
    """Verify a result, write its card unless somebody else wrote one, and publish it.

    Args:
        out: The result's folder.
        destination: Where to publish.
        card: What the user says about the card, but for its title.
        is_verified: Whether every byte was compared with target and source just now.

    Raises:
        UsageError: If it is not a result, options do not fit, or the licenses of its models differ.
        CheckpointError: If it is not what its recipe and its manifest say; nothing is published.
        HubError: If the Hub refuses, or does not answer; the repository has all of it or nothing.
    """
    recipe = load_recipe(require_result(out))
    check_push(destination, card)
    before = existing_card(out)
    card = settle_facts(replace(card, title=destination.repository), before)
    check: Check | None = None
    if not is_verified:
        check = verify_result(out, None, target=card.target, source=card.source)
        if check.faults:
            raise CheckpointError(f"{out} is not published, since it is wrong: {check.faults[0]}")
    facts: CardFacts | None = None
    if before.is_anothers:
        LOG.info(f"{out / CARD_NAME} was not written by dapa-merge, and is published as it is")
    else:
        facts = card_facts(out, card, check)
        text = render_card(facts, before, card.to_said()).encode()
        if text != before.text.encode():
            replace_file(out / CARD_NAME, text)
    for note in _notes(out, recipe):
        LOG.info(note)
    manifest = read_manifest(out) if (out / MANIFEST_NAME).is_file() else None
    known = {name: file.sha256 for name, file in manifest.files.items()} if manifest else {}
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name not in known)
    with task("reading what is published", total, "bytes"):
        files = files_of(out, known)
    if facts is not None:
        files[CARD_NAME] = _joined_card(facts, read_card(text.decode()), card, destination, files[CARD_NAME])
    message = destination.message or _message(recipe, facts)
    description = "\n".join(_description(facts)) if facts else ""
    return publish(files, destination, message, _copy_source(recipe), description=description)


def _joined_card(
    facts: CardFacts, ours: CardFile, card: CardOptions, destination: Destination, file: LocalFile
) -> LocalFile:
    """The card with the text that somebody wrote on the Hub, unless there is such text here."""
    there = _card_there(destination)
    if not (there.is_ours or there.is_anothers) or (ours.above + ours.below).strip():
        return file
    kept = replace(there, metadata={**there.metadata, **ours.metadata})
    return of_content(file.path, render_card(facts, kept, card.to_said()).encode())


def _card_there(destination: Destination) -> CardFile:
    info = find(destination.repository, destination.branch) if destination.branch in (None, MAIN) else None
    if info is None or CARD_NAME not in {file.rfilename for file in info.siblings or ()}:
        return CardFile()
    path = _download(destination.repository, CARD_NAME, str(info.sha))
    try:
        return read_card(path.read_bytes().decode())
    except UnicodeDecodeError:
        raise HubError(f"the card of {destination.repository} is not UTF-8; mend it there first") from None


def _download(repository: str, name: str, commit: str) -> Path:
    what = f"get {name} of {repository}"
    return Path(ask(what, lambda: hf_hub_download(repository, name, revision=commit)))


def _message(recipe: Recipe, facts: CardFacts | None) -> str:
    what = f": {spans(facts.units)} of {_name(recipe.source)}" if facts else ""
    return f"{_name(recipe.target)} repaired by dapa-merge {__version__}{what}"[:200]


def _description(facts: CardFacts) -> Iterator[str]:
    """The lines that a reader of the commit, or of the pull request, wants to see first."""
    for parent in facts.parents:
        yield f"- {parent.role}: {parent.public_name or parent.name}"
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
    models = [part.path for location in (recipe.target, recipe.source) for part in base_and_adapter(location)]
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


def publish(
    files: Mapping[str, LocalFile],
    destination: Destination,
    message: str,
    source: CopySource | None,
    *,
    description: str = "",
) -> Published:
    """Make a repository hold these files, in one commit or one pull request, and check that it does.

    Args:
        files: The files to publish, by their paths in the repository.
        destination: Where to publish.
        message: Of the commit.
        source: Where the Hub may copy files from, instead of their being sent.
        description: Further lines of the commit's message.

    Raises:
        Moved: If somebody else committed meanwhile.
        CheckpointError: If a file changes meanwhile; nothing is published.
        HubError: If the Hub refuses, does not answer, or has other bytes afterwards; the repository is as it was, or
            has all of it.
    """
    repository, branch = destination.repository, destination.branch
    if not check_destination(destination):
        LOG.info(f"making {repository}")
        # None leaves it to an organization's own rule.
        make: dict[str, Any] = {"private": destination.private or None, "exist_ok": True}
        ask(f"make the repository {repository}", lambda: api().create_repo(repository, **make))
    if branch and branch != MAIN:
        what = f"make the branch {branch} of {repository}"
        ask(what, lambda: api().create_branch(repository, branch=branch, exist_ok=True))
    info = find(repository, branch)
    if info is None:
        raise HubError(f"{repository} was removed meanwhile; run the command again")
    refuse_other_model(destination, info)
    head = head_of(repository, str(info.sha))
    change = needed_changes(files, head.files, _listed(repository, head))
    _check_tag(destination, head, change)
    if not change:
        unchanged = Published(commit_url(destination, head), head.commit, None, False, change)
        return _finished(destination, files, unchanged)
    if destination.create_pr and (request := waiting(destination, files)) is not None:
        return request
    if change.deleted:
        LOG.info(f"deleting files that are not part of this model: {', '.join(change.deleted)}")
    made = commit(Job(files, destination, message, description, head, change, source))
    return _finished(destination, files, made)


def _listed(repository: str, head: Head) -> Collection[str]:
    """The files of the model that dapa-merge published before in a repository, as its manifest lists them."""
    if MANIFEST_NAME not in head.files:
        return ()
    path = _download(repository, MANIFEST_NAME, head.commit)
    try:
        return frozenset(read_manifest(path.parent).files)
    except CheckpointError:
        # Whatever it is, nothing is known of the other files there.
        return ()


def _check_tag(destination: Destination, head: Head, change: Difference) -> None:
    """Refuse a tag that another commit has already, before anything is sent."""
    there = None if destination.tag is None else _tagged_commit(destination)
    if there is not None and (change or there != head.commit):
        tag = f"a tag {destination.tag} already, of commit {there[:12]}"
        raise UsageError(f"{destination.repository} has {tag}; name another")


def _tagged_commit(destination: Destination) -> str | None:
    refs = ask(f"list the tags of {destination.repository}", lambda: api().list_repo_refs(destination.repository))
    return next((str(tag.target_commit) for tag in refs.tags if tag.name == destination.tag), None)


def _finished(destination: Destination, files: Mapping[str, LocalFile], made: Published) -> Published:
    """Compare the Hub's checksums, and tag the commit."""
    repository, tag = destination.repository, destination.tag
    if made.changed:
        wrong = needed_changes(files, head_of(repository, made.commit).files)
        if wrong:
            names = ", ".join([*wrong.written, *wrong.deleted][:4])
            raise HubError(
                f"{repository} has other content at {made.commit[:12]} than {names} here, and readers see it; run the "
                f"command again"
            )
    if tag is None or _tagged_commit(destination) == made.commit:
        return made
    how: dict[str, Any] = {"tag": tag, "revision": made.commit, "exist_ok": True}
    ask(f"tag {repository} as {tag}", lambda: api().create_tag(repository, **how))
    if (there := _tagged_commit(destination)) != made.commit:
        raise HubError(f"{repository} got a tag {tag} of {there} meanwhile; the model itself is published")
    return replace(made, tag=tag)
