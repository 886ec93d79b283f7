"""Publishing a folder in one commit: a reader sees the old model or the new one, never half of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dapa_merge.errors import HubError, UsageError
from dapa_merge.hub.client import api, ask
from dapa_merge.hub.commit import Commit, Parent, Published, commit_url, waiting
from dapa_merge.hub.offer import Difference, LocalFile, difference
from dapa_merge.hub.place import MAIN, Head, Place, check_place, head_of
from dapa_merge.progress import Reporter


def publish(
    files: Mapping[str, LocalFile], place: Place, message: str, parent: Parent | None, reporter: Reporter
) -> Published:
    """Make a repository hold these files, in one commit or one pull request, and make sure that it does.

    Args:
        files: What to publish, by the paths in the repository.
        place: Where.
        message: Of the commit.
        parent: What the Hub may copy files from, instead of their being sent.
        reporter: Hears of the steps.

    Raises:
        Moved: If somebody else committed meanwhile.
        HubError: If the Hub says no, does not answer, or has other bytes afterwards; the repository is as it was, or
            has all of it.
    """
    if check_place(place) is None:
        reporter.say(f"making {place.repository}")
        make = {"private": place.private, "exist_ok": True}
        ask(f"make the repository {place.repository}", lambda: api().create_repo(place.repository, **make))
    if place.branch and place.branch != MAIN:
        _make_branch(place)
    revision = place.branch or MAIN
    head = head_of(place.repository, revision)
    change = difference(files, head.files)
    _check_tag(place, head, change)
    if not change:
        return _finished(place, files, Published(commit_url(place, head), head.commit, None, False, change))
    if place.create_pr and (offered := waiting(place, files)) is not None:
        return offered
    made = Commit(files, place, message, parent, reporter, revision, head, change).run()
    return _finished(place, files, made)


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
            raise HubError(f"{place.repository} has other content at {made.commit[:12]} than was sent: {names}")
    if place.tag is None or _tagged_commit(place) == made.commit:
        return made
    tag = {"tag": place.tag, "revision": made.commit, "exist_ok": True}
    ask(f"tag {place.repository} as {place.tag}", lambda: api().create_tag(place.repository, **tag))
    return replace(made, tagged=True)
