"""Whether a result can be made where it is wanted, before anything is written there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.writing.kernel import clone
from dapa_merge.checkpoint.writing.staging import staging_folder
from dapa_merge.errors import UsageError


def check_destination(out: Path, target: Checkpoint, num_bytes: int | None = None) -> None:
    """Raise `UsageError` unless `out` is absent or an empty folder, in a place to write to, with space left.

    Args:
        out: The result's place.
        target: What is copied there.
        num_bytes: What will be written, if less than all of the target's weights.
    """
    # The folder of this name, also where it ends in `..`.
    place = Path(os.path.abspath(out))
    try:
        occupied = place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir())))
        is_here = place.exists() and place.samefile(Path.cwd())
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error.strerror}") from error
    if occupied:
        raise UsageError(f"{out} exists already; name another folder or remove it")
    if is_here:
        raise UsageError(f"{out} is the folder you are in, which cannot be replaced; name one inside it")
    parent = place.parent
    if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(target.folder)):
        raise UsageError(f"{out} is inside the target's own folder; name a place beside it")
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{out} cannot be made: {parent} is no folder that you may write to")
    needed = num_bytes
    if needed is None:
        needed = sum((target.folder / shard).stat().st_size for shard in target.shards)
    # What an earlier run left is either gone on from or cleared.
    free = shutil.disk_usage(parent).free + _allocated(staging_folder(place))
    if free < needed and not _shares_blocks(target, parent):
        raise UsageError(
            f"the result needs {needed / 1e9:.2f} GB on the disk of {parent}, which has {free / 1e9:.2f} GB left"
        )


def _allocated(folder: Path) -> int:
    """Bytes of the disk that a folder takes."""
    if not folder.is_dir():
        return 0
    states = [path.lstat() for path in folder.rglob("*")]
    # Links to the target's own files (of a run with --link) give nothing back.
    return sum(getattr(state, "st_blocks", state.st_size // 512) * 512 for state in states if state.st_nlink == 1)


def _shares_blocks(target: Checkpoint, parent: Path) -> bool:
    """Whether a copy of the target takes no space there until it is changed."""
    try:
        with (target.folder / target.shards[0]).open("rb") as reader, tempfile.TemporaryFile(dir=parent) as writer:
            return clone(reader.fileno(), writer.fileno())
    except OSError:
        return False
