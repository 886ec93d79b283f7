"""A new chart of a run is one entry in `CHARTS`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import call, write_few

from dapa_merge import miniature
from dapa_merge.delta.minimize import Minimum
from dapa_merge.files import CHART_PREFIX
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report import charts
from dapa_merge.report.drawing import Chart, sheet
from dapa_merge.search.requirement import Requirement
from dapa_merge.search.result import Asked, Baseline, Search

FILES = {"dapa_toy.png", "dapa_toy.svg"}


def draw(run: charts.Run):
    with sheet(2) as figure:
        figure.add_subplot().bar(["before", "after"], [run.report.before.dsr, run.report.after.dsr])
    return figure


@pytest.fixture
def toy(monkeypatch) -> None:
    """The one place in which a chart is registered."""
    monkeypatch.setattr(charts, "CHARTS", (*charts.CHARTS, Chart("dapa_toy", "A toy: before and after", draw)))


def write(path: Path, target: Path, layers: str = "3-5") -> Path:
    if not (prompts := path.parent / "few").exists():
        write_few(prompts, 4)
    path.write_text(
        f"merge_method: dapa\nbase_model: {target}\nmodels:\n  - model: {miniature.path('source')}\n"
        f"parameters:\n  layers: {layers}\n  prompts: {prompts}\n  max_new_tokens: 4\n"
    )
    return path


def test_a_search_is_drawn_with_units_that_its_result_has_no_directions_of(tmp_path):
    plan = make_plan(load_recipe(write(tmp_path / "recipe.yml", miniature.path("target"))))
    few = plan.units[3:5]
    path = (Asked(plan.units[:8], True, 1.0), Asked(few, True, 1.0))
    limits = Requirement(((SCORE, 0.95),))
    baseline = Baseline({"score": 1.0}, ())
    found = Search(Minimum(few, 2, True, {}), limits, baseline, baseline, None, path, 10, 0, 0, 0, 0, 0.0, plan)
    drawn = charts.draw_search(charts.Run(None, replace(plan, units=few), found))
    names = {text.get_text() for axis in drawn.axes for text in axis.get_yticklabels()}
    assert {"0.gate", "7.gate"} <= names


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_chart_is_drawn_shown_on_the_card_and_left_behind_by_a_transplant(toy, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    result = call("run", write(tmp_path / "recipe.yml", miniature.path("target")), out)
    assert result.exit_code == 0, result.stderr
    assert names_in(out) >= FILES | {"dapa_figures.png"}
    assert (out / "dapa_toy.png").read_bytes().startswith(b"\x89PNG")
    assert "![A toy: before and after](dapa_toy.png)" in (out / "README.md").read_text()
    result = call("run", write(tmp_path / "second.yml", out, "6"), again, "--no-evaluate")
    assert result.exit_code == 0, result.stderr
    assert not [name for name in names_in(again) if name.endswith((".png", ".svg"))]


def test_without_matplotlib_a_run_says_what_to_install_and_has_no_pictures(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    result = call("run", write(tmp_path / "recipe.yml", miniature.path("target")), out)
    assert result.exit_code == 0, result.stderr
    said = "no pictures next to the model: plots need matplotlib; install it with: pip install matplotlib"
    assert said in result.stderr
    assert not [name for name in names_in(out) if name.endswith((".png", ".svg"))]
    assert "![" not in (out / "README.md").read_text()


def test_a_transplant_knows_every_chart_of_a_run_by_its_name():
    assert all(chart.name.startswith(CHART_PREFIX) and chart.parts is None for chart in charts.CHARTS)
