"""Applying a patch in place and taking it back: only the changed bytes are written, and no moment loses a model.

The order is what makes it safe. The undo file is complete and on disk, its name in the folder too, before the first
byte of the model is changed; it is removed by `revert` only, when the old bytes are on disk again. A process that dies
leaves each range old, new or half-written; either command, run again, knows these by the undo file and goes on.

Applying a patch to a copy: the base's files copied, the patch's rows written over, all or nothing.

Whether a patch is for a base, whether it holds what it says, and what the base holds in its place.

The undo file of a patch that is applied in place: the old bytes, and how to know a half-written range again.

It is a patch itself, from the patched model back to its base. Its metadata say `undo_of`, the identity of the patch
that it takes back; `blocks`, the key of one further tensor: the CRC-32 of what the patch makes of each block of 4 KiB
of the model's files, in the order of `entries`; and `alignments`: for each entry, at which byte of a block it begins.

A killed process stops between two such blocks, since the kernel changes whole pages, and each call writes up to the end
of one. So a block is the old one, which is here, or the new one, of which the sum is here, or no work of ours. Should a
block be torn all the same, as by a disk that loses power, `revert` refuses it, but to apply the patch again mends it:
then the new bytes are known too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dapa_merge import __version__
from dapa_merge.checkpoint.header import DTYPE_BITS, Tensor
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import whole_box
from dapa_merge.errors import CheckpointError, DapaError, UsageError
from dapa_merge.files import take_lock, write_all
from dapa_merge.patch.file import (
    THREADS,
    Entry,
    Patch,
    _digest,
    check_space,
    entries_text,
    identity,
    iterate_range,
    lay_out,
    layout_digest,
    read_patch,
    rest_digest,
    unique_key,
)
from dapa_merge.progress import advance
from dapa_merge.transplant.result import write_result
from dapa_merge.transplant.shard import RegionEdit
from dapa_merge.transplant.staging import clear_leftover, flush_to_disk, staged_file

COPY = "apply the patch to a copy"


def apply_in_place(patch: Patch, base: Checkpoint, undo_path: Path | None = None) -> bool:
    """Write the patch's rows over the base's own, after what they replace is safe in an undo file.

    Args:
        patch: What to change.
        base: The model that it is for, a local folder.
        undo_path: The undo file; by default hidden in the base's folder.

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
        found = states(patch, base)
        if all(state is State.PATCHED for state in found):
            _flush(files)
            return False
        check_rest(patch, base)
        if os.path.lexists(undo_path):
            _check_undo(undo_path, patch, base)
            check_content(patch)
        else:
            refuse_other(
                patch,
                base,
                found,
                f"; if an earlier run was stopped, name its undo file with --undo, else {COPY} of it",
            )
            write_undo(patch, base, undo_path)
        _write(patch, base, files)
    return True


def revert(base: Checkpoint, undo_path: Path | None = None) -> int:
    """Give a model the bytes back that it had before a patch was applied in place, and remove the undo file.

    Args:
        base: The patched model, a local folder; also one that a stopped run has patched or reverted in part.
        undo_path: The undo file.

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
        found = states(undo.patch, base)
        _refuse_strangers(undo, base, found)
        check_content(undo.patch)
        if is_changed := any(state is not State.PATCHED for state in found):
            _write(undo.patch, base, files)
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


def _write(patch: Patch, base: Checkpoint, files: Mapping[str, BinaryIO]) -> None:
    """Write a patch's rows to where they belong, and to disk; nothing else of the files is touched."""
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
            f"{base.name} is written in part, then its disk failed: {error.strerror}; run the same command again when "
            f"that is mended, or `dapa-merge patch revert`"
        ) from error


def _flush(files: Mapping[str, BinaryIO]) -> None:
    for file in files.values():
        os.fsync(file.fileno())


def apply_to_copy(patch: Patch, base: Checkpoint, out: Path) -> None:
    """Write a patched copy of `base` into the new folder `out`; the base's files are opened for reading only.

    Args:
        patch: What to change.
        base: The model that it is for, however it is divided into files.
        out: The folder to make; it must not exist, or be empty.

    Raises:
        CheckpointError: If the base is not the recorded one, or the patch does not hold what it records.
        UsageError: If `out` exists, cannot be made, or does not fit on its disk.
    """
    with _shared(base):
        check_layout(patch, base)
        refuse_other(patch, base, states(patch, base), "; name the model that the patch is for")
        check_rest(patch, base)
        changes: dict[str, list[RegionEdit]] = {name: [] for name in base.shards}
        for entry in patch.entries:
            tensor = base.tensors[entry.tensor]
            changes[tensor.file].append(_change(patch, entry, tensor))
        for of_file in changes.values():
            of_file.sort(key=lambda change: change.spans)
        write_result(base, changes, out, {"patch": patch.identity})


def _change(patch: Patch, entry: Entry, tensor: Tensor) -> RegionEdit:
    pieces = partial(checked_pieces, patch, entry)
    return RegionEdit(tensor, whole_box(tensor.shape), (entry.place(tensor),), entry.new_sha256, pieces)


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


class State(Enum):
    """What the rows of an entry are in a model."""

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
    """Raise `CheckpointError` unless the base has the recorded values also where the patch changes nothing.

    It reads all of the base but the patch's rows.
    """
    if rest_digest(base, patch.entries) != patch.metadata["base_rest"]:
        raise CheckpointError(
            f"{base.name} has other values than the model that {patch.path} was made for, in rows that the patch does "
            f"not change{_made_for(patch)}; name that model"
        )


def check_content(patch: Patch) -> None:
    """Raise `CheckpointError` unless the patch's bytes have the digests that it records."""

    def check(entry: Entry) -> None:
        if _digest(patch.pieces(entry)) != entry.new_sha256:
            raise content_fault(patch, entry)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, patch.entries))


def checked_pieces(patch: Patch, entry: Entry) -> Iterator[bytes]:
    """The new bytes of one entry, of which the last are given only if all are those that the patch records.

    Raises:
        CheckpointError: Before the last piece, if they are not.
    """
    state = hashlib.sha256()
    remaining = entry.num_bytes
    for piece in patch.pieces(entry):
        state.update(piece)
        remaining -= len(piece)
        if not remaining and state.hexdigest() != entry.new_sha256:
            raise content_fault(patch, entry)
        yield piece


def content_fault(patch: Patch, entry: Entry) -> CheckpointError:
    """What is to be raised where an entry's bytes in the patch have not the digest that it records."""
    return CheckpointError(
        f"{patch.path} is damaged: its bytes for {entry.key[:120]!r} are not those it records; get it again"
    )


def states(patch: Patch, base: Checkpoint) -> list[State]:
    """What the base holds for each entry of the patch."""

    def state(entry: Entry) -> State:
        tensor = base.tensors[entry.tensor]
        found = _digest(iterate_range(base, tensor.file, *entry.place(tensor)))
        by_digest = {entry.base_sha256: State.BASE, entry.new_sha256: State.PATCHED}
        return by_digest.get(found, State.OTHER)

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(state, patch.entries))


def refuse_other(patch: Patch, base: Checkpoint, found: Sequence[State], hint: str) -> None:
    """Raise `CheckpointError` unless all entries are as the patch found them; `hint` says what to do."""
    for entry, state in zip(patch.entries, found, strict=True):
        if state is State.OTHER:
            first, stop = entry.rows
            raise CheckpointError(
                f"{base.name} holds other values in rows {first} to {stop} of {entry.tensor} than the model that "
                f"{patch.path} was made for{_made_for(patch)}{hint}"
            )
    if all(state is State.PATCHED for state in found):
        raise CheckpointError(f"{base.name} holds what {patch.path} would write already")
    if State.PATCHED in found:
        patched, unpatched = (patch.entries[found.index(state)].tensor for state in (State.PATCHED, State.BASE))
        raise CheckpointError(f"{base.name} has {patched} as {patch.path} makes it, but not {unpatched}{hint}")


def _made_for(patch: Patch) -> str:
    """What the base was called when the patch was made; a stranger's words."""
    name = repr(patch.metadata.get("base", "an unnamed model")[:120])
    commit = patch.metadata.get("base_commit")
    return f" ({name}{f' at commit {commit[:40]!r}' if commit else ''})"


UNDO_NAME = ".dapa-undo.safetensors"
BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Undo:
    """An undo file that was read and found sound; `alignments` is one number for each entry of the way back."""

    patch: Patch
    alignments: tuple[int, ...]

    def takes_back(self, patch: Patch) -> bool:
        """Whether it leads back from this patch; what it says of itself does not count."""
        return identity(self.patch.metadata["base_layout"], _turned(self.patch.entries)) == patch.identity

    def is_half_written(self, entry: Entry, base: Checkpoint, patch: Patch | None = None) -> bool:
        """Whether every block of an entry's rows in the model is either the old one or the new one.

        With the patch that is taken back at hand, whether every single byte is.
        """
        tensor = base.tensors[entry.tensor]
        start, stop = entry.place(tensor)
        found = _blocks(iterate_range(base, tensor.file, start, stop), start)
        old = _blocks(self.patch.pieces(entry), start)
        if patch is not None:
            (forth,) = (other for other in patch.entries if (other.tensor, other.rows) == (entry.tensor, entry.rows))
            new = _blocks(patch.pieces(forth), start)
            # Strict would be of no use: `all` ends before the iterators do.
            return all(_is_mixed(*blocks) for blocks in zip(found, old, new))  # noqa: B905
        index = self.patch.entries.index(entry)
        if start % BLOCK_BYTES != self.alignments[index]:
            return False
        sums = self._sums(index)
        return all(mine == before or zlib.crc32(mine) == after for mine, before, after in zip(found, old, sums))  # noqa: B905

    def _sums(self, index: int) -> Iterator[int]:
        """The sums of the new blocks of one entry."""
        sums = self.patch.contents[self.patch.metadata["blocks"]]
        num_blocks = list(map(_num_blocks, self.patch.entries, self.alignments))
        with self.patch.path.open("rb") as file:
            file.seek(sums.start + 4 * sum(num_blocks[:index]))
            content = file.read(4 * num_blocks[index])
        return (number for (number,) in struct.iter_unpack("<I", content))


def read_undo(path: Path) -> Undo:
    """Read an undo file's header.

    Raises:
        CheckpointError: If it is none, is damaged, or says what cannot be.
    """
    patch = read_patch(path, further="blocks")
    try:
        sums = patch.contents[patch.metadata["blocks"]]
        alignments = json.loads(patch.metadata["alignments"])
        if len(alignments) != len(patch.entries) or "undo_of" not in patch.metadata:
            raise ValueError("it takes back nothing")
        if not all(type(number) is int and 0 <= number < BLOCK_BYTES for number in alignments):
            raise ValueError("its alignments are none")
        if (sums.dtype, sums.shape) != ("U32", (sum(map(_num_blocks, patch.entries, alignments)),)):
            raise ValueError("its blocks are not those of its entries")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no undo file, or is damaged ({str(error)[:200]})") from error
    return Undo(patch, tuple(alignments))


def write_undo(patch: Patch, base: Checkpoint, path: Path) -> Undo:
    """Write what the patch would overwrite to a new file, complete and on disk, and check all of the patch's bytes.

    Raises:
        CheckpointError: If the base or the patch does not hold what the patch records.
        UsageError: If the file exists, or cannot be written.
    """
    # In the order of the file that is written, as it will be read again.
    ways_forth = sorted(patch.entries, key=lambda entry: -DTYPE_BITS[entry.dtype])
    entries = _turned(ways_forth)
    starts = [entry.place(base.tensors[entry.tensor])[0] for entry in entries]
    alignments = [start % BLOCK_BYTES for start in starts]
    blocks = unique_key("crc32 of the new blocks", patch.contents)
    metadata = {
        **{key: patch.metadata[key] for key in ("dapa_patch", "base_layout")},
        "tool": f"dapa-merge {__version__}",
        "base": f"{base.name} with {patch.path.name}",
        "entries": entries_text(entries),
        "undo_of": patch.identity,
        "blocks": blocks,
        "alignments": json.dumps(alignments),
    }
    contents = [(entry.key, entry.dtype, entry.stored_shape) for entry in entries]
    num_blocks = sum(map(_num_blocks, entries, alignments))
    header, offsets = lay_out([*contents, (blocks, "U32", (num_blocks,))], metadata)
    with staged_file(path) as file:
        check_space(path, len(header) + patch.num_bytes + 4 * num_blocks, "the undo file")
        write_all(file, header)
        sums = bytearray()
        for entry, forth, start in zip(entries, ways_forth, starts, strict=True):
            old = hashlib.sha256()
            file.seek(offsets[entry.key])
            tensor = base.tensors[entry.tensor]
            for piece in iterate_range(base, tensor.file, *entry.place(tensor)):
                old.update(piece)
                write_all(file, piece)
                advance(len(piece), "bytes")
            if old.hexdigest() != entry.new_sha256:
                raise CheckpointError(f"{entry.tensor} of {base.name} was changed by another program while it was read")
            for block in _blocks(checked_pieces(patch, forth), start):
                sums += zlib.crc32(block).to_bytes(4, "little")
        file.seek(offsets[blocks])
        write_all(file, bytes(sums))
    return read_undo(path)


def _turned(entries: Iterable[Entry]) -> list[Entry]:
    return [replace(entry, base_sha256=entry.new_sha256, new_sha256=entry.base_sha256) for entry in entries]


def _num_blocks(entry: Entry, alignment: int) -> int:
    return -(-(alignment + entry.num_bytes) // BLOCK_BYTES)


def _is_mixed(found: bytes, old: bytes, new: bytes) -> bool:
    return all(mine in pair for mine, *pair in zip(found, old, new, strict=True))


def ending_on_blocks(pieces: Iterable[bytes], start: int) -> Iterator[bytes]:
    """Bytes that belong at `start` of a file, in pieces that end where a block of it does, but for the last."""
    carried = b""
    for piece in pieces:
        content = carried + piece
        size = max(0, len(content) - (start + len(content)) % BLOCK_BYTES)
        if size:
            yield content[:size]
        start += size
        carried = content[size:]
    if carried:
        yield carried


def _blocks(pieces: Iterable[bytes], start: int) -> Iterator[bytes]:
    """Bytes that belong at `start` of a file, in the parts of them that lie in one block of it."""
    for content in ending_on_blocks(pieces, start):
        # The first one may begin within a block.
        for position in range(-(start % BLOCK_BYTES), len(content), BLOCK_BYTES):
            yield content[max(0, position) : position + BLOCK_BYTES]
        start += len(content)
