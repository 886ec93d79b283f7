"""The command `dapa-merge verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dapa_merge.cli_options import allow_pickle_option, json_option
from dapa_merge.cli_output import print_answer, print_lines, reporter
from dapa_merge.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="The recipe OUT was made by.  [default: OUT/mergekit_config.yml]"
)
@click.option(
    "--target", metavar="MODEL", help="Where the target is: a folder, a Hub id or id@revision.  [default: the recipe's]"
)
@click.option("--source", metavar="MODEL", help="Where the source is.  [default: the recipe's]")
@click.option("--files-only", is_flag=True, help="Compare OUT's files with its dapa.json only; needs no other model.")
@click.option("--write-manifest", is_flag=True, help="Write OUT/dapa.json if OUT is correct and has none.")
@allow_pickle_option
@json_option
@click.pass_obj
def verify(
    quiet: bool,
    out: Path,
    recipe: Path | None,
    target: str | None,
    source: str | None,
    files_only: bool,
    write_manifest: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Check a result against its target and source.

    Compares every byte of every tensor of OUT, whoever wrote it, and says which tensors are the source's, a blend, or
    unexplained; compares its files with its dapa.json, if it has one. If anything is wrong, the exit code is 4.
    """
    from dapa_merge.report import spans
    from dapa_merge.verify_flow import check_manifest, location_option, verify_result

    if files_only:
        if recipe or target or source or write_manifest:
            raise UsageError("--files-only looks at no recipe and no other model; leave out the other options")
        check = check_manifest(out, reporter(quiet))
    else:
        models = {"target": location_option(target, "--target"), "source": location_option(source, "--source")}
        check = verify_result(out, recipe, reporter(quiet), **models, write=write_manifest, allow_pickle=allow_pickle)

    def show(console: Console) -> None:
        lines = [*check.faults, *(f"note: {note}" for note in check.notes)]
        verdict = "WRONG" if check.faults else "correct"
        if check.verification is not None:
            found = spans(check.verification.transplanted)
            is_blend = any(origin.startswith("blend") for origin in check.verification.origins.values())
            of_whom = "a blend with the source" if is_blend else "from the source"
            lines.append(f"{verdict}: {check.verification.num_tensors} tensors compared; {of_whom}: {found}")
        if check.has_manifest:
            lines.append(f"{verdict}: the files and dapa.json")
        print_lines(console, lines)

    print_answer(check.to_json(), show, as_json)
    if check.faults:
        sys.exit(4)
