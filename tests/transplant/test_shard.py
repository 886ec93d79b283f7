"""Files that are made of another's bytes and of changes, by whatever way the kernel has."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading

import pytest
import torch
from blake3 import blake3
from conftest import answer, call, save_random, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError
from dapa_merge.transplant import result as making
from dapa_merge.transplant import shard as copying
from dapa_merge.transplant.shard import NotNeeded, write_file
from dapa_merge.transplant.shard import RegionEdit as Change


def change(spans, source: bytes, cut: int) -> Change:
    """A change to the bytes that `source` has there, in pieces of `cut` bytes."""
    content = b"".join(source[start:stop] for start, stop in spans)
    pieces = [content[start : start + cut] for start in range(0, len(content), cut)]
    return Change(
        Tensor("tensor", "file", "U8", (len(source),), 0, len(source)),
        (),
        tuple(spans),
        "",
        lambda: iter(pieces),
    )


@st.composite
def cases(draw):
    """A file, and changes of it whose spans may lie between those of another, or be there twice."""
    before = draw(st.binary(min_size=1, max_size=120))
    source = draw(st.binary(min_size=len(before), max_size=len(before)))
    changes, after = [], bytearray(before)
    for _ in range(draw(st.integers(0, 3))):
        ends = sorted(draw(st.sets(st.integers(0, len(before)), max_size=6)))
        spans = list(zip(ends[::2], ends[1::2], strict=False))
        for start, stop in spans:
            after[start:stop] = source[start:stop]
        changes.append(change(spans, source, draw(st.integers(1, 30))))
    return before, changes, bytes(after)


@settings(max_examples=200)
@given(case=cases(), step=st.integers(1, 40), piece=st.integers(1, 30), num_threads=st.integers(1, 3))
def test_a_file_is_the_targets_with_the_changes_in_their_places(tmp_path_factory, case, step, piece, num_threads):
    before, changes, after = case
    folder = tmp_path_factory.mktemp("copy")
    (folder / "origin").write_bytes(before)
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "STEP_BYTES", step)
        patch.setattr(copying, "LARGE_STEP_BYTES", step)
        patch.setattr(copying, "PIECE_BYTES", piece)
        patch.setattr(copying, "advance", lambda num_bytes, _: done.append(num_bytes))
        digests = write_file(folder / "origin", folder / "result", changes, num_threads=num_threads)
    assert (folder / "result").read_bytes() == after
    assert digests.num_bytes == sum(done) == len(before)
    digest = blake3(after).hexdigest()
    assert digests.digest == digest
    assert digests.spans == ({"tensor": digest} if changes else {})


each_number_of_threads = pytest.mark.parametrize("num_threads", [1, 3])


@pytest.mark.parametrize("missing", [("copy_file_range",), ("copy_file_range", "sendfile")])
@pytest.mark.parametrize("how", ["absent", "refusing"])
def test_bytes_are_copied_some_other_way_where_the_kernel_cannot(tmp_path, monkeypatch, missing, how):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    for name in missing:
        if how == "absent":
            monkeypatch.delattr(os, name, raising=False)
        else:
            monkeypatch.setattr(os, name, refuse, raising=False)
    content = os.urandom(3_000_001)
    (tmp_path / "origin").write_bytes(content)
    write_file(tmp_path / "origin", tmp_path / "result", ())
    assert (tmp_path / "result").read_bytes() == content


@each_number_of_threads
def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch, num_threads):
    (tmp_path / "origin").write_bytes(bytes(3_000_000))
    copy_piece = copying.copy_piece

    def faulty(reader, writer, num_bytes):
        copied = copy_piece(reader, writer, num_bytes)
        os.pwrite(writer.fileno(), b"\1", 1_234_567)
        return copied

    monkeypatch.setattr(copying, "copy_piece", faulty)
    with pytest.raises(CheckpointError, match=r"does not hold what was written to it, from byte \d+ on"):
        write_file(tmp_path / "origin", tmp_path / "result", (), num_threads=num_threads)


def test_an_origin_that_is_changed_meanwhile_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "origin").write_bytes(bytes(3_000_000))

    monkeypatch.setattr(copying, "advance", lambda *_: os.utime(tmp_path / "origin", ns=(1, 1)))
    with pytest.raises(CheckpointError, match="origin was changed while it was copied; run the same command again"):
        write_file(tmp_path / "origin", tmp_path / "result", ())


@each_number_of_threads
def test_a_file_that_nobody_needs_any_more_is_given_up(tmp_path, monkeypatch, num_threads):
    (tmp_path / "origin").write_bytes(bytes(9_000_000))
    stop = threading.Event()
    done: list[int] = []

    def first(num_bytes, _):
        done.append(num_bytes)
        stop.set()

    monkeypatch.setattr(copying, "advance", first)
    with pytest.raises(NotNeeded):
        write_file(tmp_path / "origin", tmp_path / "result", (), stop, num_threads=num_threads)
    assert len(done) == 1


def test_threads_of_one_file_end_with_its_fault(tmp_path, monkeypatch):
    (tmp_path / "origin").write_bytes(os.urandom(40_000_000))
    before = threading.active_count()
    copy_piece, reached = copying.copy_piece, threading.Event()

    def short(reader, writer, num_bytes):
        if reader.tell() < 20_000_000:
            return copy_piece(reader, writer, num_bytes)
        reached.set()
        return 0

    monkeypatch.setattr(copying, "copy_piece", short)
    with pytest.raises(CheckpointError, match="origin became shorter while it was copied"):
        write_file(tmp_path / "origin", tmp_path / "result", (), num_threads=3)
    assert reached.is_set()
    assert threading.active_count() == before


@pytest.mark.parametrize(("shards", "threads"), [("1GB", {4}), ("25KB", {1})])
def test_processors_share_the_shards_of_a_model_or_its_only_one(tmp_path, monkeypatch, shards, threads):
    target = open_checkpoint(str(save_random(tmp_path / "target", tiny_llama(), seed=1, max_shard_size=shards)))
    used: dict[str, int] = {}
    write_file = making.write_file

    def observed(origin, destination, changes, stop, algorithm, num_threads):
        used[destination.name] = num_threads
        return write_file(origin, destination, changes, stop, algorithm, num_threads)

    monkeypatch.setattr(making, "write_file", observed)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    making.write_result(target, {name: [] for name in target.shards}, tmp_path / "out", {})
    assert {used[name] for name in target.shards} == threads
    assert used["config.json"] == 1
    for name in target.shards:
        assert (tmp_path / "out" / name).read_bytes() == target.path(name).read_bytes()


@pytest.fixture(params=["btrfs", "xfs"])
def sharing_disk(request, tmp_path):
    """A real file system of 400 MB that shares blocks."""
    tool = shutil.which(f"mkfs.{request.param}")
    if tool is None:
        pytest.skip(f"mkfs.{request.param} is not here")
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    for command in ([tool, "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_blocks_are_shared_where_the_file_system_can_so_that_more_fits_than_there_is_space(
    sharing_disk, llama_pair, write_recipe
):
    target = shutil.copytree(llama_pair[0], sharing_disk / "target")
    shard = target / open_checkpoint(str(target)).tensors["model.layers.1.mlp.gate_proj.weight"].file
    index = json.loads((target / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.padding"] = shard.name
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    content = load(shard.read_bytes())
    content["model.padding"] = torch.randint(0, 255, (150_000_000,), dtype=torch.uint8)
    save_file(content, shard, metadata={"format": "pt"})
    os.sync()
    recipe = write_recipe(target, llama_pair[1], layers=1)
    for name in ("one", "two", "three"):
        answer("run", recipe, sharing_disk / name, "--no-evaluate", "--json")
        assert answer("verify", sharing_disk / name, "--json")["correct"]
        os.sync()
    used = shutil.disk_usage(sharing_disk)
    assert used.total - used.free < 300_000_000, "four files of 150 MB"


@pytest.mark.skipif(os.name == "nt", reason="inodes of POSIX")
def test_a_linked_result_has_the_targets_own_shards_but_those_that_change(llama_pair, tmp_path, write_recipe):
    cache = tmp_path / "models--someone--target"
    blobs = shutil.copytree(llama_pair[0], cache / "blobs")
    target = cache / "snapshots" / "0123"
    target.mkdir(parents=True)
    for path in blobs.iterdir():
        (target / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    out = tmp_path / "out"
    answer("run", write_recipe(target, llama_pair[1], layers=2), out, "--no-evaluate", "--link", "--json")
    changed = open_checkpoint(str(out)).tensors["model.layers.2.mlp.gate_proj.weight"].file
    for path in blobs.iterdir():
        linked = path.suffix == ".safetensors" and path.name != changed
        assert (out / path.name).samefile(path) == linked, path.name
        assert not (out / path.name).is_symlink()
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    assert answer("verify", out, "--json")["correct"]


def test_what_cannot_be_linked_is_told_in_a_sentence(llama_pair, tmp_path, monkeypatch, write_recipe):
    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    result = call("run", write_recipe(*llama_pair, layers=2), tmp_path / "out", "--no-evaluate", "--link")
    assert result.exit_code == 2
    assert "cannot be hard-linked to" in result.stderr
    assert "Invalid cross-device link; leave out --link to copy it" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("cache", "recipe.yml")] == []


def test_a_clone_is_not_taken_for_granted(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    (tmp_path / "origin").write_bytes(b"abc")
    write_file(tmp_path / "origin", tmp_path / "result", ())
    assert (tmp_path / "result").read_bytes() == b"abc"
