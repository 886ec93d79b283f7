from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dapa_merge.checkpoint.location import Location
from dapa_merge.errors import RecipeError
from dapa_merge.recipe.parameters import PARAMETERS, LayerChoice, layer_spans, parse_layers, spans
from dapa_merge.recipe.parse import load_recipe, parse_recipe, recipe_from
from dapa_merge.recipe.recipe import Recipe

ROW = st.integers(0, 99)
MINIMAL = """\
merge_method: dapa
base_model: ./target
models:
  - model: ./source
"""


def with_parameters(*lines: str) -> str:
    return MINIMAL + "parameters:\n" + "".join(f"  {line}\n" for line in lines)


def test_a_minimal_recipe_has_the_documented_defaults():
    recipe = parse_recipe(MINIMAL)
    assert recipe == Recipe(target=Location("./target"), source=Location("./source"))
    assert (recipe.layers, recipe.modules, recipe.prompts) == (None, ("gate",), "builtin")
    assert (recipe.granularity, recipe.rows_per_block) == ("layer", None)
    assert recipe.confirm == 0.5
    assert (recipe.retain, recipe.max_over_refusal, recipe.max_perplexity) == (0.95, 0.05, 1.05)


def test_every_parameter_is_read():
    recipe = parse_recipe(
        with_parameters(
            'layers: "3-5,9"', "modules: gate, up", "granularity: block:16", "strength: 1", "evaluator: refusal",
            "prompts: mine.csv", "retain: 0.5", "max_over_refusal: 0", "max_perplexity: 2", "search: ddmin",
            "max_new_tokens: 8", "batch_size: 4", "confirm: 0.25",
        )
    )  # fmt: skip
    assert recipe.layers == tuple(LayerChoice(layer) for layer in (3, 4, 5, 9))
    assert recipe.modules == ("gate", "up")
    assert (recipe.granularity, recipe.rows_per_block) == ("block:16", 16)
    assert (recipe.prompts, recipe.retain, recipe.max_over_refusal, recipe.max_perplexity) == ("mine.csv", 0.5, 0.0, 2)
    assert (recipe.max_new_tokens, recipe.batch_size, recipe.confirm) == (8, 4, 0.25)


def test_a_recipe_cannot_be_changed_and_can_be_a_key():
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.retain = 0.1
    assert {recipe: 1}[parse_recipe(MINIMAL, "another file")] == 1


def test_mergekits_own_keys_and_forms_are_understood():
    text = """\
merge_method: dapa
base_model: org/target@v1
models:
  - model: org/target@v1
  - model:
      model: {path: org/source, revision: main}
dtype: bfloat16
tokenizer: {source: base}
"""
    recipe = parse_recipe(text)
    assert (str(recipe.target), str(recipe.source)) == ("org/target@v1", "org/source@main")
    assert recipe.dtype == "bfloat16"


def test_modules_auto_stays_auto_until_the_models_say_what_it_stands_for():
    recipe = parse_recipe(with_parameters("modules: auto", "prefer: q"))
    assert (recipe.modules, recipe.is_auto, recipe.prefer) == (("auto",), True, "q")
    assert not parse_recipe(with_parameters("modules: q,v")).is_auto


def test_layers_may_name_their_modules():
    recipe = parse_recipe(with_parameters("layers: 4.down,3.gate"))
    assert recipe.layers == (LayerChoice(3, "gate"), LayerChoice(4, "down"))
    assert recipe.modules == ("gate", "down")


def test_layers_may_name_rows_and_need_no_granularity():
    recipe = parse_recipe(with_parameters("layers: 4.up,3.gate[128:192], 3.gate[0:64],6-7.gate[5:6]"))
    assert recipe.layers == (
        LayerChoice(3, "gate", (0, 64)),
        LayerChoice(3, "gate", (128, 192)),
        LayerChoice(4, "up"),
        LayerChoice(6, "gate", (5, 6)),
        LayerChoice(7, "gate", (5, 6)),
    )
    assert (recipe.modules, recipe.rows_per_block) == (("gate", "up"), None)


def test_a_granularity_is_written_in_one_way():
    assert parse_recipe(with_parameters('granularity: "block:0064"')) == parse_recipe(
        with_parameters("granularity: block:64")
    )


FAULTS = {
    "unknown parameter": (
        with_parameters("retian: 0.9"),
        "r.yml, line 6: unknown key parameters.retian (did you mean 'retain'?); known are layers, modules, granularity",
    ),
    "unknown parameter without a near name": (
        with_parameters("zzz: 1"),
        "r.yml, line 6: unknown key parameters.zzz; known are layers,",
    ),
    "unknown key": (MINIMAL + "basemodel: x\n", "r.yml, line 5: unknown key basemodel (did you mean 'base_model'?)"),
    "slices": (MINIMAL + "slices: []\n", "r.yml, line 5: slices cannot be used with dapa: DAPA repairs one whole"),
    "chat template": (MINIMAL + "chat_template: chatml\n", "r.yml, line 5: chat_template cannot be used with dapa"),
    "another method": (MINIMAL.replace("dapa", "ties"), "r.yml, line 1: merge_method is 'ties'"),
    "two sources": (
        MINIMAL + "  - model: ./other\n",
        "r.yml, line 3: there are 2 sources (./source, ./other); models must hold exactly one entry",
    ),
    "no models": ("merge_method: dapa\nbase_model: a\n", "r.yml: the source is missing: models must hold exactly one"),
    "empty models": (
        "merge_method: dapa\nbase_model: a\nmodels: []\n",
        "r.yml, line 3: the source is missing: models must hold",
    ),
    "models is no list": (
        "merge_method: dapa\nbase_model: a\nmodels: b\n",
        "r.yml, line 3: models is a text; models must hold exactly one entry",
    ),
    "a model without model": (
        "merge_method: dapa\nbase_model: a\nmodels:\n  - b\n",
        "r.yml, line 4: models[0] is a text; models must hold exactly one entry",
    ),
    "source equal to target": (
        MINIMAL.replace("./source", "./target"),
        "r.yml, line 4: the source is the target itself, ./target; name its aligned sibling",
    ),
    "no target": (
        MINIMAL.replace("base_model: ./target\n", ""),
        "r.yml: base_model is missing; it must name the target, the model to repair: a folder or a Hub id",
    ),
    "two LoRAs": (MINIMAL.replace("./target", "a+b+c"), "r.yml, line 2: base_model is 'a+b+c'; write it as path"),
    "two LoRAs in two ways": (
        MINIMAL.replace("./target", "{model: a+b, lora: c}"),
        "r.yml, line 2: base_model names two LoRAs, a+b and c; merge one into its model first",
    ),
    "no LoRA": (MINIMAL.replace("./target", "a+"), "r.yml, line 2: base_model is 'a+'; write it as path"),
    "the same LoRA": (
        MINIMAL.replace("./target", "a+b").replace("./source", "{model: {path: a}, lora: {path: b}}"),
        "r.yml, line 4: the source is the target itself, a+b; name its aligned sibling",
    ),
    "two revisions": (MINIMAL.replace("./target", "a@b@c"), "r.yml, line 2: base_model is 'a@b@c'; write it as path"),
    "parameters of one model": (
        MINIMAL + "    parameters:\n      layers: '3'\n",
        "r.yml, line 5: models[0] has parameters of its own; put them at the top level",
    ),
    "a list of layers": (
        with_parameters("layers: [3, 4]"),
        "r.yml, line 6: layers is a list, which is a gradient or a filter over tensors to mergekit; "
        'write a string: auto to search, or layers as in "3-6,9"',
    ),
    "a filter": (with_parameters("retain: {value: 1, filter: mlp}"), "r.yml, line 6: retain is a mapping, which"),
    "a bad layer": (with_parameters("layers: 3-x"), "r.yml, line 6: layers is '3-x'; write a string"),
    "layers backwards": (with_parameters("layers: 6-3"), "r.yml, line 6: layers is '6-3'; write a string"),
    "a negative layer": (with_parameters("layers: -3"), "r.yml, line 6: layers is -3; write a string"),
    "a fractional layer": (with_parameters("layers: 3.5"), "r.yml, line 6: layers is 3.5; write a string"),
    "modules twice over": (
        with_parameters("layers: 3.gate", "modules: gate"),
        "r.yml, line 6: layers names modules; then every entry must name one, and `modules`",
    ),
    "an unknown module": (with_parameters("modules: gates"), "r.yml, line 6: modules is 'gates'; write auto, or a"),
    "no rows": (
        with_parameters("layers: 3.gate[64:64]"),
        "r.yml, line 6: layers names 3.gate[64:64], an empty range of rows",
    ),
    "rows backwards": (
        with_parameters("layers: 3.up[8:2]"),
        "r.yml, line 6: layers names 3.up[8:2], an empty range of rows",
    ),
    "overlapping rows": (
        with_parameters("layers: 3.gate[0:64],4.gate[0:64],3.gate[63:65]"),
        "r.yml, line 6: layers names 3.gate[0:64] and 3.gate[63:65], which overlap",
    ),
    "rows twice": (
        with_parameters("layers: 3.gate[0:64],3.gate[0:64]"),
        "r.yml, line 6: layers names 3.gate[0:64] and 3.gate[0:64], which overlap",
    ),
    "rows of what is named as a whole": (
        with_parameters("layers: 2-4.gate,3.gate[0:64]"),
        "r.yml, line 6: layers names 3.gate and 3.gate[0:64], which overlap",
    ),
    "rows that are no neurons": (
        with_parameters("layers: 3.down[0:64]"),
        "r.yml, line 6: layers names 3.down[0:64], but only rows of gate and up",
    ),
    "rows of a layer": (with_parameters('layers: "3[0:64]"'), "r.yml, line 6: layers is '3[0:64]'; write a string"),
    "rows without end": (
        with_parameters("layers: 3.gate[0:]"),
        "r.yml, line 6: layers is '3.gate[0:]'; write a string",
    ),
    "rows without number": (
        with_parameters(f"layers: 3.gate[0:{'9' * 3000}]"),
        "r.yml, line 6: layers is '3.gate[0:99999",
    ),
    "rows and a module of their own": (
        with_parameters("layers: 3.gate[0:64]", "modules: gate"),
        "r.yml, line 6: layers names modules; then every entry must name one, and `modules`",
    ),
    "experts": (
        with_parameters("granularity: experts"),
        "r.yml, line 6: granularity is 'experts'; write layer or, for gate and up only, expert",
    ),
    "blocks of nothing": (with_parameters("granularity: block:0"), "r.yml, line 6: granularity is 'block:0'; write"),
    "blocks of any size": (with_parameters("granularity: block"), "r.yml, line 6: granularity is 'block'; write layer"),
    "layers of a size": (with_parameters("granularity: layer:3"), "r.yml, line 6: granularity is 'layer:3'; write"),
    "a granularity as a mapping": (
        with_parameters("granularity: {block: 3}"),
        "r.yml, line 6: granularity is a mapping, which is a gradient or a filter",
    ),
    "blocks of what cannot be divided": (
        with_parameters("modules: auto", "granularity: block:64"),
        "r.yml, line 7: granularity is block:64, but auto cannot be divided; only rows of gate and up",
    ),
    "overlapping units": (
        with_parameters("layers: 3.mlp,4.gate"),
        "r.yml, line 6: layers names a module and a part of it; mlp is gate, up and down together, "
        "attention q, k, v and o",
    ),
    "a path of no form": (
        MINIMAL.replace("./target", "{path: x}"),
        "r.yml, line 2: base_model is {'path': 'x'}; it must name the target",
    ),
    "a revision of no form": (
        MINIMAL.replace("./target", "{model: {path: x, revision: [1]}}"),
        "r.yml, line 2: base_model is {'path': 'x', 'revision': [1]}; it must name",
    ),
    "a value unlike its tag": (MINIMAL + "parameters: {retain: !!bool maybe}\n", "r.yml is not YAML: KeyError"),
    "a huge number": (with_parameters("retain: 0x" + "f" * 6000), "r.yml, line 6: YAML reads 0xfff"),
    "a tokenizer padded": (
        MINIMAL + "tokenizer: {source: base, pad_to_multiple_of: 64}\n",
        "r.yml, line 5: tokenizer is {'pad_to_multiple_of': 64, 'source': 'base'}; the result keeps",
    ),
    "a union tokenizer by default": (MINIMAL + "tokenizer: {}\n", "r.yml, line 5: tokenizer is {}; the result keeps"),
    "overlapping modules": (with_parameters("modules: mlp,gate"), "r.yml, line 6: modules is 'mlp,gate'; write"),
    "strength": (with_parameters("strength: 0"), "r.yml, line 6: strength is 0; write a number above 0 and up to 2"),
    "an unknown search": (with_parameters("search: bogo"), "r.yml, line 6: search is 'bogo'; known algorithms:"),
    "an unknown evaluator": (
        with_parameters("evaluator: 3"),
        "r.yml, line 6: evaluator is 3; write refusal, paper, judge, lm-eval:",
    ),
    "confirming nothing": (
        with_parameters("confirm: 0"),
        "r.yml, line 6: confirm is 0; write a share above 0 and below",
    ),
    "searching nothing": (
        with_parameters("confirm: 1"),
        "r.yml, line 6: confirm is 1; write a share above 0 and below",
    ),
    "confirm not a number": (with_parameters("confirm: .nan"), "r.yml, line 6: confirm is nan; write a share above 0"),
    "retain of nothing": (with_parameters("retain: 0"), "r.yml, line 6: retain is 0; write a share above 0"),
    "retain as text": (with_parameters("retain: much"), "r.yml, line 6: retain is 'much'; write a share above 0"),
    "retain as a truth": (with_parameters("retain: true"), "r.yml, line 6: retain is True; write a share above 0"),
    "retain not a number": (with_parameters("retain: .nan"), "r.yml, line 6: retain is nan; write a share above 0"),
    "a small perplexity": (with_parameters("max_perplexity: 0.9"), "r.yml, line 6: max_perplexity is 0.9; write a"),
    "no tokens": (with_parameters("max_new_tokens: 0"), "r.yml, line 6: max_new_tokens is 0; write a whole number"),
    "parameters is a list": (MINIMAL + "parameters: [1]\n", "r.yml, line 5: parameters must be a mapping, not a list"),
    "an unknown dtype": (MINIMAL + "dtype: int4\n", "r.yml, line 5: dtype is 'int4'; allowed are bfloat16, float16"),
    "two dtypes": (
        MINIMAL + "dtype: bfloat16\nout_dtype: float32\n",
        "r.yml, line 6: out_dtype is float32 but dtype is bfloat16",
    ),
    "another tokenizer": (
        MINIMAL + "tokenizer_source: union\n",
        "r.yml, line 5: tokenizer_source is 'union'; the result keeps the target's tokenizer",
    ),
    "a key twice": (
        MINIMAL + "base_model: ./other\n",
        "r.yml, line 5: base_model is repeated",
    ),
    "no YAML": ("merge_method: {\n", "r.yml, line 2 is not YAML"),
    "a list": ("- a\n", "r.yml, line 1: a recipe is a mapping of keys, not a list"),
    "nothing": ("", "r.yml: a recipe is a mapping of keys, not empty"),
    "a Python object": ("!!python/object/apply:os.system ['true']\n", "r.yml, line 1 is not YAML"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_has_its_own_sentence_with_key_and_line(case):
    text, message = FAULTS[case]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_same_folder_by_another_name_is_the_target_itself(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    text = MINIMAL.replace("./target", str(tmp_path / "model")).replace("./source", str(tmp_path / "link"))
    with pytest.raises(RecipeError, match="the source is the target itself"):
        parse_recipe(text)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yml: No such file"):
        load_recipe(tmp_path / "none.yml")
    (tmp_path / "latin.yml").write_bytes(b"merge_method: d\xe4pa\n")
    with pytest.raises(RecipeError, match="it is not UTF-8"):
        load_recipe(tmp_path / "latin.yml")


@given(st.sets(st.integers(0, 80), min_size=1))
def test_layers_survive_being_written_and_read(layers):
    assert {choice.layer for choice in parse_layers(layer_spans(sorted(layers)))} == layers


@given(
    st.lists(
        st.builds(LayerChoice, st.integers(0, 9), st.sampled_from(["gate", "up"]), st.none() | st.tuples(ROW, ROW)),
        min_size=1,
    )
)
def test_choices_survive_being_written_and_read(choices):
    read = parse_layers(",".join(map(str, choices)))
    assert set(read) == set(choices)
    assert list(map(str, parse_layers(",".join(map(str, read))))) == list(map(str, read))


SPANS = {
    "3.gate 4.gate 7.gate": "gate of layers 3-4,7",
    "3.gate 3.down 4.gate": "gate of layers 3-4; down of layer 3",
    "3.gate 4.gate 6.gate[0:64] 6.gate[128:192]": "gate of layers 3-4; gate of layer 6 rows 0-63,128-191",
    "6.gate[64:65] 6.gate[0:32] 6.gate[32:64]": "gate of layer 6 rows 0-64",
    "2.gate[0:8] 3.gate[0:8] 3.up[5:6]": "gate of layers 2-3 rows 0-7; up of layer 3 rows 5",
    "1.up[0:2] 1.up[4:6] 1.up[8:10] 1.up[12:14] 1.up[16:19]": "up of layer 1 (11 rows in 5 ranges)",
    "": "nothing",
}


@pytest.mark.parametrize("units", SPANS)
def test_people_read_units_in_few_words(units):
    assert spans(units.split()) == SPANS[units]


@given(st.text(max_size=40))
def test_any_layer_string_is_read_or_refused(text):
    try:
        choices = parse_layers(text)
    except ValueError:
        return
    assert choices


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_one_sentence(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


@example("pretrained", "@")
@given(st.sampled_from(sorted(PARAMETERS)), st.one_of(st.text(max_size=10), st.floats(), st.integers(), st.booleans()))
def test_any_value_of_any_parameter_is_taken_or_refused_with_the_allowed_ones(name, value):
    from dapa_merge.recipe.parse import recipe_from

    content = {"merge_method": "dapa", "base_model": "a", "models": [{"model": "b"}], "parameters": {name: value}}
    try:
        recipe_from(content)
    except RecipeError as error:
        assert PARAMETERS[name].allowed in str(error)


def test_aliases_cost_no_more_than_what_they_stand_for():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{other}: &{other} [{', '.join(['*' + one] * 9)}]\n"
    for text in (bomb, MINIMAL + "parameters: {retain: &r [*r]}\n", "base_model: &m [*m]\n" + MINIMAL):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(text)
        assert len(str(caught.value)) < 500


def test_merge_keys_are_no_repetition():
    text = "defaults: &d {retain: 0.9}\n" + MINIMAL + "parameters: {<<: *d, retain: 0.8}\n"
    with pytest.raises(RecipeError, match="unknown key defaults"):
        parse_recipe(text)
    assert parse_recipe(MINIMAL + "parameters: {<<: {retain: 0.9}, retain: 0.8}\n").retain == 0.8


@pytest.mark.parametrize(
    "text", ["org/a@x+org/b@y", "{model: org/a@x, lora: org/b@y}", "{model: {path: org/a, revision: x}, lora: org/b@y}"]
)
def test_a_lora_stands_behind_its_model(text):
    target = parse_recipe(MINIMAL.replace("./target", text)).target
    assert target == Location("org/a", "x", Location("org/b", "y"))
    assert str(target) == "org/a@x+org/b@y"


def test_a_model_and_its_lora_may_be_source_and_target():
    recipe = parse_recipe(MINIMAL.replace("./target", "./source+adapter"))
    assert recipe.target == Location("./source", None, Location("adapter"))


@pytest.mark.parametrize("name", ["a+b", "a@b", "a@b@c", "a b"])
def test_a_folder_that_exists_is_a_path_whatever_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    text = MINIMAL.replace("./target", f'"{tmp_path / name}"')
    assert parse_recipe(text).target == Location(str(tmp_path / name))


@pytest.mark.parametrize("number", ["010", "0x10", "0b11", "3:30", "-017"])
def test_a_number_to_another_base_is_refused_rather_than_read(number):
    text = f"merge_method: dapa\nbase_model: a\nmodels: [{{model: b}}]\nparameters:\n  layers: {number}\n"
    with pytest.raises(RecipeError, match=f"line 5: YAML reads {number} as a number to another base"):
        parse_recipe(text)
    # In quotes it is a text, which layers are.
    quoted = text.replace(number, '"10"')
    assert [choice.layer for choice in parse_recipe(quoted).layers] == [10]


def test_a_number_that_python_does_not_print_is_named_all_the_same():
    content = {
        "merge_method": "dapa",
        "base_model": "a",
        "models": [{"model": "b"}],
        "parameters": {"retain": 16**6000},
    }
    with pytest.raises(RecipeError, match="retain is a very large number; write a share"):
        recipe_from(content)
