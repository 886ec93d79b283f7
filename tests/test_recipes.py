"""The recipes for published pairs, read and planned without the Hub, and the tables that say what they are."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import pytest
import yaml
from conftest import answer
from mergekit.config import MergeConfiguration
from published_models import MODELS, SIZES, Published, shapes_of, unit_tensors, write_published
from recipe_table import FAMILIES, RECIPES, plan_offline, published_recipes, table

from dapa_merge.errors import CheckpointError
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report import tables

MAX_LINES = 24
PATHS = [path for family in FAMILIES for path in published_recipes(family)]


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


each_recipe = pytest.mark.parametrize("path", PATHS, ids=name_of)


@pytest.fixture(autouse=True)
def not_compared(monkeypatch) -> None:
    """The models are gigabytes of zeros, which nobody needs to compare."""
    monkeypatch.setattr(tables, "count_changed", lambda _plan, units: dict.fromkeys(units))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where the models are, as far as their headers go."""
    return tmp_path_factory.mktemp("published")


def expected_units(target: Published, modules: tuple[str, ...]) -> dict[str, tuple[set[str], int]]:
    """For each unit its tensors, and how many parameters these have."""
    shapes = shapes_of(target.size, target.num_tokens)
    tensors = {
        f"{layer}.{module}": unit_tensors(target, layer, module)
        for layer in range(SIZES[target.size].sizes[2])
        for module in modules
    }
    return {unit: (names, sum(prod(shapes[name]) for name in names)) for unit, names in tensors.items()}


def num_parameters(model: Published) -> int:
    """A model's parameters: the official one's, and the rows of its embeddings that this one has more."""
    size = SIZES[model.size]
    return size.parameters + (model.num_tokens - size.vocab_size) * size.sizes[0] * (1 if size.tied else 2)


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_come_to_the_published_number_of_parameters(name):
    size = SIZES[name]
    assert sum(prod(shape) for shape in shapes_of(name, size.vocab_size).values()) == size.parameters


def test_every_folder_of_recipes_has_a_table():
    assert {path.parent.name for path in RECIPES.glob("*/*.yml")} == FAMILIES.keys()
    assert len(PATHS) == len(list(RECIPES.glob("*/**/*.yml")))


def test_no_pair_has_two_recipes_and_no_fact_is_idle():
    recipes = [load_recipe(path) for path in PATHS]
    pairs = Counter((recipe.target.path, recipe.source.path) for recipe in recipes)
    assert max(pairs.values()) == 1
    assert {place.path for recipe in recipes for place in (recipe.target, recipe.source)} == MODELS.keys()


@each_recipe
def test_a_recipe_is_planned_layer_by_layer(path, folder):
    recipe = load_recipe(path)
    target = MODELS[recipe.target.path]
    plan = plan_offline(path, folder)
    units = expected_units(target, recipe.modules)
    assert plan["architecture"] == SIZES[target.size].architecture
    assert plan["target"]["parameters"] == num_parameters(target)
    assert plan["target"]["bytes"] == 2 * num_parameters(target)
    assert {unit["unit"]: (set(unit["tensors"]), unit["parameters"]) for unit in plan["units"]} == units
    assert all(unit["bytes"] == 2 * unit["parameters"] and unit["selected"] is None for unit in plan["units"])


@each_recipe
def test_the_gates_of_a_layer_are_as_large_as_the_config_says(path, folder):
    recipe = load_recipe(path)
    size = SIZES[MODELS[recipe.target.path].size]
    hidden, intermediate, layers, heads, key_value_heads, head_dim = size.sizes
    attention = 2 * (heads + key_value_heads) * head_dim * hidden
    if size.model_type == "qwen2":
        attention += (heads + 2 * key_value_heads) * head_dim  # Only its attention has biases.
    mlp = intermediate * hidden * (size.experts or 1)
    per_layer = sum(attention if module == "attention" else mlp for module in recipe.modules)
    assert sum(unit["parameters"] for unit in plan_offline(path, folder)["units"]) == layers * per_layer


@each_recipe
def test_a_recipe_is_short_says_what_it_is_and_searches(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert text.startswith("# ")
    recipe = load_recipe(path)
    assert recipe.layers is None
    assert recipe.prompts == "builtin"


@each_recipe
def test_a_recipe_states_no_dtype_that_is_only_a_guess(path):
    recipe = load_recipe(path)
    target = MODELS[recipe.target.path]
    assert recipe.dtype is None or (recipe.dtype == target.dtype and "dtype" not in target.unsure)


@each_recipe
def test_mergekit_is_told_to_keep_a_tokenizer_that_is_or_may_be_larger(path):
    recipe = load_recipe(path)
    target, source = MODELS[recipe.target.path], MODELS[recipe.source.path]
    assert recipe.keeps_tokenizer == (target.num_tokens > source.num_tokens or "vocab_size" in target.unsure)


@each_recipe
def test_a_recipe_admits_what_was_not_confirmed(path):
    recipe = load_recipe(path)
    unsure = set(MODELS[recipe.target.path].unsure) - {"dtype"}
    comment = " ".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    assert ("confirmed" in comment) == bool(unsure)


@each_recipe
def test_mergekit_reads_a_recipe_as_dapa_merge_does(path):
    recipe = load_recipe(path)
    merge = MergeConfiguration.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert merge.merge_method == "dapa"
    assert str(merge.base_model) == recipe.target.path
    assert [str(model.model) for model in merge.models or ()] == [recipe.source.path]
    assert (merge.dtype, merge.tokenizer is not None) == (recipe.dtype, recipe.keeps_tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_line_plans_what_the_table_is_made_of(family, folder, tmp_path):
    path = published_recipes(family)[0]
    recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
    for place in (recipe.target, recipe.source):
        text = text.replace(f": {place.path}\n", f": {write_published(folder, place.path)}\n")
    local = tmp_path / "recipe.yml"
    local.write_text(text, encoding="utf-8")
    planned = answer("plan", local, "--json")
    # What a run takes is of this machine.
    assert planned.pop("forecast")["tests"] > 0
    assert planned == plan_offline(path, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_a_family_is_the_one_in_the_readme(family, folder):
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert f"### {FAMILIES[family]}\n\n{table(family, folder)}\n\n" in readme


def test_a_pair_of_two_sizes_is_refused(folder, tmp_path):
    path = RECIPES / "llama-2" / "vicuna-7b-v1.5.yml"
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text(encoding="utf-8").replace("Llama-2-7b-chat", "Llama-2-13b-chat"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has 40 layers but the target .* has 32"):
        plan_offline(wrong, folder)
