"""The commands for looking at a result, and for talking to it: `page` and `chat`."""

from __future__ import annotations

from pathlib import Path

import click

from dapa_merge.cli.options import json_option, print_answer
from dapa_merge.errors import UsageError
from dapa_merge.files import refuse_special, replace_file
from dapa_merge.report.page import BEGINS, read_sources


@click.command()
@click.argument("paths", metavar="OUT | FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the page here.  [default: dapa_responses.html in OUT, or beside the first FILE with the suffix .html]",
)
@json_option
def page(paths: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write the responses of a result, or of `evaluate --responses`, as a page to read in a browser.

    OUT is a folder that `run`, `repair` or `demo` wrote; each FILE is one that `evaluate --responses` wrote, and their
    models stand side by side. The page is one file that loads nothing; answers that may do harm are folded away. An
    earlier page is replaced.
    """
    source = read_sources(paths)
    path = out or source.out
    refuse_special(path)
    if path.exists():
        _check_own(path)
    replace_file(path, source.text().encode())
    numbers = {name: len(said) for name, said in source.models.items()}
    told = ", ".join(f"{number} of {name}" for name, number in numbers.items())
    print_answer({"page": str(path), "responses": numbers}, [f"wrote {path}: responses, {told}"], as_json)


def _check_own(path: Path) -> None:
    """Refuse to replace what is not a page of responses."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(BEGINS)) == BEGINS.encode():
                return
    raise UsageError(f"{path} exists and is not a page of responses; name another file with --out")
