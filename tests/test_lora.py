"""Models written as `model+lora`, by both entrances, with real peft adapters."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm
from conftest import answer, call, change_tensor, save_random, tiny_llama
from hub_server import SHA, hub
from mergekit.common import ModelReference
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.parse import load_recipe

MERGEKIT = (sys.executable, "-c", "from mergekit.scripts.run_yaml import main; main()")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def save_adapter(base: Path, folder: Path, seed: int, modules=("q_proj", "gate_proj", "down_proj")) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(r=2, target_modules=list(modules), init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trio(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base, an adapter for it, and an aligned source."""
    folder = tmp_path_factory.mktemp("lora")
    size = len(AutoTokenizer.from_pretrained(miniature.path("target")))
    base = save_random(folder / "base", tiny_llama(vocab_size=size), seed=1)
    source = save_random(folder / "source", tiny_llama(vocab_size=size), seed=2)
    return base, save_adapter(base, folder / "adapter", 3), source


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = open_checkpoint(str(one)), open_checkpoint(str(other))
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        twin = second.tensors[name]
        assert (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape), name
        assert read_bytes(first, tensor) == read_bytes(second, twin), name


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> Path:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", ["target", "both"])
def test_both_entrances_merge_a_lora_into_the_same_bytes(trio, write_recipe, tmp_path, which):
    base, adapter, source = trio
    of_source = save_adapter(source, tmp_path / "adapter of source", 4)
    target = f"{base}+{adapter}"
    recipe = write_recipe(target, f"{source}+{of_source}" if which != "target" else source, layers='"0,2"')
    answer("run", recipe, tmp_path / "ours", "--no-evaluate", "--json")
    command = [*MERGEKIT, recipe, tmp_path / "theirs", "--quiet", "--lora-merge-cache", tmp_path / "merged"]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    # peft is the authority for what a merged adapter is.
    whole = merged_by_peft(base, adapter, tmp_path / "peft")
    donor = merged_by_peft(source, of_source, tmp_path / "peft of source") if which != "target" else source
    plain = write_recipe(whole, donor, layers='"0,2"')
    answer("run", plain, tmp_path / "plain", "--no-evaluate", "--json")
    assert_same_tensors(tmp_path / "ours", tmp_path / "plain")
    # The replay recipes say the same again.
    assert f"base_model: {target}\n" in (tmp_path / "ours" / "mergekit_config.yml").read_text()
    assert answer("verify", tmp_path / "ours", "--json")["correct"]
    assert answer("verify", tmp_path / "theirs", "--json")["correct"]


def test_a_lora_is_merged_once_and_again_when_it_changes(trio, write_recipe, tmp_path, own_cache):
    base, adapter, source = trio
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    recipe = load_recipe(write_recipe(f"{base}+{copy}", source, layers=1))
    first = make_plan(recipe).target
    assert first.name == f"{base}+{copy}"
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert make_plan(recipe).target.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == stamps
    path = copy / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    changed = make_plan(recipe).target
    name = "model.layers.1.self_attn.q_proj.weight"
    assert read_bytes(changed, changed.tensors[name]) != read_bytes(first, first.tensors[name])
    assert not list(own_cache.rglob("*.unfinished"))


def test_an_adapter_that_is_replaced_by_one_with_its_times_is_merged_anew(trio, write_recipe, tmp_path, own_cache):
    base, adapter, source = trio
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    recipe = load_recipe(write_recipe(f"{base}+{copy}", source, layers=1))
    first = make_plan(recipe).target
    path = copy / "adapter_model.safetensors"
    state = path.stat()
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert make_plan(recipe).target.folder != first.folder


def test_a_merged_lora_is_not_changed_in_place(trio, write_recipe, tmp_path):
    base, adapter, source = trio
    answer("run", write_recipe(f"{base}+{adapter}", source, layers=1), tmp_path / "out", "--no-evaluate", "--json")
    answer("patch", "extract", tmp_path / "out", tmp_path / "patch.safetensors", "--json")
    merged = make_plan(load_recipe(write_recipe(f"{base}+{adapter}", source, layers=1))).target
    before = {path.name: path.read_bytes() for path in merged.folder.iterdir() if path.is_file()}
    for command in (("apply", "--in-place", tmp_path / "patch.safetensors"), ("revert",)):
        refused = call("patch", *command, f"{base}+{adapter}")
        assert refused.exit_code == 2
        assert "was merged into a cache that other runs share; apply the patch to a copy" in refused.stderr
    assert {path.name: path.read_bytes() for path in merged.folder.iterdir() if path.is_file()} == before


def test_the_tokenizer_is_the_loras_if_it_has_one(trio, write_recipe, tmp_path):
    base, adapter, source = trio
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    for file in base.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, copy)
    (copy / "chat_template.jinja").write_text("the adapter's")
    for place, expected in ((copy, "the adapter's"), (adapter, (base / "chat_template.jinja").read_text())):
        checkpoint = make_plan(load_recipe(write_recipe(f"{base}+{place}", source, layers=1))).target
        assert (checkpoint.folder / "chat_template.jinja").read_text() == expected
        AutoTokenizer.from_pretrained(checkpoint.folder)


def test_a_model_with_a_lora_can_be_evaluated(trio, tmp_path):
    base, adapter, _ = trio
    options = ("--prompts", "miniature", "--text", "builtin", "--max-new-tokens", "2", "--json")
    assert "dsr" in answer("evaluate", f"{base}+{adapter}", *options)


def damaged(adapter: Path, folder: Path, how: str) -> Path:
    shutil.copytree(adapter, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "config is no JSON":
        config.write_text("{")
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif how == "pickled":
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
    elif how == "other modules":
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["c_attn"]}))
    elif how == "other layers":
        save_file({name.replace("layers.1", "layers.9"): value for name, value in load_file(weights).items()}, weights)
    elif how == "other size":
        save_file({name: torch.ones(7, 7) for name in load_file(weights)}, weights)
    return folder


FAULTS = {
    "no config": "is not a LoRA adapter: it has no adapter_config.json",
    "no weights": "is not a LoRA adapter: it has no adapter_model.safetensors",
    "config is no JSON": "adapter_config.json is not JSON",
    "cut off": "adapter_model.safetensors is truncated",
    "pickled": "has pickled weights only, which can run code when loaded",
    "other modules": "down_proj.lora_A.weight is not of a module that adapter_config.json names",
    "other layers": "layers.9.mlp.down_proj.lora_A.weight has no counterpart there",
    "other size": "for a model of another size: its base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is for "
    "[7, 7], and model.layers.0.mlp.down_proj.weight is [32, 48]",
}


@pytest.mark.parametrize("how", FAULTS)
def test_an_adapter_that_is_none_is_one_sentence(trio, write_recipe, tmp_path, how, own_cache):
    base, adapter, source = trio
    folder = damaged(adapter, tmp_path / "adapter", how)
    result = call("plan", write_recipe(f"{base}+{folder}", source, layers=1))
    assert result.exit_code == 4, result.stderr
    assert FAULTS[how] in result.stderr
    assert str(folder) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    # What was begun is gone.
    assert not [path for path in own_cache.rglob("*") if path.suffix in (".unfinished", ".safetensors")]


def test_a_pickled_adapter_may_be_allowed(trio, write_recipe, tmp_path):
    base, adapter, source = trio
    recipe = write_recipe(f"{base}+{damaged(adapter, tmp_path / 'adapter', 'pickled')}", source, layers=1)
    answer("run", recipe, tmp_path / "out", "--no-evaluate", "--allow-pickle", "--json")
    answer("run", write_recipe(f"{base}+{adapter}", source, layers=1), tmp_path / "usual", "--no-evaluate", "--json")
    assert_same_tensors(tmp_path / "out", tmp_path / "usual")


def test_mergekit_without_a_place_to_merge_in_is_one_sentence(trio, write_recipe, tmp_path):
    base, adapter, source = trio
    recipe = write_recipe(f"{base}+{adapter}", source, layers=1)
    done = warm.run([*MERGEKIT, recipe, tmp_path / "out"])
    assert done.returncode == 2
    assert "base_model is a LoRA" in done.stderr
    assert "name a folder with --lora-merge-cache to merge it in" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_mergekit_does_not_use_a_merge_of_its_own(trio, write_recipe, tmp_path):
    base, adapter, source = trio
    recipe, cache = write_recipe(f"{base}+{adapter}", source, layers=1), tmp_path / "merged"
    ModelReference.parse(f"{base}+{adapter}").merged(cache_dir=str(cache))
    (merge,) = cache.iterdir()
    change_tensor(merge, "model.norm.weight", lambda tensor: tensor.add_(1))
    done = warm.run([*MERGEKIT, recipe, tmp_path / "out", "--lora-merge-cache", cache])
    assert done.returncode == 2
    assert f"{merge} holds another merge of {base}+{adapter}" in done.stderr
    done = warm.run([*MERGEKIT, recipe, tmp_path / "out", "--lora-merge-cache", cache, "--lora-merge-dtype", "float16"])
    assert done.returncode == 2
    assert "--lora-merge-dtype" in done.stderr
    assert not (tmp_path / "out").exists()


def test_mergekit_refuses_a_base_of_which_it_would_lose_tensors_and_run_keeps_them(trio, write_recipe, tmp_path):
    base, adapter, source = trio
    base = shutil.copytree(base, tmp_path / "base")
    index = base / "model.safetensors.index.json"
    owners = json.loads(index.read_text())
    save_file({"mtp.layers.0.mlp.gate_proj.weight": torch.ones(48, 32)}, base / "mtp.safetensors")
    owners["weight_map"]["mtp.layers.0.mlp.gate_proj.weight"] = "mtp.safetensors"
    index.write_text(json.dumps(owners))
    (base / "LICENSE").write_text("as it was")
    recipe = write_recipe(f"{base}+{adapter}", source, layers=1)
    done = warm.run([*MERGEKIT, recipe, tmp_path / "theirs", "--lora-merge-cache", tmp_path / "merged"])
    assert done.returncode == 4
    assert "mergekit would leave 1 of 40 tensors" in done.stderr
    assert "mtp.layers.0.mlp.gate_proj.weight" in done.stderr
    assert not (tmp_path / "theirs").exists()
    answer("run", recipe, tmp_path / "ours", "--no-evaluate", "--json")
    assert open_checkpoint(str(tmp_path / "ours")).tensors.keys() == open_checkpoint(str(base)).tensors.keys()
    assert (tmp_path / "ours" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "ours" / "LICENSE").read_text() == "as it was"
    assert answer("verify", tmp_path / "ours", "--json")["correct"]


def test_an_adapter_from_the_hub_is_pinned_to_its_commit(trio, write_recipe, tmp_path, call_at_hub):
    base, adapter, source = trio
    served = shutil.copytree(adapter, tmp_path / "served")
    (served / "optimizer.bin").write_bytes(b"not asked for")
    with hub({"someone/adapter": served, "someone/base": base}) as (endpoint, log):
        recipe = write_recipe("someone/base+someone/adapter@v1", source, layers=1)
        result = call_at_hub(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate")
    assert result.exit_code == 0, result.stderr
    replay = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert f"base_model: someone/base@{SHA}+someone/adapter@{SHA}\n" in replay
    assert not [line for line in log if "optimizer.bin" in line]
    answer("run", write_recipe(f"{base}+{adapter}", source, layers=1), tmp_path / "usual", "--no-evaluate", "--json")
    assert_same_tensors(tmp_path / "out", tmp_path / "usual")


def test_a_recipe_with_relative_paths_is_pinned_to_absolute_ones(trio, write_recipe, tmp_path, monkeypatch):
    base, adapter, source = trio
    monkeypatch.chdir(base.parent)
    answer("run", write_recipe("base+adapter", source, layers=1), tmp_path / "out", "--no-evaluate", "--json")
    assert f"base_model: {base}+{adapter}\n" in (tmp_path / "out" / "mergekit_config.yml").read_text()
    monkeypatch.chdir(os.sep)
    assert answer("verify", tmp_path / "out", "--json")["correct"]
