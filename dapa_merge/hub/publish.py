"""Publishing a folder in one commit: a reader sees the old model or the new one, never half of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from dapa_merge.checkpoint.writing.manifest import FILE_NAME as MANIFEST_NAME
from dapa_merge.checkpoint.writing.manifest import read_manifest
from dapa_merge.errors import CheckpointError, HubError, UsageError
from dapa_merge.hub.client import api, ask, find
from dapa_merge.hub.commit import CopySource, Job, Published, commit, commit_url, waiting
from dapa_merge.hub.offer import Difference, LocalFile, difference
from dapa_merge.hub.place import MAIN, Head, Place, check_place, head_of, refuse_other_model
from dapa_merge.progress import Reporter


def publish(
    files: Mapping[str, LocalFile],
    place: Place,
    message: str,
    source: CopySource | None,
    reporter: Reporter,
    *,
    description: str = "",
) -> Published:
    """Make a repository hold these files, in one commit or one pull request, and make sure that it does.

    Args:
        files: What to publish, by the paths in the repository.
        place: Where.
        message: Of the commit.
        source: Where the Hub may copy files from, instead of their being sent.
        reporter: Hears of the steps.
        description: Further lines of the commit's message.

    Raises:
        Moved: If somebody else committed meanwhile.
        CheckpointError: If a file changes meanwhile; nothing is published.
        HubError: If the Hub says no, does not answer, or has other bytes afterwards; the repository is as it was, or
            has all of it.
    """
    if not check_place(place):
        reporter.say(f"making {place.repository}")
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
    change = difference(files, head.files, _listed(place.repository, head))
    _check_tag(place, head, change)
    if not change:
        return _finished(place, files, Published(commit_url(place, head), head.commit, None, False, change))
    if place.create_pr and (offered := waiting(place, files)) is not None:
        return offered
    if change.deleted:
        reporter.say(f"deleting what is no part of this model: {', '.join(change.deleted)}")
    made = commit(Job(files, place, message, description, head, change, source), reporter)
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


def _make_branch(place: Place) -> None:
    what = f"make the branch {place.branch} of {place.repository}"
    ask(what, lambda: api().create_branch(place.repository, branch=place.branch, exist_ok=True))


def _check_tag(place: Place, head: Head, change: Difference) -> None:
    """Refuse a tag that another commit has than the one that it is for, before anything is sent."""
    there = None if place.tag is None else _tagged_commit(place)
    if there is not None and (change or there != head.commit):
        raise UsageError(f"{place.repository} has a tag {place.tag} already, of commit {there[:12]}; name another")


def _tagged_commit(place: Place) -> str | None:
    refs = ask(f"list the tags of {place.repository}", lambda: api().list_repo_refs(place.repository))
    return next((str(tag.target_commit) for tag in refs.tags if tag.name == place.tag), None)


def _finished(place: Place, files: Mapping[str, LocalFile], made: Published) -> Published:
    """Look at what the Hub has now, and tag it."""
    if made.changed:
        wrong = difference(files, head_of(place.repository, made.commit).files)
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
