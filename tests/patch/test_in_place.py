from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy
import pytest
import warm
from conftest import call
from small_models import NAMES, arrays, contents, repaired, write_model

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError, DapaError, UsageError
from dapa_merge.files import held, hidden_path
from dapa_merge.patch.apply import LOCK_NAME, apply_in_place, revert
from dapa_merge.patch.extract import extract
from dapa_merge.patch.undo import UNDO_NAME

SHARDS = [NAMES[:2], NAMES[2:5], NAMES[5:]]
# Writes in small pieces, and dies by a real SIGKILL: before one of them, or in the middle of it, at a page of the file,
# where the kernel stops.
DYING = """
import os, signal, sys
from dapa_merge.patch import apply as in_place
from dapa_merge.patch import file as patch_file
from dapa_merge.cli import main
command, piece, dies_at = sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])
patch_file.PIECE_BYTES = piece
num_calls = 0
def write_all(file, piece):
    global num_calls
    if num_calls == dies_at:
        if dies_at % 2:
            num_bytes = -file.tell() % 4096 + 4096
            file.write(piece[:num_bytes])
        os.kill(os.getpid(), signal.SIGKILL)
    num_calls += 1
    file.write(piece)
in_place.write_all = write_all
main(["patch", *command])
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The base's and the result's files, by name, and the patch between them."""
    folder = tmp_path_factory.mktemp("files")
    base = write_model(folder / "base", arrays(), SHARDS)
    result = write_model(folder / "result", repaired(arrays()), SHARDS)
    extract(open_checkpoint(str(result)), open_checkpoint(str(base)), folder / "p.safetensors")
    return contents(base), contents(result), folder / "p.safetensors"


@pytest.fixture
def base(files, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in files[0].items():
        (folder / name).write_bytes(content)
    return folder


def read_patch_of(files):
    from dapa_merge.patch.file import read_patch

    return read_patch(files[2])


def patched(base: Path, files, **options) -> bool:
    return apply_in_place(read_patch_of(files), open_checkpoint(str(base)), **options)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name not in (UNDO_NAME, LOCK_NAME)}


def test_in_place_the_base_becomes_the_result_and_goes_back_bit_for_bit(base, files):
    inodes = {path.name: path.stat().st_ino for path in base.iterdir()}
    assert patched(base, files)
    assert weights(base) == files[1]
    assert {path.name: path.stat().st_ino for path in base.iterdir() if path.name != UNDO_NAME} == inodes
    assert revert(open_checkpoint(str(base))) == read_patch_of(files).num_bytes
    assert contents(base) == files[0]


def test_applying_twice_changes_nothing_and_says_so(base, files):
    assert patched(base, files)
    before = contents(base)
    assert not patched(base, files)
    assert contents(base) == before


@pytest.mark.parametrize("shards", [None, [NAMES[4:], NAMES[:4]]])
def test_in_place_any_division_of_the_base_into_files_will_do(files, tmp_path, shards):
    base = write_model(tmp_path / "other", arrays(), shards)
    before = contents(base)
    assert patched(base, files)
    assert weights(base) == contents(write_model(tmp_path / "expected", repaired(arrays()), shards))
    revert(open_checkpoint(str(base)))
    assert contents(base) == before


def dying(dies_at: int, piece: int, *command: object) -> None:
    process = warm.run([sys.executable, "-c", DYING, piece, dies_at, *command])
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("seed", range(3))
def test_what_a_killed_apply_leaves_is_patched_or_reverted_by_a_rerun(base, files, tmp_path, seed):
    generator = random.Random(seed)
    dying(generator.randrange(1, 9), 12_345, "apply", files[2], base, "--in-place")
    assert weights(base) != files[1]
    assert not list(base.glob(".dapa-merge*"))
    other = shutil.copytree(base, tmp_path / "other")
    # Killed again in the middle of going on, and of going back.
    dying(generator.randrange(9), 20_000, "apply", files[2], base, "--in-place")
    dying(generator.randrange(9), 20_000, "revert", base)
    assert patched(base, files)
    assert weights(base) == files[1]
    dying(generator.randrange(9), 30_000, "revert", other)
    dying(generator.randrange(9), 30_000, "apply", files[2], other, "--in-place")
    revert(open_checkpoint(str(other)))
    assert contents(other) == files[0]


def test_a_block_that_is_torn_in_its_middle_is_mended_by_the_patch_but_not_reverted(base, files):
    patched(base, files)
    gate = open_checkpoint(str(base)).tensors["layers.0.gate"]
    with (base / gate.file).open("r+b") as file:
        file.seek(gate.start + 100)
        file.write(files[0][gate.file][gate.start + 100 : gate.start + 200])
    with pytest.raises(CheckpointError, match="neither the patch's nor those from before it"):
        revert(open_checkpoint(str(base)))
    assert patched(base, files)
    assert weights(base) == files[1]
    revert(open_checkpoint(str(base)))
    assert contents(base) == files[0]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_what_a_stranger_wrote_into_a_half_written_range_is_noticed_by_both(base, files):
    dying(3, 12_345, "apply", files[2], base, "--in-place")
    gate = open_checkpoint(str(base)).tensors["layers.0.gate"]
    with (base / gate.file).open("r+b") as file:
        file.seek(gate.start + 99)
        file.write(b"stranger")
    before = weights(base)
    for attempt in (lambda: patched(base, files), lambda: revert(open_checkpoint(str(base)))):
        with pytest.raises(CheckpointError, match=r"rows 0 to 64 of layers\.0\.gate that are neither the patch's nor"):
            attempt()
    assert weights(base) == before


def test_a_half_written_model_without_its_undo_file_is_refused(base, files, tmp_path):
    patched(base, files)
    (base / UNDO_NAME).rename(tmp_path / "kept.safetensors")
    name = open_checkpoint(str(base)).tensors["embed"].file
    (base / name).write_bytes(files[0][name])
    before = contents(base)
    with pytest.raises(
        CheckpointError, match=r"has .* as .* makes it, but not .*; if an earlier run was stopped, name"
    ):
        patched(base, files)
    assert contents(base) == before
    assert patched(base, files, undo_path=tmp_path / "kept.safetensors")
    assert weights(base) == files[1]


def test_after_the_patch_other_values_are_not_reverted(base, files):
    patched(base, files)
    norm = open_checkpoint(str(base)).tensors["norm"]
    with (base / norm.file).open("r+b") as file:
        file.seek(norm.start)
        file.write(b"trained on")
    before = contents(base)
    with pytest.raises(CheckpointError, match="rows 0 to 1 of norm that are neither the patch's nor those from before"):
        revert(open_checkpoint(str(base)))
    assert contents(base) == before


def test_the_base_that_is_not_the_recorded_one_is_not_touched(files, tmp_path):
    changed = arrays()
    changed["layers.0.gate_up"][63, 319] += 1
    base = write_model(tmp_path / "other", changed)
    before = contents(base)
    with pytest.raises(CheckpointError, match=r"other values in rows 0 to 64 of layers\.0\.gate_up"):
        patched(base, files)
    assert contents(base) == before


def test_patches_are_taken_back_in_turn(base, files, tmp_path):
    further = {name: numpy.asarray(2 * array) for name, array in repaired(arrays()).items()}
    result = write_model(tmp_path / "further", further, SHARDS)
    patched(base, files)
    second = extract(open_checkpoint(str(result)), open_checkpoint(str(base)), tmp_path / "second.safetensors")
    with pytest.raises(UsageError, match=r"is the undo file of another patch; revert that first, or name another"):
        apply_in_place(second, open_checkpoint(str(base)))
    undo = tmp_path / "undo.safetensors"
    assert apply_in_place(second, open_checkpoint(str(base)), undo)
    assert weights(base) == contents(result)
    with pytest.raises(CheckpointError, match="another program or a later patch changed them"):
        revert(open_checkpoint(str(base)))
    revert(open_checkpoint(str(base)), undo)
    revert(open_checkpoint(str(base)))
    assert contents(base) == files[0]


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_files_that_are_not_the_models_alone_are_refused(base, files, tmp_path):
    name = open_checkpoint(str(base)).tensors["layers.0.gate"].file
    before = contents(base)
    os.link(base / name, tmp_path / "linked")
    with pytest.raises(UsageError, match=f"{name} is hard-linked 2 times, .*; apply the patch to a copy"):
        patched(base, files)
    (base / name).unlink()
    (base / name).symlink_to(tmp_path / "linked")
    with pytest.raises(UsageError, match=f"{name} is a symbolic link to a file that others may use"):
        patched(base, files)
    (base / name).unlink()
    (tmp_path / "linked").rename(base / name)
    (base / name).chmod(0o444)
    with pytest.raises(
        UsageError, match=f"{name} (is write-protected|cannot be written: Permission denied); apply the"
    ):
        patched(base, files)
    assert contents(base) == before


def test_the_second_of_two_at_once_is_told(base, files, tmp_path):
    with held(base / LOCK_NAME):
        for command in (
            ["apply", files[2], base, "--in-place"],
            ["apply", files[2], base, tmp_path / "o"],
            ["revert", base],
        ):
            refused = call("patch", *command)
            assert refused.exit_code == 2
            assert "another" in refused.stderr
            assert "wait for it" in refused.stderr
    assert contents(base) == files[0]
    assert patched(base, files)


@pytest.mark.skipif(os.name == "nt", reason="processes of POSIX")
def test_of_many_at_once_one_patches_and_the_others_do_no_harm(base, files):
    code = "from dapa_merge.cli import main; main()"
    command = [sys.executable, "-c", code, "patch", "apply", files[2], base, "--in-place"]
    processes = [warm.Process(command) for _ in range(4)]
    for process in processes:
        assert process.wait() in (0, 2)
        assert process.returncode == 0 or "wait for it" in process.stderr
    assert 0 in [process.returncode for process in processes]
    assert weights(base) == files[1]


def test_a_disk_that_is_too_small_for_the_undo_file_leaves_the_model_alone(base, files, small_disk, monkeypatch):
    filler = small_disk / "filler"
    # All but some 80 kB.
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 82_144))
    undo = small_disk / "undo.safetensors"
    with pytest.raises(
        UsageError, match=r"the undo file needs 0\.\d+ GB on the disk of .*undo\.safetensors, which has"
    ):
        patched(base, files, undo_path=undo)
    # As if the space were taken by another program after it was checked.
    monkeypatch.setattr("dapa_merge.patch.undo.check_space", lambda *_: None)
    with pytest.raises(UsageError, match=r"no space left on the disk of .*undo\.safetensors; nothing was kept"):
        patched(base, files, undo_path=undo)
    assert list(small_disk.iterdir()) == [filler]
    assert contents(base) == files[0]
    filler.unlink()
    assert patched(base, files, undo_path=undo)
    assert weights(base) == files[1]


def test_a_disk_that_fails_in_the_middle_leaves_what_a_rerun_mends(base, files, monkeypatch):
    from dapa_merge.patch import apply as in_place

    write = in_place.write_all
    calls = []

    def failing(file, piece):
        calls.append(piece)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        write(file, piece)

    with monkeypatch.context() as context:
        context.setattr(in_place, "write_all", failing)
        with pytest.raises(
            DapaError,
            match="is partly written because its disk failed: Input/output error; repair that and run the same",
        ):
            patched(base, files)
    assert patched(base, files)
    assert weights(base) == files[1]


def test_what_a_killed_run_left_of_an_undo_file_is_cleared(base, files):
    leftover = hidden_path(base / UNDO_NAME, ".partial")
    leftover.write_bytes(b"half an undo file")
    with pytest.raises(UsageError, match="does not exist: no patch was applied in place"):
        revert(open_checkpoint(str(base)))
    assert contents(base) == files[0]
    leftover.write_bytes(b"half an undo file")
    patched(base, files)
    assert not leftover.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
def test_a_file_that_is_no_undo_file_stops_everything(base, files, content):
    (base / UNDO_NAME).write_bytes(files[2].read_bytes() if content is None else content)
    before = contents(base)
    for attempt in (lambda: patched(base, files), lambda: revert(open_checkpoint(str(base)))):
        with pytest.raises(CheckpointError, match=UNDO_NAME):
            attempt()
    assert contents(base) == before


def test_an_undo_file_whose_bytes_were_changed_is_not_written_back(base, files):
    patched(base, files)
    content = bytearray((base / UNDO_NAME).read_bytes())
    content[-2000] ^= 1
    (base / UNDO_NAME).write_bytes(content)
    before = contents(base)
    with pytest.raises(CheckpointError, match="is damaged: its bytes for"):
        revert(open_checkpoint(str(base)))
    assert contents(base) == before


def test_an_undo_file_is_no_patch(base, files, tmp_path):
    patched(base, files)
    refused = call("patch", "apply", base / UNDO_NAME, base, tmp_path / "out")
    assert (refused.exit_code, "is an undo file; use it with `dapa-merge patch revert`" in refused.stderr) == (4, True)


def test_the_files_get_their_bytes_only_after_the_undo_file_is_on_disk(base, files, monkeypatch):
    """In the order in which the kernel was asked."""
    from dapa_merge.patch import apply as in_place

    events = []
    fsync, write_all = os.fsync, in_place.write_all
    names = {path.stat().st_ino: path.name for path in base.iterdir()} | {base.stat().st_ino: "folder"}

    def seen_fsync(descriptor):
        events.append(("fsync", names.get(os.fstat(descriptor).st_ino, "undo")))
        fsync(descriptor)

    def seen_write(file, piece):
        events.append(("write", names[os.fstat(file.fileno()).st_ino]))
        write_all(file, piece)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(in_place, "write_all", seen_write)
    patched(base, files)
    assert events[:2] == [("fsync", "undo"), ("fsync", "folder")]
    written = {name for kind, name in events if kind == "write"}
    assert {name for kind, name in events[-len(written) :] if kind == "fsync"} == written
