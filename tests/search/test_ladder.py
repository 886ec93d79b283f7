"""`edit: auto` tries edits in order, with the same report for all, and stops at the first that repairs."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import pytest
import transformers
import yaml
from conftest import answer, call, configuration, save_random, skip_drawing
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CannotRepair, RecipeError
from dapa_merge.measure.meter import Measurement
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.plan.edit import EDITS, LADDER, may_choose
from dapa_merge.plan.ladder import make_ladder, rungs_of
from dapa_merge.plan.selection import make_plan
from dapa_merge.publish.lock import lock_path, read_lock
from dapa_merge.publish.write_card import write_card
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.report.report import read_report
from dapa_merge.search import ladder
from dapa_merge.search import search as searching
from dapa_merge.search.search import search_plan

PAIR = miniature.path("target"), miniature.path("source")
SHADOW = miniature.path("shadow-target"), miniature.path("shadow-source")


def parsed(target=PAIR[0], source=PAIR[1], **parameters):
    content = {"merge_method": "dapa", "base_model": str(target), "models": [{"model": str(source)}]}
    return parse_recipe(json.dumps({**content, "parameters": {"edit": "auto", **parameters}}))


def tensors(folder):
    checkpoint = open_checkpoint(str(folder))
    return {name: read_bytes(checkpoint, tensor) for name, tensor in checkpoint.tensors.items()}


def test_every_rung_is_an_edit_and_the_last_one_chooses():
    """A rung's journal is named by its edit; the last rung's parts of the prompts are those of all."""
    names = [rung.edit for rung in LADDER]
    assert set(names) <= set(EDITS)
    assert len(set(names)) == len(names)
    assert may_choose(names[-1])


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [("copy", ("gate",)), ("directions", ("auto",))]),
        ({"pretrained": "p"}, [("copy", ("gate",)), ("difference", ("auto",)), ("directions", ("auto",))]),
        ({"modules": "mlp"}, [("copy", ("mlp",)), ("directions", ("mlp",))]),
    ],
)
def test_a_rung_has_its_own_modules_unless_the_recipe_names_some_and_needs_its_models(parameters, expected):
    assert [(rung.edit, rung.modules) for rung in rungs_of(parsed(**parameters))] == expected


def test_keys_that_an_edit_cannot_follow_are_left_to_those_that_can():
    copied, chosen = rungs_of(parsed(granularity="block:16", prefer="gate"))
    assert (copied.granularity, copied.prefer) == ("block:16", "gate")
    assert (chosen.granularity, chosen.prefer) == ("layer", "gate")
    copied, chosen = rungs_of(parsed(prefer="up"))
    assert (copied.prefer, chosen.prefer) == (None, "up")


def test_what_takes_one_edit_refuses_auto_and_auto_refuses_named_layers():
    with pytest.raises(RecipeError, match="auto tries several edits"):
        make_plan(parsed())
    with pytest.raises(RecipeError, match="write `layers: auto` with `edit: auto`"):
        make_ladder(parsed(layers="3-6"))


def test_a_model_without_gates_begins_with_the_next_rung(tmp_path):
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=152)
    pair = [save_random(tmp_path / name, config, seed=seed) for seed, name in enumerate(("target", "source"))]
    assert [recipe.edit for recipe, _ in make_ladder(parsed(*pair)).rungs] == ["directions"]


def test_the_plan_lists_every_rung(write_recipe):
    rungs = answer("plan", write_recipe(*PAIR, edit="auto", prompts="miniature"), "--json")["rungs"]
    assert [(rung["edit"], len(rung["units"])) for rung in rungs] == [("copy", 10), ("directions", 70)]


def test_a_pair_is_planned_as_its_recipe_is(write_recipe):
    recipe = write_recipe(*PAIR, edit="auto", layers="auto", prompts="miniature", max_new_tokens=12)
    of_pair = answer("plan", *PAIR, "--prompts", "miniature", "--max-new-tokens", 12, "--json")
    of_recipe = answer("plan", recipe, "--json")
    assert of_pair["rungs"] == of_recipe["rungs"]
    assert of_pair["forecast"]["tests"] == of_recipe["forecast"]["tests"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((PAIR[0],), "is a folder, not a recipe; if it is a model to repair, name its SOURCE, too"),
        (
            ("recipe.yml", "--keep", "mine.txt"),
            "--keep is for TARGET and SOURCE; a recipe has a parameter of that name",
        ),
        ((PAIR[0], ""), "SOURCE is ''; pass a folder, a Hub id or id@revision"),
    ],
)
def test_what_is_neither_a_recipe_nor_a_pair_cannot_be_planned(arguments, sentence):
    result = call("plan", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


@pytest.fixture(scope="module")
def repaired(few, tmp_path_factory):
    """The recipe of the pair that gates repair, the folder of its result, and its report."""
    folder = tmp_path_factory.mktemp("repaired")
    settings = {"edit": "auto", "prompts": str(few), "max_new_tokens": 12, "batch_size": 128}
    content = {"merge_method": "dapa", "base_model": str(PAIR[0]), "models": [{"model": str(PAIR[1])}]}
    (folder / "recipe.yml").write_text(json.dumps({**content, "parameters": settings}))
    with pytest.MonkeyPatch.context() as patch:
        skip_drawing(patch, "png", "svg")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        report = answer("run", folder / "recipe.yml", folder / "out", "--journal", folder / "j.jsonl", "--json")
    return folder / "recipe.yml", folder / "out", report


def test_the_first_rung_that_repairs_is_the_result_and_its_recipe_replays_it(repaired):
    recipe, out, report = repaired
    (tried,) = report["rungs"]
    assert (tried["edit"], tried["modules"]) == ("copy", ["gate"])
    assert set(report["layers"]) <= {3, 4, 5, 6}
    replay = load_recipe(out / "mergekit_config.yml")
    assert (replay.edit, replay.modules) == ("copy", ("gate",))
    # The last rung's full transplant says what is possible.
    assert {path.name for path in recipe.parent.glob("*.jsonl")} == {"j.copy.jsonl", "j.directions.jsonl"}


def test_the_lock_has_the_edit_that_repaired_and_is_followed_without_a_search(repaired, tmp_path, no_pictures):
    recipe, out, report = repaired
    lock = read_lock(lock_path(recipe))
    assert (lock.edit, list(lock.units)) == ("copy", report["units"])
    again = answer("run", recipe, tmp_path / "again", "--locked", "--no-evaluate", "--json")
    assert (again["units"], again["tests"]) == (report["units"], 0)
    assert tensors(tmp_path / "again") == tensors(out)
    assert read_lock(tmp_path / "again" / "recipe.lock.yml").edit == "copy"


def test_the_command_repair_needs_no_recipe_and_goes_on_with_the_same_journals(repaired, few, tmp_path, no_pictures):
    recipe, out, report = repaired
    settings = ("--prompts", few, "--max-new-tokens", 12, "--batch-size", 128, "--journal", recipe.parent / "j.jsonl")
    result = call("repair", *PAIR, tmp_path / "out", *settings)
    assert result.exit_code == 0, result.stderr
    assert "copy of gate: repairs within the limits" in result.stdout
    assert "`keep` names no prompts" in result.stderr
    found = read_report(tmp_path / "out")
    assert (list(found.units), found.tests_recorded) == (report["units"], report["tests"] - 1)
    assert tensors(tmp_path / "out") == tensors(out)
    assert (tmp_path / "out" / "README.md").is_file()
    assert not list(tmp_path.glob("*.lock.yml"))
    # Tests in the journal count, so that the first answers end it.
    early = answer("repair", *PAIR, tmp_path / "early", *settings, "--max-tests", 2, "--json")
    assert (early["tests"], early["one_minimal"]) == (2, False)
    assert set(found.units) <= set(early["units"])
    assert call("repair", *PAIR, tmp_path / "none", *settings, "--max-tests", 0).exit_code == 2


def test_a_rung_must_reach_what_is_possible(few):
    recipe, _ = rungs_of(parsed(prompts=str(few), max_new_tokens=12, batch_size=128))
    with pytest.raises(CannotRepair, match="even with every unit") as refused:
        search_plan(recipe, make_plan(recipe), Options("cpu"), possible=1.5)
    assert re.fullmatch(r"with all \d+ units its DSR is .* below the \d\.\d+ required", refused.value.why)


def test_a_rung_whose_score_falls_short_asks_all_units_alone_harmful_prompts_only_and_none_of_them_twice(
    few, tmp_path, monkeypatch
):
    recipe, _ = rungs_of(parsed(prompts=str(few), max_new_tokens=12, batch_size=128))
    plan, options, asked = make_plan(recipe), Options("cpu", journal=tmp_path / "j"), []
    judge_all = Measurement.judge_all

    def judge(self, groups):
        asked.extend((kind, prompt) for kind, prompts in groups for prompt in prompts)
        return judge_all(self, groups)

    monkeypatch.setattr(Measurement, "judge_all", judge)
    with pytest.raises(CannotRepair):
        search_plan(recipe, plan, options, possible=1.5)
    # Half of them tell.
    assert {kind for kind, _ in asked} == {"harmful"}
    assert len({*asked}) == len(asked) == len(split_prompts(recipe, is_rung=True).search.harmful) / 2
    # Those are not asked again.
    monkeypatch.setattr(searching, "_check_scores", lambda _: None)
    with pytest.raises(CannotRepair):
        search_plan(recipe, plan, options, possible=1.5)
    assert {*Counter(asked).values()} == {2}
    assert {kind for kind, _ in asked} == {"harmful", "harmless"}


def test_a_target_that_refuses_already_is_asked_before_a_rung_is_given_up(few, tmp_path, monkeypatch):
    # All units would be enough for a target that refuses nothing, but not for one that refuses half.
    recipe, _ = rungs_of(parsed(prompts=str(few), max_new_tokens=12, batch_size=128, retain=0.5))
    monkeypatch.setattr(searching.Scores, "target", lambda _: 0.5)
    monkeypatch.setattr(searching.Scores, "full", lambda _, is_begun: (0.6, 0.8) if is_begun else (0.7, 0.7))
    with pytest.raises(CannotRepair) as refused:
        search_plan(recipe, make_plan(recipe), Options("cpu"), possible=1.0)
    assert re.fullmatch(r"with all \d+ units its DSR is 0\.700, 0\.050 below the 0\.750 required", refused.value.why)


def test_models_that_are_swapped_are_seen_before_any_edit_is_tried(few, tmp_path):
    asked = ("--prompts", few, "--max-new-tokens", 12, "--batch-size", 128)
    result = call("repair", *reversed(PAIR), tmp_path / "out", *asked)
    assert result.exit_code == 3
    error = result.stderr.splitlines()[-1]
    said = r"with all \d+ units copied the DSR is [01]\.\d+, and without them [01]\.\d+; were the two swapped\?"
    assert re.search(rf"the source, .*target, makes the target, .*source, worse: {said}", error)
    assert "try 1 of" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_if_no_rung_repairs_the_error_says_why_each_does_not(write_recipe, few, tmp_path, monkeypatch):
    # A loss that may be chance ends nothing.
    monkeypatch.setattr(ladder, "is_noise", lambda *_: True)
    recipe = write_recipe(*reversed(PAIR), edit="auto", prompts=few, max_new_tokens=12, batch_size=128)
    result = call("run", recipe, tmp_path / "out")
    assert result.exit_code == 3
    error = result.stderr.splitlines()[-1]
    assert re.search(r"copy of gate: with all \d+ units .*; directions of .*: with all \d+ units", error)
    assert not (tmp_path / "out").exists()


def test_where_gates_fail_the_next_edit_repairs_and_the_report_and_card_say_why(shadow_demo, tmp_path):
    out, report = shadow_demo
    copied, chosen = report["rungs"]
    assert copied == {
        "edit": "copy", "modules": ["gate"],
        "verdict": "with all 10 units its DSR is at most 0.500, 0.450 below the 0.950 required",
    }  # fmt: skip
    assert chosen["edit"] == "directions"
    assert report["before"]["dsr"] < 0.1
    assert report["after"]["dsr"] > 0.8
    parameters = yaml.safe_load((out / "mergekit_config.yml").read_text())["parameters"]
    assert (parameters["edit"], parameters["directions"]) == ("directions", "dapa_directions.dat")
    model = shutil.copytree(out, tmp_path / "model")
    write_card(model)
    assert f"- copy of gate: {copied['verdict']}\n" in (model / "README.md").read_text()


def test_mergekit_climbs_the_same_ladder_from_the_same_journals(shadow_demo, tmp_path, monkeypatch):
    out, _ = shadow_demo
    monkeypatch.setenv("XDG_CACHE_HOME", str(out.with_name("cache")))
    parameters = yaml.safe_load(miniature.recipe_text("shadow-"))["parameters"]
    run_merge(configuration(*SHADOW, **parameters), str(tmp_path / "merged"), MergeOptions(quiet=True))
    assert tensors(tmp_path / "merged") == tensors(out)


def test_search_writes_the_directions_next_to_its_recipe_and_replaces_no_others(shadow_demo, tmp_path, monkeypatch):
    out, report = shadow_demo
    monkeypatch.setenv("XDG_CACHE_HOME", str(out.with_name("cache")))
    (tmp_path / "recipe.yml").write_text(miniature.recipe_text("shadow-"))
    found = answer("search", tmp_path / "recipe.yml", "--out", tmp_path / "found.yml", "--json")
    assert (found["units"], found["rungs"]) == (report["units"], report["rungs"])
    assert call("run", tmp_path / "found.yml", tmp_path / "out", "--no-evaluate").exit_code == 0
    assert tensors(tmp_path / "out") == tensors(out)
    refused = call("search", tmp_path / "recipe.yml", "--out", tmp_path / "other.yml")
    assert refused.exit_code == 2
    assert "dapa_directions.dat exists" in refused.stderr


def test_a_lock_without_its_directions_points_to_the_result(tmp_path, repaired):
    recipe, _, _ = repaired
    copied = shutil.copy(recipe, tmp_path / "recipe.yml")
    text = lock_path(recipe).read_text()
    lock_path(tmp_path / "recipe.yml").write_text(text.replace("edit: copy", "edit: directions"))
    result = call("run", copied, tmp_path / "out", "--locked")
    assert result.exit_code == 2
    assert "run the recipe in the result" in result.stderr
