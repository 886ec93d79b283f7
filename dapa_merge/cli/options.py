"""Options and arguments that several commands share, and their output on stdout.

A new option of a run is declared here, in `search_options`, and has its field in `recipe/options.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dapa_merge.errors import UsageError
from dapa_merge.progress import Terminal
from dapa_merge.publish.options import CardOptions, given_license
from dapa_merge.recipe.asking import Asking, ServedModel, sampling_of
from dapa_merge.recipe.options import DTYPES, QUANTIZATIONS, Options, parse_number
from dapa_merge.report.tables import print_lines
from dapa_merge.verify.result import location_option


class FilePath(click.Path):
    """A path, which is not empty: the current folder would be meant by it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert to a `Path`; without a name it is a usage error."""
        if value == "":
            self.fail("it is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


environment_option = functools.partial(click.option, show_envvar=True)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
link_option = click.option(
    "--link",
    is_flag=True,
    help="Hard-link weight files that do not change rather than copy them. They are then the target's own under a "
    "second name: no space, no time, but a program that writes into one of them in place changes both models.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where to evaluate: auto, cpu, cuda, cuda:1, mps, ... With auto, a model that does not fit on the accelerator "
    "is spread over all of them and the CPU.",
)
FITTING = (
    environment_option(
        "--max-memory",
        metavar="LIMITS",
        envvar="DAPA_MAX_MEMORY",
        help="Spread models over these devices only, each up to its limit, as in cuda:0=20GiB,cpu=60GiB; for --device "
        "auto.  [default: what is free]",
    ),
    environment_option(
        "--dtype",
        type=click.Choice(DTYPES),
        envvar="DAPA_DTYPE",
        help="Measure in this arithmetic; what is written keeps the target's.  [default: as the model's config says]",
    ),
    environment_option(
        "--quantize",
        type=click.Choice(tuple(QUANTIZATIONS)),
        envvar="DAPA_QUANTIZE",
        help="Hold models with weights quantized by bitsandbytes (the extra `quantize`). What is written is not "
        "quantized; a report measures it as it is where it fits.",
    ),
)
journal_option = click.option(
    "--journal",
    type=FilePath(),
    help="Write every test of the search here, and go on from what is here.  [default: a file of its own for each "
    "search in the user's cache folder]",
)
workers_of = functools.partial(click.option, "--workers", metavar="ray[:N]")
workers_option = workers_of(
    help="Test N candidates at once in Ray actors, each with a target of its own.  [default: one at a time, here]"
)
pick_option = environment_option(
    "--pick",
    metavar="N",
    type=click.IntRange(1),
    envvar="DAPA_PICK",
    help="Take point N of those that an edit such as directions offers, whatever its figures are, without a search.",
)
evaluator_file_option = environment_option(
    "--evaluator-file",
    type=FilePath(),
    envvar="DAPA_EVALUATOR_FILE",
    help="A Python file of your own that registers evaluators; it is run.",
)
task_file_option = environment_option(
    "--task-file",
    "task_files",
    metavar="FILE",
    type=FilePath(),
    multiple=True,
    envvar="DAPA_TASK_FILE",
    help="A task file of lm-evaluation-harness of your own, whose task a recipe may name; what it names is run. May be "
    "given several times.",
)
judge_model_option = environment_option(
    "--judge-model",
    metavar="NAME",
    envvar="DAPA_JUDGE_MODEL",
    help="Have this model of an OpenAI-compatible endpoint judge every response, besides the rules. The key is read "
    "from OPENAI_API_KEY.",
)
judge_url_option = environment_option(
    "--judge-url",
    metavar="URL",
    envvar="DAPA_JUDGE_URL",
    help="Where the judge's endpoint is, as in http://localhost:8000/v1.  [default: OpenAI's]",
)
judge_requests_option = environment_option(
    "--judge-requests",
    metavar="N",
    envvar="DAPA_JUDGE_REQUESTS",
    help="Ask the judge at most so many times in all; what is left is undecided.",
)
judge_options = (judge_model_option, judge_url_option, judge_requests_option)
allow_pickle_option = environment_option(
    "--allow-pickle",
    is_flag=True,
    envvar="DAPA_ALLOW_PICKLE",
    help="Read weights that there are as pickles only (pytorch_model.bin), as nothing but tensors, and keep them as "
    "safetensors in the user's cache folder.",
)
manifest_option = click.option(
    "--manifest/--no-manifest",
    default=True,
    help="Write dapa.json, with a BLAKE3 digest of every file and changed tensor. Without, writing takes a little less "
    "time, and every byte is read back and compared all the same.  [default: --manifest]",
)
attacks_option = click.option(
    "--attacks",
    metavar="KINDS",
    help="Also measure whether refusal is only a mask, with commas: prefill (DSR with the opening of a compliant "
    "answer already there), system (a system prompt asks for compliance), jailbreak (three disguises of the request), "
    "or files of your own.  [default: as the recipe says, or none]",
)
# What `repair` knows of a pair of models besides their names: parameters of its recipe.
PAIR = (
    click.option(
        "--keep",
        help="Prompts of the kind that the fine-tune is for, without answers: a file, a folder, a Hub dataset, or "
        "skills for the questions of the skills. Without them its skill may be lost.",
    ),
    click.option("--pretrained", metavar="MODEL", help="The model that TARGET and SOURCE were both fine-tuned from."),
    click.option(
        "--prompts",
        default="builtin",
        show_default=True,
        help="Harmful and harmless prompts, as in a recipe: builtin, borderline, miniature, advbench, xstest, a file, "
        "a folder, a Hub dataset, or several with commas.",
    ),
    click.option(
        "--skills", help="What else is tested: files of questions, lm-eval:TASK:METRIC, or several with commas."
    ),
    click.option(
        "--system", metavar="TEXT", help="The system message that TARGET is used with: all prompts follow it."
    ),
    click.option(
        "--chat-template",
        metavar="FILE",
        help="Ask with this chat template in place of the models' own; none asks without one.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        help="Where responses are cut off.  [default: 100; a thought first: 1024]",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        help="Prompts that are answered at once.  [default: chosen automatically]",
    ),
    click.option(
        "--max-tests",
        type=click.IntRange(1),
        metavar="N",
        help="End the search for what can be left out after so many tests; the result is then valid, but not proved "
        "minimal.  [default: no end]",
    ),
)
PAIR_NAMES = (
    "keep", "pretrained", "prompts", "skills", "system", "chat_template", "max_new_tokens", "batch_size", "max_tests",
)  # fmt: skip
ASKING = (
    click.option("--system", metavar="TEXT", help="A system message before every prompt and question."),
    click.option(
        "--chat-template",
        metavar="FILE",
        help="Ask with this chat template in place of the model's own; none asks without one.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0, 10),
        help="Sample the responses at this temperature.  [default: 0, always the likeliest token]",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Sample from the likeliest tokens that hold this probability.  [default: 1]",
    ),
    click.option("--seed", type=int, help="What the samples depend on.  [default: 0]"),
    click.option(
        "--limit",
        metavar="N",
        type=click.IntRange(1),
        help="Ask at most N prompts of each kind and N questions of each skill, spread over all.",
    ),
)
SERVED = (
    click.option(
        "--served",
        metavar="URL",
        help="Measure a model behind this OpenAI-compatible endpoint, as in http://localhost:8000/v1. The key is read "
        "from OPENAI_API_KEY.",
    ),
    click.option(
        "--model", "served_names", metavar="NAME", multiple=True, help="Its name there. May be given several times."
    ),
    click.option(
        "--concurrency",
        metavar="N",
        type=click.IntRange(1, 1024),
        default=8,
        show_default=True,
        help="Requests to the endpoint at once.",
    ),
)
recipe_argument = click.argument("recipe", type=FilePath())
out_argument = click.argument("out", type=FilePath())


# Options that `--no-evaluate` excludes.
EVALUATING_NAMES = (
    "device", "max_memory", "dtype", "quantize", "journal", "workers", "pick", "evaluator_file", "task_files",
    "judge_model", "attacks",
)  # fmt: skip


def evaluator_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of evaluators."""
    return _with_options(command, (evaluator_file_option, task_file_option, *judge_options))


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all options of `Options`, which the command gets as `options`."""
    command = evaluator_options(allow_pickle_option(takes_options(command)))
    return fitting_options(_with_options(command, (journal_option, workers_option, pick_option)))


def fitting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where and in which arithmetic models are measured."""
    return _with_options(command, (device_option, *FITTING))


def takes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a command its options of a run as one `Options`, named `options`.

    Raises:
        UsageError: If a judge's option comes without a judge, `--workers` is not understood, or Ray or bitsandbytes,
            which an option needs, is not installed.
    """

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        if "workers" in given:
            given |= _workers(given.pop("workers"))
        if "judge_model" in given:
            given["judge_requests"] = _judge_requests(**given)
        if given.get("quantize"):
            from dapa_merge.measure.quantized import import_bitsandbytes

            # Fail before the models are read.
            import_bitsandbytes()
        names = [field.name for field in fields(Options) if field.name in given]
        return command(options=Options(**{name: given.pop(name) for name in names}), **given)

    return call


def _judge_requests(judge_model: str | None, judge_requests: str | None, **_: Any) -> int | None:
    for name in ("judge_url", "judge_requests"):
        # In the environment they may be set for other runs, which use a judge.
        if judge_model is None and is_given(name):
            raise UsageError(f"--{name.replace('_', '-')} needs a judge; name its model with --judge-model")
    where = "--judge-requests" if is_given("judge_requests") else "DAPA_JUDGE_REQUESTS"
    return parse_number(judge_requests, where)


def _workers(text: str | None) -> dict[str, Any]:
    engine, colon, number = (text or "").partition(":")
    if text is not None and (engine != "ray" or (colon and not (number.isdecimal() and int(number) > 0))):
        raise UsageError(f"--workers is {text!r}; write ray, or ray:N with the number of workers")
    if text is not None:
        from dapa_merge.search.cluster import import_ray

        # Fail before the models are read.
        import_ray()
    return {"uses_ray": text is not None, "num_workers": int(number) if number else None}


def refuse_options(names: Collection[str], why: str) -> None:
    """Refuse options that would have no effect on this command line.

    Args:
        names: The names of the options' parameters.
        why: The rest of the sentence, after the option.

    Raises:
        UsageError: If one of them is given.
    """
    for parameter in click.get_current_context().command.params:
        if parameter.name in names and is_given(parameter.name):
            raise UsageError(f"{parameter.opts[0]} {why}")


def is_given(name: str) -> bool:
    """Whether an option was given on the command line, rather than in the environment."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


DESTINATION = (
    click.option("--private", is_flag=True, help="Make REPO private, if it is made; refuse a public one."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead; none if one offers the same already."),
    click.option(
        "--revision", "branch", metavar="BRANCH", help="Commit to this branch, which is made if it is not there."
    ),
    click.option("--tag", help="Tag the commit."),
    click.option(
        "--replace", "replaces", is_flag=True, help="Replace a model in REPO that dapa-merge did not publish."
    ),
)
DESTINATION_NAMES = ("private", "create_pr", "branch", "tag", "replaces")
LICENSE = (
    click.option(
        "--license",
        metavar="ID",
        help="The licence of the result, as the Hub calls it: apache-2.0, mit, llama3.1, gemma, ... or other.  "
        "[default: both models' own]",
    ),
    click.option("--license-name", metavar="NAME", help="Its name, for --license other."),
    click.option("--license-link", metavar="URL", help="Where its text is."),
)
MODELS = (
    click.option(
        "--target",
        "published_target",
        metavar="MODEL",
        help="Where the target is published, if it is a folder here: the card then links it. It is compared first.",
    ),
    click.option(
        "--source", "published_source", metavar="MODEL", help="Where the source is published, if it is a folder here."
    ),
)


def destination_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a destination; the command gets them as `destination`, without the repository's id."""

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        return command(destination={name: given.pop(name) for name in DESTINATION_NAMES}, **given)

    return _with_options(call, DESTINATION)


def asking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how models are asked; the command gets one `Asking` as `asking`."""

    @functools.wraps(command)
    def call(system: str | None, chat_template: str | None, limit: int | None, **given: Any) -> Any:
        told = {"temperature": "--temperature", "top_p": "--top-p", "seed": "--seed"}
        sampling = sampling_of(**{name: given.pop(name) for name in told}, told=told)
        if system is not None and not system.strip():
            raise UsageError("--system is empty; write the system message, or leave the option out")
        return command(asking=Asking(system, chat_template, sampling, limit), **given)

    return _with_options(call, ASKING)


def served_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of served models; the command gets these as `served`."""

    @functools.wraps(command)
    def call(served: str | None, served_names: tuple[str, ...], concurrency: int, **given: Any) -> Any:
        if (served is None) == bool(served_names):
            raise UsageError("--served and --model go together: the endpoint's address, and the model's name there")
        if served is None:
            refuse_options(("concurrency",), "is for served models; name one with --served and --model")
        models = tuple(ServedModel(name, served or "", concurrency) for name in served_names)
        return command(served=models, **given)

    return _with_options(call, SERVED)


def pair_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a repair without a recipe; the command gets those that have a value as `parameters`."""

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        found = {name: given.pop(name) for name in PAIR_NAMES}
        return command(parameters={name: value for name, value in found.items() if value is not None}, **given)

    return _with_options(call, PAIR)


def license_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a license; the command gets one `CardOptions` as `card`."""

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        license = given_license(*(given.pop(name) for name in ("license", "license_name", "license_link")))
        return command(card=CardOptions(license=license), **given)

    return _with_options(call, LICENSE)


def card_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a license and of published models; the command gets one `CardOptions` as `card`."""

    @functools.wraps(command)
    def call(card: CardOptions, **given: Any) -> Any:
        target, source = (location_option(given.pop(f"published_{name}"), f"--{name}") for name in ("target", "source"))
        return command(card=replace(card, target=target, source=source), **given)

    return license_options(_with_options(call, MODELS))


def _with_options(command: Callable[..., Any], options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def print_answer(answer: Mapping[str, Any], shown: Iterable[str] | Callable[[Console], object], as_json: bool) -> None:
    """Print an answer: as one JSON object, or for people as lines or by a function."""
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif callable(shown):
        shown(Terminal())
    else:
        print_lines(Terminal(), shown)
