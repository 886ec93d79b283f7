"""Applying a patch in place and taking it back: only the changed bytes are written, and no moment loses a model.

The order is what makes it safe. The undo file is complete and on disk, its name in the folder too, before the first
byte of the model is changed; it is removed by `revert` only, when the old bytes are on disk again. A process that dies
leaves each range old, new or half-written; either command, run again, knows these by the undo file and goes on.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.patching.patch_file import Patch
from dapa_merge.checkpoint.patching.patch_state import (
    State,
    check_content,
    check_layout,
    check_rest,
    refuse_other,
    states,
)
from dapa_merge.checkpoint.patching.undo import UNDO_NAME, Undo, ending_on_blocks, read_undo, write_undo
from dapa_merge.checkpoint.writing.kernel import write_all
from dapa_merge.checkpoint.writing.staged_file import clear_leftover
from dapa_merge.checkpoint.writing.staging import flush_to_disk
from dapa_merge.errors import CheckpointError, DapaError, UsageError
from dapa_merge.file_lock import take_lock

Progress = Callable[[int], None]
COPY = "apply the patch to a copy"


def apply_in_place(
    patch: Patch, base: Checkpoint, undo_path: Path | None = None, progress: Progress = lambda _: None
) -> bool:
    """Write the patch's rows over the base's own, after what they replace is safe in an undo file.

    Args:
        patch: What to change.
        base: The model that it is for, a local folder.
        undo_path: The undo file; by default hidden in the base's folder.
        progress: Called with numbers of bytes as they are checked (the base's), saved and written (the patch's).

    Returns:
        False if the model was patched with it already, and nothing was done.

    Raises:
        CheckpointError: If the base is not the recorded one, or the patch does not hold what it records.
        UsageError: If the files are not to be written, or the undo file cannot be.
        DapaError: If the disk fails meanwhile; the command can be run again.
    """
    undo_path = undo_path or base.folder / UNDO_NAME
    check_layout(patch, base)
    with _locked(base), _opened(patch, base) as files:
        clear_leftover(undo_path)
        found = states(patch, base, progress)
        if all(state is State.PATCHED for state in found):
            _flush(files)
            return False
        check_rest(patch, base, progress)
        if os.path.lexists(undo_path):
            _check_undo(undo_path, patch, base)
            check_content(patch, progress)
        else:
            refuse_other(
                patch,
                base,
                found,
                f"; if an earlier run was stopped, name its undo file with --undo, else {COPY} of it",
            )
            write_undo(patch, base, undo_path, progress)
        _write(patch, base, files, progress)
    return True


def revert(base: Checkpoint, undo_path: Path | None = None, progress: Progress = lambda _: None) -> int:
    """Give a model the bytes back that it had before a patch was applied in place, and remove the undo file.

    Args:
        base: The patched model, a local folder; also one that a stopped run has patched or reverted in part.
        undo_path: The undo file.
        progress: Called with numbers of bytes as they are checked and written: three times the patch's in all.

    Returns:
        How many bytes were put back: 0 if they were there already.

    Raises:
        CheckpointError: If the undo file is damaged, or the model holds neither what it was nor what the patch made it.
        UsageError: If there is no undo file, or the files are not to be written.
        DapaError: If the disk fails meanwhile; the command can be run again.
    """
    undo_path = undo_path or base.folder / UNDO_NAME
    with ExitStack() as stack:
        stack.enter_context(_locked(base))
        clear_leftover(undo_path)
        if not os.path.lexists(undo_path):
            raise UsageError(
                f"{undo_path} does not exist: no patch was applied in place, or its undo file is elsewhere (--undo)"
            )
        undo = read_undo(undo_path)
        check_layout(undo.patch, base)
        files = stack.enter_context(_opened(undo.patch, base))
        found = states(undo.patch, base, progress)
        _refuse_strangers(undo, base, found)
        check_content(undo.patch, progress)
        if is_changed := any(state is not State.PATCHED for state in found):
            _write(undo.patch, base, files, progress)
        else:
            _flush(files)
        undo_path.unlink()
        flush_to_disk(undo_path.absolute().parent, files=False)
    return undo.patch.num_bytes if is_changed else 0


def _check_undo(path: Path, patch: Patch, base: Checkpoint) -> None:
    """Raise unless the undo file is a sound one of this patch, with which its writing can go on."""
    undo = read_undo(path)
    if not undo.takes_back(patch):
        raise UsageError(
            f"{path} is the undo file of another patch; revert that first, or name another file with --undo"
        )
    check_layout(undo.patch, base)
    check_content(undo.patch)
    _refuse_strangers(undo, base, states(undo.patch, base), patch)


def _refuse_strangers(undo: Undo, base: Checkpoint, found: Sequence[State], patch: Patch | None = None) -> None:
    """Raise `CheckpointError` if a range is neither the old one, nor the new one, nor partly each.

    With the patch at hand every byte is compared, without it the sums of blocks.
    """
    for entry, state in zip(undo.patch.entries, found, strict=True):
        if state is State.OTHER and not undo.is_half_written(entry, base, patch):
            first, stop = entry.rows
            raise CheckpointError(
                f"{base.name} holds values in rows {first} to {stop} of {entry.tensor} that are neither the patch's "
                f"nor those from before it; another program or a later patch changed them, so nothing was written"
                f"{'' if patch else ' (if an earlier run was stopped, apply the patch again before it is reverted)'}"
            )


@contextmanager
def _locked(base: Checkpoint) -> Iterator[None]:
    """Hold the lock on a local model's folder.

    Raises:
        UsageError: If another process has it, the folder is not the user's alone, or it cannot be locked.
    """
    if base.merged_from is not None:
        raise UsageError(f"{base.name} is merged in a cache, which other runs share; {COPY}")
    if base.commit is not None:
        raise UsageError(f"{base.name} is in the Hub's cache, which other programs share; {COPY}")
    if os.name == "nt":  # A folder cannot be opened there.
        yield
        return
    with ExitStack() as stack:
        try:
            folder = os.open(base.folder, os.O_RDONLY)
            stack.callback(os.close, folder)
            is_ours = take_lock(folder)
        except OSError as error:
            raise UsageError(f"{base.folder} cannot be locked ({error.strerror}); {COPY}") from error
        if not is_ours:
            raise UsageError(f"{base.name} is in use by another `dapa-merge patch`; wait for it")
        yield


@contextmanager
def _opened(patch: Patch, base: Checkpoint) -> Iterator[Mapping[str, BinaryIO]]:
    """The files that the patch changes, open for writing.

    Raises:
        UsageError: If they may not be changed, or are not the base's alone.
    """
    with ExitStack() as stack:
        names = sorted({base.tensors[entry.tensor].file for entry in patch.entries})
        yield {name: stack.enter_context(_open(base.folder / name)) for name in names}


def _open(path: Path) -> BinaryIO:
    """Open a weight file for writing over parts of it, unless it is not this folder's alone, or write-protected."""
    try:
        if path.is_symlink():
            raise UsageError(f"{path} is a symbolic link to a file that others may use, as in the Hub's cache; {COPY}")
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(descriptor, "r+b", buffering=0)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; {COPY}") from error
    status = os.fstat(descriptor)
    fault = None
    if not stat.S_ISREG(status.st_mode):
        fault = "is no plain file"
    elif status.st_nlink > 1:
        fault = f"is hard-linked {status.st_nlink} times, so that other models would change with it"
    elif not status.st_mode & 0o222:
        # The superuser could; but whoever took the permission away meant it.
        fault = "is write-protected"
    if fault:
        file.close()
        raise UsageError(f"{path} {fault}; {COPY}")
    return file


def _write(patch: Patch, base: Checkpoint, files: Mapping[str, BinaryIO], progress: Progress) -> None:
    """Write a patch's rows to where they belong, and to disk; nothing else of the files is touched."""
    try:
        for entry in patch.entries:
            tensor = base.tensors[entry.tensor]
            start, _ = entry.place(tensor)
            files[tensor.file].seek(start)
            for piece in ending_on_blocks(patch.pieces(entry), start):
                write_all(files[tensor.file], piece)
                progress(len(piece))
        _flush(files)
    except OSError as error:
        raise DapaError(
            f"{base.name} is written in part, then its disk failed: {error.strerror}; run the same command again when "
            f"that is mended, or `dapa-merge patch revert`"
        ) from error


def _flush(files: Mapping[str, BinaryIO]) -> None:
    for file in files.values():
        os.fsync(file.fileno())
