"""The merge method inside an unmodified mergekit, and what others notice of the hook."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pydantic
import pytest
import torch
import warm
from conftest import change_tensor, configuration, save_random, tiny_llama, write_few
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import TensorEntry, TensorGroup, TensorMetadata
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dapa_merge import mergekit_plugin, miniature
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import DapaError
from dapa_merge.flow import repair
from dapa_merge.mergekit_plugin import DapaMerge, register
from dapa_merge.plan.selection import make_plan
from dapa_merge.pydantic_hook import plugin
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.verify.tensors import verify


def mergekit_yaml(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    code = "import sys\nfrom mergekit.scripts.run_yaml import main\nsys.argv[0] = 'mergekit-yaml'\nmain()"
    return warm.run([sys.executable, "-c", code, *arguments, "--quiet"], env={**os.environ, **environment})


def same_tensors(one, other) -> bool:
    first, second = open_checkpoint(str(one)), open_checkpoint(str(other))
    return first.tensors.keys() == second.tensors.keys() and all(
        (tensor.dtype, read_bytes(first, tensor))
        == (second.tensors[name].dtype, read_bytes(second, second.tensors[name]))
        for name, tensor in first.tensors.items()
    )


def test_mergekit_searches_by_itself_and_writes_what_dapa_merge_writes(write_recipe, tmp_path, few, no_pictures):
    recipe = write_recipe(
        miniature.path("target"), miniature.path("source"), layers="auto", prompts=few, max_new_tokens=12
    )
    result = mergekit_yaml(recipe, tmp_path / "theirs")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("searching among 10 units") == 1
    assert "dapa: editing gate of layers" in result.stderr
    report = repair(load_recipe(recipe), tmp_path / "ours")
    assert set(report.layers) <= {3, 4, 5, 6}
    assert same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_a_bad_recipe_is_one_sentence_with_its_line_and_nothing_is_written(llama_pair, write_recipe, tmp_path):
    result = mergekit_yaml(write_recipe(*llama_pair, retian=0.9), tmp_path / "out")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "recipe.yml, line 6: unknown key parameters.retian (did you mean 'retain'?)" in line
    assert not (tmp_path / "out").exists()


def test_a_source_that_makes_nothing_better_ends_mergekit_with_3_and_nothing_written(write_recipe, tmp_path, few):
    recipe = write_recipe(
        miniature.path("shadow-target"), miniature.path("shadow-source"), prompts=few, max_new_tokens=12
    )
    result = mergekit_yaml(recipe, tmp_path / "out")
    assert result.returncode == 3, result.stderr
    assert (
        "cannot repair this target through its modules gate: with all 10 units copied the DSR is 0.000" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_layer_outside_the_model_is_refused_before_anything_is_written(llama_pair, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    with pytest.raises(DapaError, match="layers: layer 4 is outside the target, which has layers 0 to 3"):
        run_merge(configuration(target, llama_pair[1], layers="4"), str(tmp_path / "out"), MergeOptions(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_target_of_which_mergekit_would_lose_tensors_is_refused_before_anything_is_written(
    llama_pair, write_recipe, tmp_path
):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    # As the published files of models that predict several tokens at once.
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    extra = {f"{place}.mlp.up_proj.weight": torch.ones(4, 4) for place in ("model.layers.4", "mtp.layers.0")}
    save_file(extra, target / "mtp.safetensors")
    index = target / "model.safetensors.index.json"
    owners = json.loads(index.read_text())
    owners["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    index.write_text(json.dumps(owners))
    result = mergekit_yaml(write_recipe(target, llama_pair[1], layers=1), tmp_path / "out")
    assert result.returncode == 4
    assert f"would leave 2 of {len(owners['weight_map'])} tensors of {target}" in result.stderr
    assert min(extra) in result.stderr
    assert "use `dapa-merge run`" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_hook_an_import_registers_the_method(llama_pair, write_recipe, tmp_path):
    recipe = write_recipe(*llama_pair, layers=1)
    disabled = mergekit_yaml(recipe, tmp_path / "out", PYDANTIC_DISABLE_PLUGINS="__all__")
    assert "Unimplemented merge method dapa" in disabled.stderr
    code = (
        "import sys, dapa_merge.mergekit_plugin\nfrom mergekit.scripts.run_yaml import main\n"
        "sys.argv[0] = 'mergekit-yaml'\nmain()"
    )
    result = warm.run(
        [sys.executable, "-c", code, recipe, tmp_path / "out", "--quiet"],
        env={**os.environ, "PYDANTIC_DISABLE_PLUGINS": "__all__"},
    )
    assert result.returncode == 0, result.stderr
    repair(load_recipe(recipe), tmp_path / "ours", evaluate=False)
    assert same_tensors(tmp_path / "ours", tmp_path / "out")


def test_registering_again_does_no_harm():
    before = merge_methods.get("dapa")
    register()
    register()
    assert merge_methods.get("dapa") is before
    assert [method.spec.name for method in merge_methods.registered_methods()].count("dapa") == 1


def test_the_hook_watches_one_class_only():
    from pydantic.plugin import SchemaTypePath

    def handlers(module, name):
        return plugin.new_schema_validator(None, None, SchemaTypePath(module, name), "BaseModel", None, {})

    assert handlers("elsewhere", "MergeConfiguration") == (None, None, None)
    assert handlers("mergekit.config", "ConfigReader") == (None, None, None)
    handler, *others = handlers("mergekit.config", "MergeConfiguration")
    assert hasattr(handler, "on_enter")
    assert others == [None, None]


def test_other_pydantic_models_call_pydantics_own_validator():
    class Other(pydantic.BaseModel):
        number: int

    # With the plugin there is a thin object around the validator; what it calls is the validator's own method.
    validator = Other.__pydantic_validator__
    own = getattr(validator, "_schema_validator", validator)
    assert type(validator.validate_python).__name__ == "builtin_function_or_method"
    assert validator.validate_python.__self__ is own
    assert Other(number="3").number == 3


def test_recipes_for_other_methods_are_not_looked_at():
    content = {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": [1, 2]}}],
        "parameters": {"retian": 1},
    }
    assert MergeConfiguration.model_validate(content).merge_method == "linear"


def test_configurations_made_of_objects_are_understood(llama_pair, tmp_path):
    target, source = (ModelReference.parse(str(folder)) for folder in llama_pair)
    made = MergeConfiguration(
        merge_method="dapa", base_model=target, models=[{"model": source}], parameters={"layers": "1"}
    )
    run_merge(made, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert open_checkpoint(str(tmp_path / "out")).tensors.keys() == open_checkpoint(str(llama_pair[0])).tensors.keys()


def test_the_targets_dtypes_are_kept_though_mergekit_promotes(tmp_path):
    """bf16 and f16 are promoted to f32 by mergekit; the result must be bf16 again, also where nothing was selected."""
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.bfloat16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2, dtype=torch.float16)
    run_merge(configuration(target, source, layers="0,2"), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {target}\nmodels:\n  - model: {source}\nparameters:\n  layers: 0,2\n"
    )
    repair(load_recipe(recipe), tmp_path / "ours", evaluate=False)
    assert {tensor.dtype for tensor in open_checkpoint(str(tmp_path / "theirs")).tensors.values()} == {"BF16"}
    assert same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_a_dtype_that_would_convert_the_target_is_refused(llama_pair, tmp_path):
    # A pair of its own: a process that knows several recipes for one pair checks each when its first tensor comes.
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    bad = MergeConfiguration.model_validate(
        {
            "merge_method": "dapa",
            "base_model": str(target),
            "models": [{"model": str(llama_pair[1])}],
            "dtype": "float32",
            "parameters": {"layers": "1"},
        }
    )
    with pytest.raises(DapaError, match=r"dtype is float32, but the target stores .* as BF16"):
        run_merge(bad, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_replaced_model_is_searched_again(llama_pair, tmp_path, monkeypatch):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    method = DapaMerge()
    recipe = load_recipe(_recipe(tmp_path, target, llama_pair[1], "auto"))
    searches = []
    monkeypatch.setattr(mergekit_plugin, "search_ladder", _search_of_layer_one(searches))
    method.selected_tensors(recipe)
    method.selected_tensors(recipe)
    assert len(searches) == 1
    shard = next(target.glob("model-*"))
    os.utime(shard, ns=(0, 0))
    method.selected_tensors(recipe)
    assert len(searches) == 2


def test_many_threads_share_one_search(llama_pair, tmp_path, monkeypatch):
    searches: list[str] = []
    monkeypatch.setattr(mergekit_plugin, "search_ladder", _search_of_layer_one(searches))
    method = DapaMerge()
    target, source = (ModelReference.parse(str(folder)) for folder in llama_pair)
    start = threading.Barrier(8)

    def merge(layer: int) -> bool:
        group = TensorGroup(
            entries=(
                TensorEntry(id=source, tensor=torch.ones(48, 32)),
                TensorEntry(id=target, tensor=torch.zeros(48, 32), is_base=True),
            ),
            metadata=TensorMetadata(name=f"model.layers.{layer % 4}.mlp.gate_proj.weight"),
        )
        start.wait()
        (result,) = method((group,), parameters={"layers": "auto"})
        return bool(result.bool().all())

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(merge, range(8)))
    assert taken == [layer % 4 == 1 for layer in range(8)]
    assert len(searches) == 1


def _recipe(folder, target, source, layers):
    path = folder / "recipe.yml"
    path.write_text(
        f"merge_method: dapa\nbase_model: {target}\nmodels:\n  - model: {source}\nparameters:\n  layers: {layers}\n"
    )
    return path


def _search_of_layer_one(calls):
    """A search that always finds layer 1, and writes down that it was asked."""
    from types import SimpleNamespace

    def search(ladder, options):
        calls.append(options)
        units = tuple(unit for unit in ladder.plan.units if unit.layer == 1)
        return SimpleNamespace(search=SimpleNamespace(plan=ladder.plan, minimum=SimpleNamespace(units=units)))

    return search


def test_recipes_for_one_pair_are_not_confused(llama_pair, tmp_path):
    first, second = configuration(*llama_pair, layers="1"), configuration(*llama_pair, layers="2")
    for name, made in (("first", first), ("second", second)):
        run_merge(made, str(tmp_path / name), MergeOptions(quiet=True))
    plan = make_plan(load_recipe(_recipe(tmp_path, *llama_pair, "auto")))
    for name, layer in (("first", 1), ("second", 2)):
        assert [unit.layer for unit in verify(tmp_path / name, plan).transplanted] == [layer]


def test_a_value_that_the_targets_dtype_cannot_hold_is_refused(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.float16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2)
    change_tensor(source, "model.layers.1.mlp.gate_proj.weight", lambda tensor: tensor[0, 0].fill_(1e6))
    with pytest.raises(DapaError, match=r"layers\.1\.mlp\.gate_proj\.weight of the source .* leads to values"):
        run_merge(configuration(target, source, layers="1"), str(tmp_path / "out"), MergeOptions(quiet=True))


def test_a_larger_vocabulary_needs_the_targets_tokenizer_and_keeps_its_dtype(tmp_path):
    """mergekit aligns the vocabularies and promotes bf16 and f16; the result is the target's all the same."""
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.bfloat16)
    source = save_random(tmp_path / "source", tiny_llama(vocab_size=150), seed=2, dtype=torch.float16)
    for folder, size in ((target, 152), (source, 150)):
        # mergekit can align byte-pair tokenizers only.
        model = models.BPE({f"t{index}": index for index in range(size)}, [])
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="t2").save_pretrained(folder)
    made = MergeConfiguration.model_validate(
        {
            "merge_method": "dapa",
            "base_model": str(target),
            "models": [{"model": str(source)}],
            "tokenizer": {"source": "base"},
            "parameters": {"layers": "1"},
        }
    )
    run_merge(made, str(tmp_path / "out"), MergeOptions(quiet=True))
    plan = make_plan(load_recipe(_recipe(tmp_path, target, source, "1")))
    verification = verify(tmp_path / "out", plan)
    assert verification.differences == ()
    assert [unit.layer for unit in verification.transplanted] == [1]


def test_tied_weights_that_mergekit_writes_out_are_no_difference(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(tie_word_embeddings=True), seed=1)
    source = save_random(tmp_path / "source", tiny_llama(tie_word_embeddings=False), seed=2)
    run_merge(configuration(target, source, layers="1"), str(tmp_path / "out"), MergeOptions(quiet=True))
    assert "lm_head.weight" in open_checkpoint(str(tmp_path / "out")).tensors
    plan = make_plan(load_recipe(_recipe(tmp_path, target, source, "1")))
    assert verify(tmp_path / "out", plan).holds


def test_mergekit_finds_an_evaluator_in_the_file_that_the_environment_names(write_recipe, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dapa_merge\n@dapa_merge.evaluator('layer-2')\n"
        "def score(candidate):\n    return float(any(unit.layer == 2 for unit in candidate.selection))\n"
    )
    pair = miniature.path("target"), miniature.path("source")
    recipe = write_recipe(*pair, evaluator="layer-2", prompts=write_few(tmp_path / "few", 4), max_new_tokens=2)
    without = mergekit_yaml(recipe, tmp_path / "without")
    assert without.returncode == 2
    assert "evaluator 'layer-2'; known are" in without.stderr
    result = mergekit_yaml(recipe, tmp_path / "out", DAPA_EVALUATOR_FILE=str(file))
    assert result.returncode == 0, result.stderr
    assert "editing gate of layer 2 " in result.stderr
