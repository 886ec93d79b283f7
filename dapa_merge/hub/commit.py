"""One commit, or one pull request, tried until it is certain whether it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dapa_merge.errors import CheckpointError, HubError
from dapa_merge.hub.client import Moved, api, ask, passes, status_of
from dapa_merge.hub.offer import Difference, LocalFile, copies, difference
from dapa_merge.hub.place import MAIN, Head, Place, head_of
from dapa_merge.hub.published import open_requests
from dapa_merge.progress import Reporter


@dataclass(frozen=True)
class CopySource:
    """A repository that the Hub can copy files from."""

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
        copied: Files that the Hub copied.
        tag: The tag that was made; None if there was none to make.
    """

    url: str
    commit: str
    pull_request: str | None
    changed: bool
    difference: Difference
    copied: tuple[str, ...] = ()
    tag: str | None = None


@dataclass(frozen=True)
class Job:
    """What is to be committed.

    Attributes:
        files: What is published, by the paths in the repository.
        place: Where.
        message: Of the commit.
        description: Further lines of it.
        head: The branch as it was looked at.
        change: What has to change.
        source: Where the Hub may copy files from.
    """

    files: Mapping[str, LocalFile] = field(repr=False)
    place: Place
    message: str
    description: str
    head: Head
    change: Difference
    source: CopySource | None

    @property
    def what(self) -> str:
        return f"publish to {self.place.repository}"


def commit(job: Job, reporter: Reporter) -> Published:
    """Commit, or open a pull request.

    Raises:
        Moved: If somebody else committed meanwhile; nothing was changed.
        CheckpointError: If a file changed since it was hashed; nothing was changed.
        HubError: If the Hub says no, or does not answer.
    """
    copied = _copied(job, reporter)

    def settle(error: Exception) -> Published | None:
        if copied and _is_of_copying(error) and not passes(error) and job.source is not None:
            reporter.say(f"the Hub copies no files of {job.source.repository} here; sending them")
            return ask(job.what, lambda: _send(job, {}), lambda fault: _made_after_all(job, fault, {}))
        return _made_after_all(job, error, copied)

    return ask(job.what, lambda: _send(job, copied), settle)


def _copied(job: Job, reporter: Reporter) -> dict[str, str]:
    """The files that the Hub can copy, and their paths in their repository."""
    from huggingface_hub import CommitOperationCopy

    can_copy = "src_repo_id" in CommitOperationCopy.__dataclass_fields__
    if job.source is None or not can_copy or job.source.repository == job.place.repository:
        return {}
    try:
        there = head_of(job.source.repository, job.source.commit).files
    except HubError as error:
        reporter.say(f"sending every file: {error}")
        return {}
    return copies(job.files, job.change.written, there)


def _send(job: Job, copied: Mapping[str, str]) -> Published:
    """Upload, and then commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    added = []
    for name in job.change.written:
        file = job.files[name]
        if name not in copied:
            added.append(CommitOperationAdd(name, str(file.path) if file.content is None else file.content))
    _upload(job, added)
    # They note what became of them, and can be used once.
    operations: list[Any] = [*(CommitOperationDelete(name) for name in job.change.deleted), *added]
    for name, path in copied.items():
        assert job.source is not None
        origin = {"src_repo_id": job.source.repository, "src_repo_type": "model"}
        operations.append(CommitOperationCopy(path, name, src_revision=job.source.commit, **origin))
    made = api().create_commit(
        job.place.repository,
        operations,
        commit_message=job.message,
        commit_description=job.description,
        revision=job.place.branch,
        create_pr=job.place.create_pr,
        parent_commit=job.head.commit,
    )
    pull_request = str(made.pr_url) if job.place.create_pr else None
    url = pull_request or str(made.commit_url)
    return Published(url, str(made.oid), pull_request, True, job.change, tuple(copied))


def _upload(job: Job, added: list[Any]) -> None:
    """Send the large files, and make sure that what was sent is what was looked at, before anybody sees it."""
    for operation in added:
        path = operation.path_or_fileobj
        if isinstance(path, str) and job.files[operation.path_in_repo].num_bytes != operation.upload_info.size:
            raise _changed(path)
    # A .gitignore in the repository would silently keep files out of the commit; an empty one keeps none out.
    how = {"revision": job.place.branch, "create_pr": job.place.create_pr, "gitignore_content": ""}
    api().preupload_lfs_files(job.place.repository, added, free_memory=False, **how)
    for operation in added:
        if getattr(operation, "_should_ignore", False):
            raise HubError(f"cannot {job.what}: its .gitignore leaves out {operation.path_in_repo}; remove that line")
        file = job.files[operation.path_in_repo]
        if operation.upload_info.size and operation.upload_info.sha256.hex() != file.sha256:
            raise _changed(file.path)


def _changed(path: object) -> CheckpointError:
    return CheckpointError(f"{path} changed while it was published, and nothing was; run the command again")


def _made_after_all(job: Job, error: Exception, copied: Mapping[str, str]) -> Published | None:
    """What the commit made, if only its answer was lost, or somebody made the very same one."""
    if not _is_of_commit(error) or not (passes(error) or status_of(error) == 412):
        return None
    if job.place.create_pr:
        made = waiting(job.place, job.files)
        return None if made is None else replace(made, changed=True, difference=job.change, copied=tuple(copied))
    now = head_of(job.place.repository, job.place.branch or MAIN)
    if difference(job.files, now.files):
        if now.commit != job.head.commit:
            raise Moved(
                f"{job.place.repository} moved from {job.head.commit[:12]} to {now.commit[:12]} meanwhile; nothing was "
                f"changed; look at it, and run the command again"
            ) from error
        return None
    return Published(commit_url(job.place, now), now.commit, None, True, job.change, tuple(copied))


def _address(error: Exception) -> str:
    asked = getattr(error, "response", None)
    try:
        request = asked.request if asked is not None else getattr(error, "request", None)
    except RuntimeError:  # So the HTTP library says that there is none.
        return ""
    return str(getattr(request, "url", ""))


def _is_of_commit(error: Exception) -> bool:
    """Whether it was the commit itself that failed, so that it may have been made."""
    return "/commit/" in _address(error)


def _is_of_copying(error: Exception) -> bool:
    from huggingface_hub.errors import FileDuplicationError

    return isinstance(error, FileDuplicationError) or "/lfs-files/duplicate" in _address(error)


def waiting(place: Place, files: Mapping[str, LocalFile]) -> Published | None:
    """An open pull request that offers exactly this, whoever's it is."""
    for request in open_requests(place.repository, own_only=False):
        head = head_of(place.repository, request.git_reference)
        change = difference(files, head.files)
        if not change:
            return Published(request.url, head.commit, request.url, False, change)
    return None


def commit_url(place: Place, head: Head) -> str:
    """The page of a commit."""
    return f"{api().endpoint}/{place.repository}/commit/{head.commit}"
