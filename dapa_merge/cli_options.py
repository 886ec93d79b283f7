"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dapa_merge.errors import UsageError

if TYPE_CHECKING:
    from dapa_merge.search_flow import SearchOptions

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
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
recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
out_argument = click.argument("out", type=click.Path(path_type=Path))


def search_options(device: str, journal: Path | None = None, workers: str | None = None) -> SearchOptions:
    """What `--device`, `--journal` and `--workers` ask for.

    Raises:
        UsageError: If `--workers` is not understood, or Ray is not installed.
    """
    from dapa_merge.search_flow import SearchOptions

    engine, colon, number = (workers or "").partition(":")
    if workers is not None and (engine != "ray" or (colon and not (number.isdecimal() and int(number) > 0))):
        raise UsageError(f"--workers is {workers!r}; write ray, or ray:N with the number of workers")
    if workers is not None:
        from dapa_merge.search.workers import import_ray

        # Before the models are read.
        import_ray()
    return SearchOptions(device, journal, workers is not None, int(number) if number else None)
