"""The command `dapa-merge compare`."""

from __future__ import annotations

import itertools
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dapa_merge.cli_options import (
    allow_pickle_option,
    device_option,
    evaluator_options,
    json_option,
    search_options,
)
from dapa_merge.cli_output import print_answer, print_lines, reporter
from dapa_merge.compare.options import METHODS, CompareOptions
from dapa_merge.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from dapa_merge.compare.flow import Compared
    from dapa_merge.evaluate.options import EvaluatorOptions

DEFAULTS = CompareOptions()


@click.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder for tables and pictures.")
@click.option(
    "--methods",
    metavar="LIST",
    help=f"What to compare beside target and source, with commas: {', '.join(METHODS)}.  [default: all]",
)
@click.option(
    "--seeds",
    type=click.IntRange(0),
    default=DEFAULTS.num_seeds,
    show_default=True,
    help="Random selections of each size.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=DEFAULTS.seed, show_default=True, help="The first of their seeds."
)
@click.option(
    "--weights",
    metavar="LIST",
    help=f"Weights of the source in mergekit's methods, with commas.  [default: "
    f"{', '.join(f'{weight:g}' for weight in DEFAULTS.weights)}]",
)
@click.option("--no-curve", is_flag=True, help="Leave out the edits of every size.")
@click.option(
    "--points",
    type=click.IntRange(2),
    default=DEFAULTS.num_points,
    show_default=True,
    help="Sizes of edits, roughly.",
)
@click.option(
    "--block-rows",
    type=click.IntRange(1),
    help="Rows (neurons) of the smallest edit.  [default: a sixteenth of a projection]",
)
@device_option
@evaluator_options
@allow_pickle_option
@json_option
@click.pass_obj
def compare(
    quiet: bool,
    recipes: tuple[Path, ...],
    out: Path,
    methods: str | None,
    seeds: int,
    seed: int,
    weights: str | None,
    no_curve: bool,
    points: int,
    block_rows: int | None,
    device: str,
    evaluators: EvaluatorOptions,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Compare DAPA with other methods on the targets of RECIPE...

    Makes the paper's table of your own models: for each recipe the target, the source, what the search finds, fixed
    layers, all gates, whole MLPs, random selections, and mergekit's linear, TIES and task arithmetic, all of them live
    and on the same prompts; averages with intervals; and edits of every size. Writes table.md, table.csv, curve.csv,
    table.tex, summary.json and figures/ to --out. Stopped, the same command goes on.
    """
    wanted = CompareOptions(
        methods=_methods(methods),
        num_seeds=seeds,
        seed=seed,
        weights=_weights(weights),
        draws_curve=not no_curve,
        num_points=points,
        rows_per_block=block_rows,
    )
    if max(wanted.weights) == min(wanted.weights) == 1 and methods is not None and "linear" in wanted.methods:
        raise UsageError(
            "--weights: linear with weight 1 is the source itself, which is in every table; add a weight below 1, or "
            "leave linear out of --methods"
        )
    with _stoppable(out):
        from dapa_merge.compare.flow import compare_recipes

        options = search_options(device, None, None, evaluators, allow_pickle)
        found = compare_recipes(recipes, out, wanted, options, reporter(quiet))
    print_answer(found.summary, lambda console: _show(found, out, console), as_json)
    if found.fault is not None:
        raise found.fault


def _show(found: Compared, out: Path, console: Console) -> None:
    from dapa_merge.compare.flow import PAGE_NAME
    from dapa_merge.compare.result import DAPA
    from dapa_merge.compare.tables import methods_table, paper_table

    if not found.rows:
        return
    searched = [paper_table(found.rows)] if any(row.arm(DAPA) for row in found.rows) else []
    for table in (*searched, methods_table(found.rows)):
        print_lines(console, [*table.text("simple").splitlines(), ""])
    print_lines(console, [f"- {sentence}" for sentence in found.summary["findings"]])
    if found.is_written:
        print_lines(console, ["", f"the tables: {out / PAGE_NAME}"])


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """A `with` block that Ctrl-C and SIGTERM end alike: what is held is let go of, and a sentence says what is kept."""
    terminated = []

    def terminate(number: int, _: object) -> None:
        terminated.append(number)
        # What lets Ctrl-C through lets this through.
        raise KeyboardInterrupt

    is_usual = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_usual:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        kept = f"what was measured is in {out}, and the same command goes on from there"
        if not out.exists():
            kept = "nothing was measured yet, and the same command begins again"
        if terminated:
            click.echo(f"Error: stopped; {kept}", err=True)
            sys.exit(128 + signal.SIGTERM)
        # Not the best selection of a search that was stopped: it is one of many.
        stopped = KeyboardInterrupt()
        stopped.kept = kept  # type: ignore[attr-defined]
        raise stopped from None
    finally:
        if is_usual:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _methods(text: str | None) -> tuple[str, ...]:
    if text is None:
        return tuple(METHODS)
    named = {name.strip().lower() for name in text.split(",")}
    for name in sorted(named):
        if name not in METHODS:
            raise UsageError(f"--methods: there is no method {name!r}; known are {', '.join(METHODS)}")
    return tuple(name for name in METHODS if name in named)


def _weights(text: str | None) -> tuple[float, ...]:
    if text is None:
        return DEFAULTS.weights
    weights = []
    for part in text.split(","):
        try:
            weight = float(part)
        except ValueError:
            weight = math.nan
        if not 0 < weight <= 1:
            raise UsageError(
                f"--weights: {part.strip()!r} is no weight; write numbers above 0 and up to 1, with commas"
            )
        weights.append(weight)
    distinct = sorted(set(weights))
    for low, high in itertools.pairwise(distinct):
        if f"{low:g}" == f"{high:g}":
            raise UsageError(
                f"--weights: {low} and {high} agree in the six digits that tables show; name one of them only"
            )
    return tuple(distinct)
