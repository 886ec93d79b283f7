"""Options and arguments that several commands share.

Options of the commands that publish: where, and what the card says.

How commands speak: an answer on stdout, for people or programs, and progress on stderr.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapa_merge.errors import UsageError, printable
from dapa_merge.recipe.options import Options, parse_requests

if TYPE_CHECKING:
    from rich.console import Console

    from dapa_merge.publish.push import PushOptions
    from dapa_merge.publish.write_card import CardOptions
    from dapa_merge.recipe.options import Options


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
link_option = click.option(
    "--link",
    is_flag=True,
    help="Hard-link weight files that do not change rather than copy them. They are then the target's own under a "
    "second name: no space, no time, but a program that writes into one of them in place changes both models.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="Where to evaluate: auto, cpu, cuda, cuda:1, mps, ..."
)
journal_option = click.option(
    "--journal",
    type=click.Path(path_type=Path),
    help="Write every test of the search here, and go on from what is here.  [default: a file of its own for each "
    "search in the user's cache folder]",
)
workers_option = click.option(
    "--workers",
    metavar="ray[:N]",
    help="Test N candidates at once in Ray actors, each with a target of its own.  [default: one at a time, here]",
)
evaluator_file_option = click.option(
    "--evaluator-file",
    type=click.Path(path_type=Path),
    envvar="DAPA_EVALUATOR_FILE",
    show_envvar=True,
    help="A Python file of your own that registers evaluators; it is run.",
)
judge_model_option = click.option(
    "--judge-model",
    metavar="NAME",
    envvar="DAPA_JUDGE_MODEL",
    show_envvar=True,
    help="Have this model of an OpenAI-compatible endpoint judge every response, beside the rules. The key is read "
    "from OPENAI_API_KEY.",
)
judge_url_option = click.option(
    "--judge-url",
    metavar="URL",
    envvar="DAPA_JUDGE_URL",
    show_envvar=True,
    help="Where the judge's endpoint is, as in http://localhost:8000/v1.  [default: OpenAI's]",
)
judge_requests_option = click.option(
    "--judge-requests",
    metavar="N",
    envvar="DAPA_JUDGE_REQUESTS",
    show_envvar=True,
    help="Ask the judge at most so many times in all; what is left is undecided.",
)
allow_pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    envvar="DAPA_ALLOW_PICKLE",
    show_envvar=True,
    help="Read weights that there are as pickles only (pytorch_model.bin), as nothing but tensors, and keep them as "
    "safetensors in the user's cache folder.",
)
manifest_option = click.option(
    "--manifest/--no-manifest",
    default=True,
    help="Write dapa.json, with a SHA-256 of every file and changed tensor. Hashing takes as long again as copying "
    "where the disk is fast; without, every byte is read back and compared all the same.  [default: --manifest]",
)
recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
out_argument = click.argument("out", type=click.Path(path_type=Path))


EVALUATOR_NAMES = ("evaluator_file", "judge_model", "judge_url", "judge_requests")


def evaluator_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of evaluators."""
    for option in (judge_requests_option, judge_url_option, judge_model_option, evaluator_file_option):
        command = option(command)
    return command


def takes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one `Options` as `options`, made of those options of a run that it has.

    Raises:
        UsageError: If a judge's option comes without a judge, `--workers` is not understood, or Ray is not installed.
    """

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        names = ("device", "journal", "allow_pickle")
        made: dict[str, Any] = {name: given.pop(name) for name in names if name in given}
        if "judge_model" in given:
            made |= _evaluators(**{name: given.pop(name) for name in EVALUATOR_NAMES})
        if "workers" in given:
            made |= _workers(given.pop("workers"))
        return command(options=Options(**made), **given)

    return call


def _evaluators(judge_requests: str | None, **given: Any) -> dict[str, Any]:
    for name in ("judge_url", "judge_requests"):
        # In the environment they may stand for the days when there is a judge.
        if given["judge_model"] is None and is_given(name):
            raise UsageError(f"--{name.replace('_', '-')} needs a judge; name its model with --judge-model")
    where = "--judge-requests" if is_given("judge_requests") else "DAPA_JUDGE_REQUESTS"
    return {**given, "judge_requests": parse_requests(judge_requests, where)}


def _workers(text: str | None) -> dict[str, Any]:
    engine, colon, number = (text or "").partition(":")
    if text is not None and (engine != "ray" or (colon and not (number.isdecimal() and int(number) > 0))):
        raise UsageError(f"--workers is {text!r}; write ray, or ray:N with the number of workers")
    if text is not None:
        from dapa_merge.search.workers import import_ray

        # Before the models are read.
        import_ray()
    return {"uses_ray": text is not None, "num_workers": int(number) if number else None}


def refuse_evaluating_options() -> None:
    """Refuse, with `--no-evaluate`, what the command line says of evaluating: whoever says it counts on it.

    Raises:
        UsageError: If there is any of it.
    """
    for name in ("device", "journal", "workers", "evaluator_file", "judge_model"):
        if is_given(name):
            raise UsageError(f"--{name.replace('_', '-')} is for evaluating; leave out either it or --no-evaluate")


def is_given(name: str) -> bool:
    """Whether an option stands on the command line, rather than in the environment."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


PLACE = (
    click.option("--private", is_flag=True, help="Make REPO private, if it is made; refuse a public one."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead; none if one offers the same already."),
    click.option("--revision", metavar="BRANCH", help="Commit to this branch, which is made if it is not there."),
    click.option("--tag", help="Tag the commit."),
    click.option("--replace", is_flag=True, help="Replace a model in REPO that dapa-merge did not publish."),
)
PLACE_NAMES = ("private", "create_pr", "revision", "tag", "replace")
LICENSE = (
    click.option("--license", metavar="ID", help="The licence of the result.  [default: both models' own]"),
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


def license_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a license; the command gets one `CardOptions` as `card`."""

    @functools.wraps(command)
    def call(*arguments: Any, **options: Any) -> Any:
        from dapa_merge.publish.parents import given_license
        from dapa_merge.publish.write_card import CardOptions

        license = given_license(*(options.pop(name) for name in ("license", "license_name", "license_link")))
        return command(*arguments, card=CardOptions(license=license), **options)

    for option in reversed(LICENSE):
        call = option(call)
    return call


def card_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a license, and of models that are published elsewhere than a recipe says; also as `card`."""

    @functools.wraps(command)
    def call(*arguments: Any, card: CardOptions, **options: Any) -> Any:
        from dapa_merge.verify.result import location_option

        target, source = (location_option(options.pop(name), f"--{name}") for name in ("target", "source"))
        return command(*arguments, card=replace(card, target=target, source=source), **options)

    for option in reversed(MODELS):
        call = option(call)
    return license_options(call)


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
    from dapa_merge.hub_client import check_id
    from dapa_merge.publish.commit import Destination as Place
    from dapa_merge.publish.push import PushOptions

    where = Place(
        check_id(repository),
        private=place["private"],
        branch=place["revision"],
        create_pr=place["create_pr"],
        tag=place["tag"],
        replaces=place["replace"],
    )
    return PushOptions(where, replace(card, title=repository), message)


def print_answer(answer: Mapping[str, Any], show: Callable[[Console], object], as_json: bool) -> None:
    """Print an answer as one JSON object, or as `show` shows it."""
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    from rich.console import Console

    show(Console())


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are, however long; what they quote may be a stranger's."""
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
