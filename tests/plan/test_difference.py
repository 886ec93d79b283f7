"""`edit: difference`: the target plus what was trained into the source, through every command, and held to numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, answer, call, change_tensor, configuration, save_random, skip_drawing
from edited_models import GATES, assert_same_bytes, values_of, write
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from test_both_paths import assert_paths_agree, new_pair

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.plan.edit import EDITS, make_edit
from dapa_merge.plan.selection import make_plan, without_equal_units
from dapa_merge.recipe.parse import load_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The miniature, and a pretrained model: its target but for noise in seven gates, and its source in another."""
    pretrained = tmp_path_factory.mktemp("models") / "pretrained"
    shutil.copytree(miniature.path("target"), pretrained)
    torch.manual_seed(0)
    for name in GATES[:7]:
        change_tensor(pretrained, name, lambda tensor: tensor.add_(0.003 * torch.randn_like(tensor)))
    untrained = values_of(open_checkpoint(str(miniature.path("source"))), GATES[7])
    change_tensor(pretrained, GATES[7], lambda tensor: tensor.copy_(untrained))
    return {"target": miniature.path("target"), "source": miniature.path("source"), "pretrained": pretrained}


@pytest.fixture(scope="module")
def recipe(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write(folder, models, edit="difference", pretrained=models["pretrained"])


@pytest.fixture(scope="module")
def repaired(recipe, tmp_path_factory) -> tuple[Path, dict]:
    """The result of `run`, after a search, and its report."""
    out = tmp_path_factory.mktemp("repaired") / "out"
    with pytest.MonkeyPatch.context() as patch:
        skip_drawing(patch, "png", "svg")
        return out, answer("run", recipe, out, "--device", "cpu", "--json")


@pytest.mark.parametrize("strength", [1.0, 0.3, 2.0])
def test_it_is_computed_in_float32_and_rounded_once(strength):
    torch.manual_seed(0)
    values = {name: torch.randn(500).bfloat16() for name in EDITS["difference"].inputs}
    target, source, pretrained = (values[name].float().numpy() for name in ("target", "source", "pretrained"))
    exact = target + (source - pretrained) * numpy.float32(strength)
    found = make_edit("difference", strength).new_values(values, torch.bfloat16)
    # To nearest, ties to even: the upper half of float32.
    bits = exact.view("<u4").astype("<u8")
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    assert numpy.array_equal(found.view(torch.uint16).numpy(), nearest)


def test_a_search_finds_units_and_run_writes_exactly_what_it_says(repaired, models):
    out, report = repaired
    assert report["one_minimal"]
    assert {"3.gate", "4.gate", "5.gate", "6.gate"} >= set(report["units"]) > set()
    result, *opened = (open_checkpoint(str(folder)) for folder in (out, *models.values()))
    for name in GATES:
        target, source, pretrained = (values_of(checkpoint, name).float() for checkpoint in opened)
        is_selected = f"{name.split('.')[2]}.gate" in report["units"]
        expected = target + (source - pretrained) if is_selected else target
        assert torch.equal(values_of(result, name), expected.bfloat16()), name


def test_mergekit_writes_the_same_bytes(repaired, models, tmp_path):
    out, report = repaired
    said = {"edit": "difference", "layers": ",".join(report["units"]), "pretrained": str(models["pretrained"])}
    merge = configuration(models["target"], models["source"], **said)
    run_merge(merge, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert_same_bytes(out, tmp_path / "out")


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "GPT2LMHeadModel"])
def test_every_path_agrees_on_parts_of_attention(architecture, tmp_path, write_recipe):
    kind, changes = {**ARCHITECTURES, "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 4, "n_embd": 32, "n_head": 4})}[
        architecture
    ]
    config = getattr(transformers, kind)(**{**SHAPE, **changes})
    pretrained = save_random(tmp_path / "pretrained", config, seed=3, dtype=torch.float32)
    parameters = {"edit": "difference", "pretrained": str(pretrained), "strength": 0.7, "layers": '"1,3"'}
    assert_paths_agree(
        new_pair(tmp_path, architecture), architecture, tmp_path, write_recipe, modules="q,v", **parameters
    )


def test_verify_proves_the_result_and_names_a_value_that_is_wrong(repaired, tmp_path):
    out, report = repaired
    found = answer("verify", out, "--json")
    assert (found["correct"], found["units"]) == (True, report["units"])
    assert found["num_changed"] == {"difference": len(report["units"])}
    assert "the target plus the difference of source and pretrained model: gate of layer" in call("verify", out).stdout
    name = f"model.layers.{report['units'][0].split('.')[0]}.mlp.gate_proj.weight"
    wrong = shutil.copytree(out, tmp_path / "wrong")
    change_tensor(wrong, name, lambda tensor: tensor[3, 0].add_(1))
    refused = call("verify", wrong)
    assert refused.exit_code == 4
    assert f"{name}[3:4] is neither the target's nor the target's plus the difference" in refused.stdout


def test_the_card_says_what_was_added_and_nothing_of_copies(repaired):
    card = (repaired[0] / "README.md").read_text()
    how = "moved by 1 times the difference from `pretrained` (a folder) to `source` (a folder), its aligned sibling."
    assert how in " ".join(card.split())
    assert "copied" not in card
    assert "of the source" not in card


def test_units_that_were_not_trained_are_left_out_of_the_search(recipe, models):
    parsed = load_recipe(recipe)
    plan = make_plan(parsed)
    assert [unit.layer for unit in plan.units] == list(range(10))
    assert [unit.layer for unit in without_equal_units(parsed, plan).units] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    same = write(
        recipe.parent, {**models, "source": models["pretrained"]}, edit="difference", pretrained=copied(models)
    )
    refused = call("search", same)
    assert refused.exit_code == 3
    assert "the edit difference would change none of its" in refused.stderr


def copied(models: dict[str, Path]) -> Path:
    folder = models["pretrained"].parent / "same"
    if not folder.exists():
        shutil.copytree(models["pretrained"], folder)
    return folder


def test_the_pretrained_model_must_be_named(models, recipe):
    refused = call("plan", write(recipe.parent, models, edit="difference"))
    assert refused.exit_code == 2
    assert "the edit difference reads the model that target and source were both fine-tuned from" in refused.stderr
    assert json.loads(call("plan", recipe, "--json").stdout)["pretrained"]["name"] == str(models["pretrained"])
