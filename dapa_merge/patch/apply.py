"""Applies a patch in place or to a copy, and reverts it; a kill at any moment loses nothing.

The order makes this safe. The undo file and its name are on disk before the first byte of the model is changed, and
only `revert` removes it, once the old bytes are on disk again. A process that dies leaves each range old, new or
half-written; both commands, run again, recognize these states by the undo file and continue.

A copy consists of the base's files with the patch's rows written over them, all or nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import whole_box
from dapa_merge.errors import CheckpointError, DapaError, UsageError
from dapa_merge.files import clear_leftover, flush_folder, held, write_all
from dapa_merge.patch.file import (
    THREADS,
    Entry,
    Patch,
    check_content,
    checked_pieces,
    digest_of,
    iterate_range,
    layout_digest,
    rest_digest,
)
from dapa_merge.patch.undo import UNDO_NAME, Undo, ending_on_blocks, read_undo, write_undo
from dapa_merge.progress import advance
from dapa_merge.transplant.result import model_state, write_result
from dapa_merge.transplant.shard import RegionEdit

# Held in a model's folder while a patch is applied to it in place.
LOCK_NAME = ".dapa-patch.lock"
COPY = "apply the patch to a copy"


def apply_in_place(patch: Patch, base: Checkpoint, undo_path: Path | None = None) -> bool:
    """Write the patch's rows over the base's own, after saving the old ones in an undo file.

    Returns:
        False if the model was already patched, and nothing was done.

    Raises:
        CheckpointError: If the base is not the recorded one, or the patch's bytes are not the recorded ones.
        UsageError: If the files must not be written, or the undo file cannot be.
        DapaError: If the disk fails meanwhile; the command can be run again.
    """
    undo_path = undo_path or base.folder / UNDO_NAME
    check_layout(patch, base)
    with _locked(base), _opened(patch, base) as files:
        clear_leftover(undo_path)
        found = states(patch, base)
        if all(state is State.PATCHED for state in found):
            _flush(files)
            return False
        check_rest(patch, base)
        if os.path.lexists(undo_path):
            patch = _check_undo(undo_path, patch, base)
            check_content(patch)
        else:
            refuse_other(
                patch,
                base,
                found,
                f"; if an earlier run was stopped, name its undo file with --undo, else {COPY} of it",
            )
            undo = write_undo(patch.reading(partial(_rows_of, base)), base, undo_path)
            patch = patch.reading(undo.old)
        _write(patch, base, files)
    return True


def revert(base: Checkpoint, undo_path: Path | None = None) -> int:
    """Restore the bytes that a model had before a patch was applied in place, and remove the undo file.

    Returns:
        Number of bytes restored: 0 if the model had them already.

    Raises:
        CheckpointError: If the undo file is damaged, or the model holds neither the old nor the patched values.
        UsageError: If the undo file is absent, or the files must not be written.
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
        found = states(undo.patch, base)
        _refuse_unknown_values(undo, base, found)
        check_content(undo.patch)
        if is_changed := any(state is not State.PATCHED for state in found):
            _write(undo.patch, base, files)
        else:
            _flush(files)
        undo_path.unlink()
        flush_folder(undo_path.absolute().parent)
    return undo.patch.num_bytes if is_changed else 0


def _rows_of(base: Checkpoint, entry: Entry) -> Iterator[bytes]:
    """The rows of an entry as a model has them."""
    tensor = base.tensors[entry.tensor]
    return iterate_range(base, tensor.file, *entry.place(tensor))


def _check_undo(path: Path, patch: Patch, base: Checkpoint) -> Patch:
    """Raise unless the undo file is valid and belongs to this patch, so that the patch can be resumed.

    Returns:
        The patch that computes from the undo file, since the base may be half-written.
    """
    undo = read_undo(path)
    if not undo.takes_back(patch):
        raise UsageError(
            f"{path} is the undo file of another patch; revert that first, or name another file with --undo"
        )
    check_layout(undo.patch, base)
    check_content(undo.patch)
    patch = patch.reading(undo.old)
    _refuse_unknown_values(undo, base, states(undo.patch, base), patch)
    return patch


def _refuse_unknown_values(undo: Undo, base: Checkpoint, found: Sequence[State], patch: Patch | None = None) -> None:
    """Raise `CheckpointError` if a range is neither old, nor new, nor a mixture of both.

    With the patch every byte is compared, without it the checksums of blocks.
    """
    for entry, state in zip(undo.patch.entries, found, strict=True):
        if state is State.OTHER and not undo.is_half_written(entry, base, patch):
            first, stop = entry.rows
            raise CheckpointError(
                f"{base.name} holds values in rows {first} to {stop} of {entry.tensor} that are neither the patch's "
                f"nor those from before it; another program or a later patch changed them, so nothing was written"
                f"{'' if patch else ' (if an earlier run was stopped, apply the patch again before reverting it)'}"
            )


def _lock(base: Checkpoint) -> AbstractContextManager[None]:
    """The lock that keeps other patch commands out of a model's folder."""
    return held(base.folder / LOCK_NAME, f"{base.name} is in use by another `dapa-merge patch`; wait for it")


@contextmanager
def _locked(base: Checkpoint) -> Iterator[None]:
    """Hold the lock on a local model's folder.

    Raises:
        UsageError: If another process holds it, the folder is shared, or it cannot be written.
    """
    if base.merged_from is not None:
        raise UsageError(f"{base.name} was merged into a cache that other runs share; {COPY}")
    if base.commit is not None:
        raise UsageError(f"{base.name} is in the Hub's cache, which other programs share; {COPY}")
    with ExitStack() as stack:
        try:
            stack.enter_context(_lock(base))
        except OSError as error:
            raise UsageError(f"{base.folder} cannot be locked ({error.strerror}); {COPY}") from error
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
    """Open a weight file for overwriting parts; refuses one that is linked from elsewhere or write-protected."""
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
        fault = "is not a regular file"
    elif status.st_nlink > 1:
        fault = f"is hard-linked {status.st_nlink} times, so other models would change with it"
    elif not status.st_mode & 0o222:
        # The superuser could write it, but somebody removed the permission on purpose.
        fault = "is write-protected"
    if fault:
        file.close()
        raise UsageError(f"{path} {fault}; {COPY}")
    return file


def _write(patch: Patch, base: Checkpoint, files: Mapping[str, BinaryIO]) -> None:
    """Write a patch's rows to their places and flush them; nothing else in the files is changed."""
    try:
        for entry in patch.entries:
            tensor = base.tensors[entry.tensor]
            start, _ = entry.place(tensor)
            files[tensor.file].seek(start)
            for piece in ending_on_blocks(patch.pieces(entry), start):
                write_all(files[tensor.file], piece)
                advance(len(piece), "bytes")
        _flush(files)
    except OSError as error:
        raise DapaError(
            f"{base.name} is partly written because its disk failed: {error.strerror}; repair that and run the same "
            f"command again, or `dapa-merge patch revert`"
        ) from error


def _flush(files: Mapping[str, BinaryIO]) -> None:
    for file in files.values():
        os.fsync(file.fileno())


def apply_to_copy(patch: Patch, base: Checkpoint, out: Path) -> None:
    """Write a patched copy of `base` into the new folder `out`; the base's files are opened for reading only.

    Raises:
        CheckpointError: If the base is not the recorded one, or the patch's bytes are not the recorded ones.
        UsageError: If `out` exists, cannot be made, or does not fit on its disk.
    """
    # A folder that cannot be written cannot be locked, but is not being patched in place either.
    with suppress(OSError), _lock(base):
        pass
    before = model_state(base, base.shards)
    check_layout(patch, base)
    refuse_other(patch, base, states(patch, base), "; name the model that the patch is for")
    check_rest(patch, base)
    patch = patch.reading(partial(_rows_of, base))
    changes: dict[str, list[RegionEdit]] = {name: [] for name in base.shards}
    for entry in patch.entries:
        tensor = base.tensors[entry.tensor]
        changes[tensor.file].append(_change(patch, entry, tensor))
    for of_file in changes.values():
        of_file.sort(key=lambda change: change.spans)

    def check_unchanged(_: Path) -> None:
        if model_state(base, base.shards) != before:
            raise CheckpointError(f"{base.name} was changed while it was copied; run the same command again")

    write_result(base, changes, out, {"patch": patch.identity}, finish=check_unchanged)


def _change(patch: Patch, entry: Entry, tensor: Tensor) -> RegionEdit:
    pieces = partial(checked_pieces, patch, entry)
    return RegionEdit(tensor, whole_box(tensor.shape), (entry.place(tensor),), entry.new_sha256, pieces)


class State(Enum):
    """State of an entry's rows in a model."""

    BASE = "as the patch found them"
    PATCHED = "as the patch makes them"
    OTHER = "neither"


def check_layout(patch: Patch, base: Checkpoint) -> None:
    """Raise `CheckpointError` unless the base has exactly the tensors, dtypes and shapes that the patch is for."""
    for entry in patch.entries:
        tensor = base.tensors.get(entry.tensor)
        name = f"{entry.tensor[:120]!r}"
        if tensor is None:
            raise CheckpointError(f"{patch.path} changes {name}, which {base.name} does not have{_made_for(patch)}")
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"{patch.path} changes {name} of {entry.dtype} {list(entry.shape)}, but {base.name} has it as "
                f"{tensor.dtype} {list(tensor.shape)}{_made_for(patch)}"
            )
    if layout_digest(base.tensors) != patch.metadata["base_layout"]:
        raise CheckpointError(
            f"{base.name} has other tensors, dtypes or shapes than the model that {patch.path} is for{_made_for(patch)}"
        )


def check_rest(patch: Patch, base: Checkpoint) -> None:
    """Raise `CheckpointError` unless the base has the recorded values where the patch changes nothing.

    This reads all of the base except the patch's rows.
    """
    if rest_digest(base, patch.entries) != patch.metadata["base_rest"]:
        raise CheckpointError(
            f"{base.name} has other values than the model that {patch.path} was made for, in rows that the patch does "
            f"not change{_made_for(patch)}; name that model"
        )


def states(patch: Patch, base: Checkpoint) -> list[State]:
    """The state of the base's rows for each entry of the patch."""

    def state(entry: Entry) -> State:
        found = digest_of(_rows_of(base, entry))
        by_digest = {entry.base_sha256: State.BASE, entry.new_sha256: State.PATCHED}
        return by_digest.get(found, State.OTHER)

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(state, patch.entries))


def refuse_other(patch: Patch, base: Checkpoint, found: Sequence[State], hint: str) -> None:
    """Raise `CheckpointError` unless the base has the recorded old rows of all entries; `hint` says what to do."""
    for entry, state in zip(patch.entries, found, strict=True):
        if state is State.OTHER:
            first, stop = entry.rows
            raise CheckpointError(
                f"{base.name} holds other values in rows {first} to {stop} of {entry.tensor} than the model that "
                f"{patch.path} was made for{_made_for(patch)}{hint}"
            )
    if all(state is State.PATCHED for state in found):
        raise CheckpointError(f"{base.name} already holds what {patch.path} would write")
    if State.PATCHED in found:
        patched, unpatched = (patch.entries[found.index(state)].tensor for state in (State.PATCHED, State.BASE))
        raise CheckpointError(f"{base.name} has {patched} as {patch.path} makes it, but not {unpatched}{hint}")


def _made_for(patch: Patch) -> str:
    """The base's name when the patch was made, from an untrusted file."""
    name = repr(patch.metadata.get("base", "an unnamed model")[:120])
    commit = patch.metadata.get("base_commit")
    return f" ({name}{f' at commit {commit[:40]!r}' if commit else ''})"
