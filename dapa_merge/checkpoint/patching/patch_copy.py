"""Applying a patch to a copy: the base's files copied, the patch's rows written over, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.patching.patch_file import Entry, Patch
from dapa_merge.checkpoint.patching.patch_state import check_layout, check_rest, checked_pieces, refuse_other, states
from dapa_merge.checkpoint.region import whole_box
from dapa_merge.checkpoint.writing.changes import Change
from dapa_merge.checkpoint.writing.result import write_result
from dapa_merge.errors import UsageError
from dapa_merge.file_lock import take_lock

Progress = Callable[[int], None]


def apply_to_copy(patch: Patch, base: Checkpoint, out: Path, progress: Progress = lambda _: None) -> None:
    """Write a patched copy of `base` into the new folder `out`; the base's files are opened for reading only.

    Args:
        patch: What to change.
        base: The model that it is for, however it is divided into files.
        out: The folder to make; it must not exist, or be empty.
        progress: Called with numbers of bytes as the base is checked, and as the copy is written.

    Raises:
        CheckpointError: If the base is not the recorded one, or the patch does not hold what it records.
        UsageError: If `out` exists, cannot be made, or does not fit on its disk.
    """
    with _shared(base):
        check_layout(patch, base)
        refuse_other(patch, base, states(patch, base), "; name the model that the patch is for")
        check_rest(patch, base, progress)
        changes: dict[str, list[Change]] = {name: [] for name in base.shards}
        for entry in patch.entries:
            tensor = base.tensors[entry.tensor]
            changes[tensor.file].append(_change(patch, entry, tensor))
        for of_file in changes.values():
            of_file.sort(key=lambda change: change.spans)
        write_result(base, changes, out, {"patch": patch.identity}, progress=progress)


def _change(patch: Patch, entry: Entry, tensor: Tensor) -> Change:
    pieces = partial(checked_pieces, patch, entry)
    return Change(tensor, whole_box(tensor.shape), (entry.place(tensor),), entry.new_sha256, patch.path.name, pieces)


@contextmanager
def _shared(base: Checkpoint) -> Iterator[None]:
    """Keep others from patching the base in place while it is read, where its file system has locks.

    Raises:
        UsageError: If that is being done.
    """
    descriptor = None
    # On Windows a folder cannot be opened, and some network file systems have no locks on folders.
    with suppress(OSError):
        descriptor = os.open(base.folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            if descriptor is not None and not take_lock(descriptor, shared=True):
                raise UsageError(f"{base.name} is being patched in place by another process; wait for it")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
