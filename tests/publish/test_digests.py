"""The Hub knows a large file by its SHA-256, a manifest by its own digest: which of them a push computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3
from conftest import as_format_1, call, sha256_of
from publish.conftest import tree

from dapa_merge.publish import commit, push
from dapa_merge.transplant.manifest import read_manifest


@pytest.fixture(autouse=True)
def all_weights_are_large(monkeypatch) -> None:
    monkeypatch.setattr(commit, "MAX_SMALL_BYTES", 20_000)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that a push reads to hash them."""
    names: list[str] = []
    read_into = commit.read_into

    def observed(path, *hashers):
        names.append(path.name)
        read_into(path, *hashers)

    monkeypatch.setattr(commit, "read_into", observed)
    return names


def large(out: Path) -> set[str]:
    return {path for path in tree(out) if (out / path).stat().st_size > commit.MAX_SMALL_BYTES}


@pytest.mark.parametrize("manifest", ["of format 2", "of format 1", "absent"])
def test_the_hub_gets_the_sha256_of_every_large_file_whatever_the_manifest_has(hub, new_id, result, read, manifest):
    if manifest == "of format 1":
        as_format_1(result)
    elif manifest == "absent":
        (result / "dapa.json").unlink()
    name, weights = new_id("repaired"), {path for path in large(result) if path.endswith(".safetensors")}
    assert weights
    assert call("push", result, name).exit_code == 0
    there = hub.store.repositories[name].files()
    assert {path: there[path].sha256 for path in weights} == {path: sha256_of(result / path) for path in weights}
    # SHA-256s that are in the manifest are not computed again.
    assert set(read) == (set() if manifest == "of format 1" else large(result))
    assert "nothing to do" in call("push", result, name).stdout


def test_a_file_that_changes_after_it_was_verified_is_not_published(hub, new_id, result, monkeypatch):
    name, verify_result = new_id("repaired"), push.verify_result
    shard = result / min(path for path in large(result) if path.endswith(".safetensors"))

    def verified_and_changed(*arguments, **options):
        found = verify_result(*arguments, **options)
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        return found

    monkeypatch.setattr(push, "verify_result", verified_and_changed)
    refused = call("push", result, name)
    assert refused.exit_code == 4
    assert f"{shard} changed during publishing; nothing was published" in refused.stderr
    assert name not in hub.store.repositories


@pytest.mark.parametrize("number", [1, 2])
def test_the_published_manifest_has_the_digests_of_the_published_files(
    hub, new_id, llama_pair, write_recipe, tmp_path, number
):
    out, name = tmp_path / "out", new_id("repaired")
    assert call("run", write_recipe(*llama_pair, layers=1), out, "--no-evaluate").exit_code == 0
    if number == 1:
        as_format_1(out)
    ours = read_manifest(out)
    assert call("push", out, name).exit_code == 0
    there = tmp_path / "there"
    for path, entry in hub.store.repositories[name].files().items():
        (there / path).parent.mkdir(parents=True, exist_ok=True)
        (there / path).write_bytes(hub.store.read(entry))
    published = read_manifest(there)
    assert published.algorithm == ours.algorithm == {1: "sha256", 2: "blake3"}[number]
    # Folders of this machine are named otherwise there.
    assert published.files["mergekit_config.yml"] != ours.files["mergekit_config.yml"]
    for path, file in published.files.items():
        raw = (there / path).read_bytes()
        digest = sha256_of(there / path) if number == 1 else blake3(raw).hexdigest()
        assert (file.num_bytes, file.digest) == (len(raw), digest)
    assert call("verify", there, "--files-only").exit_code == 0
