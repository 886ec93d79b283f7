"""An edit takes one entry in `EDITS`: one that reads three models goes through everything that asks what an edit is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    SHAPE,
    answer,
    call,
    change_tensor,
    configuration,
    save_random,
    skip_drawing,
)
from edited_models import GATES, assert_same_bytes, values_of, write
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from test_both_paths import assert_paths_agree, new_pair

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure.live import LiveModel
from dapa_merge.plan.edit import EDITS, Edit
from dapa_merge.plan.selection import given_selection, make_plan
from dapa_merge.publish.lock import lock_path, read_lock
from dapa_merge.recipe.parse import load_recipe


class Toy(Edit):
    """target + strength x 0.5 x (source - pretrained)."""

    name = "toy"
    inputs = ("target", "source", "pretrained")

    def change(self, values):
        return 0.5 * (values["source"] - values["pretrained"])

    def how(self, models):
        return f"moved by half of what {models['source']} is from {models['pretrained']}"


@pytest.fixture(autouse=True, scope="module")
def toy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EDITS, "toy", Toy)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The miniature, and a pretrained model whose gates are almost its target's: a strength of 2 almost copies."""
    pretrained = tmp_path_factory.mktemp("models") / "pretrained"
    shutil.copytree(miniature.path("target"), pretrained)
    torch.manual_seed(0)
    for name in open_checkpoint(str(pretrained)).tensors:
        if name in GATES:
            change_tensor(pretrained, name, lambda tensor: tensor.add_(0.003 * torch.randn_like(tensor)))
    return {"target": miniature.path("target"), "source": miniature.path("source"), "pretrained": pretrained}


@pytest.fixture(scope="module")
def recipe(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write(folder, models, edit="toy", strength=2.0, pretrained=models["pretrained"])


@pytest.fixture(scope="module")
def repaired(recipe, tmp_path_factory) -> tuple[Path, dict]:
    """The result of `run`, after a search, and its report."""
    out = tmp_path_factory.mktemp("repaired") / "out"
    with pytest.MonkeyPatch.context() as patch:
        skip_drawing(patch, "png", "svg")
        journal = recipe.parent / "journal.jsonl"
        return out, answer("run", recipe, out, "--journal", journal, "--device", "cpu", "--json")


def test_a_search_finds_units_and_run_writes_what_the_edit_computes(repaired, models):
    out, report = repaired
    assert report["one_minimal"]
    assert {"3.gate", "4.gate", "5.gate", "6.gate"} >= set(report["units"]) > set()
    result, *opened = (open_checkpoint(str(folder)) for folder in (out, *models.values()))
    for name in GATES:
        target, source, pretrained = (values_of(checkpoint, name).float() for checkpoint in opened)
        is_selected = f"{name.split('.')[2]}.gate" in report["units"]
        expected = target + 0.5 * (source - pretrained) * 2.0 if is_selected else target
        assert torch.equal(values_of(result, name), expected.bfloat16()), name


def test_the_model_in_memory_is_the_one_on_disk(repaired):
    out, _ = repaired
    replayed = load_recipe(out / "mergekit_config.yml")
    plan, result = make_plan(replayed), open_checkpoint(str(out))
    live = LiveModel(plan, torch.device("cpu"))
    with live.transplanted(given_selection(replayed, plan)) as model:
        for name in GATES:
            assert torch.equal(model.get_parameter(name), values_of(result, name)), name
    live.close()


def test_mergekit_writes_the_same_bytes(repaired, models, tmp_path):
    out, report = repaired
    said = {"edit": "toy", "strength": 2.0, "layers": ",".join(report["units"])}
    merge = configuration(models["target"], models["source"], pretrained=str(models["pretrained"]), **said)
    run_merge(merge, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert_same_bytes(out, tmp_path / "out")


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "MixtralForCausalLM"])
def test_every_path_agrees_on_fused_projections_and_experts(architecture, tmp_path, write_recipe):
    kind, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, kind)(**{**SHAPE, **changes})
    pretrained = save_random(tmp_path / "pretrained", config, seed=3, dtype=torch.float32)
    pair = new_pair(tmp_path, architecture)
    parameters = {"edit": "toy", "pretrained": str(pretrained), "layers": '"1,3"'}
    assert_paths_agree(pair, architecture, tmp_path, write_recipe, **parameters)


def test_verify_proves_the_result_and_names_a_tensor_that_is_wrong(repaired, tmp_path):
    out, report = repaired
    found = answer("verify", out, "--json")
    assert found["correct"]
    assert found["units"] == report["units"]
    assert found["num_changed"] == {"toy": len(report["units"])}
    assert "tensors compared; by the edit toy: gate of layer" in call("verify", out).stdout
    layer = report["units"][0].split(".")[0]
    name = f"model.layers.{layer}.mlp.gate_proj.weight"
    wrong = shutil.copytree(out, tmp_path / "wrong")
    change_tensor(wrong, name, lambda tensor: tensor[3, 0].add_(1))
    refused = call("verify", wrong)
    assert refused.exit_code == 4
    assert f"{name}[3:4] is neither the target's nor the toy" in refused.stdout


def test_a_manifest_of_another_edit_is_a_fault(repaired, tmp_path):
    out, _ = repaired
    content = json.loads((out / "dapa.json").read_text())
    assert (content["edit"], content["strength"]) == ("toy", 2.0)
    assert content["pretrained"]["model"].endswith("pretrained")
    lying = shutil.copytree(out, tmp_path / "lying")
    del content["edit"]
    (lying / "dapa.json").write_text(json.dumps(content))
    refused = call("verify", lying)
    assert refused.exit_code == 4
    assert "dapa.json says strength 2.0, but the recipe says edit toy, strength 2.0" in refused.stdout


def test_a_journal_answers_for_its_own_edit_only(repaired, recipe, models):
    journal = recipe.parent / "journal.jsonl"
    assert answer("search", recipe, "--journal", journal, "--device", "cpu", "--json")["tests_recorded"] > 0
    copying = write(recipe.parent, models)
    refused = call("search", copying, "--journal", journal, "--device", "cpu")
    assert refused.exit_code == 2
    assert "belongs to another search: edit, pretrained, strength differ" in refused.stderr


def test_the_card_says_how_values_came_about_and_from_which_models(repaired):
    out, _ = repaired
    card = (out / "README.md").read_text()
    assert "moved by half of what `source` (a folder) is from `pretrained` (a folder)" in card
    assert "That changed" in card
    assert "| pretrained | `pretrained` (a folder) |" in card
    assert "edit: toy" in card
    assert "pretrained: ./pretrained" in card


def test_the_lock_holds_every_model_that_the_edit_reads(repaired, recipe, models, tmp_path):
    lock = read_lock(lock_path(recipe))
    assert [upstream.model for upstream in lock.pretrained] == [str(models["pretrained"])]
    moved = shutil.copytree(models["pretrained"], tmp_path / "pretrained")
    change_tensor(models["pretrained"], GATES[0], lambda tensor: tensor[0, 0].add_(1))
    try:
        outdated = call("outdated", recipe)
        locked = call("run", recipe, tmp_path / "out", "--locked", "--no-evaluate")
    finally:
        shutil.copytree(moved, models["pretrained"], dirs_exist_ok=True)
    assert outdated.exit_code == 10
    assert f"pretrained {models['pretrained']}: moved" in outdated.stdout
    assert "changed since it was locked" in locked.stderr


def test_a_comparison_names_the_edit(recipe, models, tmp_path, no_pictures):
    said = {"edit": "toy", "strength": 2.0, "pretrained": models["pretrained"], "layers": "3-6"}
    named = write(recipe.parent, models, **said)
    summary = answer(
        "compare", named, "--out", tmp_path / "out", "--methods", "gates", "--no-curve", "--device", "cpu", "--json"
    )
    assert [row["edit"] for row in summary["rows"]] == ["toy"]
    page = (tmp_path / "out" / "table.md").read_text()
    assert "Edit toy: whatever is edited is moved by half of what the source is from the pretrained model" in page


def test_what_an_edit_reads_must_be_named(models, recipe):
    refused = call("plan", write(recipe.parent, models, edit="toy"))
    assert refused.exit_code == 2
    assert "the edit toy reads the model that target and source were both fine-tuned from" in refused.stderr
    refused = call("plan", write(recipe.parent, models, edit="toy", pretrained=models["source"]))
    assert "the pretrained model is the source itself" in refused.stderr
    refused = call("plan", write(recipe.parent, models, edit="toys"))
    assert (
        "parameters.edit: 'toys' is not an edit; known are copy, blend, difference, directions, toy" in refused.stderr
    )
    planned = answer("plan", recipe, "--json")
    assert planned["pretrained"]["name"] == str(models["pretrained"])
