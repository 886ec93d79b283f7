from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import answer, call
from safetensors.torch import load_file, save_file

from dapa_merge.checkpoint.folder import Layout, find_weights
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.live import choose_device, load_model

SHARDS = tuple(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        ([*SHARDS, "model.safetensors.index.json"], Layout(index="model.safetensors.index.json")),
        (["model.safetensors"], Layout(shards=("model.safetensors",))),
        (["model.safetensors", "consolidated.safetensors"], Layout(shards=("model.safetensors",))),
        (SHARDS[::-1], Layout(shards=SHARDS)),
        ([*SHARDS, "consolidated.safetensors"], Layout(shards=SHARDS)),
        (["consolidated.safetensors", "params.json"], Layout(shards=("consolidated.safetensors",))),
        (["weights.safetensors", "model-q4.gguf", "model.onnx"], Layout(shards=("weights.safetensors",))),
        ([*SHARDS, *(f"._{name}" for name in SHARDS), ".DS_Store"], Layout(shards=SHARDS)),
        ([*SHARDS, "._model-00001-of-00002.safetensors", "model-00004-of-00003.safetensors~"], Layout(shards=SHARDS)),
        (["model-00001-of-00001.safetensors"], Layout(shards=("model-00001-of-00001.safetensors",))),
        (["pytorch_model.bin", "training_args.bin"], Layout(shards=("pytorch_model.bin",), pickled=True)),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
            Layout(index="pytorch_model.bin.index.json", pickled=True),
        ),
        (["model.safetensors", "pytorch_model.bin"], Layout(shards=("model.safetensors",))),
    ],
)
def test_the_weights_are_found_by_their_names(files, layout):
    assert find_weights(files, "m") == layout


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "m has neither model.safetensors nor model.safetensors.index.json"),
        (SHARDS[:2], r"m lacks model-00003-of-00003.safetensors: it has no .*, and 2 of 3 shards"),
        (SHARDS[1:], r"m lacks model-00001-of-00003.safetensors"),
        (["model-00001-of-99999.safetensors"], r"m lacks model-00002-of-99999.safetensors"),
        ([*SHARDS, "model-00004-of-00003.safetensors"], "model-00004-of-00003.safetensors, which is not a shard of 3"),
        (["model-00000-of-00000.safetensors"], "which is not a shard of 0"),
        ([*SHARDS, "model-00001-of-00002.safetensors"], "several sets of shards"),
        (["a.safetensors", "b.safetensors"], r"2 other safetensors files \(a.safetensors, b.safetensors, ...\)"),
        (["adapter_model.safetensors", "adapter_config.json"], r"m is a LoRA adapter.*as BASE\+m"),
        (["consolidated.00.pth", "params.json"], "pickled weights only, .*none are named pytorch_model.bin"),
        (["training_args.bin"], "m has neither"),
        (["._model.safetensors"], "m has neither"),
        (
            ["model.safetensors", "adapter_config.json"],
            r"adapter_config.json beside .*model.safetensors.*BASE\+ADAPTER",
        ),
        (["model.safetensors", "adapter_model.safetensors"], "adapter_model.safetensors beside .* model.safetensors"),
        (
            ["pytorch_model.bin", "adapter_config.json", "adapter_model.bin"],
            "adapter_config.json and adapter_model.bin",
        ),
        ([*SHARDS, "pytorch_model.bin"], "pytorch_model.bin, which transformers loads instead of model-00001-of-00003"),
        (["consolidated.safetensors", "pytorch_model.bin.index.json"], "instead of consolidated.safetensors"),
        (["model.safetensors", "shard-00001-model-00001-of-00001.safetensors"], "distributed checkpoint, shard-00001"),
    ],
)
def test_what_cannot_be_told_or_is_missing_is_named(files, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        find_weights(files, "m")


def rename_without_index(folder, *, single: str | None = None) -> None:
    """Leave out the index; with `single`, put all weights into one file of that name."""
    (folder / "model.safetensors.index.json").unlink()
    if single:
        content = {}
        for path in sorted(folder.glob("*.safetensors")):
            content |= load_file(path)
            path.unlink()
        save_file(content, folder / single, metadata={"format": "pt"})


@pytest.mark.parametrize("single", [None, "consolidated.safetensors", "my-own.safetensors"])
def test_a_model_of_another_naming_is_repaired_and_loaded(llama_pair, write_recipe, tmp_path, single):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    rename_without_index(target, single=single)
    answer("run", write_recipe(target, llama_pair[1], layers='"1-2"'), tmp_path / "out", "--no-evaluate", "--json")
    answer("run", write_recipe(*llama_pair, layers='"1-2"'), tmp_path / "usual", "--no-evaluate", "--json")
    ours, usual = open_checkpoint(str(tmp_path / "out")), open_checkpoint(str(tmp_path / "usual"))
    assert ours.shards == ((single,) if single else usual.shards)
    assert ours.tensors.keys() == usual.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert read_bytes(ours, tensor) == read_bytes(usual, usual.tensors[name])
    models = [load_model(checkpoint, choose_device("cpu"))[0] for checkpoint in (ours, usual)]
    input_ids = torch.arange(3, 15)[None]
    assert torch.equal(*(model(input_ids).logits for model in models))


def test_mistrals_own_form_is_repaired(tmp_path, write_recipe):
    generator = torch.Generator().manual_seed(0)
    for name in ("target", "source"):
        (tmp_path / name).mkdir()
        weights = {"tok_embeddings.weight": torch.randn(8, 4, generator=generator)}
        for layer in range(2):
            for projection in ("w1", "w2", "w3"):
                shape = (4, 6) if projection == "w2" else (6, 4)
                weights[f"layers.{layer}.feed_forward.{projection}.weight"] = torch.randn(shape, generator=generator)
        save_file(weights, tmp_path / name / "consolidated.safetensors")
        (tmp_path / name / "params.json").write_text(json.dumps({"dim": 4, "n_layers": 2}))
    recipe = write_recipe(tmp_path / "target", tmp_path / "source", layers=1)
    report = answer("run", recipe, tmp_path / "out", "--no-evaluate", "--json")
    assert report["units"] == ["1.gate"]
    target, source, out = (
        load_file(tmp_path / name / "consolidated.safetensors") for name in ("target", "source", "out")
    )
    for name, tensor in out.items():
        assert torch.equal(tensor, (source if name == "layers.1.feed_forward.w1.weight" else target)[name])


def test_a_folder_of_links_is_a_model(llama_pair, tmp_path, write_recipe):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(llama_pair[0].iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    answer("run", write_recipe(snapshot, llama_pair[1], layers=0), tmp_path / "out", "--no-evaluate", "--json")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert {path: path.read_bytes() for path in blobs.iterdir()} == before


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json", "model.safetensors.index.json"])
def test_every_command_says_which_file_of_a_clone_is_only_a_pointer(llama_pair, tmp_path, write_recipe, name):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    name = next(target.glob("*.safetensors")).name if name == SHARDS[0] else name
    (target / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 690376\n")
    recipe = write_recipe(target, llama_pair[1], layers=0)
    for arguments in (["run", recipe, tmp_path / "out", "--no-evaluate"], ["evaluate", target]):
        result = call(*arguments)
        assert result.exit_code == 4
        assert f"{name} is only Git LFS's pointer" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_a_link_out_of_its_folder_is_refused_by_every_command(llama_pair, tmp_path, write_recipe):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    shutil.move(target / "tokenizer.json", tmp_path / "elsewhere.json")
    (target / "tokenizer.json").symlink_to("../elsewhere.json")
    recipe = write_recipe(target, llama_pair[1], layers=0)
    for arguments in (["run", recipe, tmp_path / "out", "--no-evaluate"], ["evaluate", target]):
        result = call(*arguments)
        assert result.exit_code == 4
        assert "tokenizer.json is a link that leads out of its folder" in " ".join(result.stderr.split())
