"""Locking a recipe, following it as it was locked, and noticing that its models moved since.

What was published before in a repository: its lock, and those of pull requests that wait there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.location import Location
from dapa_merge.errors import CheckpointError, DapaError, HubError, UsageError
from dapa_merge.files import replace_file
from dapa_merge.hub_client import ask, find
from dapa_merge.plan.selection import models_of
from dapa_merge.progress import LOG, task
from dapa_merge.publish.commit import open_requests
from dapa_merge.publish.lock import (
    LOCK_NAME,
    MAX_BYTES,
    Lock,
    Movement,
    Upstream,
    base_and_adapter,
    changed_files,
    lock_path,
    lock_text,
    look_at,
    movement,
    named_parts,
    num_bytes,
    pair_up,
    parse_lock,
    pin,
    read_lock,
    recipe_digest,
    versions,
)
from dapa_merge.recipe.recipe import Recipe


@dataclass(frozen=True)
class News:
    """What became of a recipe and its models since it was followed.

    Attributes:
        place: Where the lock is that this was compared with; None if there is none.
        recipe_changed: Whether the recipe says something else now.
        movements: How each model and adapter differs from what it was, with what it is in the recipe.
    """

    place: str | None
    recipe_changed: bool = False
    movements: tuple[tuple[str, Movement], ...] = ()

    @property
    def is_outdated(self) -> bool:
        """Whether to follow the recipe (again) may give something else."""
        return self.place is None or self.recipe_changed or any(moved.matters for _, moved in self.movements)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a program."""
        return {
            "outdated": self.is_outdated,
            "lock": self.place,
            "recipe_changed": self.recipe_changed,
            "models": [
                {
                    "role": role,
                    "model": str(moved.before),
                    "locked_commit": moved.before.commit,
                    "commit": moved.commit,
                    "outdated": moved.matters,
                    "changed": list(moved.changed),
                    "added": list(moved.added),
                    "removed": list(moved.removed),
                }
                for role, moved in self.movements
            ],
        }


def make_lock(recipe: Recipe) -> Lock:
    """What the models of a recipe are now; the selection is not in it yet.

    Raises:
        DapaError: If one of them cannot be read, or the Hub not be asked.
    """
    parts = {name: base_and_adapter(location) for name, location in models_of(recipe).items()}
    with task("locking", sum(num_bytes(part) for of_model in parts.values() for part in of_model), "bytes"):
        models = {name: tuple(map(look_at, of_model)) for name, of_model in parts.items()}
    return Lock(recipe_digest(recipe), **models, units=(), versions=versions())


def follow_lock(recipe: Recipe, path: Path) -> tuple[Recipe, Lock]:
    """A recipe with its models as they were locked, and the lock.

    Raises:
        UsageError: If the recipe was never locked.
        RecipeError: If it says something else than it did.
        CheckpointError: If a model is not what it was.
        HubError: If the Hub does not give the locked commit any more, or cannot be asked.
    """
    lock = read_lock(lock_path(path))
    if lock is None:
        raise UsageError(f"there is no {lock_path(path)}; run the recipe without --locked, which writes it")
    recipe = pin(recipe, lock)
    now = make_lock(recipe)
    pairs = (pair for name in models_of(recipe) for pair in zip(lock.of(name), now.of(name), strict=True))
    for before, after in pairs:
        moved = changed_files(before, after)
        if moved.matters:
            raise CheckpointError(
                f"{before} is not what was locked: {changes(moved)}; bring it back, or run without --locked"
            )
    for package, version in now.versions.items():
        if lock.versions.get(package) != version:
            LOG.info(f"note: locked with {package} {lock.versions.get(package)}, and this is {version}")
    return recipe, lock


def keep_lock(lock: Lock, recipe: Path) -> None:
    """Write a lock beside its recipe; where that cannot be, the result has it all the same."""
    path = lock_path(recipe)
    try:
        replace_file(path, lock_text(lock).encode())
    except DapaError as error:
        LOG.info(f"not locked beside the recipe: {error}")
    else:
        LOG.info(f"locked in {path}")


def news_of(recipe: Recipe, path: Path, repository: str | None) -> News:
    """What became of a recipe and its models since it was followed.

    Args:
        recipe: What the file says now.
        path: The file.
        repository: Compare with the lock of the model that was published here, or of a pull request that offers it,
            rather than with the file beside the recipe.

    Raises:
        CheckpointError: If the lock cannot be read.
        HubError: If the Hub does not tell.
    """
    first: News | None = None
    for place, lock in _locks(path, repository):
        news = _compared(recipe, place, lock)
        if not news.is_outdated:
            return news
        first = first or news
    return first or News(None)


def _locks(path: Path, repository: str | None) -> Iterator[tuple[str, Lock]]:
    if repository is not None:
        yield from locks(repository)
    elif (lock := read_lock(lock_path(path))) is not None:
        yield str(lock_path(path)), lock


def _compared(recipe: Recipe, place: str, lock: Lock) -> News:
    if recipe_digest(recipe) != lock.recipe:
        return News(place, recipe_changed=True)
    pairs = [pair for name, place in models_of(recipe).items() for pair in _pairs(name, place, lock.of(name))]
    with task("comparing", sum(num_bytes(location) for _, location, _ in pairs), "bytes"):
        return News(place, False, tuple((role, movement(before, part)) for role, part, before in pairs))


def _pairs(role: str, location: Location, locked: tuple[Upstream, ...]) -> list[tuple[str, Location, Upstream]]:
    pairs = pair_up(location, locked)
    return [(name, part, before) for (name, part), (_, before) in zip(named_parts(role, location), pairs, strict=True)]


def changes(moved: Movement) -> str:
    """Which files differ, for people."""
    what = {"changed": moved.changed, "new": moved.added, "gone": moved.removed}
    return "; ".join(f"{word}: {_few(names)}" for word, names in what.items() if names)


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more


def story(news: News) -> list[str]:
    """What became of a recipe, in lines for people."""
    if news.place is None:
        return ["outdated: there is no lock, which a run would have left"]
    lines = [f"{role} {moved.before}: {_fate(moved)}" for role, moved in news.movements]
    if news.recipe_changed:
        lines.append("the recipe says something else than when it was run")
    verdict = "outdated" if news.is_outdated else "up to date"
    return [*lines, f"{verdict}, by {news.place}"]


def _fate(moved: Movement) -> str:
    before, now = moved.before.commit, moved.commit
    commits = f" ({before[:12]} -> {now[:12]})" if before and now and before != now else ""
    if moved.matters:
        return f"moved{commits}; {changes(moved)}"
    return f"a new commit{commits}, but no file that counts differs" if commits else "as it was"


def locks(repository: str) -> Iterator[tuple[str, Lock]]:
    """The lock of a published model, and those of our own open pull requests, the newest first.

    Raises:
        HubError: If there is no such repository, or the Hub cannot be asked.
        CheckpointError: If what the default branch has is no lock.
    """
    if find(repository) is None:
        raise HubError(f"there is no repository {repository}, or the token may not see it; make it, or mend the name")
    if (lock := _lock(repository, None)) is not None:
        yield f"{repository}/{LOCK_NAME}", lock
    for request in open_requests(repository):
        if (lock := _lock(repository, request.git_reference)) is not None:
            yield request.url, lock


def _lock(repository: str, revision: str | None) -> Lock | None:
    path = _fetched(repository, revision)
    if path is None:
        return None
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise HubError(f"{LOCK_NAME} of {repository} is larger than any lock; it was not made by dapa-merge")
    return parse_lock(content.decode(errors="replace"), f"{repository}/{LOCK_NAME}")


def _fetched(repository: str, revision: str | None) -> str | None:
    """The lock's file as it is there now; None if there is none."""
    from huggingface_hub import hf_hub_download

    info = find(repository, revision)
    if info is None or LOCK_NAME not in {file.rfilename for file in info.siblings or ()}:
        return None
    sha = str(info.sha)
    return str(ask(f"get {LOCK_NAME} of {repository}", lambda: hf_hub_download(repository, LOCK_NAME, revision=sha)))
