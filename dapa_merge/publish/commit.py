"""Publish the files of a result in one commit or one pull request.

Large files are uploaded first, so readers see the old model or the new one, never half of it. If the answer to the
commit is lost, the branch is checked. Afterwards the Hub's checksums are compared. huggingface_hub's `upload_folder`
may make several commits, and its `verify_repo_checksums` would read every weight again, so neither is used.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub

from dapa_merge.checkpoint.digest import Hasher, read_into
from dapa_merge.checkpoint.folder import ADAPTER_NAMES, NO_WEIGHTS, WEIGHTS, read_regular, refuse_stray_link
from dapa_merge.checkpoint.location import Location
from dapa_merge.errors import CheckpointError, HubError, UsageError
from dapa_merge.hub_client import Moved, api, ask, download, find, hub_errors, passes, status_of
from dapa_merge.imports import Shown
from dapa_merge.progress import LOG, advance
from dapa_merge.publish.options import Destination
from dapa_merge.transplant.manifest import (
    MANIFEST_NAME,
    PRIVATE,
    Manifest,
    files_in,
    foreign_files,
    is_for_other_programs,
    read_manifest,
)

MAIN = "main"
# A repository with one of these files, or with the tag `dapa` in its card, was published by dapa-merge.
OURS = ("dapa.json", "recipe.lock.yml")
# Files up to this size are sent from memory; the Hub keeps larger ones outside of git.
MAX_SMALL_BYTES = 10 << 20
LOADED = (".safetensors", ".bin", ".h5", ".msgpack", ".index.json")
# The name of a Hub user; CI jobs that log in without a secret have names of another form.
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class LocalFile:
    """A file to publish.

    Attributes:
        sha256: The Hub's checksum of a large file.
        git_hash: The Hub's checksum of a small file: SHA-1 of git's blob header and the content.
        content: The content of a small file, so the bytes that were hashed are the bytes sent.
    """

    path: Path
    num_bytes: int
    sha256: str
    git_hash: str = ""
    content: bytes | None = field(default=None, repr=False)

    def is_same_as(self, remote: huggingface_hub.RepoFile | None) -> bool:
        """Whether a file on the Hub has this content."""
        if remote is None:
            return False
        return bool(remote.lfs.sha256 == self.sha256 if remote.lfs is not None else remote.blob_id == self.git_hash)


@dataclass(frozen=True)
class Difference:
    """The changes that publishing makes in a repository.

    Attributes:
        written: Files that are new or differ.
        deleted: Files of the replaced model, and other weights that programs would load.
        kept: Other existing files.
    """

    written: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.written or self.deleted)


@dataclass(frozen=True)
class Head:
    """The commit of a branch or pull request when it was read, and its files by path."""

    commit: str
    files: Mapping[str, huggingface_hub.RepoFile] = field(repr=False)


@dataclass(frozen=True)
class Published(Shown):
    """The outcome of publishing.

    Attributes:
        commit: The current commit of the repository or pull request.
        pull_request: The address of the pull request; None for a commit.
        changed: Whether anything had to be done.
        copied: Files that the Hub copied.
    """

    url: str
    commit: str
    pull_request: str | None
    changed: bool
    difference: Difference
    copied: tuple[str, ...] = ()
    tag: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a program."""
        return {
            "url": self.url,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "changed": self.changed,
            "tag": self.tag,
            "written": list(self.difference.written),
            "copied": list(self.copied),
            "deleted": list(self.difference.deleted),
            "kept": list(self.difference.kept),
        }

    def lines(self) -> Iterator[str]:
        """The outcome as text."""
        if self.changed:
            number, num_copied = len(self.difference.written), len(self.copied)
            copied = f", {num_copied} copied on the Hub from the target" if num_copied else ""
            files = f"published {number} file{'' if number == 1 else 's'}"
            yield f"{files} ({number - num_copied} sent{copied}); the Hub has the same checksums"
            if self.difference.kept:
                yield f"left as they are: {', '.join(self.difference.kept)}"
        else:
            what = "a pull request already has these files" if self.pull_request else "nothing to do: already published"
            yield f"{what}, with every checksum the same"
        if self.tag:
            yield f"tagged {self.tag}"
        yield self.url


@dataclass(frozen=True)
class Job:
    """A commit to make.

    Attributes:
        files: All files to publish, by their paths in the repository.
        head: The branch as it was read.
        change: The changes to make.
        source: A repository that the Hub may copy files from, at a commit.
    """

    files: Mapping[str, LocalFile] = field(repr=False)
    destination: Destination
    message: str
    description: str
    head: Head
    change: Difference
    source: Location | None

    @property
    def what(self) -> str:
        """The request, worded to follow "cannot"."""
        return f"publish to {self.destination.repository}"


def publish(
    files: Mapping[str, LocalFile],
    destination: Destination,
    message: str,
    source: Location | None,
    *,
    description: str = "",
) -> Published:
    """Publish files in one commit or one pull request, and check the outcome.

    Args:
        files: The files to publish, by their paths in the repository.
        destination: Where to publish.
        message: The first line of the commit message.
        source: A repository, at a commit, that the Hub may copy files from.
        description: Further lines of the commit message.

    Raises:
        Moved: If somebody else committed meanwhile.
        CheckpointError: If a file changes meanwhile; nothing is published.
        HubError: If the Hub refuses, does not answer, or has other bytes afterwards; the repository is unchanged, or
            has all files.
    """
    repository, branch = destination.repository, destination.branch
    if not check_repository(destination):
        LOG.info(f"creating {repository}")
        # None leaves the choice to the organization's settings.
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
    """The files of the model that dapa-merge published there before, by its manifest."""
    if MANIFEST_NAME not in head.files:
        return ()
    path = download(repository, MANIFEST_NAME, head.commit)
    try:
        return frozenset(read_manifest(path.parent).files)
    except CheckpointError:
        # Without a readable manifest, nothing is known about the other files.
        return ()


def _check_tag(destination: Destination, head: Head, change: Difference) -> None:
    """Refuse a tag that is already on another commit, before anything is sent."""
    there = None if destination.tag is None else _tagged_commit(destination)
    if there is not None and (change or there != head.commit):
        tag = f"the tag {destination.tag}, on commit {there[:12]}"
        raise UsageError(f"{destination.repository} already has {tag}; choose another")


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
                f"{repository} at {made.commit[:12]} differs from the local files ({names}), and readers see it; run "
                f"the command again"
            )
    if tag is None or _tagged_commit(destination) == made.commit:
        return made
    how: dict[str, Any] = {"tag": tag, "revision": made.commit, "exist_ok": True}
    ask(f"tag {repository} as {tag}", lambda: api().create_tag(repository, **how))
    if (there := _tagged_commit(destination)) != made.commit:
        raise HubError(f"the tag {tag} of {repository} was put on {there} meanwhile; the model itself is published")
    return replace(made, tag=tag)


def commit(job: Job) -> Published:
    """Commit, or open a pull request.

    Raises:
        Moved: If somebody else committed meanwhile; nothing was changed.
        CheckpointError: If a file changed since it was hashed; nothing was changed.
        HubError: If the Hub refuses, or does not answer.
    """
    copied = _copied(job)

    def settle(error: Exception) -> Published | None:
        if copied and _is_of_copying(error) and not passes(error) and job.source is not None:
            LOG.info(f"the Hub cannot copy files from {job.source.path}; sending them")
            return ask(job.what, lambda: _send(job, {}), lambda fault: _made_after_all(job, fault, {}))
        return _made_after_all(job, error, copied)

    return ask(job.what, lambda: _send(job, copied), settle)


def _copied(job: Job) -> dict[str, str]:
    """The files that the Hub can copy, each with its path in the source repository.

    Only large files: small ones are sent faster than they are copied.
    """
    can_copy = "src_repo_id" in huggingface_hub.CommitOperationCopy.__dataclass_fields__
    if job.source is None or not can_copy or job.source.path == job.destination.repository:
        return {}
    try:
        there = head_of(job.source.path, job.source.revision or MAIN).files
    except HubError as error:
        LOG.info(f"sending every file: {error}")
        return {}
    paths = {file.lfs.sha256: path for path, file in sorted(there.items()) if file.lfs and file.xet_hash}
    return {name: paths[job.files[name].sha256] for name in job.change.written if job.files[name].sha256 in paths}


def _send(job: Job, copied: Mapping[str, str]) -> Published:
    """Upload, and then commit."""
    added = []
    for name in job.change.written:
        file = job.files[name]
        if name not in copied:
            content = str(file.path) if file.content is None else file.content
            added.append(huggingface_hub.CommitOperationAdd(name, content))
    _upload(job, added)
    # Operations are single-use: they record their own upload.
    operations: list[Any] = [*(huggingface_hub.CommitOperationDelete(name) for name in job.change.deleted), *added]
    for name, path in copied.items():
        assert job.source is not None
        origin: dict[str, Any] = {"src_repo_id": job.source.path, "src_repo_type": "model"}
        operations.append(huggingface_hub.CommitOperationCopy(path, name, src_revision=job.source.revision, **origin))
    made = api().create_commit(
        job.destination.repository,
        operations,
        commit_message=job.message,
        commit_description=job.description,
        revision=job.destination.branch,
        create_pr=job.destination.create_pr,
        parent_commit=job.head.commit,
    )
    pull_request = str(made.pr_url) if job.destination.create_pr else None
    return Published(pull_request or str(made.commit_url), str(made.oid), pull_request, True, job.change, tuple(copied))


def _upload(job: Job, added: list[huggingface_hub.CommitOperationAdd]) -> None:
    """Send the large files, and check that they are the ones that were hashed, before anybody sees them."""
    for operation in added:
        path = operation.path_or_fileobj
        if isinstance(path, str) and job.files[operation.path_in_repo].num_bytes != operation.upload_info.size:
            raise _changed(path)
    # A .gitignore in the repository would silently keep files out of the commit; an empty one keeps none out.
    how: dict[str, Any] = {"revision": job.destination.branch, "create_pr": job.destination.create_pr}
    api().preupload_lfs_files(job.destination.repository, added, free_memory=False, gitignore_content="", **how)
    for operation in added:
        if getattr(operation, "_should_ignore", False):
            raise HubError(f"cannot {job.what}: its .gitignore leaves out {operation.path_in_repo}; remove that line")
        file = job.files[operation.path_in_repo]
        if operation.upload_info.size and operation.upload_info.sha256.hex() != file.sha256:
            raise _changed(file.path)


def _changed(path: object) -> CheckpointError:
    return CheckpointError(f"{path} changed during publishing; nothing was published, run the command again")


def _made_after_all(job: Job, error: Exception, copied: Mapping[str, str]) -> Published | None:
    """The commit, if only its answer was lost, or somebody else made the same one."""
    is_of_commit = "/commit/" in _address(error)
    if not is_of_commit or not (passes(error) or status_of(error) == 412):
        return None
    destination = job.destination
    if destination.create_pr:
        made = waiting(destination, job.files)
        return None if made is None else replace(made, changed=True, difference=job.change, copied=tuple(copied))
    now = head_of(destination.repository, destination.branch or MAIN)
    if needed_changes(job.files, now.files):
        if now.commit != job.head.commit:
            raise Moved(
                f"{destination.repository} moved from {job.head.commit[:12]} to {now.commit[:12]} meanwhile; nothing "
                f"was changed; look at it, and run the command again"
            ) from error
        return None
    return Published(commit_url(destination, now), now.commit, None, True, job.change, tuple(copied))


def _address(error: Exception) -> str:
    # The HTTP library raises RuntimeError if there was no request.
    with suppress(RuntimeError):
        response = getattr(error, "response", None)
        return str(getattr(getattr(error if response is None else response, "request", None), "url", ""))
    return ""


def _is_of_copying(error: Exception) -> bool:
    return isinstance(error, hub_errors().FileDuplicationError) or "/lfs-files/duplicate" in _address(error)


def waiting(destination: Destination, files: Mapping[str, LocalFile]) -> Published | None:
    """An open pull request, by anybody, with exactly these files."""
    for request in open_requests(destination.repository, own_only=False):
        head = head_of(destination.repository, request.git_reference)
        change = needed_changes(files, head.files)
        if not change:
            return Published(request.url, head.commit, request.url, False, change)
    return None


def commit_url(destination: Destination, head: Head) -> str:
    """The page of a commit."""
    return f"{api().endpoint}/{destination.repository}/commit/{head.commit}"


def files_of(out: Path, manifest: Manifest | None) -> dict[str, LocalFile]:
    """The files of a result to publish, by relative path: those that make the model and describe it.

    Left out are hidden files and clutter, the models' responses, and weights in forms that nothing compared. The Hub
    compares large files by their SHA-256, so that is computed unless the manifest has it.

    Args:
        out: The result, just verified.
        manifest: Its manifest, if it has one.

    Raises:
        CheckpointError: If a file cannot be read, links out of the folder, or is not a part of a model.
    """
    names = publishable(out)
    hashed = manifest.files if manifest is not None else {}

    def sha256_of(name: str) -> str:
        if manifest is not None and name in hashed and manifest.algorithm == "sha256":
            advance(hashed[name].num_bytes, "bytes")
            return hashed[name].digest
        sha256 = Hasher("sha256")
        if manifest is None or name not in hashed:
            read_into(out / name, sha256)
        else:
            # In the same read, so what is sent is what was verified.
            own = Hasher(manifest.algorithm)
            read_into(out / name, sha256, own)
            if own.digests().digest != hashed[name].digest:
                raise _changed(out / name)
        return sha256.digests().digest

    def read(name: str) -> LocalFile:
        path = out / name
        refuse_stray_link(path, out)
        try:
            size = path.stat().st_size
            if size > MAX_SMALL_BYTES:
                return LocalFile(path, size, sha256_of(name))
            content = read_regular(path, MAX_SMALL_BYTES)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        advance(size, "bytes")
        return of_content(path, content)

    # Reading and hashing both release the GIL.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def publishable(out: Path) -> list[str]:
    """The paths in a result of the files to publish, as `files_of` describes them.

    Raises:
        CheckpointError: If programs would load other weights, or a file is not a part of a model.
    """
    names = [name for name in files_in(out) if name not in PRIVATE and not is_for_other_programs(name)]
    # Also what the manifest lists: an earlier version, or somebody else, may have listed a key or a log.
    if others := foreign_files(out, names):
        more = f" (nor are {len(others) - 1} others)" if len(others) > 1 else ""
        raise CheckpointError(f"{out / others[0]} is not a known part of a model{more}; move it out of {out}")
    return names


def of_content(path: Path, content: bytes) -> LocalFile:
    """A file with the given content, which is what will be sent."""
    git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return LocalFile(path, len(content), hashlib.sha256(content).hexdigest(), git_hash, content)


def needed_changes(
    files: Mapping[str, LocalFile], there: Mapping[str, huggingface_hub.RepoFile], listed: Collection[str] = ()
) -> Difference:
    """The changes that publish these files in a repository.

    Args:
        files: The files to publish.
        there: The repository's files.
        listed: The files of the replaced model.
    """
    others = sorted(name for name in there if name not in files and name != ".gitattributes")
    stale = [name for name in others if name in listed or is_loaded(name)]
    return Difference(
        written=tuple(name for name, file in files.items() if not file.is_same_as(there.get(name))),
        deleted=tuple(stale),
        kept=tuple(name for name in others if name not in stale),
    )


def is_loaded(name: str) -> bool:
    """Whether transformers would load a file of this name as weights, instead of or besides the model's own."""
    if "/" in name or (name in NO_WEIGHTS and name not in ADAPTER_NAMES):
        return False
    return name.endswith(LOADED) or name.startswith("adapter_")


def check_repository(destination: Destination) -> bool:
    """Check a repository before any costly work.

    Returns:
        Whether it exists.

    Raises:
        UsageError: If options contradict each other, or the repository is public but should be private.
        HubError: If it holds another model, the token may not write there, or the Hub does not answer.
    """
    repository = destination.repository
    for option, value in (("--revision", destination.branch), ("--tag", destination.tag)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} is empty; leave it out, or name one")
        if value is not None and destination.create_pr:
            raise UsageError(
                f"--create-pr proposes a change to the default branch and has no use for {option}; leave out one"
            )
    info = find(repository)
    if info is None:
        return False
    if destination.private and not info.private:
        raise UsageError(f"{repository} exists and is public; leave out --private, or name another repository")
    if not destination.create_pr:
        _check_right(repository)
        if destination.branch in (None, MAIN):
            refuse_other_model(destination, info)
    return True


def _check_right(repository: str) -> None:
    """Raise unless the token may write; skipped if this huggingface_hub cannot ask."""
    if "write" not in inspect.signature(api().auth_check).parameters:
        return

    def check() -> bool:
        # A Hub without this endpoint answers 404.
        with suppress(hub_errors().EntryNotFoundError):
            api().auth_check(repository, write=True)
        return True

    ask(f"write to {repository}", check)


def refuse_other_model(destination: Destination, info: Any) -> None:
    """Raise `HubError` if a branch holds a model that dapa-merge did not publish, unless it may be replaced."""
    if destination.create_pr or destination.replaces:
        return
    names = {file.rfilename for file in info.siblings or ()}
    tags = getattr(info.card_data, "tags", None) or ()
    if any(name.endswith(WEIGHTS) for name in names) and not names & set(OURS) and "dapa" not in tags:
        raise HubError(
            f"{destination.repository} exists and holds a model that dapa-merge did not publish; name another "
            f"repository, open a pull request with --create-pr, or replace it with --replace"
        )


def head_of(repository: str, revision: str) -> Head:
    """A revision's commit, and its files at exactly that commit."""
    what = f"list the files of {repository}"
    commit = str(ask(what, lambda: api().model_info(repository, revision=revision)).sha)
    tree = ask(what, lambda: list(api().list_repo_tree(repository, recursive=True, expand=False, revision=commit)))
    return Head(commit, {file.path: file for file in tree if isinstance(file, huggingface_hub.RepoFile)})


def open_requests(repository: str, *, own_only: bool = True) -> Sequence[Any]:
    """The open pull requests of a repository, the newest first.

    With `own_only`, those of strangers are left out, so that nobody else can block a job by opening one. Own ones are
    by the token's user, the repository's owner, or CI jobs, which are not users.
    """

    def found() -> list[Any]:
        kinds: dict[str, Any] = {"discussion_type": "pull_request", "discussion_status": "open"}
        try:
            return list(api().get_repo_discussions(repository, **kinds))
        except hub_errors().HfHubHTTPError as error:
            # Pull requests are disabled, or the repository does not exist.
            if status_of(error) in (401, 403, 404, 410):
                return []
            raise

    requests = ask(f"list the pull requests of {repository}", found)
    if own_only:
        own = {repository.partition("/")[0], _own_name()}
        requests = [one for one in requests if one.author in own or not _USER.fullmatch(str(one.author))]
    return sorted(requests, key=lambda one: -one.num)


def _own_name() -> str | None:
    """The user of this token; None without a token, or for a CI job's token, which has no user."""
    try:
        return str(api().whoami()["name"])
    except Exception:
        # After any error, the owner's pull requests still count.
        return None
