"""A repository to publish in: what it is now, and whether it may be written to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dapa_merge.checkpoint.weights import WEIGHTS
from dapa_merge.errors import HubError, UsageError
from dapa_merge.hub.client import api, ask, find

MAIN = "main"
# By one of these, or its card's tag, a model is known as one that dapa-merge published.
OURS = ("dapa.json", "recipe.lock.yml")


@dataclass(frozen=True)
class Place:
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


def check_options(place: Place) -> None:
    """Raise `UsageError` if what is asked contradicts itself; asks nobody."""
    for option, value in (("--revision", place.branch), ("--tag", place.tag)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} is empty; leave it out, or name one")
        if value is not None and place.create_pr:
            raise UsageError(
                f"--create-pr offers a change to the default branch and has no use for {option}; leave out one"
            )


def check_place(place: Place) -> bool:
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


def refuse_other_model(place: Place, info: Any) -> None:
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
