"""The command line: parse, call, print. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapa_merge import __version__
from dapa_merge.cli_compare import compare
from dapa_merge.cli_group import Group
from dapa_merge.cli_hub import card, gate, outdated, push
from dapa_merge.cli_options import (
    allow_pickle_option,
    device_option,
    evaluator_options,
    journal_option,
    json_option,
    recipe_argument,
    search_options,
    workers_option,
)
from dapa_merge.cli_output import print_answer, reporter
from dapa_merge.cli_patch import patch
from dapa_merge.cli_run import demo, run
from dapa_merge.cli_trace import trace
from dapa_merge.cli_verify import verify
from dapa_merge.new_file import new_file

if TYPE_CHECKING:
    from rich.console import Console

    from dapa_merge.evaluate.options import EvaluatorOptions


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Exit codes: 0 done, 1 another fault, 2 usage or bad recipe, 3 the source
cannot repair this target, 4 bad checkpoint or result, 5 the Hub said no, 6 a
gate failed, 10 outdated, 130 stopped by Ctrl-C, 143 by SIGTERM (compare).""",
)
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.version_option(__version__, prog_name="dapa-merge")
@click.pass_context
def main(context: click.Context, debug: bool, quiet: bool) -> None:
    """Give a fine-tuned model its safety back.

    Copies MLP gate projections from an aligned model (the source) into an unaligned one of the same family (the
    target), after a search for the few layers that are needed (DAPA, arXiv 2406.01514).
    """
    context.obj = quiet
    if quiet or not sys.stderr.isatty():
        _disable_client_bars()
    for stream in (sys.stdout, sys.stderr):
        # A path may hold characters that the terminal's encoding does not.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _disable_client_bars() -> None:
    """huggingface_hub's bars, which in a log are lines and lines; whoever set its variable may have meant them."""
    if os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1") != "0" and "huggingface_hub" in sys.modules:
        # It read the variable when it was imported.
        sys.modules["huggingface_hub"].utils.disable_progress_bars()


@main.command()
@recipe_argument
@allow_pickle_option
@json_option
def plan(recipe: Path, allow_pickle: bool, as_json: bool) -> None:
    """Show what RECIPE would transplant, without loading a model."""
    from dapa_merge.plan_view import plan_json, print_plan
    from dapa_merge.recipe_file import load_recipe
    from dapa_merge.selection import given_selection, make_plan

    parsed = load_recipe(recipe)
    made = make_plan(parsed, partial_target=True, allow_pickle=allow_pickle)
    selection = given_selection(parsed, made)
    print_answer(plan_json(made, selection), lambda console: print_plan(made, selection, console), as_json)


@main.command()
@recipe_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write a recipe that transplants what was found, unsearched, to this new file.",
)
@device_option
@journal_option
@workers_option
@evaluator_options
@allow_pickle_option
@json_option
@click.pass_obj
def search(
    quiet: bool,
    recipe: Path,
    out: Path | None,
    device: str,
    journal: Path | None,
    workers: str | None,
    evaluators: EvaluatorOptions,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Find the few layers that are needed.

    Searches as `run` does, whatever layers RECIPE names, and shows for each layer found that it is needed. Writes no
    model.
    """
    from dapa_merge.recipe_file import load_recipe
    from dapa_merge.run import replay_text
    from dapa_merge.search_flow import search_plan
    from dapa_merge.search_view import print_search, search_json
    from dapa_merge.selection import make_plan

    with _kept_in(out) as keep:
        parsed = load_recipe(recipe)
        options = search_options(device, journal, workers, evaluators, allow_pickle)
        made = make_plan(parsed, allow_pickle=allow_pickle)
        found = search_plan(parsed, made, options, reporter(quiet))
        replay = replay_text(parsed, made, found.minimum.units)

        def show(console: Console) -> None:
            print_search(found, made, console)
            if out is None:
                # Not through rich, which would fold its long lines.
                click.echo(f"\nThe recipe that replays it:\n\n{replay}", nl=False)

        try:
            keep(replay)
        finally:
            print_answer({**search_json(found, made), "recipe": replay}, show, as_json)


@main.command()
@click.argument("model")
@click.option(
    "--prompts",
    default="builtin",
    show_default=True,
    help="What is asked: builtin, miniature, advbench, harmbench, jailbreakbench, xstest, or-bench, or-bench-hard, "
    "or-bench-80k, or-bench-toxic, a file, a folder, a Hub dataset, or several with commas.",
)
@click.option("--evaluator", default="refusal", show_default=True, help="Also score it by this one, as in a recipe.")
@click.option("--text", help="What perplexity is taken of: builtin, auto, a file or a Hub dataset.  [default: auto]")
@click.option("--skills", help="What else is tested: files of questions, lm-eval:TASK:METRIC, or several with commas.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Where responses are cut off.  [default: 100; evaluator paper: 350]",
)
@click.option("--batch-size", type=click.IntRange(1), help="Prompts that are answered at once.  [default: found]")
@click.option(
    "--responses", type=click.Path(path_type=Path), help="Write every prompt, response and verdict here, as JSON lines."
)
@evaluator_options
@allow_pickle_option
@device_option
@json_option
@click.pass_obj
def evaluate(
    quiet: bool,
    model: str,
    prompts: str,
    evaluator: str,
    text: str | None,
    skills: str | None,
    max_new_tokens: int | None,
    batch_size: int | None,
    responses: Path | None,
    evaluators: EvaluatorOptions,
    allow_pickle: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure the safety and skill of any model.

    MODEL is a folder or a Hub id, or id@revision. Prints DSR and over-refusal with intervals, also by category,
    perplexity and skills.
    """
    from dataclasses import asdict

    from dapa_merge.figures_view import categories_table, figures_table
    from dapa_merge.report import jsonable
    from dapa_merge.run import evaluate_model, responses_text

    settings: dict[str, Any] = {"evaluator": evaluator, "text": text, "skills": skills}
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "allow_pickle": allow_pickle}
    with _kept_in(responses) as keep:
        measured = evaluate_model(model, prompts, device, reporter(quiet), evaluators, **settings, **limits)

        def show(console: Console) -> None:
            console.print(figures_table([model], [measured.figures]))
            console.print(f"perplexity of {measured.figures.text}", highlight=False, markup=False, soft_wrap=True)
            if table := categories_table([model], [measured.figures]):
                console.print(table)

        try:
            keep(responses_text({model: measured.responses}))
        finally:
            print_answer(jsonable(asdict(measured.figures)), show, as_json)


def _kept_in(path: Path | None) -> AbstractContextManager[Callable[[str], None]]:
    """Gives what writes the file that a user may have asked for."""
    return nullcontext(lambda _: None) if path is None else new_file(path)


main.add_command(demo)
main.add_command(run)
main.add_command(trace)
main.add_command(compare)
main.add_command(verify)
main.add_command(patch)
main.add_command(card)
main.add_command(push)
main.add_command(gate)
main.add_command(outdated)
