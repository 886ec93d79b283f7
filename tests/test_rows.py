"""Recipes that name rows, from the file to the result: plan, run, verify, replay, and mergekit."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import change_tensor, configuration, num_different, save_random, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.cli import main
from dapa_merge.errors import DapaError, RecipeError
from dapa_merge.mergekit_plugin import _with_boxes
from dapa_merge.plan.edit import Copy
from dapa_merge.plan.plan import divide, join
from dapa_merge.plan.selection import given_selection, make_plan
from dapa_merge.plan.values import Rounding
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.report.replay import replay_text
from dapa_merge.verify.result import verify_result

GATE = "model.layers.3.mlp.gate_proj.weight"
MINIATURE = miniature.path("target"), miniature.path("source")


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def stored(folder, name):
    return load_file(folder / open_checkpoint(str(folder)).tensors[name].file)[name]


@pytest.fixture
def repaired(write_recipe, tmp_path):
    """The miniature with rows of layer 3's gate and all of layer 5's."""
    recipe = write_recipe(
        *MINIATURE, layers="3.gate[0:64],3.gate[128:160],5.gate,3.gate[64:80]", granularity="block:16"
    )
    return answer("run", recipe, tmp_path / "out", "--no-evaluate", "--json"), tmp_path / "out"


def test_a_run_takes_the_rows_that_a_recipe_names(repaired):
    report, out = repaired
    assert report["units"] == ["3.gate[0:80]", "3.gate[128:160]", "5.gate"]
    assert report["layers"] == [3, 5]
    assert 0 < report["parameters_changed"] == num_different(MINIATURE[0], out) <= (80 + 32 + 208) * 80
    target, source = (stored(folder, GATE) for folder in MINIATURE)
    expected = target.clone()
    expected[:80], expected[128:160] = source[:80], source[128:160]
    assert torch.equal(stored(out, GATE), expected)
    assert not torch.equal(expected, target)


def test_the_replayed_recipe_writes_the_same_bytes(repaired, tmp_path):
    _, out = repaired
    replayed = yaml.safe_load((out / "mergekit_config.yml").read_text())["parameters"]
    assert replayed == {"layers": "3.gate[0:80],3.gate[128:160],5.gate"}
    answer("run", out / "mergekit_config.yml", tmp_path / "again", "--no-evaluate", "--json")
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_verify_proves_rows_and_notices_others(repaired, write_recipe, tmp_path):
    report, out = repaired
    verdict = answer("verify", out, "--json")
    assert (verdict["correct"], verdict["units"], verdict["faults"]) == (True, report["units"], [])
    rows = [f"{GATE}[0:80]", f"{GATE}[128:160]", GATE.replace("3", "5")]
    assert verdict["changed"] == dict.fromkeys(rows, "source")
    shown = call("verify", out).stdout
    assert "from the source: gate of layer 3 rows 0-79,128-159; gate of layer 5" in shown
    # A recipe that leaves it to a search: whatever rows were taken are right, and are found.
    searched = write_recipe(*MINIATURE, granularity="block:16")
    assert answer("verify", out, "--recipe", searched, "--json") == verdict
    other = write_recipe(*MINIATURE, layers="3.gate[0:79],5.gate")
    result = call("verify", out, "--recipe", other)
    assert result.exit_code == 4
    says = "the recipe says 3.gate[0:79] 5.gate, but the result has 3.gate[0:80] 3.gate[128:160] 5.gate"
    assert says in result.stdout


@pytest.mark.parametrize("row", [70, 100, 207])
def test_verify_names_the_row_of_a_changed_byte(repaired, tmp_path, row):
    _, out = repaired
    broken = shutil.copytree(out, tmp_path / "broken")
    change_tensor(broken, GATE, lambda tensor: tensor[row, 7].add_(1))
    result = call("verify", broken)
    assert result.exit_code == 4
    assert f"{GATE}[{row}:{row + 1}] is neither the target's nor the source's" in result.stdout


def test_a_plan_shows_the_rows_and_those_between_them(write_recipe):
    recipe = write_recipe(*MINIATURE, layers="3.gate[0:64],3.gate[128:160]")
    plan = answer("plan", recipe, "--json")
    of_layer = [unit for unit in plan["units"] if unit["unit"].startswith("3.")]
    assert [(unit["unit"], unit["selected"]) for unit in of_layer] == [
        ("3.gate[0:64]", True), ("3.gate[64:128]", False), ("3.gate[128:160]", True), ("3.gate[160:208]", False),
    ]  # fmt: skip
    assert [unit["bytes"] for unit in of_layer] == [2 * 80 * rows for rows in (64, 64, 32, 48)]
    assert plan["selected_parameters"] == 96 * 80
    assert plan["selected_share"] == 96 * 80 / plan["target"]["parameters"]
    shown = call("plan", recipe).stdout
    assert "3.gate[128:160]" in shown
    assert "3.gate[160:208]" not in shown
    assert "changes                 2 units, 0.02 MB" in shown


def test_rows_outside_the_target_are_refused_with_their_line(write_recipe, tmp_path):
    recipe = write_recipe(*MINIATURE, layers="3.gate[0:64],4.up[200:209]")
    for arguments in (("plan", recipe), ("run", recipe, tmp_path / "out", "--no-evaluate")):
        result = call(*arguments)
        assert result.exit_code == 2
        assert result.stderr == (
            f"Error: {recipe}, line 6: parameters.layers: 4.up[200:209] is outside the target, "
            f"whose 4.up has rows 0 to 207\n"
        )
    assert not (tmp_path / "out").exists()


def test_all_rows_are_the_whole_module(write_recipe):
    recipe = load_recipe(write_recipe(*MINIATURE, layers="3.gate[0:100],3.gate[100:208]"))
    plan = make_plan(recipe)
    assert given_selection(recipe, plan) == (plan.units[3],)
    assert yaml.safe_load(replay_text(recipe, plan, given_selection(recipe, plan)))["parameters"]["layers"] == "3"


@pytest.fixture(scope="module")
def searched():
    """A recipe that searches among blocks, and its plan."""
    text = f"merge_method: dapa\nbase_model: {MINIATURE[0]}\nmodels: [{{model: {MINIATURE[1]}}}]\n"
    recipe = parse_recipe(text + 'parameters: {modules: "gate,up", granularity: block:8}\n')
    return recipe, make_plan(recipe)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_blocks_survive_being_replayed(searched, data):
    recipe, plan = searched
    blocks = divide(plan, plan.units, data.draw(st.integers(1, 250)))
    selection = data.draw(st.lists(st.sampled_from(blocks.units), unique=True, min_size=1))
    for made in (plan, blocks):
        replayed = parse_recipe(replay_text(recipe, made, selection))
        assert given_selection(replayed, plan) == join(plan, selection)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float16"), ("float16", "bfloat16"), ("bfloat16", "float32")])
def test_mergekit_rounds_the_rows_it_takes_and_keeps_the_targets_others(tmp_path, write_recipe, dtypes):
    target_dtype, source_dtype = (getattr(torch, name) for name in dtypes)
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=target_dtype)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2, dtype=source_dtype)
    made = configuration(target, source, layers="3.gate[5:9],3.gate[40:48],1.gate")
    run_merge(made, str(tmp_path / "out"), MergeOptions(quiet=True))
    expected = stored(target, GATE).clone()
    for rows in (slice(5, 9), slice(40, 48)):
        expected[rows] = stored(source, GATE)[rows].to(target_dtype)
    assert torch.equal(stored(tmp_path / "out", GATE), expected)
    recipe = write_recipe(target, source, layers="3.gate[5:9],3.gate[40:48],1.gate")
    check = verify_result(tmp_path / "out", recipe)
    assert check.faults == ()
    assert list(map(str, check.verification.transplanted)) == ["1.gate", "3.gate[5:9]", "3.gate[40:48]"]


def test_mergekit_minds_values_that_do_not_fit_only_in_the_rows_it_takes(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.float16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2)
    change_tensor(source, GATE, lambda tensor: tensor[20, 0].fill_(1e6))
    with pytest.raises(DapaError, match=r"layers\.3\.mlp\.gate_proj\.weight of the source .* leads to values that"):
        run_merge(configuration(target, source, layers="3.gate[16:24]"), str(tmp_path / "a"), MergeOptions(quiet=True))
    run_merge(configuration(target, source, layers="3.gate[21:24]"), str(tmp_path / "b"), MergeOptions(quiet=True))
    assert stored(tmp_path / "b", GATE).isfinite().all()


def test_mergekit_refuses_rows_outside_the_model_before_it_writes(llama_pair, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    made = configuration(target, llama_pair[1], layers="3.gate[40:49]")
    with pytest.raises(DapaError, match=r"3\.gate\[40:49\] is outside the target, whose 3\.gate has rows 0 to 47"):
        run_merge(made, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert not (tmp_path / "out").exists()


def test_mergekit_refuses_overlapping_rows(llama_pair):
    with pytest.raises(RecipeError, match="which overlap"):
        configuration(*llama_pair, layers="3.gate[0:9],3.gate[8:10]")


def test_what_mergekit_lends_is_not_written_to():
    lent = torch.zeros(4, 2), torch.ones(4, 2)
    selected = SimpleNamespace(
        boxes={"gate": [(((1, 3), (0, 2)), {})]}, plan=SimpleNamespace(edit=Copy(), source=None), rounding=Rounding()
    )
    result = _with_boxes("gate", *lent, selected)
    assert result[:, 0].tolist() == [0, 1, 1, 0]
    assert (float(lent[0].sum()), float(lent[1].sum())) == (0, 8)
