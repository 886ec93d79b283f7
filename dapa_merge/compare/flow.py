"""The flow of `dapa-merge compare`: recipe after recipe, and the folder that holds the tables.

The tables are written again after every recipe; the same command goes on with what a killed one left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from dapa_merge.work_folder import check_folder, forget_pictures, make_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    check_folder(out, lambda folder: (folder / ROWS_NAME).is_dir(), "comparison")
    choose_device(options.device)
    for recipe in recipes.values():
        _check(recipe, options)
    # First of all that is made: by it the folder is known again, also by another process.
    make_folder(out / ROWS_NAME)
    rows: list[Row] = []
    failures: dict[str, DapaError] = {}
    folder = _PictureFolder(out / FIGURES_NAME, reporter)
    try:
        for number, (name, recipe) in enumerate(recipes.items(), 1):
            reporter.say(f"recipe {number} of {len(recipes)}: {name}")
            try:
                rows.append(_row(recipe, name, out, wanted, options, reporter))
            except DapaError as error:
                reporter.say(f"{name}: {error}")
                failures[name] = error
            else:
                folder.draw_row(rows[-1])
            summary = _write(rows, failures, out, wanted, folder)
    except KeyboardInterrupt as stop:
        stop.kept = f"what was measured is in {out}, and the same command goes on from there"  # type: ignore[attr-defined]
        raise
    if failures:
        if rows:
            reporter.say(f"{len(failures)} of {len(recipes)} recipes could not be measured; the tables have the others")
        raise next(iter(failures.values()))
    return Compared(tuple(rows), summary)


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


def _write(
    rows: Sequence[Row],
    failures: Mapping[str, DapaError],
    out: Path,
    wanted: CompareOptions,
    folder: _PictureFolder,
) -> dict[str, Any]:
    """Write the tables, and the picture of all rows; returns the summary."""
    summary = summarize(rows, failures, wanted)
    if rows:
        folder.draw_methods(rows)
    texts = {
        PAGE_NAME: page(rows, {name: str(error) for name, error in failures.items()}, folder.shown),
        ARMS_NAME: arms_csv(rows),
        POINTS_NAME: points_csv(rows),
        LATEX_NAME: latex(rows),
        SUMMARY_NAME: json.dumps(summary, indent=2) + "\n",
    }
    for name, text in texts.items():
        replace_file(out / name, text.encode())
    return summary


class _PictureFolder:
    """The pictures of a comparison; one that fails, of whatever, costs a sentence and never the tables.

    Attributes:
        shown: The names of the PNG files that there are.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        """Make the folder, and remove what an earlier run drew: other rows, or other methods."""
        self._path = path
        self._reporter = reporter
        self._told: set[str] = set()
        self.shown: set[str] = set()
        make_folder(path)
        try:
            forget_pictures(path, (METHODS_PICTURE, ROW_PICTURE))
        except OSError as error:
            raise DapaError(f"{path} cannot be written: {error.strerror}") from error

    def draw_row(self, row: Row) -> None:
        """Edits of every size of one recipe."""

        def figure() -> Figure:
            from dapa_merge.compare.plot import row_figure

            return row_figure(row)

        if row.curve:
            self._draw(f"{ROW_PICTURE}{row.name}", figure)

    def draw_methods(self, rows: Sequence[Row]) -> None:
        """Every method over all recipes."""

        def figure() -> Figure:
            from dapa_merge.compare.plot import methods_figure

            return methods_figure(rows)

        self._draw(METHODS_PICTURE, figure)

    def _draw(self, name: str, figure: Callable[[], Figure]) -> None:
        try:
            drawn = figure()
            from dapa_merge.trace.plot_style import render

            contents = {kind: render(drawn, kind) for kind in ("png", "svg")}
        except Exception as error:
            why = str(error) if isinstance(error, UsageError) else one_line(error)
            if why not in self._told:
                self._reporter.say(f"no pictures: {why}")
            self._told.add(why)
            return
        for kind, content in contents.items():
            replace_file(self._path / f"{name}.{kind}", content)
        self.shown.add(f"{name}.png")


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
