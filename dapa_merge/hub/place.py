"""A repository to publish in: what it is now, and whether it may be written to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dapa_merge.errors import HubError, UsageError
from dapa_merge.hub.client import LOG_IN, api, ask, status_of

MAIN = "main"
# By this file a repository is known as one that dapa-merge published.
OURS = "dapa.json"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


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


def check_place(place: Place) -> Any:
    """Look at a repository before anything costly is done for it.

    Returns:
        What the Hub says of it; None if it is not there.

    Raises:
        UsageError: If it is there and public, but should be private; if options contradict each other.
        HubError: If it holds another model, the token may not write there, or the Hub does not answer.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    if place.create_pr and (place.branch or place.tag):
        what = "--revision" if place.branch else "--tag"
        raise UsageError(f"--create-pr offers a change to the default branch and has no use for {what}; leave out one")

    def found() -> Any:
        try:
            return api().model_info(place.repository)
        except RepositoryNotFoundError as error:
            # With a token, 401 is said of the token: it is not accepted, not even for what is public.
            if status_of(error) == 401:
                raise HubError(f"the Hub does not accept the token; {LOG_IN}") from error
            return None

    info = ask(f"look at {place.repository}", found)
    if info is None:
        return None
    if place.private and not info.private:
        raise UsageError(f"{place.repository} exists and is public; leave out --private, or name another repository")
    if not place.create_pr and not place.replaces:
        _refuse_other_model(place.repository, {file.rfilename for file in info.siblings or ()})
    return info


def _refuse_other_model(repository: str, names: set[str]) -> None:
    if OURS not in names and any(name.endswith(WEIGHTS) for name in names):
        raise HubError(
            f"{repository} exists and holds a model that dapa-merge did not publish; name another repository, offer a "
            f"pull request with --create-pr, or replace it with --replace"
        )


def head_of(repository: str, revision: str) -> Head:
    """A revision's commit, and its files at exactly that commit."""
    from huggingface_hub.hf_api import RepoFile

    what = f"list the files of {repository}"
    commit = str(ask(what, lambda: api().model_info(repository, revision=revision)).sha)
    tree = ask(what, lambda: list(api().list_repo_tree(repository, recursive=True, expand=False, revision=commit)))
    return Head(commit, {file.path: file for file in tree if isinstance(file, RepoFile)})
