from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import change_tensor, save_random, tiny_llama

from dapa_merge.checkpoint.digest import settings_digest, tensors_digest
from dapa_merge.checkpoint.open import open_checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """One model, saved in many shards and in one."""
    folder = tmp_path_factory.mktemp("digest")
    return (
        save_random(folder / "many", tiny_llama(), seed=1),
        save_random(folder / "one", tiny_llama(), seed=1, max_shard_size="1GB"),
    )


def test_the_division_into_files_does_not_matter(pair):
    many, one = (open_checkpoint(str(folder)) for folder in pair)
    assert len(many.shards) > len(one.shards) == 1
    assert tensors_digest(many) == tensors_digest(one)
    assert tensors_digest(many).startswith("sha256 ")


def test_every_byte_and_every_name_counts(pair, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(pair[0], folder)
    gate, query = "model.layers.2.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    before = open_checkpoint(str(folder))
    whole, part = tensors_digest(before), tensors_digest(before, [gate])
    assert tensors_digest(before, ["model.layers.1.mlp.gate_proj.weight"]) != part
    change_tensor(folder, query, lambda tensor: tensor[0, 0].add_(1))
    after = open_checkpoint(str(folder))
    assert tensors_digest(after) != whole
    assert tensors_digest(after, [gate]) == part


def test_all_bytes_are_reported_as_they_are_read(pair, monkeypatch):
    checkpoint = open_checkpoint(str(pair[0]))
    read: list[int] = []
    monkeypatch.setattr("dapa_merge.checkpoint.digest.advance", lambda num_bytes, _: read.append(num_bytes))
    tensors_digest(checkpoint)
    assert sum(read) == checkpoint.num_bytes


def test_a_snapshot_of_the_hub_is_its_commit(pair):
    checkpoint = replace(open_checkpoint(str(pair[0])), commit="0123456789abcdef")
    assert tensors_digest(checkpoint) == "commit 0123456789abcdef"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/default.jinja",
    ],
)
def test_what_a_model_is_asked_with_counts_and_cards_do_not(pair, tmp_path, name):
    folder = tmp_path / "changed"
    shutil.copytree(pair[0], folder)
    before = settings_digest(open_checkpoint(str(folder)))
    (folder / "README.md").write_text("a card")
    (folder / "trainer_state.json").write_text("{}")
    assert settings_digest(open_checkpoint(str(folder))) == before
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    assert settings_digest(open_checkpoint(str(folder))) != before
