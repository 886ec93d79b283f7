"""Publishing a result: verified, with its card, in one commit, and checked afterwards.

Publishing a folder in one commit: a reader sees the old model or the new one, never half of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dapa_merge import __version__
from dapa_merge.checkpoint.location import Location, is_path
from dapa_merge.errors import CheckpointError, HubError, UsageError
from dapa_merge.files import replace_file
from dapa_merge.hub_client import api, ask, find, require_token
from dapa_merge.plan.selection import RECIPE_NAME
from dapa_merge.progress import LOG, task
from dapa_merge.publish.card import CardFacts
from dapa_merge.publish.card_file import CardFile, read_card, render_card
from dapa_merge.publish.commit import (
    MAIN,
    CopySource,
    Destination,
    Difference,
    Head,
    Job,
    LocalFile,
    Published,
    check_place,
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
from dapa_merge.publish.parents import inherited
from dapa_merge.publish.write_card import (
    CardOptions,
    card_facts,
    existing_card,
    parents_of,
    require_result,
    settle_facts,
)
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.tables import change_lines
from dapa_merge.transplant.manifest import CARD_NAME, MANIFEST_NAME, PRIVATE, read_manifest
from dapa_merge.verify.result import Check, verify_result


@dataclass(frozen=True)
class PushOptions:
    """How a result is published.

    Attributes:
        place: Where.
        card: What the user says about its card.
        message: Of the commit; None for one that says what it is.
        is_proved: Whether every byte was compared with target and source just now.
    """

    place: Destination
    card: CardOptions = field(default_factory=CardOptions)
    message: str | None = None
    is_proved: bool = False


def check_push(options: PushOptions, recipe: Recipe | None = None) -> None:
    """Say now what would be in the way of a push, rather than after hours of work for it.

    Args:
        options: How it will be published.
        recipe: What will be followed, if its result is not there yet.

    Raises:
        UsageError: If options do not fit, or the licenses of the recipe's models differ.
        HubError: If there is no token, or it may not write there, the repository holds another model, or the Hub does
            not answer.
    """
    require_token()
    check_place(options.place)
    if recipe is not None and options.card.license is None:
        inherited([(parent.name, parent.license) for parent in parents_of(recipe, options.card)])


def push(out: Path, options: PushOptions) -> Published:
    """Verify a result, write its card unless it has one of somebody else's, and publish it.

    Raises:
        UsageError: If it is no result, options do not fit, or the licenses of its models differ.
        CheckpointError: If it is not what its recipe and its manifest say; nothing is published.
        HubError: If the Hub says no, or does not answer; the repository has all of it or nothing.
    """
    recipe = load_recipe(require_result(out))
    check_push(options)
    before = existing_card(out)
    card = settle_facts(options.card, before)
    check: Check | None = None
    if not options.is_proved:
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
        files[CARD_NAME] = _joined_card(facts, read_card(text.decode()), card, options.place, files[CARD_NAME])
    message = options.message or _message(recipe, facts)
    description = "\n".join(_description(facts)) if facts else ""
    return publish(files, options.place, message, _copy_source(recipe), description=description)


def _joined_card(facts: CardFacts, ours: CardFile, card: CardOptions, place: Destination, file: LocalFile) -> LocalFile:
    """The card with what somebody wrote on the Hub, unless there is something of the kind here."""
    there = _card_there(place)
    if not (there.is_ours or there.is_anothers) or (ours.above + ours.below).strip():
        return file
    kept = replace(there, metadata={**there.metadata, **ours.metadata})
    return of_content(file.path, render_card(facts, kept, card.to_said()).encode())


def _card_there(place: Destination) -> CardFile:
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
    models = [part.path for place in (recipe.target, recipe.source) for part in base_and_adapter(place)]
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


def publish(
    files: Mapping[str, LocalFile],
    place: Destination,
    message: str,
    source: CopySource | None,
    *,
    description: str = "",
) -> Published:
    """Make a repository hold these files, in one commit or one pull request, and make sure that it does.

    Args:
        files: What to publish, by the paths in the repository.
        place: Where.
        message: Of the commit.
        source: Where the Hub may copy files from, instead of their being sent.
        description: Further lines of the commit's message.

    Raises:
        Moved: If somebody else committed meanwhile.
        CheckpointError: If a file changes meanwhile; nothing is published.
        HubError: If the Hub says no, does not answer, or has other bytes afterwards; the repository is as it was, or
            has all of it.
    """
    if not check_place(place):
        LOG.info(f"making {place.repository}")
        # Without a word about it, an organization's own rule holds.
        make = {"private": place.private or None, "exist_ok": True}
        ask(f"make the repository {place.repository}", lambda: api().create_repo(place.repository, **make))
    if place.branch and place.branch != MAIN:
        _make_branch(place)
    info = find(place.repository, place.branch)
    if info is None:
        raise HubError(f"{place.repository} was removed meanwhile; run the command again")
    refuse_other_model(place, info)
    head = head_of(place.repository, str(info.sha))
    change = needed_changes(files, head.files, _listed(place.repository, head))
    _check_tag(place, head, change)
    if not change:
        return _finished(place, files, Published(commit_url(place, head), head.commit, None, False, change))
    if place.create_pr and (offered := waiting(place, files)) is not None:
        return offered
    if change.deleted:
        LOG.info(f"deleting what is no part of this model: {', '.join(change.deleted)}")
    made = commit(Job(files, place, message, description, head, change, source))
    return _finished(place, files, made)


def _listed(repository: str, head: Head) -> Collection[str]:
    """The files of the model that dapa-merge published before in a repository, as its manifest lists them."""
    from huggingface_hub import hf_hub_download

    if MANIFEST_NAME not in head.files:
        return ()
    what = f"get {MANIFEST_NAME} of {repository}"
    path = ask(what, lambda: hf_hub_download(repository, MANIFEST_NAME, revision=head.commit))
    try:
        return frozenset(read_manifest(Path(path).parent).files)
    except CheckpointError:
        # Whatever it is; then nothing is known of what else lies there.
        return ()


def _make_branch(place: Destination) -> None:
    what = f"make the branch {place.branch} of {place.repository}"
    ask(what, lambda: api().create_branch(place.repository, branch=place.branch, exist_ok=True))


def _check_tag(place: Destination, head: Head, change: Difference) -> None:
    """Refuse a tag that another commit has than the one that it is for, before anything is sent."""
    there = None if place.tag is None else _tagged_commit(place)
    if there is not None and (change or there != head.commit):
        raise UsageError(f"{place.repository} has a tag {place.tag} already, of commit {there[:12]}; name another")


def _tagged_commit(place: Destination) -> str | None:
    refs = ask(f"list the tags of {place.repository}", lambda: api().list_repo_refs(place.repository))
    return next((str(tag.target_commit) for tag in refs.tags if tag.name == place.tag), None)


def _finished(place: Destination, files: Mapping[str, LocalFile], made: Published) -> Published:
    """Look at what the Hub has now, and tag it."""
    if made.changed:
        wrong = needed_changes(files, head_of(place.repository, made.commit).files)
        if wrong:
            names = ", ".join([*wrong.written, *wrong.deleted][:4])
            raise HubError(
                f"{place.repository} has other content at {made.commit[:12]} than {names} here, and readers see it; "
                f"run the command again"
            )
    if place.tag is None or _tagged_commit(place) == made.commit:
        return made
    tag = {"tag": place.tag, "revision": made.commit, "exist_ok": True}
    ask(f"tag {place.repository} as {place.tag}", lambda: api().create_tag(place.repository, **tag))
    if (there := _tagged_commit(place)) != made.commit:
        raise HubError(f"{place.repository} got a tag {place.tag} of {there} meanwhile; the model itself is published")
    return replace(made, tag=place.tag)
