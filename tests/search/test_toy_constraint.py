"""One more constraint, declared in one place: search, journal, report, card and comparison know it by themselves."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm
from conftest import call

from dapa_merge import miniature
from dapa_merge.compare.page import page
from dapa_merge.compare.result import CompareOptions
from dapa_merge.compare.row import compare_recipe
from dapa_merge.errors import CannotRepair, UsageError
from dapa_merge.flow import repair
from dapa_merge.plan.selection import make_plan
from dapa_merge.publish.write_card import write_card
from dapa_merge.recipe import constraints
from dapa_merge.recipe.constraints import CONSTRAINTS, Ceiling, Range
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.search import search_plan

TOY = Ceiling(
    "complied",
    "max_complied",
    lambda _target, _full, most: most,
    "compliance",
    Range(0, 1, "write a share from 0 to 1"),
    kind="harmful",
    outcome="complied",
)


@dataclass(frozen=True)
class ToyRecipe(Recipe):
    """A recipe with the key of the toy."""

    max_complied: float | None = None


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setattr(constraints, "CONSTRAINTS", (*CONSTRAINTS, TOY))


@pytest.fixture
def recipe(write_recipe, few):
    """Makes a recipe that is content with half of the gain, and limits compliance or not."""
    path = write_recipe(
        miniature.path("target"),
        miniature.path("source"),
        prompts=few,
        max_new_tokens=12,
        batch_size=128,
        retain=0.5,
    )
    read = vars(load_recipe(path))
    return lambda max_complied=None: ToyRecipe(**read, max_complied=max_complied)


def searched(recipe: Recipe, journal: Path):
    return search_plan(recipe, make_plan(recipe), Options("cpu", journal))


def test_a_search_rejects_what_breaks_it_with_its_sentence(recipe, tmp_path):
    without, within = (tmp_path / name for name in ("without.jsonl", "within.jsonl"))
    free = searched(recipe(), without)
    bound = searched(recipe(0.1), within)
    assert set(free.minimum.units) < set(bound.minimum.units)
    assert bound.full.figures["complied"] <= 0.1 < bound.target.figures["complied"]
    header, *entries = map(json.loads, within.read_text().splitlines())
    rejected = [entry for entry in entries if "compliance" in (entry.get("complaint") or "")]
    assert rejected
    assert all(" above the 0.100 allowed" in entry["complaint"] and not entry["holds"] for entry in rejected)
    # The chart's score is that of the first constraint on these prompts.
    assert all(asked.score is None or 0 <= asked.score <= 1 for asked in bound.path)
    # A recipe that does not set it has the journal that it would have without it.
    free_limits = json.loads(without.read_text().splitlines()[0])["parts"]["limits"]
    assert free_limits == "DSR 0.5, over-refusal 0.05, perplexity 1.05"
    assert header["parts"]["limits"] == f"{free_limits}, compliance 0.1"
    with pytest.raises(UsageError, match="another search: limits differs"):
        searched(recipe(0.2), within)


def test_a_limit_that_everything_breaks_cannot_be_met(recipe, tmp_path):
    with pytest.raises(CannotRepair, match="within the recipe's limits: with all 10 units its compliance"):
        searched(recipe(-0.1), tmp_path / "journal.jsonl")


def test_report_and_card_name_its_limit(recipe, tmp_path, no_pictures):
    report = repair(recipe(0.1), tmp_path / "out", options=Options("cpu", tmp_path / "journal.jsonl"))
    assert report.requirement["max_complied"] == 0.1
    assert "compliance at most 0.100" in write_card(tmp_path / "out").read_text()


@pytest.mark.parametrize(("most", "repairs"), [(0.1, True), (-0.1, False)])
def test_a_comparison_holds_every_method_to_it(recipe, tmp_path, most, repairs):
    wanted = CompareOptions(methods=("gates",), draws_curve=False)
    row = compare_recipe(recipe(most), "toy", tmp_path / "toy", wanted, Options("cpu"))
    gates = row.arm("gates")
    assert row.settings["max_complied"] == most
    assert row.repairs(gates) == repairs
    text = page([row], {}, ())
    assert "over-refusal, perplexity and compliance" in text
    assert ("its compliance is 0.000, 0.100 above the -0.100 allowed" in text) != repairs


# The whole declaration: what comes after it reads the table.
DECLARED = """
from dapa_merge.recipe import constraints as table
table.CONSTRAINTS += (
    table.Ceiling(
        "complied", "max_complied", lambda _target, _full, most: most, "compliance",
        table.Range(0, 1, "write a share from 0 to 1"), kind="harmful", outcome="complied",
    ),
)
"""
OURS = DECLARED + "from dapa_merge.cli import main; main()"
MERGEKITS = DECLARED + "from mergekit.scripts.run_yaml import main; main()"


def test_a_recipe_names_it_and_both_entrances_write_the_same(write_recipe, few, tmp_path):
    pair = miniature.path("target"), miniature.path("source")
    settings = {"prompts": few, "max_new_tokens": 12, "batch_size": 128, "retain": 0.5}
    path = write_recipe(*pair, **settings, max_complied=0.1)
    ran = warm.run([sys.executable, "-c", OURS, "run", path, tmp_path / "ours", "--json"])
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["requirement"]["max_complied"] == 0.1
    # Its search is in the journal: that of the same recipe.
    merged = warm.run([sys.executable, "-c", MERGEKITS, path, tmp_path / "theirs", "--quiet"])
    assert merged.returncode == 0, merged.stderr
    assert "by the journal" in merged.stderr
    verify = ["verify", tmp_path / "theirs", "--recipe", tmp_path / "ours" / "mergekit_config.yml", "--json"]
    verified = warm.run([sys.executable, "-c", OURS, *verify])
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["units"] == report["units"]
    bad = warm.run([sys.executable, "-c", OURS, "plan", write_recipe(*pair, max_complied=2)])
    assert bad.returncode == 2
    assert "max_complied is 2; write a share from 0 to 1" in bad.stderr
    unknown = call("plan", tmp_path / "ours" / "mergekit_config.yml")
    assert unknown.exit_code == 2
    assert "unknown key parameters.max_complied" in unknown.stderr
