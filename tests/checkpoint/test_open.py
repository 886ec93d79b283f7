from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dapa_merge.checkpoint.header import read_header
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CheckpointError, HubError


@pytest.fixture
def copy(llama_pair, tmp_path):
    """A target that a test may damage."""
    return shutil.copytree(llama_pair[0], tmp_path / "copy")


def test_tensors_are_those_that_safetensors_reads(llama_pair):
    checkpoint = open_checkpoint(str(llama_pair[0]))
    assert len(checkpoint.shards) >= 3
    seen = 0
    for shard in checkpoint.shards:
        with safe_open(checkpoint.folder / shard, framework="pt") as reference:
            for name in reference.keys():  # noqa: SIM118, it is no dict
                expected = reference.get_tensor(name)
                tensor = checkpoint.tensors[name]
                assert tensor.shape == tuple(expected.shape)
                assert read_bytes(checkpoint, tensor) == expected.view(torch.uint8).numpy().tobytes()
                seen += 1
    assert seen == len(checkpoint.tensors)
    assert checkpoint.num_parameters == sum(tensor.num_parameters for tensor in checkpoint.tensors.values())


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["a"]


def test_empty_tensors_and_scalars_are_read(tmp_path):
    save_file({"none": torch.ones(0, 4), "scalar": torch.tensor(2.0)}, tmp_path / "t.safetensors")
    assert {tensor.name: tensor.num_bytes for tensor in read_header(tmp_path / "t.safetensors")} == {
        "none": 0,
        "scalar": 4,
    }


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_truncated_shard_is_named(copy):
    shard = copy / open_checkpoint(str(copy)).shards[1]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 7)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated: .* {size} bytes, the file has {size - 7}"):
        open_checkpoint(str(copy))


def test_a_missing_shard_is_named(copy):
    shard = copy / open_checkpoint(str(copy)).shards[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{shard.name}: No such file"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "x.bin"])
def test_an_index_cannot_name_a_file_outside_its_folder(copy, name):
    change_index(copy, lambda owners: owners.update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="which is not a safetensors file inside its own folder") as caught:
        open_checkpoint(str(copy))
    assert name in str(caught.value)


def test_a_tensor_that_the_index_puts_elsewhere_is_named(copy):
    first, *_, last = open_checkpoint(str(copy)).shards

    def swap(owners):
        owners[next(name for name, shard in owners.items() if shard == first)] = last

    change_index(copy, swap)
    with pytest.raises(CheckpointError, match=rf"says that {last} holds .*, but it does not"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(copy, content):
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(str(copy))


def test_pickles_are_refused(copy):
    for path in [*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"]:
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickled weights only, which can run code"):
        open_checkpoint(str(copy))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config\.json"):
        open_checkpoint(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_no_damaged_checkpoint():
    # The tests run offline, so that any repository is out of reach.
    with pytest.raises(HubError, match="there is no folder 'someone/some-model' here, and it cannot"):
        open_checkpoint("someone/some-model")


def test_a_name_that_is_neither_folder_nor_repository_is_named():
    with pytest.raises(CheckpointError, match=r"there is no folder '\./no/such/folder' here, and it is not the id"):
        open_checkpoint("./no/such/folder")


def file_with_header(path, header: bytes, data: bytes, length: int | None = None):
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"not json", b""),
        (b"[1]", b""),
        (b'{"a": 3}', b""),
        (json.dumps({"a": {**ENTRY, "dtype": "F99"}}).encode(), bytes(8)),
        (json.dumps({"a": {**ENTRY, "dtype": ["F32"]}}).encode(), bytes(8)),
        (json.dumps({"a": {**ENTRY, "shape": [3]}}).encode(), bytes(8)),
        (json.dumps({"a": {**ENTRY, "shape": [-2]}}).encode(), bytes(8)),
        (json.dumps({"a": {**ENTRY, "shape": [2.0]}}).encode(), bytes(8)),
        (json.dumps({"a": {**ENTRY, "shape": [True, 2]}}).encode(), bytes(8)),
        (json.dumps({"a": {**ENTRY, "data_offsets": [8, 0]}}).encode(), bytes(8)),
        (json.dumps({"a": {**ENTRY, "data_offsets": [4, 12]}}).encode(), bytes(12)),
        (json.dumps({"a": ENTRY, "b": ENTRY}).encode(), bytes(8)),
        (json.dumps({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}).encode(), bytes(12)),
        (json.dumps({"a": ENTRY}).encode(), bytes(9)),
        (b"[" * 100_000, b""),
    ],
)
def test_a_lying_header_is_refused(tmp_path, header, data):
    with pytest.raises(CheckpointError):
        read_header(file_with_header(tmp_path / "t.safetensors", header, data))


@pytest.mark.parametrize("length", [1, 10**9, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path, length):
    header = json.dumps({"a": ENTRY}).encode()
    with pytest.raises(CheckpointError):
        read_header(file_with_header(tmp_path / "t.safetensors", header, bytes(8), length))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_read_but_never_crash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert all(tensor.stop <= len(content) for tensor in tensors)


def test_a_tensor_in_two_shards_is_refused(copy):
    first, second, *_ = open_checkpoint(str(copy)).shards
    tensors = load_file(copy / second)
    name = next(iter(load_file(copy / first)))
    save_file({**tensors, name: load_file(copy / first)[name]}, copy / second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"holds {name} twice, in {first} and {second}"):
        open_checkpoint(str(copy))


def test_two_forms_of_one_model_are_refused(copy):
    save_file({"a": torch.ones(3)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("name", ["a\x00.safetensors", "\ud800.safetensors", "a\n.safetensors"])
def test_a_shard_name_that_is_no_name_is_refused(copy, name):
    change_index(copy, lambda owners: owners.update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="not a safetensors file inside its own folder"):
        open_checkpoint(str(copy))


def test_a_shard_that_vanishes_is_named(copy):
    checkpoint = open_checkpoint(str(copy))
    (copy / checkpoint.shards[0]).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{checkpoint.shards[0]}: No such file"):
        read_bytes(checkpoint, next(iter(checkpoint.tensors.values())))


def test_a_long_header_does_not_make_a_long_message(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_header(file_with_header(tmp_path / "t.safetensors", json.dumps([1] * 100_000).encode(), b""))
    assert len(str(caught.value)) < 500


def test_what_users_name_instead_of_a_model_is_told(copy, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(copy, trained / "checkpoint-60")
    with pytest.raises(CheckpointError, match=r"no config.json, but a folder in it has; name .*checkpoint-60"):
        open_checkpoint(str(trained))
    only = tmp_path / "gguf"
    only.mkdir()
    shutil.copy(copy / "config.json", only)
    (only / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"has GGUF weights only, model-q4.gguf"):
        open_checkpoint(str(only))
    with pytest.raises(CheckpointError, match=r"model-q4.gguf is a file; name the folder"):
        open_checkpoint(str(only / "model-q4.gguf"))
