"""What was published before in a repository: its lock, and those of pull requests that wait there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dapa_merge.errors import HubError
from dapa_merge.hub.client import api, ask, find, status_of
from dapa_merge.hub.lock import FILE_NAME, MAX_BYTES, Lock, parse_lock

# What a user of the Hub may be called; a job that logs in without a secret is named otherwise.
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def locks(repository: str) -> Iterator[tuple[str, Lock]]:
    """The lock of a published model, and those of our own open pull requests, the newest first.

    Raises:
        HubError: If there is no such repository, or the Hub cannot be asked.
        CheckpointError: If what the default branch has is no lock.
    """
    if find(repository) is None:
        raise HubError(f"there is no repository {repository}, or the token may not see it; make it, or mend the name")
    if (lock := _lock(repository, None)) is not None:
        yield f"{repository}/{FILE_NAME}", lock
    for request in open_requests(repository):
        if (lock := _lock(repository, request.git_reference)) is not None:
            yield request.url, lock


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
    """The lock's file as it is there now; None if there is none."""
    from huggingface_hub import hf_hub_download

    info = find(repository, revision)
    if info is None or FILE_NAME not in {file.rfilename for file in info.siblings or ()}:
        return None
    sha = str(info.sha)
    return str(ask(f"get {FILE_NAME} of {repository}", lambda: hf_hub_download(repository, FILE_NAME, revision=sha)))
