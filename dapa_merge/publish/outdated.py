"""Compares a recipe and its models with the lock of its last run, here or in a published repository."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapa_merge.errors import HubError
from dapa_merge.hub_client import check_id, download, find
from dapa_merge.plan.selection import models_of
from dapa_merge.progress import task
from dapa_merge.publish.commit import open_requests
from dapa_merge.publish.lock import (
    LOCK_NAME,
    MAX_BYTES,
    Lock,
    Movement,
    lock_path,
    movement,
    named_parts,
    num_bytes,
    pair_up,
    parse_lock,
    read_lock,
    recipe_digest,
)
from dapa_merge.recipe.recipe import Recipe


@dataclass(frozen=True)
class Status:
    """A recipe and its models, compared with the lock of its last run.

    Attributes:
        lock: The file or address of the lock; None if absent.
        recipe_changed: Whether the recipe itself changed.
        movements: The role of each model and adapter, and how it changed.
    """

    lock: str | None
    recipe_changed: bool = False
    movements: tuple[tuple[str, Movement], ...] = ()

    @property
    def is_outdated(self) -> bool:
        """Whether running the recipe (again) may give a different result."""
        return self.lock is None or self.recipe_changed or any(moved.matters for _, moved in self.movements)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a program."""
        return {
            "outdated": self.is_outdated,
            "lock": self.lock,
            "recipe_changed": self.recipe_changed,
            "models": [
                {
                    "role": role,
                    "model": str(moved.before),
                    "locked_commit": moved.before.commit,
                    "commit": moved.commit,
                    "outdated": moved.matters,
                    **{name: list(getattr(moved, name)) for name in ("changed", "added", "removed")},
                }
                for role, moved in self.movements
            ],
        }

    def lines(self) -> list[str]:
        """The status as text."""
        if self.lock is None:
            return ["outdated: no lock was found; a run writes one"]
        lines = [f"{role} {moved.before}: {_fate(moved)}" for role, moved in self.movements]
        if self.recipe_changed:
            lines.append("the recipe changed since it was run")
        return [*lines, f"{'outdated' if self.is_outdated else 'up to date'}, by {self.lock}"]


def _fate(moved: Movement) -> str:
    before, now = moved.before.commit, moved.commit
    commits = f" ({before[:12]} -> {now[:12]})" if before and now and before != now else ""
    if moved.matters:
        return f"moved{commits}; {moved.changes}"
    return f"a new commit{commits}, but no relevant file differs" if commits else "unchanged"


def compare_with_lock(recipe: Recipe, path: Path, repository: str | None) -> Status:
    """Compare a recipe and its models with the lock.

    Args:
        recipe: The recipe as it is now.
        path: Its file.
        repository: Use the lock that was published in this repository, or in a pull request to it, rather than the
            file next to the recipe.

    Raises:
        UsageError: If the repository's id is not valid.
        CheckpointError: If the lock cannot be read.
        HubError: If the Hub does not answer.
    """
    first: Status | None = None
    is_published = repository is not None
    for name, lock in published_locks(check_id(repository)) if repository is not None else _local_lock(path):
        status = _compared(recipe, name, lock, is_published=is_published)
        if not status.is_outdated:
            return status
        first = first or status
    return first or Status(None)


def _local_lock(path: Path) -> Iterator[tuple[str, Lock]]:
    if (lock := read_lock(lock_path(path))) is not None:
        yield str(lock_path(path)), lock


def _compared(recipe: Recipe, name: str, lock: Lock, *, is_published: bool) -> Status:
    if recipe_digest(recipe) != lock.recipe:
        return Status(name, recipe_changed=True)
    # The recipe's digest covers the names of its models.
    parts = [
        (role, part, before)
        for model, location in models_of(recipe).items()
        for (role, part), (_, before) in zip(
            named_parts(model, location), pair_up(location, lock.of(model), is_published=is_published), strict=True
        )
    ]
    with task("comparing", sum(num_bytes(part) for _, part, _ in parts), "bytes"):
        return Status(name, False, tuple((role, movement(before, part)) for role, part, before in parts))


def published_locks(repository: str) -> Iterator[tuple[str, Lock]]:
    """Yields the lock of a published model, and those of the user's own open pull requests, newest first.

    Raises:
        HubError: If the repository does not exist, or the Hub does not answer.
        CheckpointError: If the file on the default branch is not a lock.
    """
    if find(repository) is None:
        raise HubError(f"{repository} does not exist, or the token may not see it; correct the name, or create it")
    if (lock := _published_lock(repository, None)) is not None:
        yield f"{repository}/{LOCK_NAME}", lock
    for request in open_requests(repository):
        if (lock := _published_lock(repository, request.git_reference)) is not None:
            yield request.url, lock


def _published_lock(repository: str, revision: str | None) -> Lock | None:
    info = find(repository, revision)
    if info is None or LOCK_NAME not in {file.rfilename for file in info.siblings or ()}:
        return None
    with download(repository, LOCK_NAME, str(info.sha)).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise HubError(f"{LOCK_NAME} of {repository} is larger than any lock; it was not made by dapa-merge")
    return parse_lock(content.decode(errors="replace"), f"{repository}/{LOCK_NAME}")
