"""One commit, or one pull request, tried until it is certain whether it was made.

What of a folder goes to a repository, and what that changes there.

A repository to publish in: what it is now, and whether it may be written to.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.digest import hash_file
from dapa_merge.checkpoint.folder import ADAPTER_NAMES, NO_WEIGHTS, WEIGHTS, read_regular, refuse_stray_link
from dapa_merge.errors import CheckpointError, HubError, UsageError
from dapa_merge.hub_client import Moved, api, ask, find, passes, status_of
from dapa_merge.progress import LOG, advance
from dapa_merge.transplant.manifest import PRIVATE, may_be_added


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
    place: Destination
    message: str
    description: str
    head: Head
    change: Difference
    source: CopySource | None

    @property
    def what(self) -> str:
        return f"publish to {self.place.repository}"


def commit(job: Job) -> Published:
    """Commit, or open a pull request.

    Raises:
        Moved: If somebody else committed meanwhile; nothing was changed.
        CheckpointError: If a file changed since it was hashed; nothing was changed.
        HubError: If the Hub says no, or does not answer.
    """
    copied = _copied(job)

    def settle(error: Exception) -> Published | None:
        if copied and _is_of_copying(error) and not passes(error) and job.source is not None:
            LOG.info(f"the Hub copies no files of {job.source.repository} here; sending them")
            return ask(job.what, lambda: _send(job, {}), lambda fault: _made_after_all(job, fault, {}))
        return _made_after_all(job, error, copied)

    return ask(job.what, lambda: _send(job, copied), settle)


def _copied(job: Job) -> dict[str, str]:
    """The files that the Hub can copy, and their paths in their repository."""
    from huggingface_hub import CommitOperationCopy

    can_copy = "src_repo_id" in CommitOperationCopy.__dataclass_fields__
    if job.source is None or not can_copy or job.source.repository == job.place.repository:
        return {}
    try:
        there = head_of(job.source.repository, job.source.commit).files
    except HubError as error:
        LOG.info(f"sending every file: {error}")
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
    if needed_changes(job.files, now.files):
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


def waiting(place: Destination, files: Mapping[str, LocalFile]) -> Published | None:
    """An open pull request that offers exactly this, whoever's it is."""
    for request in open_requests(place.repository, own_only=False):
        head = head_of(place.repository, request.git_reference)
        change = needed_changes(files, head.files)
        if not change:
            return Published(request.url, head.commit, request.url, False, change)
    return None


def commit_url(place: Destination, head: Head) -> str:
    """The page of a commit."""
    return f"{api().endpoint}/{place.repository}/commit/{head.commit}"


# What is sent from memory; larger files are never kept in git itself.
MAX_SMALL_BYTES = 10 << 20
LOADED = (".safetensors", ".bin", ".h5", ".msgpack", ".index.json")
# How the files of a model end that nothing else lists.
PARTS = (*WEIGHTS, ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".yml")


@dataclass(frozen=True)
class LocalFile:
    """A file to publish.

    Attributes:
        path: Where it is.
        num_bytes: Its size.
        sha256: What the Hub knows a large file by.
        git_hash: What the Hub knows a small file by: SHA-1 of git's header for a blob, and the content.
        content: All of it, if it is small, so that what was looked at is what is sent.
    """

    path: Path
    num_bytes: int
    sha256: str
    git_hash: str = ""
    content: bytes | None = field(default=None, repr=False)

    def is_same_as(self, remote: Any) -> bool:
        """Whether a file on the Hub (huggingface_hub's `RepoFile`) has this content."""
        if remote is None:
            return False
        return bool(remote.lfs.sha256 == self.sha256 if remote.lfs is not None else remote.blob_id == self.git_hash)


@dataclass(frozen=True)
class Difference:
    """What publishing a folder changes in a repository.

    Attributes:
        written: Files that are new there, or have another content.
        deleted: Files there of the model that is replaced, and other weights that programs would load.
        kept: Other files there, which stay.
    """

    written: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.written or self.deleted)


def files_of(out: Path, known: Mapping[str, str]) -> dict[str, LocalFile]:
    """The files of a result that are published, by their paths in it: all but hidden ones and what the models said.

    Args:
        out: The result.
        known: The SHA-256 of files that were hashed already.

    Raises:
        CheckpointError: If one cannot be read, leads out of the folder, or is no part of a model.
    """
    names = []
    for parent, folders, files in os.walk(out):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent).relative_to(out)
        names += [(here / name).as_posix() for name in sorted(files) if not name.startswith(".")]
    names = [name for name in names if name.rpartition("/")[2] not in PRIVATE]
    for name in names:
        # A manifest lists what belongs to a result; without one, a key or a log may lie there.
        if name not in known and not (name.endswith(PARTS) or may_be_added(name)):
            raise CheckpointError(f"{out / name} is no part of a model that is known; move it out of {out}")

    def read(name: str) -> LocalFile:
        path = out / name
        refuse_stray_link(path, out)
        try:
            return _local_file(path, known.get(name))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _local_file(path: Path, sha256: str | None) -> LocalFile:
    size = path.stat().st_size
    if size > MAX_SMALL_BYTES:
        return LocalFile(path, size, sha256 or hash_file(path).sha256)
    content = read_regular(path, MAX_SMALL_BYTES)
    advance(size, "bytes")
    return of_content(path, content)


def of_content(path: Path, content: bytes) -> LocalFile:
    """A file whose content is at hand, which is sent as it is now."""
    git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return LocalFile(path, len(content), hashlib.sha256(content).hexdigest(), git_hash, content)


def needed_changes(
    files: Mapping[str, LocalFile], there: Mapping[str, Any], listed: Collection[str] = ()
) -> Difference:
    """What has to change in a repository for it to be these files.

    Args:
        files: What is published.
        there: huggingface_hub's `RepoFile`s of the repository, by path.
        listed: Files there that belong to the model that is replaced.
    """
    others = sorted(name for name in there if name not in files and name != ".gitattributes")
    stale = [name for name in others if name in listed or is_loaded(name)]
    return Difference(
        written=tuple(name for name, file in files.items() if not file.is_same_as(there.get(name))),
        deleted=tuple(stale),
        kept=tuple(name for name in others if name not in stale),
    )


def is_loaded(name: str) -> bool:
    """Whether transformers would load a file of this name as a model's weights, instead of or beside its own."""
    if "/" in name or (name in NO_WEIGHTS and name not in ADAPTER_NAMES):
        return False
    return name.endswith(LOADED) or name.startswith("adapter_")


def copies(files: Mapping[str, LocalFile], names: Sequence[str], there: Mapping[str, Any]) -> dict[str, str]:
    """Which of these files the Hub can copy from another repository of its, and their paths there.

    Only large ones: what is small is sent faster than it is copied.
    """
    places = {file.lfs.sha256: path for path, file in sorted(there.items()) if file.lfs and file.xet_hash}
    return {name: places[files[name].sha256] for name in names if files[name].sha256 in places}


MAIN = "main"
# By one of these, or its card's tag, a model is known as one that dapa-merge published.
OURS = ("dapa.json", "recipe.lock.yml")


@dataclass(frozen=True)
class Destination:
    """Where to publish, and how.

    Attributes:
        repository: Its id.
        private: Make it private, if it is made; refuse one that is public.
        branch: The branch; None for the default one.
        create_pr: Offer a pull request rather than commit.
        tag: A tag for the commit.
        replaces: Whether another model may be replaced.
    """

    repository: str
    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    tag: str | None = None
    replaces: bool = False


@dataclass(frozen=True)
class Head:
    """A branch, or a pull request, as it was looked at."""

    commit: str
    files: Mapping[str, Any] = field(repr=False)


def check_options(place: Destination) -> None:
    """Raise `UsageError` if what is asked contradicts itself; asks nobody."""
    for option, value in (("--revision", place.branch), ("--tag", place.tag)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} is empty; leave it out, or name one")
        if value is not None and place.create_pr:
            raise UsageError(
                f"--create-pr offers a change to the default branch and has no use for {option}; leave out one"
            )


def check_place(place: Destination) -> bool:
    """Look at a repository before anything costly is done for it.

    Returns:
        Whether it is there.

    Raises:
        UsageError: If it is there and public, but should be private; if options contradict each other.
        HubError: If it holds another model, the token may not write there, or the Hub does not answer.
    """
    check_options(place)
    info = find(place.repository)
    if info is None:
        return False
    if place.private and not info.private:
        raise UsageError(f"{place.repository} exists and is public; leave out --private, or name another repository")
    if not place.create_pr:
        _check_right(place.repository)
        if place.branch in (None, MAIN):
            refuse_other_model(place, info)
    return True


def _check_right(repository: str) -> None:
    """Whether the token may write, where huggingface_hub knows how to ask."""
    if "write" in inspect.signature(api().auth_check).parameters:
        from huggingface_hub.errors import EntryNotFoundError

        def check() -> bool:
            # A Hub that does not know the question says so by 404.
            with suppress(EntryNotFoundError):
                api().auth_check(repository, write=True)
            return True

        ask(f"write to {repository}", check)


def refuse_other_model(place: Destination, info: Any) -> None:
    """Raise `HubError` if a branch holds a model that dapa-merge did not publish, unless it may be replaced."""
    if place.create_pr or place.replaces:
        return
    names = {file.rfilename for file in info.siblings or ()}
    tags = getattr(info.card_data, "tags", None) or ()
    if any(name.endswith(WEIGHTS) for name in names) and not names & set(OURS) and "dapa" not in tags:
        raise HubError(
            f"{place.repository} exists and holds a model that dapa-merge did not publish; name another repository, "
            f"offer a pull request with --create-pr, or replace it with --replace"
        )


def head_of(repository: str, revision: str) -> Head:
    """A revision's commit, and its files at exactly that commit."""
    from huggingface_hub.hf_api import RepoFile

    what = f"list the files of {repository}"
    commit = str(ask(what, lambda: api().model_info(repository, revision=revision)).sha)
    tree = ask(what, lambda: list(api().list_repo_tree(repository, recursive=True, expand=False, revision=commit)))
    return Head(commit, {file.path: file for file in tree if isinstance(file, RepoFile)})


# What a user of the Hub may be called; a job that logs in without a secret is named otherwise.
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def open_requests(repository: str, *, own_only: bool = True) -> list[Any]:
    """The open pull requests of a repository, the newest first.

    Args:
        repository: Its id.
        own_only: Leave out strangers' ones, who may open one but must not keep a job from its work by that. Ours are
            those of the token's user, of the repository's owner, and of jobs, which are no users.
    """
    from huggingface_hub.errors import HfHubHTTPError

    def found() -> list[Any]:
        try:
            kinds = {"discussion_type": "pull_request", "discussion_status": "open"}
            return list(api().get_repo_discussions(repository, **kinds))
        except HfHubHTTPError as error:
            # There are none where they are switched off, or the repository is not there.
            if status_of(error) in (401, 403, 404, 410):
                return []
            raise

    requests = ask(f"list the pull requests of {repository}", found)
    if own_only:
        own = {repository.partition("/")[0], _own_name()}
        requests = [one for one in requests if one.author in own or not _USER.fullmatch(str(one.author))]
    return sorted(requests, key=lambda one: -one.num)


def _own_name() -> str | None:
    """Whose token this is; None without one, or if it is a job's, which has no name."""
    try:
        return str(api().whoami()["name"])
    except Exception:
        # Whatever it is, the owner's own pull requests are looked at all the same.
        return None
