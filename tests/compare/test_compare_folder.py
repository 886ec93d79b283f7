"""The folder of a comparison: whose its rows are, and what becomes of an earlier run's tables. Nothing is measured."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import answer, call
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.cli.study import _weights
from dapa_merge.compare import charts as plot
from dapa_merge.compare import compare as flow
from dapa_merge.compare.compare import LOCK_NAME, MAX_LETTERS, OWNER_NAME, compare_recipes, new_names, row_names
from dapa_merge.compare.result import Arm, CompareOptions, Point, Row
from dapa_merge.delta.minimize import Minimum, SearchStopped
from dapa_merge.errors import CannotRepair, CheckpointError, DapaError, UsageError
from dapa_merge.files import replace_files
from dapa_merge.measure.figures import Figures
from dapa_merge.plan.edit import Copy
from dapa_merge.recipe.options import Options
from dapa_merge.report import drawing

TABLES = {"table.md", "table.csv", "curve.csv", "table.tex", "summary.json"}
CURVE = (Point("dapa", 0.1, 1, 0.5, (0.4, 0.6), 0.0, None, 1.0),)
SETTINGS = {"retain": 0.95, "max_over_refusal": 0.05, "max_perplexity": 1.05}


def figures(dsr: float) -> Figures:
    return Figures(
        10, dsr, (0.0, 1.0), 1 - dsr, 0.0, 0.0, 10, 0.0, (0.0, 1.0), (), (), None, 1.0, "some text", ()
    )  # fmt: skip


def row(name: str, dsr: float = 0.5, curve: tuple[Point, ...] = CURVE) -> Row:
    def arm(key: str, value: float) -> Arm:
        return Arm(key, key, key, key, figures(value), refused=(True,) * 10, over_refused=(False,) * 10)

    return Row(
        name, "the/target", "the/source", "LlamaForCausalLM", "gate", "refusal", Copy(), 1000, "some", SETTINGS,
        (arm("target", 0.0), arm("source", 1.0), arm("fixed", dsr)), curve,
    )  # fmt: skip


class Measured:
    """What is measured of each row, by its name: figures of one arm, or what is raised instead."""

    def __init__(self) -> None:
        self.outcomes: dict[str, float | BaseException] = {}
        self.has_curve = True
        self.asked: list[str] = []

    def __call__(self, recipe, name, folder, wanted, options) -> Row:
        self.asked.append(name)
        outcome = self.outcomes.get(name, 0.5)
        if isinstance(outcome, BaseException):
            raise outcome
        return row(name, outcome, CURVE if self.has_curve else ())


def draw(monkeypatch, name: str, draw: Callable) -> None:
    """Let a chart be drawn by something else."""
    charts = [replace(chart, draw=draw) if chart.name == name else chart for chart in plot.CHARTS]
    monkeypatch.setattr(plot, "CHARTS", charts)


@pytest.fixture
def measured(monkeypatch) -> Measured:
    """Rows that are known without a model, and pictures that are no more than what they show."""
    found = Measured()
    monkeypatch.setattr(flow, "compare_recipe", found)
    draw(monkeypatch, "methods", lambda rows: " ".join(row.name for row in rows) or None)
    draw(monkeypatch, "row_{}", lambda row: f"{row.name} {row.arm('fixed').figures.dsr}")
    monkeypatch.setattr(drawing, "render", lambda figure, kind: f"{figure} {kind}".encode())
    return found


@pytest.fixture
def recipes(tmp_path) -> dict[str, Path]:
    return {name: write(tmp_path / f"{name}.yml") for name in ("one", "two", "three")}


def write(path: Path, **parameters) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = "".join(f"  {key}: {value}\n" for key, value in {"prompts": "miniature", **parameters}.items())
    path.write_text(
        f"merge_method: dapa\nbase_model: {miniature.path('target')}\nmodels:\n"
        f"  - model: {miniature.path('source')}\nparameters:\n{settings}"
    )
    return path


def compared(out: Path, *paths: Path):
    return call("compare", *paths, "--out", out, "--methods", "fixed", "--device", "cpu")


def rows_in(out: Path) -> list[str]:
    return [row["name"] for row in json.loads((out / "summary.json").read_text())["rows"]]


def content(out: Path) -> dict[str, bytes]:
    """All tables and pictures."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.relative_to(out).parts[0] != "rows"
    }


def pictures_in(out: Path) -> set[str]:
    return {path.stem for path in (out / "figures").glob("*.png")}


# Names.


def test_rows_are_called_as_their_files_and_no_recipe_comes_twice(tmp_path, recipes):
    paths = [Path("a/llama.yml"), Path("b/llama.yml"), Path("c/gemma.yml")]
    assert list(new_names(paths, paths, ()).values()) == ["a-llama", "b-llama", "gemma"]
    again = tmp_path / ".." / tmp_path.name / "one.yml"
    result = compared(tmp_path / "out", recipes["one"], again)
    assert result.exit_code == 2
    assert "a recipe is given twice; name each once" in result.stderr
    assert not (tmp_path / "out").exists()


LETTERS = st.text(st.sampled_from("aAxX-2.é\n|") | st.characters(exclude_characters="/\0"), min_size=1, max_size=6)
FOLDERS = st.sampled_from(["a", "b", "c/a"])


@given(st.sets(st.tuples(FOLDERS, LETTERS), max_size=8), st.sets(LETTERS, max_size=3))
def test_no_two_recipes_have_one_name_and_every_name_is_a_safe_file_name(files, taken):
    paths = [Path(folder) / f"{stem}.yml" for folder, stem in files]
    names = new_names(paths, paths, taken)
    assert list(names) == paths
    folded = [name.casefold() for name in names.values()]
    assert len({*folded, *(name.casefold() for name in taken)}) == len(folded) + len({one.casefold() for one in taken})
    for name in names.values():
        assert name.isprintable()
        assert not set(name) & set('/\\|:*?"<>')
        assert name[0] not in " ."


@pytest.mark.parametrize(
    "files",
    [
        ("a/x", "b/x", "c/a-x"), ("c/a-x", "a/x", "b/x"), ("a/x", "b/a/x", "c/a/x"), ("b/a/x", "c/a/x", "d/a-x-2"),
        ("a/x", "b/X", "c/a-X"), ("b/a/x", "c/a/x", "d/a/x", "a-x-1", "a-x-2", "a-x-3"),
    ],
)  # fmt: skip
def test_no_recipe_is_dropped_where_names_collide(tmp_path, files):
    paths = [tmp_path / f"{name}.yml" for name in files]
    (tmp_path / "out" / "rows").mkdir(parents=True)
    names = row_names(paths, tmp_path / "out")
    assert list(names.values()) == paths
    assert len({name.casefold() for name in names}) == len(paths)


def test_a_long_name_is_cut_for_pictures_and_journals(measured, tmp_path):
    path = write(tmp_path / f"{'x' * 250}.yml")
    hidden = write(tmp_path / ".hidden\nname.yml")
    assert compared(tmp_path / "out", path, hidden).exit_code == 0
    assert rows_in(tmp_path / "out") == ["x" * MAX_LETTERS, "hidden-name"]
    assert pictures_in(tmp_path / "out") == {"methods", f"row_{'x' * MAX_LETTERS}", "row_hidden-name"}


@pytest.mark.parametrize("company", list(itertools.permutations(["a/x", "b/x", "a-x"])))
def test_a_row_keeps_its_name_in_whatever_company(tmp_path, company):
    paths = {name: tmp_path / f"{name}.yml" for name in company}
    out = tmp_path / "out"
    (out / "rows").mkdir(parents=True)
    known: dict[Path, str] = {}
    for number in range(1, 4):
        for some in itertools.permutations(company[:number]):
            names = row_names([paths[name] for name in some], out)
            for name, path in names.items():
                assert known.setdefault(path, name) == name
    assert len(set(known.values())) == 3


def test_the_row_of_another_recipe_is_not_taken(measured, tmp_path):
    out = tmp_path / "out"
    first, second = write(tmp_path / "a" / "x.yml"), write(tmp_path / "b" / "x.yml")
    assert compared(out, first).exit_code == 0
    assert compared(out, second).exit_code == 0
    assert compared(out, second, first).exit_code == 0
    assert measured.asked == ["x", "b-x", "b-x", "x"]


def test_folder_and_recipes_may_move_together_and_the_folder_alone(measured, tmp_path):
    here = tmp_path / "here"
    paths = [write(here / name / "x.yml") for name in ("a", "b")]
    assert compared(here / "out", *paths).exit_code == 0
    there = tmp_path / "there"
    shutil.copytree(here / "out", there / "out")
    assert compared(there / "out", paths[1]).exit_code == 0
    shutil.rmtree(there)
    here.rename(there)
    assert compared(there / "out", there / "b" / "x.yml").exit_code == 0
    assert measured.asked == ["a-x", "b-x", "b-x", "b-x"]


def test_a_row_of_before_rows_had_owners_is_gone_on_with(measured, tmp_path, recipes):
    out = tmp_path / "out"
    assert compared(out, recipes["one"]).exit_code == 0
    (out / "rows" / "one" / OWNER_NAME).unlink()
    (out / "rows" / "one" / "figures.jsonl").write_text('{"journal":1}\n')
    assert compared(out, recipes["one"]).exit_code == 0
    assert measured.asked == ["one", "one"]


# Whose a folder is.


@pytest.mark.parametrize("name", ["rows/thesis.tex", "rows/one/data.jsonl", "rows/one/recipe.json"])
def test_a_folder_with_rows_of_something_else_is_left_alone(tmp_path, recipes, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    before = content(tmp_path)
    result = compared(tmp_path / "out", recipes["one"])
    assert result.exit_code == 2
    assert "exists and is not the folder of a comparison; name another or remove it" in result.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize("left", ["rows", "rows/one", "rows/one/.dapa-merge-0123456789abcdef", f"rows/{LOCK_NAME}"])
def test_what_a_kill_in_the_first_moment_leaves_is_gone_on_with(measured, tmp_path, recipes, left):
    path = tmp_path / "out" / left
    path.parent.mkdir(parents=True)
    if path.name.startswith("."):
        path.touch()
    else:
        path.mkdir()
    assert compared(tmp_path / "out", recipes["one"]).exit_code == 0


def make_file(path: Path) -> Path:
    path.write_text("mine")
    return path


def make_closed(path: Path) -> Path:
    path.mkdir()
    path.chmod(0o500)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_file, "exists and is not the folder of a comparison"),
        (lambda path: make_file(path) / "below", "is not a folder; name another folder"),
        (lambda path: make_file(path) / "far" / "below", "is not a folder; name another folder"),
        (lambda path: path.parent / ("x" * 300), "File name too long; name another folder"),
        (lambda path: path.parent / ("x" * 300) / "below", "File name too long; name another folder"),
        (lambda path: path.symlink_to("nowhere") or path, "cannot be made: File exists; name another folder"),
        (lambda path: Path("/proc/out"), "name another folder"),
        pytest.param(
            make_closed,
            "cannot be written: Permission denied; name another folder",
            marks=pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write everywhere"),
        ),
    ],
)
def test_where_nothing_can_be_written_is_said_in_a_sentence(measured, tmp_path, recipes, make, message):
    result = compared(make(tmp_path / "place"), recipes["one"])
    assert result.exit_code == 2, result.stderr
    # After what was read of the prompts, if the folder was made only then.
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert measured.asked == []


def test_a_file_in_the_place_of_the_rows_is_said_in_a_sentence(measured, tmp_path, recipes):
    assert compared(tmp_path / "out", recipes["one"]).exit_code == 0
    (tmp_path / "out" / "rows" / "two").touch()
    result = compared(tmp_path / "out", recipes["two"])
    assert result.exit_code == 2
    assert "rows/two cannot be made: File exists; name another folder" in result.stderr


# What an earlier run left.


@pytest.mark.parametrize(
    "outcome", [UsageError("the journal belongs to another comparison"), CheckpointError("damaged")]
)
def test_a_row_that_fails_costs_neither_its_earlier_tables_nor_pictures(measured, tmp_path, recipes, outcome):
    out = tmp_path / "out"
    assert compared(out, recipes["one"], recipes["two"]).exit_code == 0
    before = content(out)
    for some in ([recipes["one"]], [recipes["one"], recipes["two"]], recipes.values()):
        measured.outcomes = {"one": type(outcome)(*outcome.args), "three": 0.25}
        result = compared(out, *some)
        assert result.exit_code == outcome.exit_code
        assert f"Error: recipe {recipes['one']}: " in result.stderr
        assert f"the tables and pictures in {out} are left as an earlier run wrote them" in result.stderr
        assert "the tables: " not in result.stdout
        assert content(out) == before


def test_if_every_row_fails_the_earlier_tables_of_others_stay(measured, tmp_path, recipes):
    out = tmp_path / "out"
    assert compared(out, recipes["one"]).exit_code == 0
    before = content(out)
    measured.outcomes = {"two": CheckpointError("damaged")}
    result = compared(out, recipes["two"])
    assert result.exit_code == 4
    assert "1 of 1 recipes could not be measured, so the tables and pictures in" in result.stderr
    assert content(out) == before


def test_a_new_row_that_fails_is_told_in_the_tables_of_the_others(measured, tmp_path, recipes):
    out = tmp_path / "out"
    assert compared(out, recipes["one"]).exit_code == 0
    measured.outcomes = {"two": CheckpointError("damaged")}
    result = compared(out, *recipes.values())
    assert result.exit_code == 4
    assert (
        f"recipe {recipes['two']}: damaged; 1 of 3 recipes could not be measured, and the tables have the others"
        in (result.stderr)
    )
    assert f"the tables: {out / 'table.md'}" in result.stdout
    assert rows_in(out) == ["one", "three"]
    assert "- two: damaged" in (out / "table.md").read_text()


def test_in_a_new_folder_the_tables_say_that_nothing_could_be_measured(measured, tmp_path, recipes):
    measured.outcomes = {"one": CannotRepair("no gain")}
    result = compared(tmp_path / "out", recipes["one"])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "- one: no gain" in (tmp_path / "out" / "table.md").read_text()
    assert compared(tmp_path / "out", recipes["two"]).exit_code == 0
    assert rows_in(tmp_path / "out") == ["two"]


@pytest.mark.parametrize("stopped", ["one", "two"])
def test_ctrl_c_leaves_the_earlier_tables_and_pictures_complete(measured, tmp_path, recipes, stopped):
    out = tmp_path / "out"
    assert compared(out, recipes["one"], recipes["two"]).exit_code == 0
    before = content(out)
    measured.outcomes = {"one": 0.25, stopped: KeyboardInterrupt()}
    result = compared(out, *recipes.values())
    assert result.exit_code == 130
    assert content(out) == before


def test_tables_can_be_followed_where_they_only_grow(measured, tmp_path, recipes):
    out = tmp_path / "out"
    measured.outcomes = {"two": KeyboardInterrupt()}
    assert compared(out, *recipes.values()).exit_code == 130
    assert rows_in(out) == ["one"]
    measured.outcomes = {"one": 0.25, "three": KeyboardInterrupt()}
    assert compared(out, *recipes.values()).exit_code == 130
    assert rows_in(out) == ["one", "two"]
    assert (out / "figures" / "row_one.png").read_bytes() == b"one 0.25 png"


def test_another_process_in_the_folder_is_overwritten_at_the_end_only(measured, tmp_path, recipes, monkeypatch):
    out = tmp_path / "out"

    def look(recipe, name, *_) -> Row:
        if name == "two":
            assert rows_in(out) == ["one"]
            # The other process, with a recipe of its own.
            (out / "summary.json").write_text('{"rows": [{"name": "theirs"}]}')
            (out / "figures" / "row_one.png").unlink()
        if name == "three":
            assert rows_in(out) == ["theirs"]
        return row(name)

    monkeypatch.setattr(flow, "compare_recipe", look)
    assert compared(out, *recipes.values()).exit_code == 0
    assert rows_in(out) == list(recipes)
    assert pictures_in(out) == {"methods", *(f"row_{name}" for name in recipes)}


def test_pictures_of_rows_that_are_no_longer_there_are_removed_and_nobody_elses(measured, tmp_path, recipes):
    out = tmp_path / "out"
    assert compared(out, recipes["one"], recipes["two"]).exit_code == 0
    for name in ("row_notes.png", "methods2.png", "mine.svg", "row_one.txt"):
        (out / "figures" / name).write_text("mine")
    assert compared(out, recipes["two"]).exit_code == 0
    assert pictures_in(out) == {"methods", "row_two", "row_notes", "methods2"}
    assert (out / "figures" / "mine.svg").exists()
    assert not (out / "figures" / "row_one.svg").exists()
    # As another process leaves it, whose tables were written over.
    (out / "figures" / "row_one.png").touch()
    assert compared(out, recipes["two"]).exit_code == 0
    assert "row_one" not in pictures_in(out)
    measured.has_curve = False
    assert compared(out, recipes["two"]).exit_code == 0
    assert pictures_in(out) == {"methods", "row_notes", "methods2"}


def fail_to_draw(*_):
    raise UsageError("pictures need matplotlib")


def test_without_matplotlib_pictures_stay_that_are_still_right(measured, tmp_path, recipes, monkeypatch):
    out = tmp_path / "out"
    assert compared(out, recipes["one"], recipes["two"]).exit_code == 0
    before = content(out)
    monkeypatch.setattr(drawing, "render", fail_to_draw)
    result = compared(out, recipes["one"], recipes["two"])
    assert result.exit_code == 0
    assert result.stderr.count("no pictures: pictures need matplotlib") == 1
    assert content(out) == before
    assert "figures/row_one.png" in (out / "table.md").read_text()
    measured.outcomes = {"two": 0.25}
    assert compared(out, recipes["one"], recipes["two"]).exit_code == 0
    assert pictures_in(out) == {"row_one"}
    page = (out / "table.md").read_text()
    assert "figures/row_one.png" in page
    assert "figures/row_two.png" not in page
    assert "figures/methods.png" not in page


def fail_to_write(path: Path, content: bytes) -> None:
    if path.parent.name == "figures":
        raise DapaError(f"{path} cannot be written: No space left on device")
    path.write_bytes(content)


def test_pictures_that_cannot_be_written_cost_a_sentence(measured, tmp_path, recipes, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(flow, "replace_file", fail_to_write)
    result = compared(out, recipes["one"])
    assert result.exit_code == 0
    assert "no pictures: " in result.stderr
    assert "No space left on device" in result.stderr
    assert rows_in(out) == ["one"]
    assert "figures/" not in (out / "table.md").read_text()


def test_a_file_in_the_place_of_the_pictures_costs_a_sentence(measured, tmp_path, recipes):
    out = tmp_path / "out"
    measured.has_curve = False
    assert compared(out, recipes["one"]).exit_code == 0
    shutil.rmtree(out / "figures")
    (out / "figures").touch()
    result = compared(out, recipes["one"])
    assert result.exit_code == 0
    assert "figures cannot be made: File exists" in result.stderr
    assert {path.name for path in out.iterdir()} == {*TABLES, "rows", "figures"}


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), MemoryError(), ZeroDivisionError("x")])
def test_a_picture_that_cannot_be_drawn_costs_a_sentence(measured, tmp_path, recipes, monkeypatch, fault):
    def fail(row):
        raise fault

    draw(monkeypatch, "row_{}", fail)
    result = compared(tmp_path / "out", recipes["one"])
    assert result.exit_code == 0
    assert f"no pictures: {type(fault).__name__}" in result.stderr
    assert pictures_in(tmp_path / "out") == {"methods"}


# What is said.


@pytest.mark.parametrize("is_written", [True, False])
def test_json_is_printed_also_where_a_row_failed(measured, tmp_path, recipes, is_written):
    out = tmp_path / "out"
    if not is_written:
        assert compared(out, recipes["two"]).exit_code == 0
    measured.outcomes = {"two": CheckpointError("damaged")}
    result = call("compare", *recipes.values(), "--out", out, "--device", "cpu", "--json")
    assert result.exit_code == 4
    summary = json.loads(result.stdout)
    assert [row["name"] for row in summary["rows"]] == ["one", "three"]
    assert summary["failures"] == {"two": "damaged"}
    assert (json.loads((out / "summary.json").read_text()) == summary) is is_written


def test_a_fault_that_is_seen_early_names_its_recipe(measured, tmp_path, recipes):
    bad = write(tmp_path / "bad.yml", prompts="no-such-set")
    result = compared(tmp_path / "out", recipes["one"], bad)
    assert result.exit_code == 2
    assert f"Error: recipe {bad}: " in result.stderr
    assert not (tmp_path / "out").exists()
    # These say themselves where they are.
    for parameters in ({"nonsense": 1}, {"layers": '"99"'}, {"retain": 7}, {"pretrained": "./nowhere"}):
        placed = write(tmp_path / "placed.yml", **parameters)
        result = compared(tmp_path / "out", recipes["one"], placed)
        assert result.exit_code in (2, 4)
        assert result.stderr.count(str(placed)) == 1


STOPS = {
    "Ctrl-C": (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130),
    "Ctrl-C in a search": (lambda: (_ for _ in ()).throw(SearchStopped(Minimum((), 1, False, {}))), 130),
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), 143),
}


@pytest.mark.parametrize("is_begun", [True, False])
@pytest.mark.parametrize("how", STOPS)
def test_whoever_stops_it_is_told_that_the_same_command_goes_on(
    measured, tmp_path, recipes, monkeypatch, how, is_begun
):
    stop, exit_code = STOPS[how]
    if is_begun:
        monkeypatch.setattr(flow, "compare_recipe", lambda *_: stop())
        kept = f"the measurements so far are in {tmp_path / 'out'}, and the same command resumes from there"
    else:
        monkeypatch.setattr(flow, "make_plan", lambda *_, **__: stop())
        kept = "nothing was measured yet, and the same command starts again"
    result = compared(tmp_path / "out", recipes["one"])
    assert result.exit_code == exit_code
    assert result.stderr.splitlines()[-1] == f"Stopped by {how.partition(' in ')[0]}; {kept}"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Model:
    """Something large."""


def test_a_row_that_failed_is_not_kept_in_memory(measured, tmp_path, recipes, monkeypatch):
    models: list[weakref.ref[Model]] = []

    def load() -> None:
        model = Model()
        models.append(weakref.ref(model))
        raise ZeroDivisionError

    def fail(recipe, name, *_) -> Row:
        if name == "two":
            gc.collect()
            assert [model() for model in models] == [None, None]
            return row(name)
        model = Model()
        models.append(weakref.ref(model))
        try:
            load()
        except ZeroDivisionError as error:
            raise CheckpointError("damaged") from error

    monkeypatch.setattr(flow, "compare_recipe", fail)
    paths = [recipes["one"], recipes["two"]]
    found = compare_recipes(paths, tmp_path / "out", CompareOptions(), Options(device="cpu"))
    assert isinstance(found.fault, CheckpointError)
    assert [row.name for row in found.rows] == ["two"]


# Weights.


def test_weights_that_a_table_would_show_alike_are_refused():
    assert _weights("0.5, 0.25,0.5") == (0.25, 0.5)
    assert _weights("0.333333,0.333334") == (0.333333, 0.333334)
    with pytest.raises(UsageError, match=r"0\.3333333 and 0\.33333334 agree in the six digits that tables show; name"):
        _weights("0.3333333,0.5,0.33333334")


def test_the_source_itself_is_no_linear_blend(measured, tmp_path, recipes):
    out = tmp_path / "out"
    for methods in ("linear", "fixed,linear"):
        result = call(
            "compare", recipes["one"], "--out", out, "--methods", methods, "--weights", "1", "--device", "cpu"
        )
        assert result.exit_code == 2
        assert "linear with weight 1 is the source itself, which is in every table; add a weight below 1" in (
            result.stderr
        )
    for more in (("--methods", "linear", "--weights", "1,0.5"), ("--methods", "ties", "--weights", "1"), ()):
        answer("compare", recipes["one"], "--out", out, *more, "--device", "cpu", "--json")


def test_of_files_that_belong_together_none_is_replaced_where_one_cannot_be_written(tmp_path):
    (tmp_path / "table.md").write_bytes(b"before")
    with pytest.raises(DapaError, match="cannot be written: No such file or directory; the previous content is kept"):
        replace_files({tmp_path / "table.md": b"after", tmp_path / "absent" / "table.csv": b"after"})
    assert (tmp_path / "table.md").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
