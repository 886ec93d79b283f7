"""The flow of `dapa-merge compare`: recipe after recipe, and the folder of rows, tables and pictures.

Tables and pictures of an earlier run are kept until new ones replace them together: after the last recipe, or earlier
if the new tables have all rows of the old ones, so that long comparisons can be watched. The same command resumes a
killed one. A row's folder holds a small file with the path of its recipe, which connects the two, whatever other
recipes are given.
"""

from __future__ import annotations

import json
import os
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dapa_merge import __version__
from dapa_merge.compare import charts
from dapa_merge.compare.blend import open_pretrained
from dapa_merge.compare.forecast import RowForecast, forecast, forecast_row
from dapa_merge.compare.measuring import besides
from dapa_merge.compare.methods import AUTO, DAPA
from dapa_merge.compare.page import arms_csv, latex, page, points_csv
from dapa_merge.compare.result import CompareOptions, Row, averages
from dapa_merge.compare.row import JOURNAL_NAME, compare_recipe, copying, meter_of, prompts_of
from dapa_merge.compare.sentences import choices, sentences
from dapa_merge.compare.spread import spread_rows
from dapa_merge.errors import DapaError, UsageError, one_line
from dapa_merge.files import (
    begins_journal,
    check_folder,
    held,
    make_folder,
    remove_pictures,
    replace_file,
    replace_files,
)
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.prompts.parts import check_prompts, refuse_turns
from dapa_merge.measure.prompts.sets import load_own
from dapa_merge.plan.selection import check_any_units, make_plan
from dapa_merge.progress import LOG, begin, end
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.drawing import Picture
from dapa_merge.report.report import jsonable
from dapa_merge.search.bench import LIMITED_JUDGE

FIGURES_NAME = "figures"
ROWS_NAME, OWNER_NAME = "rows", "recipe.json"
PAGE_NAME, ARMS_NAME, POINTS_NAME, LATEX_NAME, SUMMARY_NAME = (
    "table.md", "table.csv", "curve.csv", "table.tex", "summary.json",
)  # fmt: skip
# The names of unfinished files begin with this, too.
OURS = ".dapa-merge-"
LOCK_NAME = f"{OURS}lock"
# The maximum length of a row's name.
MAX_LETTERS, MAX_BYTES = 80, 160
# Characters that Windows forbids in file names, or that would break a table in Markdown.
UNSAFE = frozenset('\\/<>:"|?*')


@dataclass(frozen=True)
class Compared:
    """A comparison.

    Attributes:
        is_written: Whether tables and pictures were written; not if that would lose rows of an earlier run.
        fault: The fault of the first recipe that could not be measured, for the caller to raise.
    """

    rows: tuple[Row, ...]
    summary: Mapping[str, Any]
    is_written: bool = True
    fault: DapaError | None = None


def compare_recipes(paths: Sequence[Path], out: Path, wanted: CompareOptions, options: Options) -> Compared:
    """Compare methods on the targets of recipes, and fill the folder `out` with tables and pictures.

    A recipe that cannot be measured loses only its own row, and is reported in `fault`. If existing tables have that
    row from an earlier run, or no recipe could be measured, tables and pictures are left unchanged.

    Raises:
        UsageError: If the folder holds something else, or a recipe is given twice.
        DapaError: If a recipe is invalid, which is checked before any measurement, or the tables cannot be written.
    """
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError("a recipe is given twice; name each once")
    if options.uses_ray and options.judge_requests is not None:
        raise UsageError(LIMITED_JUDGE)
    recipes = {path: load_recipe(path) for path in paths}
    check_folder(out, is_comparison, "comparison")
    choose_device(options.device)
    for name in wanted.also:
        try:
            load_own(name)
        except DapaError as error:
            error.args = (f"--also: {error}",)
            raise
    checked = {path: _check(recipe, path, wanted, options) for path, recipe in recipes.items()}
    # Made first: this marks the folder as a comparison, for other processes too.
    make_folder(out / ROWS_NAME)
    names = row_names(paths, out)
    tables = Tables(out, wanted)
    of_name = {name: recipes[path] for name, path in names.items()}
    expected = forecast(
        [checked[path](name, out / ROWS_NAME / name / JOURNAL_NAME) for name, path in names.items()], options
    )
    with ExitStack() as stack:
        if options.uses_ray:
            # Progress is where the work is done.
            expected.tell()
            measured = spread_rows(of_name, out / ROWS_NAME, wanted, options)
        else:
            stack.enter_context(expected.told())
            measured = _in_turn(of_name, out / ROWS_NAME, wanted, options)
        for number, (name, found) in enumerate(measured, 1):
            if isinstance(found, DapaError):
                LOG.info(f"{name}: {found}")
            tables.take(name, found, tuple(names))
            summary = tables.write(is_last=number == len(names))
    return Compared(tuple(tables.rows), summary, tables.is_written, tables.fault(names))


def _in_turn(
    recipes: Mapping[str, Recipe], rows: Path, wanted: CompareOptions, options: Options
) -> Iterator[tuple[str, Row | DapaError]]:
    """Measure rows one after another, here; as `spread_rows`."""
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        LOG.info(f"recipe {number} of {len(recipes)}: {name}")
        begin(name)
        try:
            found: Row | DapaError = compare_recipe(recipe, name, rows / name, wanted, options)
        except DapaError as error:
            _let_go(error)
            found = error
        end()
        yield name, found


def _check(given: Recipe, path: Path, wanted: CompareOptions, options: Options) -> Callable[[str, Path], RowForecast]:
    """Raise a recipe's errors before other rows take hours; of the Hub's models, only headers are read.

    Returns:
        What estimates the row of a name and a journal.
    """
    try:
        recipe = copying(given)
        check_any_units(recipe)
        plan = make_plan(recipe, partial_target=True, allow_pickle=options.allow_pickle)
        check_prompts(recipe)
        pretrained = open_pretrained(recipe, plan.target, plan.source, partial=True, allow_pickle=options.allow_pickle)
        parts, _ = prompts_of(recipe)
        refuse_turns(recipe, parts.report)
        meter = meter_of(recipe, parts.report, options, plan.models.values())
        also = besides(wanted, parts.report)
    except DapaError as error:
        # The error of a key already names the file.
        if not str(error).startswith(str(path)):
            error.args = (f"recipe {path}: {error}",)
        raise
    return lambda name, journal: forecast_row(
        name, given, recipe, plan, parts, meter, also, pretrained, journal, wanted, options
    )


def _let_go(error: BaseException) -> None:
    """Clear the frames of an error and its causes, which hold models in memory; their lines are kept for `--debug`."""
    seen: set[int] = set()
    faults: list[BaseException | None] = [error]
    while faults:
        fault = faults.pop()
        if fault is not None and id(fault) not in seen:
            seen.add(id(fault))
            traceback.clear_frames(fault.__traceback__)
            faults += [fault.__cause__, fault.__context__]


@dataclass
class Tables:
    """The tables and pictures of a comparison.

    Pictures are drawn in memory and written with the tables. If one fails, for whatever reason, a message is logged and
    the tables are still written.

    Attributes:
        failures: The errors of other recipes, by name.
        is_written: Whether the folder holds the latest tables.
        drawn: Pictures by name, each with the data that it shows.
    """

    out: Path
    wanted: CompareOptions
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, DapaError] = field(default_factory=dict)
    is_written: bool = False
    drawn: dict[str, tuple[object, Picture]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def take(self, name: str, found: Row | DapaError, order: Sequence[str]) -> None:
        """Add a row, or its error, in the place that its name has in an order."""
        if isinstance(found, DapaError):
            failures = self.failures | {name: found}
            self.failures = {one: failures[one] for one in order if one in failures}
        else:
            self.rows = sorted([*self.rows, found], key=lambda row: order.index(row.name))

    def write(self, *, is_last: bool) -> dict[str, Any]:
        """Write everything, unless rows of an earlier run would be lost; returns the summary."""
        summary = summarize(self.rows, self.failures, self.wanted)
        self._draw()
        with locked(self.out):
            before = _written_rows(self.out / SUMMARY_NAME)
            done = {row.name for row in self.rows}
            if is_last:
                self.is_written = not before.keys() & self.failures.keys() and bool(done or not before)
            else:
                self.is_written = before.keys() <= done
            if self.is_written:
                self._replace(summary, before)
        return summary

    def _replace(self, summary: dict[str, Any], before: Mapping[str, Any]) -> None:
        folder = self.out / FIGURES_NAME
        shown = set(filter(self._write_picture, self.drawn))
        shown |= {name for name in self._unchanged(summary["rows"], before) if (folder / f"{name}.png").is_file()}
        failures = {name: str(error) for name, error in self.failures.items()}
        texts = {
            PAGE_NAME: page(self.rows, failures, {f"{name}.png" for name in shown}),
            ARMS_NAME: arms_csv(self.rows),
            POINTS_NAME: points_csv(self.rows),
            LATEX_NAME: latex(self.rows),
            SUMMARY_NAME: json.dumps(summary, indent=2) + "\n",
        }
        replace_files({self.out / name: text.encode() for name, text in texts.items()})
        ours = {name for chart in charts.CHARTS for name in chart.names(before.keys() | existing_rows(self.out))}
        try:
            remove_pictures(folder, sorted(ours - shown))
        except OSError as error:
            self._tell(error)

    def _unchanged(self, rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> set[str]:
        """The pictures that would not change if they were drawn again."""
        same = [row for row, found in zip(self.rows, rows, strict=True) if before.get(row.name) == found]
        is_whole = len(same) == len(rows) == len(before)
        return {name for chart in charts.CHARTS if is_whole or chart.parts is not None for name in chart.shown(same)}

    def _draw(self) -> None:
        """Draw the new pictures: the charts of all rows, and of the last row."""
        for chart in charts.CHARTS:
            for name, shown in chart.shown(tuple(self.rows)).items():
                if name in self.drawn and self.drawn[name][0] is shown:
                    continue
                # An older picture would not match the tables.
                self.drawn.pop(name, None)
                try:
                    if (picture := chart.picture(name, shown)) is not None:
                        self.drawn[name] = shown, picture
                except Exception as error:
                    self._tell(error)

    def _write_picture(self, name: str) -> bool:
        try:
            make_folder(self.out / FIGURES_NAME)
            for ending, content in self.drawn[name][1].files.items():
                replace_file(self.out / FIGURES_NAME / f"{name}{ending}", content)
        except Exception as error:
            self._tell(error)
            return False
        return True

    def _tell(self, error: Exception) -> None:
        why = str(error) if isinstance(error, DapaError) else one_line(error)
        if why not in self.told:
            LOG.info(f"no pictures: {why}")
        self.told.add(why)

    def fault(self, names: Mapping[str, Path]) -> DapaError | None:
        """The error of the first recipe that could not be measured, extended by what is kept; None if all were."""
        if not self.failures:
            return None
        name, error = next(iter(self.failures.items()))
        number = f"; {len(self.failures)} of {len(names)} recipes could not be measured"
        kept = ", and the tables have the others" if self.rows else ""
        if not self.is_written:
            kept = (
                f", so the tables and pictures in {self.out} are left as an earlier run wrote them; new measurements "
                f"are kept in {self.out / ROWS_NAME}"
            )
        error.args = (f"recipe {names[name]}: {error}{number}{kept}",)
        return error


def _written_rows(summary: Path) -> dict[str, Any]:
    """The rows of the existing tables, by name."""
    try:
        return {row["name"]: row for row in json.loads(summary.read_bytes())["rows"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def summarize(rows: Sequence[Row], failures: Mapping[str, DapaError], wanted: CompareOptions) -> dict[str, Any]:
    """Turn everything into plain data for `json.dumps`; figures that are not finite become None."""
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
    arms = [{**asdict(arm), "repairs": row.repairs(arm), "skill": arm.skill} for arm in row.arms]
    for arm in arms:
        # The journals tell which prompts were refused.
        del arm["refused"], arm["over_refused"]
    curve = [{**asdict(point), "on_front": is_best} for point, is_best in zip(row.curve, row.front(), strict=True)]
    best = [arm.key for arm in choices(row)]
    found = {key: row.arm(key) for key in (DAPA, AUTO)}
    dapa = {key: asdict(row.change(one)) for key, one in found.items() if one is not None and one.figures is not None}
    said: dict[str, Any] = {}
    for key, value in asdict(replace(row, arms=(), curve=())).items():
        said |= row.edit.to_json() if key == "edit" else value if key == "settings" else {key: value}
    return {**said, "arms": arms, "curve": curve, "repair": best, "changes": dapa}


@dataclass(frozen=True)
class Owner:
    """The place of a row's recipe.

    Attributes:
        seen_from_folder: Relative to the comparison's folder, so that both can be moved together.
    """

    path: str
    seen_from_folder: str


_OWNER = TypeAdapter(Owner)


def is_comparison(out: Path) -> bool:
    """Whether a folder holds a comparison, by the contents of its rows."""
    rows = out / ROWS_NAME
    try:
        if any(_is_row(row) for row in rows.iterdir()):
            return True
        # A run that is killed at once leaves only this.
        return os.listdir(out) == [ROWS_NAME] and all(
            path.is_dir() or path.name.startswith(OURS) for path in rows.rglob("*")
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def existing_rows(out: Path) -> set[str]:
    """The names of the rows in a comparison's folder."""
    return {row.name for row in (out / ROWS_NAME).iterdir() if _is_row(row)}


def row_names(paths: Sequence[Path], out: Path) -> dict[str, Path]:
    """Name the recipes, in their order, by their existing rows or by new names, which are recorded.

    Raises:
        UsageError: If the folder cannot be written.
    """
    rows = out / ROWS_NAME
    with locked(out):
        owners = {row.name: owner for row in rows.iterdir() if (owner := _read_owner(row)) is not None}
        found: dict[Path, str] = {}
        wanted = {path: _owner(path, out) for path in paths}
        for kind in ("path", "seen_from_folder"):
            for path in paths:
                free = owners.keys() - found.values()
                same = sorted(name for name in free if getattr(owners[name], kind) == getattr(wanted[path], kind))
                if path not in found and same:
                    found[path] = same[0]
        found |= new_names([path for path in paths if path not in found], paths, owners)
        for path, name in found.items():
            if owners.get(name) != wanted[path]:
                _write_owner(rows / name, wanted[path])
    return {found[path]: path for path in paths}


def new_names(new: Sequence[Path], given: Sequence[Path], taken: Iterable[str]) -> dict[Path, str]:
    """Name each new recipe by its file or, if several of the `given` recipes share that name, by folder and file.

    Names are valid file names and differ from each other and from those `taken`, even where case is ignored.
    """
    used = set(map(_folded, taken))
    stems = Counter(_folded(_safe(path.stem)) for path in given)
    names: dict[Path, str] = {}
    for path in new:
        short = _safe(path.stem)
        long = _safe(f"{Path(os.path.abspath(path)).parent.name}-{path.stem}")
        wanted = [short] if stems[_folded(short)] == 1 else []
        numbered = (f"{long}-{number}" for number in count(2))
        names[path] = next(name for name in chain(wanted, [long], numbered) if _folded(name) not in used)
        used.add(_folded(names[path]))
    return names


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from naming rows or writing tables in the same folder.

    Raises:
        UsageError: If the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(out / ROWS_NAME / LOCK_NAME))
        except OSError as error:
            raise UsageError(f"{out} cannot be written: {error.strerror}; name another folder") from error
        yield


def _folded(name: str) -> str:
    """A form that is equal for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _safe(text: str) -> str:
    """A text as a file name: short enough for any disk, in one line, and not hidden."""
    shown = "".join(one if one.isprintable() and one not in UNSAFE else "-" for one in text)
    return shown[:MAX_LETTERS].encode()[:MAX_BYTES].decode(errors="ignore").strip(" .-") or "recipe"


def _is_row(row: Path) -> bool:
    return row.is_dir() and (_read_owner(row) is not None or any(map(begins_journal, row.glob("*.jsonl"))))


def _owner(path: Path, out: Path) -> Owner:
    real = os.path.realpath(path)
    try:
        return Owner(real, os.path.relpath(real, os.path.realpath(out)))
    except ValueError:
        # On Windows there is no relative path from one disk to another.
        return Owner(real, real)


def _read_owner(row: Path) -> Owner | None:
    try:
        return _OWNER.validate_json((row / OWNER_NAME).read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


def _write_owner(row: Path, owner: Owner) -> None:
    make_folder(row)
    try:
        replace_file(row / OWNER_NAME, json.dumps(asdict(owner)).encode() + b"\n")
    except DapaError as error:
        raise UsageError(str(error)) from error
