"""The commands that plan, search, measure and repair: `plan`, `search`, `evaluate`, `demo`, `run` and `repair`."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.cli.options import (
    DESTINATION_NAMES,
    EVALUATING_NAMES,
    PAIR_NAMES,
    FilePath,
    allow_pickle_option,
    asking_options,
    attacks_option,
    card_options,
    destination_options,
    device_option,
    evaluator_options,
    fitting_options,
    json_option,
    link_option,
    manifest_option,
    out_argument,
    pair_options,
    print_answer,
    recipe_argument,
    refuse_options,
    search_options,
    served_options,
    takes_options,
)
from dapa_merge.errors import CannotRepair, DapaError, UsageError
from dapa_merge.files import new_file, replace_file
from dapa_merge.imports import lasting
from dapa_merge.measure.figures import Figures, responses_text
from dapa_merge.miniature import path, recipe_text
from dapa_merge.plan.directions import FILE_NAME
from dapa_merge.plan.edit import may_choose
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.plan.plan import reduced
from dapa_merge.progress import LOG, Terminal, collected, quiet
from dapa_merge.publish.options import CardOptions, Destination
from dapa_merge.recipe.asking import Asking, ServedModel
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, pair_recipe, parse_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.report import Report, jsonable
from dapa_merge.report.tables import (
    ladder_json,
    print_evaluated,
    print_ladder,
    print_lines,
    print_report,
    print_search,
    search_json,
)
from dapa_merge.transplant.manifest import PAGE_NAME
from dapa_merge.verify.result import location_option

if TYPE_CHECKING:
    from dapa_merge.measure.meter import MeasuredModel


@click.command()
@click.argument("recipe", metavar="RECIPE|TARGET", type=FilePath())
@click.argument("source", required=False)
@pair_options
@evaluator_options
@allow_pickle_option
@fitting_options
@json_option
@takes_options
def plan(recipe: Path, source: str | None, parameters: dict[str, Any], options: Options, as_json: bool) -> None:
    """Show what RECIPE would change and what that takes, without loading a model.

    With TARGET and SOURCE in its place, and the options of `repair`, shows what that would try. Time is estimated by a
    short calibration on the device.
    """
    if source is None:
        refuse_options(PAIR_NAMES, "is for TARGET and SOURCE; a recipe has a parameter of that name")
        if recipe.is_dir():
            raise UsageError(f"{recipe} is a folder, not a recipe; if it is a model to repair, name its SOURCE, too")
        parsed = load_recipe(recipe)
    else:
        _check_pair(str(recipe), source)
        parsed = pair_recipe(str(recipe), source, parameters)
    ladder = make_ladder(parsed, partial_target=True, allow_pickle=options.allow_pickle)
    with lasting():
        from dapa_merge.measure.prompts.parts import check_prompts
        from dapa_merge.search.forecast import forecast

    check_prompts(parsed)
    expected = forecast(ladder, options)

    def show(console: Console) -> None:
        print_ladder(ladder, console)
        print_lines(console, [f"{'a run takes':<24}{expected}"])

    print_answer({**ladder_json(ladder), "forecast": expected.to_json()}, show, as_json)


@click.command()
@recipe_argument
@click.option(
    "--out",
    type=FilePath(),
    help="Write a recipe that repeats what was found, without a search, to this new file; chosen directions beside it.",
)
@search_options
@json_option
def search(recipe: Path, out: Path | None, options: Options, as_json: bool) -> None:
    """Find the few layers that are needed.

    Searches as `run` does, whatever layers RECIPE names, and shows for each layer found that it is needed. Writes no
    model.
    """
    with lasting():
        from dapa_merge.report.replay import replay_text
        from dapa_merge.search.ladder import search_ladder

    with _kept_in(out) as keep:
        parsed = load_recipe(recipe)
        if out is not None and may_choose(parsed.edit) and (beside := out.with_name(FILE_NAME)).exists():
            raise UsageError(f"{beside} exists, and would hold what is chosen; name a file in another folder")
        climbed = search_ladder(make_ladder(parsed, allow_pickle=options.allow_pickle), options)
        found = climbed.search
        if options.quantize is not None:
            LOG.warning(
                f"found with weights in {options.quantize}, and not checked in 16 bits; `dapa-merge run` on the recipe "
                f"that replays it measures that"
            )
        files = reduced(found.plan, found.minimum.units).edit.files()
        replay = replay_text(climbed.recipe, found.plan, found.minimum.units)

        def show(console: Console) -> None:
            print_lines(console, map(str, climbed.rungs))
            print_search(found, found.plan, console)
            if out is None:
                # Not through rich, which would fold its long lines.
                click.echo(f"\nThe recipe that replays it:\n\n{replay}", nl=False)
                if files:
                    click.echo("\nWhat it reads was not written; name a file with --out.")

        try:
            if out is not None:
                for name, content in files.items():
                    replace_file(out.with_name(name), content)
            keep(replay)
        finally:
            rungs = {"rungs": [asdict(rung) for rung in climbed.rungs]} if climbed.rungs else {}
            print_answer({**search_json(found, found.plan), **rungs, "recipe": replay}, show, as_json)


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--prompts",
    default="builtin",
    show_default=True,
    help="What is asked: builtin, borderline, miniature, advbench, jailbreakbench, harmbench, xstest, or-bench, "
    "or-bench-hard, or-bench-80k, or-bench-toxic, a file, a folder, a Hub dataset, or several with commas.",
)
@click.option("--evaluator", default="refusal", show_default=True, help="Also score it by this one, as in a recipe.")
@click.option("--text", help="What perplexity is taken of: builtin, auto, a file or a Hub dataset.  [default: auto]")
@click.option("--skills", help="What else is tested: files of questions, lm-eval:TASK:METRIC, or several with commas.")
@attacks_option
@asking_options
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Where responses are cut off.  [default: 100; evaluator paper: 350; a thought first: 1024]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), help="Prompts that are answered at once.  [default: chosen automatically]"
)
@served_options
@click.option("--responses", type=FilePath(), help="Write every prompt, response and verdict here, as JSON lines.")
@evaluator_options
@allow_pickle_option
@fitting_options
@json_option
@takes_options
def evaluate(
    models: tuple[str, ...],
    prompts: str,
    responses: Path | None,
    served: Sequence[ServedModel],
    asking: Asking,
    options: Options,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure the safety and skill of any models.

    MODEL is a folder or a Hub id, or id@revision; several are measured one after the other on the same prompts, and
    each is compared with the first. --served measures a model behind an OpenAI-compatible endpoint. Prints DSR and
    over-refusal with intervals, also by category, perplexity and skills.
    """
    if not (models or served):
        raise UsageError("no model: name a folder or a Hub id, or a served one with --served and --model")
    with lasting():
        from dapa_merge.measure.evaluate import evaluate_models

    told: dict[str, MeasuredModel] = {}
    arithmetic = options.where.arithmetic
    said = [] if arithmetic is None else [f"arithmetic: {arithmetic}"]
    with _kept_in(responses) as keep:
        try:
            found = evaluate_models(
                [*models, *served], prompts, options, asking=asking, tell=told.__setitem__, **settings
            )
        except BaseException:
            if told:
                # What was measured until then is not lost.
                keep(_responses_text(told))
                print_answer({}, lambda console: print_evaluated(_figures(told), {}, console), as_json=False)
            raise
        try:
            keep(_responses_text(told))
        finally:
            print_answer(
                {**jsonable(found.to_json()), **({} if arithmetic is None else {"arithmetic": arithmetic})},
                lambda console: print_evaluated(_figures(told), found.changes, console, [*asking.lines(), *said]),
                as_json,
            )


def _figures(measured: Mapping[str, MeasuredModel]) -> dict[str, Figures]:
    return {name: one.figures for name, one in measured.items()}


def _responses_text(measured: Mapping[str, MeasuredModel]) -> str:
    return responses_text({name: one.responses for name, one in measured.items()})


def _kept_in(path: Path | None) -> AbstractContextManager[Callable[[str], None]]:
    """Yields a function that writes to `path`, or does nothing without one."""
    return nullcontext(lambda _: None) if path is None else new_file(path)


@click.command()
@click.argument("out", type=FilePath(), default=Path("dapa-demo"))
@device_option
@json_option
@takes_options
def demo(out: Path, options: Options, as_json: bool) -> None:
    """Repair the packaged miniature models.

    Two pairs: one that copied gate projections repair, whose result is written to OUT, and one that takes the edit
    directions, whose result is written next to it, to OUT-shadow. Neither may exist.  [default: dapa-demo]
    """
    from dapa_merge.transplant.result import check_destination

    is_told = not (as_json or click.get_current_context().find_root().params["quiet"])

    def tell(report: Report, folder: Path) -> None:
        if not as_json:
            print_report(report, Terminal())
            print_next(folder, Terminal(), is_demo=True)
            click.echo()

    def tell_recipe(pair: str) -> None:
        if is_told:
            click.echo(f"The recipe:\n\n{recipe_text(pair)}", err=True)

    other_out = out.with_name(f"{out.name}-shadow")
    for pair, folder in (("", out), ("shadow-", other_out)):
        check_destination(folder, open_checkpoint(str(path(f"{pair}target"))))
    tell_recipe("")
    # Both at once, each on one core: models this small gain nothing from more. Torch reads the variable.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with _aside("shadow-", other_out, options) as outcome:
        first = _repaired("", out, options)
        tell(first, out)
        tell_recipe("shadow-")
        second, lines = outcome()
    if is_told:
        click.echo("\n".join(lines), err=True)
    tell(second, other_out)
    if as_json:
        print_answer({**first.to_json(), "shadow": second.to_json()}, (), as_json)


def print_next(out: Path, console: Console, *, is_published: bool = False, is_demo: bool = False) -> None:
    """Print what can be done with a result."""
    from dapa_merge.publish.write_card import existing_card

    place = shlex.quote(str(out))
    # The miniature knows nothing longer than a message.
    steps = [f"talk to it and its target: dapa-merge chat {place} --before{' --single' if is_demo else ''}"]
    if (out / PAGE_NAME).is_file():
        steps.insert(0, f"read what the models said, in a browser: {out / PAGE_NAME}")
    if not is_published:
        # What nobody said yet, and a card should say.
        card = existing_card(out).metadata
        wanted = {"license": " --license ID", "base_model": " --target ID --source ID"}
        more = "".join(options for key, options in wanted.items() if key not in card)
        steps.append(f"publish it on the Hub: dapa-merge push {place} YOU/YOUR-MODEL{more}")
    print_lines(console, [f"{'' if number else 'next':<20}{step}" for number, step in enumerate(steps)])


def _repaired(pair: str, out: Path, options: Options) -> Report:
    from dapa_merge.flow import repair

    return repair(parse_recipe(recipe_text(pair), "the miniature's recipe"), out, options=options)


@contextmanager
def _aside(pair: str, out: Path, options: Options) -> Iterator[Callable[[], tuple[Report, list[str]]]]:
    """Do as `_repaired` in a process of its own, which ends with the block; also yields what it would have said."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_repaired, args=(sender, pair, out, options), daemon=True)
    process.start()
    sender.close()

    def outcome() -> tuple[Report, list[str]]:
        try:
            found: tuple[Report, list[str]] | Exception = receiver.recv()
        except EOFError:
            raise DapaError(f"the process that repairs {out} ended before it was done; name other folders") from None
        if isinstance(found, Exception):
            raise found
        return found

    try:
        yield outcome
    finally:
        process.terminate()
        process.join()


def _send_repaired(sender: Connection, pair: str, out: Path, options: Options) -> None:
    # Ctrl-C goes to both processes of a terminal; the other one says so, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with collected() as lines:
        try:
            sender.send((_repaired(pair, out, options), lines))
        except (DapaError, OSError) as error:
            sender.send(error)


@click.command()
@recipe_argument
@out_argument
@click.option("--no-evaluate", is_flag=True, help="Write and verify only; the recipe must name its layers.")
@link_option
@manifest_option
@click.option(
    "--lock/--no-lock",
    default=None,
    help="Write NAME.lock.yml next to RECIPE, and recipe.lock.yml into OUT: commits and SHA-256s of target and source, "
    "and the selection.  [default: --lock, and --no-lock with --no-evaluate]",
)
@click.option(
    "--locked", is_flag=True, help="Use exactly the commits, files and selection of the lock next to RECIPE; no search."
)
@attacks_option
@search_options
@click.option("--push", metavar="REPO", help="Publish OUT there afterwards, as `dapa-merge push` does.")
@destination_options
@card_options
@json_option
def run(
    recipe: Path,
    out: Path,
    no_evaluate: bool,
    link: bool,
    manifest: bool,
    lock: bool | None,
    locked: bool,
    attacks: str | None,
    options: Options,
    push: str | None,
    destination: dict[str, Any],
    card: CardOptions,
    as_json: bool,
) -> None:
    """Repair a model from a recipe.

    Writes the repaired target of RECIPE to OUT, which must be absent or empty. Searches for the layers unless the
    recipe names them, edits a copy of the target, verifies every byte, reports what it did to safety, over-refusal,
    perplexity and skill, and writes a model card.
    """
    if no_evaluate:
        refuse_options(EVALUATING_NAMES, "is for evaluating; leave out either it or --no-evaluate")
    if locked and lock is False:
        raise UsageError("--locked uses the lock, and --no-lock leaves it out; use only one of them")
    published = _destination(push, destination)
    parsed = load_recipe(recipe)
    if attacks is not None:
        parsed = replace(parsed, attacks=attacks)
    _run_and_print(
        parsed,
        recipe,
        out,
        as_json,
        keeps_lock=not no_evaluate if lock is None else lock,
        is_locked=locked,
        card=card,
        destination=published,
        evaluate=not no_evaluate,
        link=link,
        manifest=manifest,
        options=options,
    )


@click.command()
@click.argument("target")
@click.argument("source")
@out_argument
@pair_options
@link_option
@manifest_option
@search_options
@click.option("--push", metavar="REPO", help="Publish OUT there afterwards, as `dapa-merge push` does.")
@destination_options
@card_options
@json_option
def repair(
    target: str,
    source: str,
    out: Path,
    link: bool,
    manifest: bool,
    options: Options,
    push: str | None,
    destination: dict[str, Any],
    card: CardOptions,
    parameters: dict[str, Any],
    as_json: bool,
) -> None:
    """Repair TARGET with SOURCE, without a recipe.

    TARGET is the fine-tune that answers too much, SOURCE the aligned model of the same family and size: folders or Hub
    ids, also id@revision. Writes the repaired TARGET to OUT, which must be absent or empty, and leaves both as they
    are. Give it some prompts of what TARGET is for, a line each:

    \b
    dapa-merge repair my-fine-tune its-aligned-sibling out --keep my_prompts.txt

    Tries one edit after the other, as a recipe with `edit: auto` does, and takes the first whose result refuses enough
    and keeps the rest: one matrix of each layer (the gate projection) copied from SOURCE; with --pretrained, what was
    trained into SOURCE; a change along directions of the difference. Says why the others did not, and writes what `run`
    writes, and the recipe that repeats it.
    """  # noqa: D301  click needs the character.
    _check_pair(target, source)
    published = _destination(push, destination)
    _run_and_print(
        pair_recipe(target, source, parameters),
        None,
        out,
        as_json,
        card=card,
        destination=published,
        link=link,
        manifest=manifest,
        options=options,
    )


def _check_pair(target: str, source: str) -> None:
    """Refuse what names no models, and warn of a pair that seems to be swapped."""
    with lasting():
        from dapa_merge.inspect.inspection import warn_of_swap

    warn_of_swap(location_option(target, "TARGET"), location_option(source, "SOURCE"))


def _destination(push: str | None, destination: dict[str, Any]) -> Destination | None:
    """Where to publish; without a repository, options for publishing are refused."""
    if push is None:
        refuse_options(DESTINATION_NAMES, "is for publishing; name a repository with --push")
        return None
    return Destination(push, **destination)


def _run_and_print(recipe: Recipe, path: Path | None, out: Path, as_json: bool, **settings: Any) -> None:
    """Call `run_recipe`, and print its report."""
    with lasting():
        from dapa_merge.flow import run_recipe

    try:
        with quiet("huggingface_hub", bars=True):
            report, published = run_recipe(recipe, path, out, **settings)
    except CannotRepair:
        words = ["dapa-merge", "inspect", str(recipe.target), str(recipe.source)]
        LOG.info(f"how the two differ, and what may help: {shlex.join(words)}")
        raise

    def show(console: Console) -> None:
        print_report(report, console)
        if published is not None:
            print_lines(console, published.lines())
        print_next(out, console, is_published=published is not None)

    answer = report.to_json()
    if published is not None:
        answer["published"] = published.to_json()
    print_answer(answer, show, as_json)
