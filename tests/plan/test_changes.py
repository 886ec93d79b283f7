"""What an edit does not change is no part of a search, a selection or a share; compared with brute force."""

from __future__ import annotations

import json
import shutil

import numpy
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
    num_different,
    save_random,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from small_models import write_model

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.compare.selections import find_selections
from dapa_merge.errors import CannotRepair
from dapa_merge.plan.edit import EDITS
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.plan.plan import divide
from dapa_merge.plan.selection import count_changed, make_plan, units_that_differ
from dapa_merge.publish.lock import lock_path
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.search.journal import Journal

TARGET = miniature.path("target")
GATE = "model.layers.{}.mlp.gate_proj.weight"


def recipe_of(folder, target, source, **parameters):
    path = folder / "recipe.yml"
    content = {"layers": "auto", "prompts": "miniature", "max_new_tokens": 4, **parameters}
    path.write_text(
        f"merge_method: dapa\nbase_model: {target}\nmodels: [{{model: {source}}}]\nparameters: {json.dumps(content)}\n"
    )
    return path


@pytest.fixture
def abliterated(tmp_path):
    """The miniature without what one layer's output projection and another's down projection did: (target, source)."""
    folder = shutil.copytree(TARGET, tmp_path / "abliterated")
    change_tensor(folder, "model.layers.2.self_attn.o_proj.weight", lambda tensor: tensor[1:3].zero_())
    change_tensor(folder, "model.layers.4.mlp.down_proj.weight", lambda tensor: tensor[7].zero_())
    return folder, TARGET


def draw_nearer(folder, other):
    """Make layer 1 that of another model but for less than bfloat16 holds, and of layer 2 every second row."""
    theirs = weights(other)
    for path in folder.glob("*.safetensors"):
        content = load_file(path)
        for name, value in content.items():
            if ".layers.1." in name:
                content[name] = theirs[name].float() * (1 + 2.0**-20)
            elif ".layers.2." in name and value.dim() > 1:
                value[..., ::2, :] = theirs[name][..., ::2, :]
        save_file(content, path, {"format": "pt"})


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("edit", ["copy", "blend", "difference"])
def test_a_share_counts_the_values_that_differ_between_target_and_result(architecture, edit, tmp_path):
    kind, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, kind)(**{**SHAPE, **changes})
    target = save_random(tmp_path / "target", config, seed=0)
    source = save_random(tmp_path / "source", config, seed=1, dtype=torch.float32)
    pretrained = save_random(tmp_path / "pretrained", config, seed=1, dtype=torch.float32)
    draw_nearer(source, target)
    draw_nearer(pretrained, source)
    said = {"copy": {}, "blend": {"strength": 0.5}, "difference": {"edit": edit, "pretrained": str(pretrained)}}[edit]
    recipe = recipe_of(tmp_path, target, source, layers="1,2", modules="gate,down", **said)
    plan = answer("plan", recipe, "--json")
    run = call("run", recipe, tmp_path / "out", "--no-evaluate", "--json")
    assert "left out gate, down of layer 1, which the edit would not change" in run.stderr
    report = json.loads(run.stdout)
    expected = num_different(target, tmp_path / "out")
    assert 0 < expected < plan["selected_parameters"] / 3
    assert report["parameters_changed"] == plan["differing_parameters"] == expected
    assert report["share_changed"] == expected / plan["target"]["parameters"]
    assert plan["differing_units"] == 2
    assert report["units"] == answer("verify", tmp_path / "out", "--json")["units"] == ["2.gate", "2.down"]
    counts = {unit["unit"]: unit["differing_parameters"] for unit in plan["units"]}
    assert (counts["1.gate"], counts["1.down"]) == (0, 0)


FLOATS = st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5, float("nan"), float("inf")]), min_size=24, max_size=24)


@given(FLOATS, FLOATS)
def test_a_value_counts_if_its_bits_change_but_for_the_sign_of_a_computed_zero(tmp_path_factory, ours, theirs):
    folder = tmp_path_factory.mktemp("pair")
    arrays = [numpy.array(values, numpy.float32).reshape(4, 6) for values in (ours, theirs)]
    models = {
        name: open_checkpoint(str(write_model(folder / name, {"x": array})))
        for name, array in zip(("target", "source"), arrays, strict=True)
    }
    regions = {name: Region.of(model.tensors["x"]) for name, model in models.items()}
    one, other = (array.view(numpy.uint32) for array in arrays)
    copy, blend = EDITS["copy"](), EDITS["blend"](0.5)
    assert copy.shift(models, regions).number == int((one != other).sum())
    assert copy.differs(models, regions) == bool((one != other).any())
    # A blend of what is equal and finite is that; NaN and infinity become NaN, of any bits.
    finite = numpy.isfinite(arrays[0]) & numpy.isfinite(arrays[1])
    changed = blend.shift(models, regions).number
    assert 0 <= changed - int((arrays[0] != arrays[1])[finite].sum()) <= int((~finite).sum())


@pytest.mark.parametrize("layers", ["auto", "0-9"])
@pytest.mark.parametrize("command", ["run", "search", "mergekit"])
def test_equal_modules_are_told_with_those_that_differ_before_anything_is_loaded(
    command, layers, abliterated, tmp_path, monkeypatch
):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dapa_merge.measure.live.load_model", load)
    recipe, out = recipe_of(tmp_path, *abliterated, layers=layers), tmp_path / "out"
    if command == "mergekit":
        with pytest.raises(CannotRepair) as raised:
            run_merge(configuration(*abliterated, layers=layers, prompts="miniature"), str(out), MergeOptions())
        code, said = raised.value.exit_code, str(raised.value)
    else:
        result = call(command, recipe, *([out] if command == "run" else []))
        code, said = result.exit_code, result.stderr
    assert code == 3
    assert "same gate in all 10 layers" in said
    assert said.strip().endswith("try `modules: down, attention`")
    assert not out.exists()
    assert not lock_path(recipe).exists()


def test_a_plan_shows_what_differs_and_where_else_to_look(abliterated, tmp_path):
    recipe = recipe_of(tmp_path, *abliterated, modules="gate,down")
    found = answer("plan", recipe, "--json")
    differing = {unit["unit"]: unit["differing_parameters"] for unit in found["units"] if unit["differing_parameters"]}
    before = weights(TARGET)["model.layers.4.mlp.down_proj.weight"]
    assert differing == {"4.down": int((before[7] != 0).sum())}
    assert (found["differing_units"], found["differing_parameters"]) == (1, differing["4.down"])
    shown = call("plan", recipe).stdout
    assert "differ                  1 of 20 units, 0.0" in shown
    equal = call("plan", recipe_of(tmp_path, *abliterated, layers="3"))
    assert equal.exit_code == 0
    assert "0 of 1 units" in equal.stdout
    assert "try `modules: down, attention`" in equal.stdout


def test_named_layers_without_a_difference_are_told_where_the_module_does_differ(abliterated, tmp_path):
    result = call("run", recipe_of(tmp_path, *abliterated, layers="0-3", modules="down"), tmp_path / "out")
    assert result.exit_code == 3
    assert "down of layers 0-3; they differ in down of layer 4" in result.stderr


def test_models_that_are_equal_in_all_modules_are_told_so(tmp_path):
    copy = shutil.copytree(TARGET, tmp_path / "copy")
    change_tensor(copy, "model.norm.weight", lambda tensor: tensor[0].add_(1))
    result = call("search", recipe_of(tmp_path, copy, TARGET))
    assert result.exit_code == 3
    assert "no other module differs; name another source" in result.stderr


def test_a_rung_that_would_change_nothing_is_skipped_with_its_reason(abliterated, tmp_path):
    parsed = parse_recipe(recipe_of(tmp_path, *abliterated, edit="auto").read_text())
    ladder = make_ladder(parsed).without_equal_units()
    assert [recipe.edit for recipe, _ in ladder.rungs] == ["directions"]
    assert list(map(str, ladder.plan.units)) == ["2.o", "4.down"]
    (skipped,) = ladder.skipped
    assert (skipped.edit, skipped.modules) == ("copy", ("gate",))
    assert "same gate in all 10 layers" in skipped.verdict
    same = shutil.copytree(TARGET, tmp_path / "same")
    with pytest.raises(CannotRepair, match=r"copy of gate: .*; directions of gate, up"):
        make_ladder(parse_recipe(recipe_of(tmp_path, same, TARGET, edit="auto").read_text())).without_equal_units()


def test_blocks_whose_rows_are_equal_are_left_out(abliterated, tmp_path):
    target, source = abliterated
    change_tensor(target, GATE.format(3), lambda tensor: tensor[70:100].add_(1))
    plan = make_plan(load_recipe(recipe_of(tmp_path, target, source)))
    blocks = divide(plan, [unit for unit in plan.units if unit.layer == 3], 32).units
    found = units_that_differ(plan, blocks)
    assert list(map(str, found)) == ["3.gate[64:96]", "3.gate[96:128]"]
    counts = count_changed(plan, found)
    ours, theirs = weights(target)[GATE.format(3)], weights(source)[GATE.format(3)]
    assert list(counts.values()) == [int((ours != theirs)[64:96].sum()), int((ours != theirs)[96:128].sum())]


def test_a_comparison_says_of_named_layers_that_they_are_equal(abliterated, tmp_path):
    recipe = load_recipe(recipe_of(tmp_path, *abliterated, layers="0-3"))
    found = find_selections("dapa", recipe, make_plan(recipe), tmp_path, Journal(), Options())
    assert found.units is None
    assert "try `modules: down, attention`" in found.why_not
