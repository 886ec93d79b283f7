"""The flow of `dapa-merge compare`: recipe after recipe, and the folder that holds the tables.

Tables and pictures of an earlier run stay until new ones take their place all at once: after any recipe that makes the
new tables have every row of theirs, so that long comparisons can be followed, and else after the last one. The same
command goes on with what a killed one left.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge import __version__
from dapa_merge.compare import charts
from dapa_merge.compare.blend import open_pretrained
from dapa_merge.compare.naming import ROWS_NAME, existing_rows, is_comparison, locked, refuse_repeated, row_names
from dapa_merge.compare.page import arms_csv, latex, page, points_csv
from dapa_merge.compare.result import AUTO, DAPA, CompareOptions, Row, averages
from dapa_merge.compare.sentences import choices, sentences
from dapa_merge.errors import DapaError, one_line
from dapa_merge.files import check_folder, make_folder, remove_pictures, replace_file, replace_files
from dapa_merge.measure.prompts.sets import check_prompts
from dapa_merge.plan.selection import make_plan
from dapa_merge.progress import LOG
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.report import jsonable

if TYPE_CHECKING:
    from dapa_merge.report.charts import Chart


FIGURES_NAME = "figures"
PAGE_NAME, ARMS_NAME, POINTS_NAME, LATEX_NAME, SUMMARY_NAME = (
    "table.md", "table.csv", "curve.csv", "table.tex", "summary.json",
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A comparison.

    Attributes:
        rows: The recipes that could be measured.
        summary: Everything as plain data, as `summary.json` has it.
        is_written: Whether tables and pictures are these; not if they would have lost an earlier run's rows.
        fault: That of the first recipe that could not be measured, with what is kept; for the caller to raise.
    """

    rows: tuple[Row, ...]
    summary: Mapping[str, Any]
    is_written: bool = True
    fault: DapaError | None = None


def compare_recipes(paths: Sequence[Path], out: Path, wanted: CompareOptions, options: Options) -> Compared:
    """Compare methods on the targets of recipes, and leave tables and pictures in a folder.

    A recipe that cannot be measured costs its own row only, and is told in `fault`. If the tables that are there have
    that row, from an earlier run, or if no recipe could be measured, they and the pictures are left as they are: what
    fails today takes nothing away that was right before.

    Args:
        paths: The recipes; a row each, by the names of the files.
        out: A new folder, or one of a comparison: what is in it already is not measured again.
        wanted: What to compare.
        options: Where to evaluate.

    Raises:
        UsageError: If the folder is of something else, or a recipe is given twice.
        DapaError: If a recipe does not fit, which is seen before any is measured, or the tables cannot be written.
    """
    from dapa_merge.measure.live import choose_device

    refuse_repeated(paths)
    recipes = {path: load_recipe(path) for path in paths}
    check_folder(out, is_comparison, "comparison")
    choose_device(options.device)
    for path, recipe in recipes.items():
        _check(recipe, path, options)
    # First of all that is made: by it the folder is known again, also by another process.
    make_folder(out / ROWS_NAME)
    names = row_names(paths, out)
    tables = _Tables(out, wanted)
    for number, (name, path) in enumerate(names.items(), 1):
        LOG.info(f"recipe {number} of {len(names)}: {name}")
        try:
            row = _row(recipes[path], name, out, wanted, options)
        except DapaError as error:
            LOG.info(f"{name}: {error}")
            _let_go(error)
            tables.failures[name] = error
        else:
            tables.rows.append(row)
        summary = tables.write(is_last=number == len(names))
    return Compared(tuple(tables.rows), summary, tables.is_written, tables.fault(names))


def _check(recipe: Recipe, path: Path, options: Options) -> None:
    """Find what does not fit before the hours of the rows before it; of the Hub's models, by their headers alone."""
    from dapa_merge.measure.meter import report_meter
    from dapa_merge.measure.prompts.sets import load_prompts

    try:
        plan = make_plan(recipe, partial_target=True, allow_pickle=options.allow_pickle)
        check_prompts(recipe)
        open_pretrained(recipe, plan.target, plan.source, partial=True, allow_pickle=options.allow_pickle)
        report_meter(recipe, load_prompts(recipe.prompts), options)
    except DapaError as error:
        # A fault of a key says where it stands.
        if not str(error).startswith(str(path)):
            error.args = (f"recipe {path}: {error}",)
        raise


def _row(recipe: Recipe, name: str, out: Path, wanted: CompareOptions, options: Options) -> Row:
    from dapa_merge.compare.row import compare_recipe

    return compare_recipe(recipe, name, out / ROWS_NAME / name, wanted, options)


def _let_go(error: BaseException) -> None:
    """Empty the frames of a fault that is kept, and of those behind it: they hold the models of its row in memory.

    Their lines stay, for `--debug`.
    """
    seen: set[int] = set()
    faults: list[BaseException | None] = [error]
    while faults:
        fault = faults.pop()
        if fault is not None and id(fault) not in seen:
            seen.add(id(fault))
            traceback.clear_frames(fault.__traceback__)
            faults += [fault.__cause__, fault.__context__]


class _Tables:
    """The tables and pictures of a comparison, beside or in the place of an earlier run's.

    Attributes:
        rows: What was measured so far.
        failures: What could not be.
        is_written: Whether the folder has what was written last.
    """

    def __init__(self, out: Path, wanted: CompareOptions) -> None:
        self._out = out
        self._wanted = wanted
        self._pictures = _Pictures(out / FIGURES_NAME)
        self.rows: list[Row] = []
        self.failures: dict[str, DapaError] = {}
        self.is_written = False

    def write(self, *, is_last: bool) -> dict[str, Any]:
        """Write everything that is known, unless it would take away what is there; returns the summary."""
        summary = summarize(self.rows, self.failures, self._wanted)
        self._pictures.draw(tuple(self.rows))
        with locked(self._out):
            before = _written_rows(self._out / SUMMARY_NAME)
            done = {row.name for row in self.rows}
            if is_last:
                self.is_written = not before.keys() & self.failures.keys() and bool(done or not before)
            else:
                self.is_written = before.keys() <= done
            if self.is_written:
                self._replace(summary, before)
        return summary

    def _replace(self, summary: dict[str, Any], before: Mapping[str, Any]) -> None:
        shown = self._pictures.write()
        shown |= self._pictures.existing(self._unchanged(summary["rows"], before) - shown)
        texts = {
            PAGE_NAME: page(
                self.rows,
                {name: str(error) for name, error in self.failures.items()},
                {f"{name}.png" for name in shown},
            ),
            ARMS_NAME: arms_csv(self.rows),
            POINTS_NAME: points_csv(self.rows),
            LATEX_NAME: latex(self.rows),
            SUMMARY_NAME: json.dumps(summary, indent=2) + "\n",
        }
        replace_files({self._out / name: text.encode() for name, text in texts.items()})
        ours = {name for chart in charts.CHARTS for name in chart.names(before.keys() | existing_rows(self._out))}
        self._pictures.remove(ours - shown)

    def _unchanged(self, rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> set[str]:
        """The pictures that would be the same, were they drawn again."""
        same = [row for row, found in zip(self.rows, rows, strict=True) if before.get(row.name) == found]
        is_whole = len(same) == len(rows) == len(before)
        return {name for chart in charts.CHARTS if is_whole or chart.parts is not None for name in chart.shown(same)}

    def fault(self, names: Mapping[str, Path]) -> DapaError | None:
        """The first recipe's that could not be measured, and what is kept; None if all were."""
        if not self.failures:
            return None
        name, error = next(iter(self.failures.items()))
        number = f"; {len(self.failures)} of {len(names)} recipes could not be measured"
        kept = ", and the tables have the others" if self.rows else ""
        if not self.is_written:
            kept = (
                f", so that the tables and pictures in {self._out} are left as an earlier run wrote them; what was "
                f"measured since is kept in {self._out / ROWS_NAME}"
            )
        error.args = (f"recipe {names[name]}: {error}{number}{kept}",)
        return error


def _written_rows(summary: Path) -> dict[str, Any]:
    """The rows of the tables that are there, by name."""
    try:
        return {row["name"]: row for row in json.loads(summary.read_bytes())["rows"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


class _Pictures:
    """The pictures of a comparison; one that fails, of whatever, costs a sentence and never the tables.

    They are drawn in memory, and written together with the tables.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: set[str] = set()
        self._drawn: dict[str, Mapping[str, bytes]] = {}
        self._shown: dict[str, object] = {}
        self._written: set[str] = set()

    def draw(self, rows: tuple[Row, ...]) -> None:
        """Draw every chart of these rows; a row's only once."""
        for chart in charts.CHARTS:
            for name, shown in chart.shown(rows).items():
                if self._shown.get(name) is not shown:
                    self._draw(chart, name, shown)

    def _draw(self, chart: Chart, name: str, shown: object) -> None:
        # An older one is not what the tables will say.
        self._drawn.pop(name, None)
        self._written.discard(name)
        try:
            if (picture := chart.picture(name, shown)) is not None:
                self._drawn[name], self._shown[name] = picture.files, shown
        except Exception as error:
            self._tell(error)

    def write(self) -> set[str]:
        """Write what was drawn since, and what another run removed; returns the names of all that are there."""
        there = set()
        for name, contents in self._drawn.items():
            try:
                if name not in self._written or not self.existing([name]):
                    make_folder(self._folder)
                    for ending, content in contents.items():
                        replace_file(self._folder / f"{name}{ending}", content)
                self._written.add(name)
                there.add(name)
            except Exception as error:
                self._tell(error)
        return there

    def existing(self, names: Collection[str]) -> set[str]:
        """Those of some pictures that are there."""
        return {name for name in names if (self._folder / f"{name}.png").is_file()}

    def remove(self, names: Collection[str]) -> None:
        """Remove pictures that are no longer right."""
        try:
            remove_pictures(self._folder, sorted(names))
        except OSError as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        why = str(error) if isinstance(error, DapaError) else one_line(error)
        if why not in self._told:
            LOG.info(f"no pictures: {why}")
        self._told.add(why)


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
    said: dict[str, Any] = {}
    for key, value in asdict(replace(row, arms=(), curve=())).items():
        said |= row.edit.to_json() if key == "edit" else {key: value}
    return {**said, "arms": arms, "curve": curve, "repair": best, "changes": dapa}
