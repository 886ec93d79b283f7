"""The commands `dapa-merge demo` and `dapa-merge run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapa_merge.cli_hub_options import licence_options, place_options, push_options, refuse_place_options, silent_client
from dapa_merge.cli_options import (
    allow_pickle_option,
    device_option,
    evaluator_options,
    journal_option,
    json_option,
    link_option,
    manifest_option,
    out_argument,
    recipe_argument,
    refuse_evaluating_options,
    search_options,
    workers_option,
)
from dapa_merge.cli_output import print_answer, print_lines, reporter
from dapa_merge.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from dapa_merge.card_flow import CardOptions
    from dapa_merge.evaluate.options import EvaluatorOptions


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path("dapa-demo"))
@device_option
@json_option
@click.pass_obj
def demo(quiet: bool, out: Path, device: str, as_json: bool) -> None:
    """Repair the packaged miniature model.

    Writes the result to OUT, which must not exist.  [default: dapa-demo]
    """
    import torch

    from dapa_merge.miniature import recipe_text
    from dapa_merge.recipe_file import parse_recipe
    from dapa_merge.report import print_report
    from dapa_merge.run import repair

    # A model this small gains nothing from more threads, and loses much where they have to share their cores.
    torch.set_num_threads(1)
    text = recipe_text()
    if not (as_json or quiet):
        click.echo(f"The recipe:\n\n{text}", err=True)
    recipe = parse_recipe(text, "the miniature's recipe")
    report = repair(recipe, out, options=search_options(device), reporter=reporter(quiet))
    print_answer(report.to_json(), lambda console: print_report(report, console), as_json)


@click.command()
@recipe_argument
@out_argument
@click.option("--no-evaluate", is_flag=True, help="Transplant and verify only; the recipe must name its layers.")
@link_option
@manifest_option
@click.option(
    "--lock/--no-lock",
    default=None,
    help="Write NAME.lock.yml beside RECIPE, and recipe.lock.yml into OUT: commits and SHA-256s of target and source, "
    "and the selection.  [default: --lock, and --no-lock with --no-evaluate]",
)
@click.option(
    "--locked", is_flag=True, help="Use exactly the commits, files and selection of the lock beside RECIPE; no search."
)
@device_option
@journal_option
@workers_option
@evaluator_options
@allow_pickle_option
@click.option("--push", metavar="REPO", help="Publish OUT there afterwards, as `dapa-merge push` does.")
@place_options
@licence_options
@json_option
@click.pass_obj
def run(
    quiet: bool,
    recipe: Path,
    out: Path,
    no_evaluate: bool,
    link: bool,
    manifest: bool,
    lock: bool | None,
    locked: bool,
    device: str,
    journal: Path | None,
    workers: str | None,
    evaluators: EvaluatorOptions,
    allow_pickle: bool,
    push: str | None,
    place: dict[str, Any],
    card: CardOptions,
    as_json: bool,
) -> None:
    """Repair a model from a recipe.

    Writes the repaired target of RECIPE to OUT, which must not exist. Searches for the layers unless the recipe names
    them, transplants, verifies every byte, reports what it did to safety, over-refusal, perplexity and skill, and
    writes a model card.
    """
    from dapa_merge.follow import FollowOptions, follow
    from dapa_merge.recipe_file import load_recipe
    from dapa_merge.report import print_report

    if no_evaluate:
        refuse_evaluating_options()
    if locked and lock is False:
        raise UsageError("--locked goes by the lock, and --no-lock leaves it out; use one of them")
    if push is None:
        refuse_place_options()
    how = FollowOptions(
        keeps_lock=not no_evaluate if lock is None else lock,
        is_locked=locked,
        card=card,
        push=None if push is None else push_options(push, place, card),
    )
    settings: dict[str, Any] = {"evaluate": not no_evaluate, "link": link, "manifest": manifest}
    settings["options"] = search_options(device, journal, workers, evaluators, allow_pickle)
    with silent_client():
        report, published = follow(load_recipe(recipe), recipe, out, how, reporter(quiet), **settings)

    def show(console: Console) -> None:
        print_report(report, console)
        if published is not None:
            from dapa_merge.push_flow import published_lines

            print_lines(console, published_lines(published))

    answer = report.to_json()
    if published is not None:
        from dapa_merge.push_flow import published_json

        answer["published"] = published_json(published)
    print_answer(answer, show, as_json)
