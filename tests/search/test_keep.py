"""Keep prompts, and the limits on divergence and skill, through a whole run: search, journal, report, card, gate."""

from __future__ import annotations

import json
import math
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from conftest import answer, call, skip_drawing

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.compare.result import CompareOptions
from dapa_merge.compare.row import compare_recipe
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.divergence import divergence, make_reference
from dapa_merge.measure.live import choose_device, load_model
from dapa_merge.measure.prompts.parts import all_prompts, split_prompts
from dapa_merge.plan.selection import make_plan
from dapa_merge.publish.write_card import write_card
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.report.report import read_report
from dapa_merge.search.bench import ExamineSelection, _make_hand, make_bench
from dapa_merge.search.requirement import requirement, settings_of
from dapa_merge.search.search import search_plan

PAIR = miniature.path("target"), miniature.path("source")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rows = (miniature.path("target").parent / "prompts" / "skill.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("keep") / "questions.jsonl"
    path.write_text("".join(rows[::4]))
    return path


@pytest.fixture(scope="module")
def recipe(few, questions):
    """Makes a recipe of the miniature with a few prompts, as text."""

    def make(**parameters):
        settings = {"prompts": str(few), "max_new_tokens": 12, "batch_size": 128, "keep": str(questions), **parameters}
        models = {"base_model": str(PAIR[0]), "models": [{"model": str(PAIR[1])}]}
        return json.dumps({"merge_method": "dapa", **models, "parameters": settings})

    return make


@pytest.fixture(scope="module")
def limited(recipe, tmp_path_factory):
    """The result of a run with limits, its report, and its journal."""
    folder = tmp_path_factory.mktemp("limited")
    (folder / "recipe.yml").write_text(recipe(max_divergence=0.4, min_skill=0.5, retain=0.9))
    with pytest.MonkeyPatch.context() as patch:
        skip_drawing(patch, "png", "svg")
        report = answer("run", folder / "recipe.yml", folder / "out", "--journal", folder / "journal.jsonl", "--json")
    return folder / "out", report, folder / "journal.jsonl"


def entries(journal):
    return list(map(json.loads, journal.read_text().splitlines()))


def test_a_report_has_the_divergence_of_result_and_source_from_the_target_on_its_own_prompts(limited):
    out, report, _ = limited
    asked = split_prompts(load_recipe(out.parent / "recipe.yml")).report.keep
    loaded = {folder: load_model(open_checkpoint(str(folder)), choose_device("cpu")) for folder in (*PAIR, out)}
    reference = make_reference(*loaded[PAIR[0]], asked, batch_size=BatchSize(8), keeps_logits=True)
    for column, folder in (("after", out), ("source_alone", PAIR[1])):
        expected = divergence(loaded[folder][0], reference, BatchSize(8))
        assert report[column]["divergence"] == pytest.approx(expected, rel=1e-3)
    assert report["before"]["divergence"] == 0
    assert report["keep"] == load_recipe(out.parent / "recipe.yml").keep
    assert 0 < report["after"]["divergence"] < report["source_alone"]["divergence"]


def test_a_search_measures_both_and_its_report_and_card_name_their_limits(limited, monkeypatch):
    out, report, journal = limited
    header, *others = entries(journal)
    assert header["parts"]["limits"] == "DSR 0.9, over-refusal 0.05, perplexity 1.05, divergence 0.4, skill 0.5"
    notes = {entry["note"]: entry["value"] for entry in others if "note" in entry}
    assert notes["target"]["divergence"] < 1e-6
    assert notes["full transplant"]["divergence"] > 0.01
    assert report["requirement"]["max_divergence"] == 0.4
    assert report["requirement"]["min_skill"] == pytest.approx(0.5 * notes["target"]["skill"])
    assert {skill["name"]: skill["num_questions"] for skill in report["after"]["skills"]} == {"keep": 10}
    card = write_card(out).read_text()
    assert "divergence at most 0.400, skill at least " in card
    assert "| divergence (nats/token) | 0.000 |" in card
    assert "because none were named" not in card


def test_a_replay_reads_the_same_keep_prompts(limited, questions):
    out, _, _ = limited
    replayed = load_recipe(out / "mergekit_config.yml")
    assert replayed.keep == str(questions)
    assert len(all_prompts(replayed).report.keep) == 20


def test_what_breaks_a_limit_is_told_with_its_figure_and_the_nearest_part(recipe, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(recipe(max_divergence=1e-7))
    result = call("search", path, "--journal", tmp_path / "journal.jsonl")
    assert result.exit_code == 3
    last = result.stderr.splitlines()[-1]
    assert "within the recipe's limits: with all 10 units its divergence is" in last
    assert "divergence at most 1e-07" in last
    assert "`--pick " in last


def test_a_journal_knows_keep_prompts_only_where_a_limit_needs_them(recipe, few, tmp_path):
    journal = tmp_path / "journal.jsonl"

    def search(**parameters):
        parsed = parse_recipe(recipe(**parameters))
        return search_plan(parsed, make_plan(parsed), Options("cpu", journal))

    search(retain=0.5)
    assert not {"keep", "skill", "choice"} & entries(journal)[0]["parts"].keys()
    # Without a limit, other keep prompts are the same search.
    again = search(retain=0.5, keep=str(few))
    assert again.num_recorded == again.minimum.tests - 1
    journal.unlink()
    search(retain=0.5, max_divergence=1.0)
    assert {"keep", "skill"} & entries(journal)[0]["parts"].keys() == {"keep"}


def test_a_worker_judges_by_the_targets_own_answers_too(recipe):
    parsed = parse_recipe(recipe(max_divergence=0.05, retain=0.5))
    plan = make_plan(parsed)
    prompts = split_prompts(parsed).search
    with closing(make_bench(parsed, plan, prompts, Options("cpu"))) as bench:
        target, full = (bench.baseline(units).figures for units in ((), plan.units))
        limits = requirement(bench.constraints, target, full, settings_of(parsed))
    # What Ray calls in a process of its own.
    hand = _make_hand(parsed, prompts, Options("cpu"), torch.get_num_threads())
    work = ExamineSelection(SimpleNamespace(get=lambda: plan.edit), limits, frozenset(plan.units))
    assert full["divergence"] > 0.05
    assert f"its divergence is {full['divergence']:.3f}" in hand(work)["complaint"]


def test_a_comparison_measures_divergence_only_where_it_is_limited(recipe, tmp_path):
    wanted = CompareOptions(methods=("gates",), draws_curve=False)
    free, bound = (
        compare_recipe(parse_recipe(recipe(**limit)), name, tmp_path / name, wanted, Options("cpu"))
        for name, limit in (("free", {}), ("bound", {"max_divergence": 0.001}))
    )
    gates = bound.arm("gates")
    assert bound.before.divergence < 1e-6
    assert 0.001 < gates.figures.divergence < bound.alone.divergence
    assert "its divergence is" in bound.complaint(gates.figures)
    assert math.isnan(free.before.divergence)
    assert free.complaint(gates.figures) is None


def test_a_report_from_before_divergence_is_read(limited, tmp_path):
    out, _, _ = limited
    content = json.loads((out / "dapa_report.json").read_text())
    for column in ("before", "after", "source_alone"):
        del content[column]["divergence"]
    old = tmp_path / "dapa_report.json"
    old.write_text(json.dumps(content))
    assert math.isnan(read_report(old).after.divergence)
    result = call("gate", old, "--max-divergence", 1, "--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["gates"][0]["value"] is None
