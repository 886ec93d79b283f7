"""What was published before in a repository: its lock, and those of pull requests that wait there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapa_merge.errors import HubError
from dapa_merge.hub.client import api, ask
from dapa_merge.hub.lock import FILE_NAME, MAX_BYTES, Lock, parse_lock


def locks(repository: str) -> Iterator[tuple[str, Lock]]:
    """The lock of a published model, and those of our own open pull requests, the newest first.

    Raises:
        HubError: If the Hub cannot be asked; a repository that is not there has none.
        CheckpointError: If what the default branch has is no lock.
    """
    if (lock := _lock(repository, None)) is not None:
        yield f"{repository}/{FILE_NAME}", lock
    for request in open_requests(repository):
        if (lock := _lock(repository, request.git_reference)) is not None:
            yield request.url, lock


def open_requests(repository: str) -> list[Any]:
    """The open pull requests of whoever the token is of, or of the repository's owner; the newest first.

    A stranger may open one as well, but must not keep a job from its work by that.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def found() -> list[Any]:
        try:
            kinds = {"discussion_type": "pull_request", "discussion_status": "open"}
            return list(api().get_repo_discussions(repository, **kinds))
        except RepositoryNotFoundError:
            return []

    requests = ask(f"list the pull requests of {repository}", found)
    own = {repository.partition("/")[0], _own_name()}
    return sorted((one for one in requests if one.author in own), key=lambda one: -one.num)


def _own_name() -> str | None:
    """Whose token this is; None without one, or if it is a job's, which has no name."""
    try:
        return str(api().whoami()["name"])
    except Exception:
        # Whatever it is, the owner's own pull requests are looked at all the same.
        return None


def _lock(repository: str, revision: str | None) -> Lock | None:
    path = _fetched(repository, revision)
    if path is None:
        return None
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise HubError(f"{FILE_NAME} of {repository} is larger than any lock; it was not made by dapa-merge")
    return parse_lock(content.decode(errors="replace"), f"{repository}/{FILE_NAME}")


def _fetched(repository: str, revision: str | None) -> str | None:
    """The lock's file as it is there now; None if there is no such repository, or no lock in it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    what = f"get the lock of {repository}"

    def commit() -> str | None:
        try:
            info = api().model_info(repository, revision=revision)
        except RepositoryNotFoundError:
            return None
        return str(info.sha) if FILE_NAME in {file.rfilename for file in info.siblings or ()} else None

    sha = ask(what, commit)
    return None if sha is None else str(ask(what, lambda: hf_hub_download(repository, FILE_NAME, revision=sha)))
