from __future__ import annotations

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
import warm
from conftest import answer, call
from safetensors.torch import load_file

from dapa_merge.checkpoint.convert import open_model
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.parse import load_recipe


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def as_pickles(folder, copy, *, sharded=True, change=lambda weights: None, **options):
    """The same model with its weights as pickles, in the shards that it has or in one file."""
    shutil.copytree(folder, copy)
    paths = sorted(copy.glob("*.safetensors"))
    weights = {path: load_file(path) for path in paths}
    for path in paths:
        path.unlink()
    (copy / "model.safetensors.index.json").unlink()
    if sharded:
        names = {path: f"pytorch_{path.stem}.bin" for path in paths}
        index = {"weight_map": {name: names[path] for path, content in weights.items() for name in content}}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for path, content in weights.items():
            change(content)
            torch.save(content, copy / names[path], **options)
    else:
        merged = {name: tensor for content in weights.values() for name, tensor in content.items()}
        change(merged)
        torch.save(merged, copy / "pytorch_model.bin", **options)
    return copy


def assert_same_tensors(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        twin = other.tensors[name]
        assert (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape)
        assert read_bytes(one, tensor) == read_bytes(other, twin), name


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "before torch 1.6"])
def test_pickles_that_are_allowed_are_the_same_model(llama_pair, tmp_path, sharded, is_archive):
    folder = as_pickles(llama_pair[0], tmp_path / "pickled", sharded=sharded, _use_new_zipfile_serialization=is_archive)
    converted = open_model(str(folder), allow_pickle=True)
    assert_same_tensors(converted, open_checkpoint(str(llama_pair[0])))
    assert len(converted.shards) == (len(list(llama_pair[0].glob("*.safetensors"))) if sharded else 1)


@pytest.mark.parametrize("command", ["run", "plan", "search", "evaluate", "verify"])
def test_pickles_are_refused_unless_they_are_allowed(llama_pair, tmp_path, write_recipe, command):
    source = as_pickles(llama_pair[1], tmp_path / "pickled")
    recipe = write_recipe(llama_pair[0], source, layers=1)
    answer("run", recipe, tmp_path / "out", "--no-evaluate", "--allow-pickle", "--json")
    arguments = {
        "run": (recipe, tmp_path / "again"), "plan": (recipe,), "search": (recipe,), "evaluate": (source,),
        "verify": (tmp_path / "out",),
    }  # fmt: skip
    result = call(command, *arguments[command])
    assert result.exit_code == 4
    assert "has pickled weights only, which can run code when loaded; save it again" in result.stderr
    assert "with --allow-pickle (or DAPA_ALLOW_PICKLE=1)" in result.stderr


def test_a_pickled_pair_is_repaired_verified_and_named_where_it_is(llama_pair, tmp_path, write_recipe, monkeypatch):
    target = as_pickles(llama_pair[0], tmp_path / "target", sharded=False)
    source = as_pickles(llama_pair[1], tmp_path / "source")
    monkeypatch.setenv("DAPA_ALLOW_PICKLE", "1")
    answer("run", write_recipe(target, source, layers='"0,3"'), tmp_path / "out", "--no-evaluate", "--json")
    assert answer("verify", tmp_path / "out", "--json")["correct"]
    answer("run", write_recipe(*llama_pair, layers='"0,3"'), tmp_path / "usual", "--no-evaluate", "--json")
    assert_same_tensors(open_checkpoint(str(tmp_path / "out")), open_checkpoint(str(tmp_path / "usual")))
    replayed = load_recipe(tmp_path / "out" / "mergekit_config.yml")
    assert (replayed.target.path, replayed.source.path) == (str(target), str(source))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_mergekit_takes_the_same_pickles(llama_pair, tmp_path, write_recipe):
    source = as_pickles(llama_pair[1], tmp_path / "source")
    recipe = write_recipe(llama_pair[0], source, layers=2)
    answer("run", recipe, tmp_path / "ours", "--no-evaluate", "--allow-pickle", "--json")
    code = "from mergekit.scripts.run_yaml import main; main()"
    command = [sys.executable, "-c", code, recipe, tmp_path / "theirs", "--quiet"]
    refused = warm.run(command)
    assert refused.returncode == 4
    assert "has pickled weights only" in refused.stderr
    allowed = warm.run(command, env={**os.environ, "DAPA_ALLOW_PICKLE": "1"})
    assert allowed.returncode == 0, allowed.stderr
    assert_same_tensors(open_checkpoint(str(tmp_path / "ours")), open_checkpoint(str(tmp_path / "theirs")))


def test_they_are_converted_once_and_again_when_they_change(llama_pair, tmp_path, own_cache):
    folder = as_pickles(llama_pair[0], tmp_path / "pickled", sharded=False)
    first = open_model(str(folder), allow_pickle=True)
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    (folder / "chat_template.jinja").write_text("new")
    (folder / "generation_config.json").unlink()
    (folder / "id_rsa").write_text("private")
    # As an earlier version copied it.
    (first.folder / "adapter_config.json").write_text("{}")
    again = open_model(str(folder), allow_pickle=True)
    assert again.folder == first.folder
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == stamp
    # Small files are those that the model has now.
    assert (again.folder / "chat_template.jinja").read_text() == "new"
    assert not {"generation_config.json", "id_rsa", "adapter_config.json"} & {*os.listdir(again.folder)}
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights["model.norm.weight"] += 1
    torch.save(weights, folder / "pytorch_model.bin")
    changed = open_model(str(folder), allow_pickle=True)
    assert changed.folder != first.folder
    norm = changed.tensors["model.norm.weight"]
    assert read_bytes(changed, norm) == weights["model.norm.weight"].view(torch.uint8).numpy().tobytes()


def test_tensors_that_share_memory_or_are_no_block_of_it_are_written_out(tmp_path):
    shared = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    weights = {
        "whole": shared, "same": shared, "rows": shared[1:3], "turned": shared.T, "scalar": torch.tensor(2.5),
        "none": torch.ones(0, 3), "bits": torch.tensor([True, False]), "wide": torch.ones(2, dtype=torch.complex64),
        "narrow": torch.ones(3).to(torch.float8_e4m3fn), "parameter": torch.nn.Parameter(torch.ones(2)),
        "brain": torch.ones(3, dtype=torch.bfloat16),
    }  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    torch.save({"state_dict": weights}, tmp_path / "pytorch_model.bin")
    converted = open_model(str(tmp_path), allow_pickle=True)
    loaded = load_file(converted.folder / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach()), name


@pytest.mark.parametrize("form", ["in an archive", "before torch 1.6", "bare"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(tmp_path, form, own_cache):
    marker = tmp_path / "it ran".replace(" ", "-")
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"
    content = {"weight": torch.ones(2), "evil": Evil(marker)}
    if form == "bare":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "in an archive")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin holds more than tensors, or is damaged, and was not read"
    ):
        open_model(str(tmp_path), allow_pickle=True)
    assert not marker.exists()
    assert not list(own_cache.rglob("*.safetensors"))
    # It is real: Python's own reader runs it.
    if form == "bare":
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (torch.ones(2), "holds a Tensor where tensors by name were expected"),
        ({"a": 3}, "holds 'a', a int, which is not a named tensor"),
        ({1: torch.ones(1)}, "holds '1', a Tensor, which is not a named tensor"),
        ({"a": torch.ones(1).expand(1 << 40)}, "holds 'a', which is larger than the bytes behind it"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"holds 'a' as torch.float32 \(torch.sparse_coo\)"),
    ],
)
def test_what_is_no_weights_is_named(tmp_path, content, sentence):
    (tmp_path / "config.json").write_text("{}")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=sentence):
        open_model(str(tmp_path), allow_pickle=True)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04" + bytes(100), b"text", bytes(1000)])
def test_a_damaged_pickle_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds more than tensors, or is damaged, and was not read") as caught:
        open_model(str(tmp_path), allow_pickle=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../evil.bin", "/evil.bin", "a/b.bin", "model.safetensors", "a\n.bin"])
def test_an_index_of_pickles_cannot_name_a_file_outside_its_folder(llama_pair, tmp_path, name):
    folder = as_pickles(llama_pair[0], tmp_path / "pickled")
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="which is not a pickle file inside its own folder"):
        open_model(str(folder), allow_pickle=True)


def test_a_conversion_that_was_killed_starts_again(llama_pair, tmp_path, own_cache):
    folder = as_pickles(llama_pair[0], tmp_path / "pickled", sharded=False)
    checkpoint = open_model(str(folder), allow_pickle=True)
    left = checkpoint.folder.with_name(f"{checkpoint.folder.name}.unfinished")
    checkpoint.folder.rename(left)
    (left / "model.safetensors").write_bytes(b"half")
    again = open_model(str(folder), allow_pickle=True)
    assert not left.exists()
    assert_same_tensors(again, open_checkpoint(str(llama_pair[0])))


def test_a_plan_of_pickles_has_the_tensors_of_both(llama_pair, tmp_path, write_recipe):
    source = as_pickles(llama_pair[1], tmp_path / "source")
    plan = make_plan(load_recipe(write_recipe(llama_pair[0], source)), allow_pickle=True)
    assert len(plan.units) == 4
