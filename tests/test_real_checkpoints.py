"""Checkpoints as people publish them, by both entrances: `dapa-merge run` and `mergekit-yaml` write the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import warm
from conftest import answer, save_random, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapa_merge import miniature
from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint, read_bytes

MERGEKIT = (sys.executable, "-c", "from mergekit.scripts.run_yaml import main; main()")
SHARDS = {"one file": "1GB", "shards": "25KB", "split layers": "12KB"}


def assert_entrances_agree(recipe: Path, folder: Path) -> tuple[Checkpoint, Checkpoint]:
    """Follow a recipe by both entrances in processes of their own; the same tensors but for copies of tied ones."""
    answer("run", recipe, folder / "ours", "--no-evaluate", "--json")
    done = warm.run([*MERGEKIT, recipe, folder / "theirs", "--quiet"])
    assert done.returncode == 0, done.stderr
    ours, theirs = open_checkpoint(str(folder / "ours")), open_checkpoint(str(folder / "theirs"))
    for name, tensor in ours.tensors.items():
        other = theirs.tensors[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert read_bytes(ours, tensor) == read_bytes(theirs, other), name
    assert theirs.tensors.keys() - ours.tensors.keys() <= {"lm_head.weight"}
    assert answer("verify", folder / "ours", "--json")["correct"]
    assert answer("verify", folder / "theirs", "--json")["correct"]
    return ours, theirs


def assert_gates_are_the_sources(result: Checkpoint, target: Path, source: Path, layers: set[int]) -> None:
    target_tensors, source_tensors = open_checkpoint(str(target)), open_checkpoint(str(source))
    assert result.tensors.keys() == target_tensors.tensors.keys()
    for name, tensor in result.tensors.items():
        is_gate = any(f"layers.{layer}.mlp.gate_proj" in name for layer in layers)
        origin = source_tensors if is_gate else target_tensors
        assert read_bytes(result, tensor) == read_bytes(origin, origin.tensors[name]), name


def with_more_tokens(folder: Path, number: int) -> Path:
    """Add tokens to a model as Chinese-Alpaca-2 did to Llama 2: to its tokenizer, its embeddings and its output."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"token{index}" for index in range(number)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder, max_shard_size="25KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_target_with_a_larger_vocabulary(write_recipe, tmp_path, tied):
    size = len(AutoTokenizer.from_pretrained(miniature.path("target")))
    config = tiny_llama(tie_word_embeddings=tied, vocab_size=size)
    target = with_more_tokens(save_random(tmp_path / "target", config, seed=1), 40)
    source = save_random(tmp_path / "source", config, seed=2)
    recipe = write_recipe(target, source, layers='"0,2"')
    recipe.write_text(recipe.read_text() + "tokenizer: {source: base}\n")
    ours, theirs = assert_entrances_agree(recipe, tmp_path)
    assert ours.tensors["model.embed_tokens.weight"].shape[0] == size + 40
    assert_gates_are_the_sources(ours, target, source, {0, 2})
    models = [AutoModelForCausalLM.from_pretrained(made.folder, dtype="auto").eval() for made in (ours, theirs)]
    input_ids = torch.tensor([[5, size, size + 39, 7]])
    assert torch.equal(*(model(input_ids).logits for model in models))
    assert (
        len(AutoTokenizer.from_pretrained(ours.folder))
        == len(AutoTokenizer.from_pretrained(theirs.folder))
        == size + 40
    )


@pytest.mark.parametrize("target_shards", SHARDS)
@pytest.mark.parametrize("source_shards", SHARDS)
def test_shards_need_not_be_the_same(write_recipe, tmp_path, target_shards, source_shards):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, max_shard_size=SHARDS[target_shards])
    source = save_random(tmp_path / "source", tiny_llama(), seed=2, max_shard_size=SHARDS[source_shards])
    if target_shards == "split layers":
        tensors = open_checkpoint(str(target)).tensors.values()
        assert len({tensor.file for tensor in tensors if ".layers.1." in tensor.name}) > 1
    recipe = write_recipe(target, source, layers='"1-2"')
    answer("run", recipe, tmp_path / "ours", "--no-evaluate", "--json")
    ours = open_checkpoint(str(tmp_path / "ours"))
    assert ours.shards == open_checkpoint(str(target)).shards
    assert_gates_are_the_sources(ours, target, source, {1, 2})


def test_tied_embeddings_and_other_shards_by_both_entrances(write_recipe, tmp_path):
    config = tiny_llama(tie_word_embeddings=True)
    target = save_random(tmp_path / "target", config, seed=1, max_shard_size="1GB")
    source = save_random(tmp_path / "source", config, seed=2, max_shard_size="12KB")
    ours, _ = assert_entrances_agree(write_recipe(target, source, layers='"3"'), tmp_path)
    assert "lm_head.weight" not in ours.tensors
    assert_gates_are_the_sources(ours, target, source, {3})


def test_a_source_of_another_dtype_in_links_by_both_entrances(write_recipe, tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2, dtype=torch.float32)
    snapshots = []
    for folder in (target, source):
        # As the Hub's cache has them.
        snapshot = tmp_path / f"models--someone--{folder.name}" / "snapshots" / "0123"
        blobs = snapshot.parent.parent / "blobs"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(blobs / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        snapshots.append(snapshot)
    ours, _ = assert_entrances_agree(write_recipe(*snapshots, layers='"0"'), tmp_path)
    assert {TORCH_NAMES[tensor.dtype] for tensor in ours.tensors.values()} == {"bfloat16"}
