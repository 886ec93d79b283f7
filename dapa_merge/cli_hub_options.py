"""Options of the commands that publish: where, and what the card says."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from dapa_merge.cli_options import is_given
from dapa_merge.errors import UsageError

if TYPE_CHECKING:
    from dapa_merge.card_flow import CardOptions
    from dapa_merge.push_flow import PushOptions

PLACE = (
    click.option("--private", is_flag=True, help="Make REPO private, if it is made; refuse a public one."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead; none if one offers the same already."),
    click.option("--revision", metavar="BRANCH", help="Commit to this branch, which is made if it is not there."),
    click.option("--tag", help="Tag the commit."),
    click.option("--replace", is_flag=True, help="Replace a model in REPO that dapa-merge did not publish."),
)
PLACE_NAMES = ("private", "create_pr", "revision", "tag", "replace")
LICENCE = (
    click.option("--license", "licence", metavar="ID", help="The licence of the result.  [default: both models' own]"),
    click.option("--license-name", metavar="NAME", help="Its name, for --license other."),
    click.option("--license-link", metavar="URL", help="Where its text is."),
)
MODELS = (
    click.option("--target", metavar="MODEL", help="Where the target is published, if the recipe names a folder."),
    click.option("--source", metavar="MODEL", help="Where the source is published, if the recipe names a folder."),
)


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a repository; the command gets them as `place`, to be given to `push_options`."""

    @functools.wraps(command)
    def call(*arguments: Any, **options: Any) -> Any:
        return command(*arguments, place={name: options.pop(name) for name in PLACE_NAMES}, **options)

    for option in reversed(PLACE):
        call = option(call)
    return call


def licence_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a licence; the command gets one `CardOptions` as `card`."""

    @functools.wraps(command)
    def call(*arguments: Any, **options: Any) -> Any:
        from dapa_merge.card_flow import CardOptions
        from dapa_merge.hub.licence import given_licence

        licence = given_licence(*(options.pop(name) for name in ("licence", "license_name", "license_link")))
        return command(*arguments, card=CardOptions(licence=licence), **options)

    for option in reversed(LICENCE):
        call = option(call)
    return call


def card_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a licence, and of models that are published elsewhere than a recipe says; also as `card`."""

    @functools.wraps(command)
    def call(*arguments: Any, card: CardOptions, **options: Any) -> Any:
        from dapa_merge.verify_flow import location_option

        target, source = (location_option(options.pop(name), f"--{name}") for name in ("target", "source"))
        return command(*arguments, card=replace(card, target=target, source=source), **options)

    for option in reversed(MODELS):
        call = option(call)
    return licence_options(call)


def refuse_place_options() -> None:
    """Refuse, without `--push`, what the command line says of publishing.

    Raises:
        UsageError: If there is any of it.
    """
    for name in PLACE_NAMES:
        if is_given(name):
            raise UsageError(f"--{name.replace('_', '-')} is for publishing; name a repository with --push")


def push_options(repository: str, place: dict[str, Any], card: CardOptions, message: str | None = None) -> PushOptions:
    """What the options of a push ask for.

    Raises:
        UsageError: If the repository's id is none.
    """
    from dapa_merge.hub.client import check_id
    from dapa_merge.hub.place import Place
    from dapa_merge.push_flow import PushOptions

    where = Place(
        check_id(repository),
        private=place["private"],
        branch=place["revision"],
        create_pr=place["create_pr"],
        tag=place["tag"],
        replaces=place["replace"],
    )
    return PushOptions(where, replace(card, title=repository), message)


@contextmanager
def silent_client() -> Iterator[None]:
    """Without huggingface_hub's log lines and warnings: what they say, we say."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
            yield
    finally:
        logging.set_verbosity(level)
