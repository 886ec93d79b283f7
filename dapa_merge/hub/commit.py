"""One commit, or one pull request, tried until it is certain whether it was made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dapa_merge.errors import HubError
from dapa_merge.hub import client
from dapa_merge.hub.client import Moved, api, fault, passes, status_of
from dapa_merge.hub.offer import Difference, LocalFile, copies, difference
from dapa_merge.hub.place import Head, Place, head_of
from dapa_merge.hub.published import open_requests
from dapa_merge.progress import Reporter


@dataclass(frozen=True)
class Parent:
    """The repository that most files came from, from which the Hub can copy them."""

    repository: str
    commit: str


@dataclass(frozen=True)
class Published:
    """What became of it.

    Attributes:
        url: Of the commit, or the pull request.
        commit: What the repository, or the pull request, has now.
        pull_request: The address of the pull request; None if there is none.
        changed: Whether anything had to be done.
        difference: What was changed.
        copied: Files that the Hub copied from the parent.
        tagged: Whether a tag was made.
    """

    url: str
    commit: str
    pull_request: str | None
    changed: bool
    difference: Difference
    copied: tuple[str, ...] = ()
    tagged: bool = False


@dataclass
class Commit:
    """One commit, tried until it is certain whether it was made."""

    files: Mapping[str, LocalFile]
    place: Place
    message: str
    parent: Parent | None
    reporter: Reporter
    revision: str
    head: Head
    change: Difference

    def run(self) -> Published:
        copied = self.copied()
        for wait in (*client.WAITS, None):
            try:
                return self.send(copied)
            except Exception as error:
                if copied and _is_of_copying(error):
                    self.reporter.say(f"the Hub copies no files of {self.parent_name} here; sending them")
                    copied = {}
                    continue
                if (made := self.made_after_all(error)) is not None:
                    return made
                if wait is None or not passes(error) or not _is_of_commit(error):
                    raise fault(f"publish to {self.place.repository}", error) from error
                time.sleep(wait)
        return self.send({})

    @property
    def parent_name(self) -> str:
        return self.parent.repository if self.parent else ""

    def copied(self) -> dict[str, str]:
        """The files that the Hub can copy from the parent, and their paths there."""
        from huggingface_hub import CommitOperationCopy

        can_copy = "src_repo_id" in CommitOperationCopy.__dataclass_fields__
        if self.parent is None or not can_copy or self.parent.repository == self.place.repository:
            return {}
        try:
            there = head_of(self.parent.repository, self.parent.commit).files
        except HubError as error:
            self.reporter.say(f"sending every file: {error}")
            return {}
        return copies(self.files, self.change.written, there)

    def send(self, copied: Mapping[str, str]) -> Published:
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        # They note what became of them, and can be used once.
        operations: list[Any] = [CommitOperationDelete(name) for name in self.change.deleted]
        for name in self.change.written:
            if name in copied and self.parent is not None:
                origin = {"src_repo_id": self.parent.repository, "src_repo_type": "model"}
                operations.append(CommitOperationCopy(copied[name], name, src_revision=self.parent.commit, **origin))
            else:
                operations.append(CommitOperationAdd(name, str(self.files[name].path)))
        made = api().create_commit(
            self.place.repository,
            operations,
            commit_message=self.message,
            revision=self.place.branch,
            create_pr=self.place.create_pr,
            parent_commit=self.head.commit,
        )
        pull_request = str(made.pr_url) if self.place.create_pr else None
        url = pull_request or str(made.commit_url)
        return Published(url, str(made.oid), pull_request, True, self.change, tuple(copied))

    def made_after_all(self, error: Exception) -> Published | None:
        """What the commit made, if only its answer was lost, or somebody made the very same one."""
        if not _is_of_commit(error) or not (passes(error) or status_of(error) == 412):
            return None
        if self.place.create_pr:
            made = waiting(self.place, self.files)
            return None if made is None else replace(made, changed=True, difference=self.change)
        now = head_of(self.place.repository, self.revision)
        if difference(self.files, now.files):
            if now.commit != self.head.commit:
                raise Moved(
                    f"{self.place.repository} moved from {self.head.commit[:12]} to {now.commit[:12]} meanwhile; "
                    f"nothing was changed; look at it, and run the command again"
                ) from error
            return None
        return Published(commit_url(self.place, now), now.commit, None, True, self.change)


def _address(error: Exception) -> str:
    asked = getattr(error, "response", None)
    try:
        request = asked.request if asked is not None else getattr(error, "request", None)
    except RuntimeError:  # So the HTTP library says that there is none.
        return ""
    return str(getattr(request, "url", ""))


def _is_of_commit(error: Exception) -> bool:
    """Whether it was the commit itself that failed; what goes before it, huggingface_hub tried again already."""
    return "/commit/" in _address(error)


def _is_of_copying(error: Exception) -> bool:
    from huggingface_hub.errors import FileDuplicationError

    return isinstance(error, FileDuplicationError) or "/lfs-files/duplicate" in _address(error)


def waiting(place: Place, files: Mapping[str, LocalFile]) -> Published | None:
    """An open pull request that offers exactly this."""
    for request in open_requests(place.repository):
        head = head_of(place.repository, request.git_reference)
        change = difference(files, head.files)
        if not change:
            return Published(request.url, head.commit, request.url, False, change)
    return None


def commit_url(place: Place, head: Head) -> str:
    """The page of a commit."""
    return f"{api().endpoint}/{place.repository}/commit/{head.commit}"
