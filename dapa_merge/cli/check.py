"""The commands that check results and pass them on: `verify`, and `patch` with its four subcommands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dapa_merge.cli.options import FilePath, allow_pickle_option, json_option, print_answer
from dapa_merge.errors import UsageError
from dapa_merge.imports import lasting
from dapa_merge.patch.commands import apply_patch, extract_lora, extract_patch, revert_patch, show_patch


@click.command()
@click.argument("out")
@click.option("--recipe", type=FilePath(), help="The recipe OUT was made by.  [default: OUT/mergekit_config.yml]")
@click.option(
    "--target", metavar="MODEL", help="Where the target is: a folder, a Hub id or id@revision.  [default: the recipe's]"
)
@click.option("--source", metavar="MODEL", help="Where the source is.  [default: the recipe's]")
@click.option("--files-only", is_flag=True, help="Compare OUT's files with its dapa.json only; needs no other model.")
@click.option("--write-manifest", is_flag=True, help="Write OUT/dapa.json if OUT is correct and has none.")
@allow_pickle_option
@json_option
def verify(
    out: str,
    recipe: Path | None,
    target: str | None,
    source: str | None,
    files_only: bool,
    write_manifest: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Check a result against its target and source.

    OUT is a folder, or the Hub id of a published result, also id@revision, which is fetched first. Compares every byte
    of every tensor of OUT, whoever wrote it, and says which tensors are the source's, a blend, or unexplained; compares
    its files with its dapa.json, if it has one. If anything is wrong, the exit code is 4.
    """
    with lasting():
        from dapa_merge import api

    check = api.verify(
        out,
        recipe=recipe,
        target=target,
        source=source,
        files_only=files_only,
        write_manifest=write_manifest,
        allow_pickle=allow_pickle,
    )
    print_answer(check.to_json(), check.lines(), as_json)
    if check.faults:
        sys.exit(4)


patch_argument = click.argument("patch", type=FilePath())
undo_option = click.option(
    "--undo",
    type=FilePath(),
    help="Where the old bytes are kept.  [default: .dapa-undo.safetensors in BASE]",
)


@click.group()
def patch() -> None:
    """Pass a repair on as a small file, apply it, take it back.

    A patch holds the tensors, or rows of tensors, that a result has changed of its base, or the directions that it has
    added to them, and digests of what they replace: it applies to exactly that base, however that is divided into
    files, and to nothing else.
    """


@patch.command()
@click.argument("result")
@click.argument("patch", type=FilePath(), required=False)
@click.option("--lora", type=FilePath(), help="Write a LoRA adapter of peft into this new folder, not a patch.")
@click.option("--base", metavar="MODEL", help="What RESULT was made of.  [default: as RESULT/mergekit_config.yml says]")
@allow_pickle_option
@json_option
def extract(
    result: str, patch: Path | None, lora: Path | None, base: str | None, allow_pickle: bool, as_json: bool
) -> None:
    """Write the changes of RESULT from its base to PATCH, a new safetensors file.

    RESULT and its base are folders or Hub ids, or id@revision. If RESULT was made by the edit directions, PATCH holds
    these, and --lora can write them as an adapter instead.
    """
    if lora is not None and patch is None:
        answer = extract_lora(result, lora, base, allow_pickle=allow_pickle)
        found = answer["ranks"].values()
        ranks = f"of rank {min(found)} to {max(found)}"
        print_answer(answer, [f"wrote {lora}: a LoRA of {len(found)} layers of {answer['base']}, {ranks}"], as_json)
        return
    if patch is None or lora is not None:
        raise UsageError("name either PATCH, a file to make, or --lora and a folder to make")
    answer = extract_patch(result, patch, base, allow_pickle=allow_pickle)
    share = answer["file_bytes"] / answer["model_bytes"]
    lines = [f"wrote {patch}: {_content(answer)}, {100 * share:.2f} % of the model's size"]
    if answer["other_files"]:
        lines.append(f"differs from the base, but not in the patch: {', '.join(answer['other_files'])}")
    print_answer(answer, lines, as_json)


@patch.command()
@patch_argument
@click.argument("base")
@click.argument("out", type=FilePath(), required=False)
@click.option("--in-place", is_flag=True, help="Change BASE itself; what it held is kept in an undo file first.")
@undo_option
@allow_pickle_option
@json_option
def apply(
    patch: Path,
    base: str,
    out: Path | None,
    in_place: bool,
    undo: Path | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Apply PATCH to BASE: into the new folder OUT, or in place.

    Refuses a base with other values than the one that PATCH was made for. If a change in place is stopped, the same
    command resumes it.
    """
    answer = apply_patch(patch, base, out, in_place, undo, allow_pickle=allow_pickle)
    size = f"{answer['bytes'] / 1e6:.2f} MB"
    if not answer["applied"]:
        line = f"{base} already holds what {patch} would write; nothing was written"
    elif in_place:
        back = f"dapa-merge patch revert {base}" + (f" --undo {undo}" if undo else "")
        line = f"patched {base}: {size} written; `{back}` takes it back"
    else:
        line = f"wrote {out}: {base} with {size} of it patched"
    print_answer(answer, [line], as_json)


@patch.command()
@click.argument("base")
@undo_option
@json_option
def revert(base: str, undo: Path | None, as_json: bool) -> None:
    """Undo a patch that was applied to BASE in place.

    Restores every replaced byte, and removes the undo file. If it is stopped, the same command resumes.
    """
    answer = revert_patch(base, undo)
    size = f"{answer['bytes'] / 1e6:.2f} MB put back" if answer["bytes"] else "nothing to do"
    print_answer(answer, [f"the patched rows of {base} are as they were: {size}"], as_json)


@patch.command()
@patch_argument
@json_option
def show(patch: Path, as_json: bool) -> None:
    """Show what PATCH changes, and in which model."""
    answer = show_patch(patch)
    lines = []
    for entry in answer["entries"]:
        first, stop = entry["rows"]
        how = ", computed" if entry["computed"] else ""
        lines.append(f"{entry['tensor']} {entry['dtype']} {list(entry['shape'])} rows {first}:{stop}{how}")
    commit = f" at commit {answer['base_commit']}" if answer["base_commit"] else ""
    print_answer(answer, [*lines, f"{_content(answer)}, for {answer['base']}{commit}"], as_json)


def _content(answer: dict[str, Any]) -> str:
    edit = f" by {answer['edit']['edit']}" if answer["edit"] else ""
    return f"{answer['tensors']} tensors in {answer['ranges']} ranges{edit}, {answer['file_bytes'] / 1e6:.2f} MB"
