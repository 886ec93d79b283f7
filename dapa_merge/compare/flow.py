"""The flow of `dapa-merge compare`: recipe after recipe, and the folder that holds the tables.

The tables are written again after every recipe; the same command goes on with what a killed one left.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dapa_merge import __version__
from dapa_merge.compare.average import averages
from dapa_merge.compare.options import CompareOptions
from dapa_merge.compare.page import page
from dapa_merge.compare.result import AUTO, DAPA, Row
from dapa_merge.compare.sentences import choices, sentences
from dapa_merge.compare.tables import arms_csv, latex, points_csv
from dapa_merge.errors import DapaError, UsageError, one_line
from dapa_merge.new_file import replace_file
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.recipe_file import load_recipe
from dapa_merge.report import jsonable
from dapa_merge.search_options import SearchOptions
from dapa_merge.selection import make_plan, open_location

ROWS_NAME, FIGURES_NAME = "rows", "figures"
PAGE_NAME, ARMS_NAME, POINTS_NAME, LATEX_NAME, SUMMARY_NAME = (
    "table.md", "table.csv", "curve.csv", "table.tex", "summary.json",
)  # fmt: skip
# What the names of all pictures begin with; others in their folder are somebody else's.
METHODS_PICTURE, ROW_PICTURE = "methods", "row_"


@dataclass(frozen=True)
class Compared:
    """A comparison.

    Attributes:
        rows: The recipes.
        summary: Everything as plain data, as `summary.json` has it.
    """

    rows: tuple[Row, ...]
    summary: Mapping[str, Any]


def compare_recipes(
    paths: Sequence[Path], out: Path, wanted: CompareOptions, options: SearchOptions, reporter: Reporter
) -> Compared:
    """Compare methods on the targets of recipes, and leave tables and pictures in a folder.

    Args:
        paths: The recipes; a row each, by the names of the files.
        out: A new folder, or one of a comparison: what is in it already is not measured again.
        wanted: What to compare.
        options: Where to evaluate.
        reporter: Hears of the steps.

    Raises:
        UsageError: If the folder is of something else, or a recipe is given twice.
        DapaError: Of the first recipe that could not be measured, after all others were.
    """
    from dapa_merge.evaluate.live import choose_device

    recipes = {name: load_recipe(path) for name, path in row_names(paths).items()}
    _check_folder(out)
    choose_device(options.device)
    for recipe in recipes.values():
        _check(recipe, options)
    rows: list[Row] = []
    failures: dict[str, DapaError] = {}
    try:
        for number, (name, recipe) in enumerate(recipes.items(), 1):
            reporter.say(f"recipe {number} of {len(recipes)}: {name}")
            try:
                rows.append(_row(recipe, name, out, wanted, options, reporter))
            except DapaError as error:
                reporter.say(f"{name}: {error}")
                failures[name] = error
            _write(rows, failures, out, wanted, reporter)
    except KeyboardInterrupt as stop:
        stop.kept = f"what was measured is in {out}, and the same command goes on from there"  # type: ignore[attr-defined]
        raise
    if failures:
        reporter.say(f"{len(failures)} of {len(recipes)} recipes could not be measured; the tables have the others")
        raise next(iter(failures.values()))
    return Compared(tuple(rows), summarize(rows, failures, wanted))


def _check(recipe: Recipe, options: SearchOptions) -> None:
    """Find what does not fit before the hours of the rows before it; of the Hub's models, by their headers alone."""
    from dapa_merge.evaluate.prompts import load_prompts
    from dapa_merge.meters import report_meter

    make_plan(recipe, partial_target=True, allow_pickle=options.allow_pickle)
    if recipe.pretrained is not None:
        open_location(recipe.pretrained, partial=True, allow_pickle=options.allow_pickle)
    report_meter(recipe, load_prompts(recipe.prompts), options.evaluators)


def row_names(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each recipe: that of its file or, where several are called so, with its folder before it.

    Raises:
        UsageError: If a recipe is given twice.
    """
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError("a recipe is given twice; name each once")
    stems = [path.stem for path in paths]
    long = [
        stem if stems.count(stem) == 1 else f"{path.absolute().parent.name}-{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    names = [name if long.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(long, 1)]
    return dict(zip(names, paths, strict=True))


def _row(
    recipe: Recipe, name: str, out: Path, wanted: CompareOptions, options: SearchOptions, reporter: Reporter
) -> Row:
    from dapa_merge.compare.row import compare_recipe

    return compare_recipe(recipe, name, out / ROWS_NAME / name, wanted, options, reporter)


def _check_folder(out: Path) -> None:
    """Raise `UsageError` if a folder cannot be that of a comparison, because it holds something else."""
    try:
        if out.exists() and not (out / ROWS_NAME).is_dir() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} exists and is no folder of a comparison; name another or remove it")
        place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not os.access(place, os.W_OK):
            raise UsageError(f"{out} cannot be written: {os.strerror(errno.EACCES)}; name another folder")
    except OSError as error:
        raise UsageError(f"{out} cannot be read: {error.strerror}; name another folder") from error


def _write(
    rows: Sequence[Row], failures: Mapping[str, DapaError], out: Path, wanted: CompareOptions, reporter: Reporter
) -> None:
    """Write tables and pictures."""
    summary = summarize(rows, failures, wanted)
    try:
        (out / FIGURES_NAME).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DapaError(f"{out / FIGURES_NAME} cannot be made: {error.strerror}") from error
    pictures = _pictures(rows, reporter)
    for path in (out / FIGURES_NAME).iterdir():
        if path.suffix in (".png", ".svg") and path.name.startswith((METHODS_PICTURE, ROW_PICTURE)):
            path.unlink(missing_ok=True)
    for name, content in pictures.items():
        replace_file(out / FIGURES_NAME / name, content)
    shown = {name for name in pictures if name.endswith(".png")}
    texts = {
        PAGE_NAME: page(rows, {name: str(error) for name, error in failures.items()}, shown),
        ARMS_NAME: arms_csv(rows),
        POINTS_NAME: points_csv(rows),
        LATEX_NAME: latex(rows),
        SUMMARY_NAME: json.dumps(summary, indent=2) + "\n",
    }
    for name, text in texts.items():
        replace_file(out / name, text.encode())


def _pictures(rows: Sequence[Row], reporter: Reporter) -> dict[str, bytes]:
    """Every picture by its file name; none without matplotlib."""
    if not rows:
        return {}
    try:
        from dapa_merge.compare.plot import methods_figure, row_figure
        from dapa_merge.trace.plot_style import render

        figures = {METHODS_PICTURE: methods_figure(rows)}
        figures |= {f"{ROW_PICTURE}{row.name}": row_figure(row) for row in rows}
        return {f"{name}.{kind}": render(figure, kind) for name, figure in figures.items() for kind in ("png", "svg")}
    except Exception as error:
        # Whatever a picture fails of, it must not cost the tables.
        reporter.say(f"no pictures: {error if isinstance(error, UsageError) else one_line(error)}")
        return {}


def summarize(rows: Sequence[Row], failures: Mapping[str, DapaError], wanted: CompareOptions) -> dict[str, Any]:
    """Everything as plain data for `json.dumps`; a figure that is not finite is None."""
    return dict(
        jsonable(
            {
                "version": __version__,
                "options": asdict(wanted),
                "findings": sentences(rows),
                "failures": {name: str(error) for name, error in failures.items()},
                "averages": [asdict(average) for average in averages(rows)],
                "rows": [_row_json(row) for row in rows],
            }
        )
    )


def _row_json(row: Row) -> dict[str, Any]:
    # Which prompts were refused is in the journals.
    arms = [
        {**asdict(replace(arm, refused=(), over_refused=())), "repairs": row.repairs(arm), "skill": arm.skill}
        for arm in row.arms
    ]
    for arm in arms:
        del arm["refused"], arm["over_refused"]
    curve = [{**asdict(point), "on_front": is_best} for point, is_best in zip(row.curve, row.front(), strict=True)]
    best = [arm.key for arm in choices(row)]
    found = {key: row.arm(key) for key in (DAPA, AUTO)}
    dapa = {key: asdict(row.change(one)) for key, one in found.items() if one is not None and one.figures is not None}
    return {**asdict(replace(row, arms=(), curve=())), "arms": arms, "curve": curve, "repair": best, "changes": dapa}
