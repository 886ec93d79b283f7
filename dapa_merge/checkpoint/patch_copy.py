"""Applying a patch to a copy: the base's files copied, the patch's rows written over, all or nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dapa_merge.checkpoint.files import INDEX_NAME, TEMPLATES, Checkpoint
from dapa_merge.checkpoint.patch_file import Patch
from dapa_merge.checkpoint.patch_state import check_layout, checked_pieces, refuse_other, states
from dapa_merge.checkpoint.staged_file import take_lock, write_all
from dapa_merge.checkpoint.staging import check_destination, flush_to_disk, staging
from dapa_merge.checkpoint.transplant import COPY_THREADS, NOT_COPIED, _copy
from dapa_merge.errors import UsageError

Progress = Callable[[int], None]


def apply_to_copy(patch: Patch, base: Checkpoint, out: Path, progress: Progress = lambda _: None) -> None:
    """Write a patched copy of `base` into the new folder `out`; the base's files are opened for reading only.

    Args:
        patch: What to change.
        base: The model that it is for, however it is divided into files.
        out: The folder to make; it must not exist, or be empty.
        progress: Called with numbers of bytes as they are written.

    Raises:
        CheckpointError: If the base is not the recorded one, or the patch does not hold what it records.
        UsageError: If `out` exists, cannot be made, or does not fit on its disk.
    """
    check_destination(out, base)
    out = Path(os.path.abspath(out))
    with _shared(base):
        check_layout(patch, base)
        refuse_other(patch, base, states(patch, base), "; name the model that the patch is for")
        with staging(out) as folder:
            _copy_files(base, folder, progress)
            _write_rows(patch, base, folder, progress)
            flush_to_disk(folder)
            try:
                folder.rename(out)
            except OSError as error:
                raise UsageError(f"{out} came into being while its content was written; nothing was changed") from error
            flush_to_disk(out.parent, files=False)


def _copy_files(base: Checkpoint, folder: Path, progress: Progress) -> None:
    """Copy the weights and what belongs to them, in parallel; Ctrl-C stops between two pieces."""
    names = list(base.shards)
    for path in [*base.folder.iterdir(), *base.folder.glob(f"{TEMPLATES}/*.jinja")]:
        if path.is_file() and (path.name == INDEX_NAME or not path.name.endswith(NOT_COPIED)):
            names.append(str(path.relative_to(base.folder)))
    if any(name.startswith(TEMPLATES) for name in names):
        (folder / TEMPLATES).mkdir()
    stop = threading.Event()
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        try:
            for copied in [pool.submit(_copy, base.folder / name, folder / name, progress, stop) for name in names]:
                copied.result()
        except BaseException:
            stop.set()
            raise


def _write_rows(patch: Patch, base: Checkpoint, folder: Path, progress: Progress) -> None:
    """Put the patch's rows into the copied files."""
    with ExitStack() as stack:
        names = {base.tensors[entry.tensor].file for entry in patch.entries}
        files = {name: stack.enter_context((folder / name).open("r+b", buffering=0)) for name in names}
        for entry in patch.entries:
            tensor = base.tensors[entry.tensor]
            start, _ = entry.place(tensor)
            files[tensor.file].seek(start)
            for piece in checked_pieces(patch, entry):
                write_all(files[tensor.file], piece)
                progress(len(piece))


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
