"""Writes one file of a result: copies the target's file, overwrites regions, and reads everything back.

Each byte is read back, compared with the target's or with the new value, and hashed. The kernel copies, by sharing
blocks or copying ranges where the file system supports it. `find_changes` is the only place where units become spans of
files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from dapa_merge.checkpoint.digest import ALGORITHM, PIECE_BYTES, Digests, Hasher, Span, read_whole, same
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.region import Box, Region, whole_box
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.files import write_all
from dapa_merge.plan.edit import Rounding
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import advance

# Bytes copied before they are read back: enough for a fast kernel copy, and still in the second-level cache. Copying
# whole files before reading them back took a quarter longer.
STEP_BYTES = 1 << 19
# Bytes written between background flushes, which keep the final flush short.
FLUSH_BYTES = 256 << 20


class NotNeeded(Exception):
    """Another file failed, so this one is not needed."""


def write_file(
    origin: Path,
    destination: Path,
    changes: Sequence[RegionEdit],
    stop: threading.Event | None = None,
    algorithm: str | None = ALGORITHM,
) -> Digests:
    """Write a copy of `origin` with changes to a new file, flushed to disk, read back and compared.

    Args:
        origin: The target's file.
        destination: The file to make.
        changes: The changes to `origin`.
        stop: Set it to cancel the write.
        algorithm: That of the digests; None to return them empty.

    Returns:
        The digests of the file and of each changed tensor, whole.

    Raises:
        CheckpointError: If `origin` changes meanwhile, a change does not fit, or other bytes are read back.
        OSError: If the disk fails or is full.
        NotNeeded: If `stop` was set.
    """
    stop = stop or threading.Event()
    tensors = {change.tensor.name: (change.tensor.start, change.tensor.stop) for change in changes}
    hasher = Hasher(algorithm, tensors)
    with (
        origin.open("rb", buffering=0) as reader,
        destination.open("x+b", buffering=0) as writer,
        ThreadPoolExecutor(1) as flusher,
    ):
        before = os.fstat(reader.fileno())
        is_cloned = clone(reader.fileno(), writer.fileno())
        for change in changes:
            _overwrite(writer, change, destination)
        buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in range(2)]
        flushed = 0
        flush = flusher.submit(os.fsync, writer.fileno())
        for (first, last), is_changed in _steps(changes, before.st_size):
            if stop.is_set():
                raise NotNeeded
            if not is_changed and not is_cloned:
                _copy(reader, writer, first, last, origin)
            _read_back(reader, writer, first, last, is_changed, hasher, buffers, origin, destination)
            advance(last - first, "bytes")
            if last - flushed >= FLUSH_BYTES and flush.done():
                # The kernel reports a failed write to one flush only, so no flush's result may be ignored.
                flush.result()
                flushed, flush = last, flusher.submit(os.fsync, writer.fileno())
        flush.result()
        os.fsync(writer.fileno())
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{origin} was changed while it was copied; run the same command again")
        if os.fstat(writer.fileno()).st_size != before.st_size:
            raise CheckpointError(f"{destination} does not have the size of {origin} although it is a copy of it")
    return hasher.digests()


def _copy(reader: IO[bytes], writer: IO[bytes], first: int, last: int, origin: Path) -> None:
    reader.seek(first)
    writer.seek(first)
    while first < last:
        num_copied = copy_piece(reader, writer, last - first)
        if not num_copied:
            raise CheckpointError(f"{origin} became shorter while it was copied")
        first += num_copied


def _overwrite(writer: IO[bytes], change: RegionEdit, destination: Path) -> None:
    """Write a change to its places, read it back and compare it."""
    mine = memoryview(bytearray(PIECE_BYTES))
    for start, piece in _placed(change):
        writer.seek(start)
        write_all(writer, piece)
        writer.seek(start)
        read_whole(writer, mine[: len(piece)], destination)
        if not same(mine[: len(piece)], piece):
            raise _damaged(destination, start)


def _placed(change: RegionEdit) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a change in small pieces, each with its place in the file."""
    pieces = change.pieces()
    rest = memoryview(b"")
    for start, stop in change.spans:
        while start < stop:
            rest = rest or memoryview(next(pieces))
            piece = rest[: min(stop - start, PIECE_BYTES)]
            yield start, piece
            start, rest = start + len(piece), rest[len(piece) :]
    # Exhausts the generator, which may check its values after the last piece.
    for _ in pieces:
        pass


def _read_back(
    reader: IO[bytes],
    writer: IO[bytes],
    first: int,
    last: int,
    is_changed: bool,
    hasher: Hasher,
    buffers: Sequence[memoryview],
    origin: Path,
    destination: Path,
) -> None:
    """Hash a step of the file, and compare it with the target's if it is unchanged."""
    writer.seek(first)
    reader.seek(first)
    mine, theirs = buffers
    for start in range(first, last, PIECE_BYTES):
        size = min(PIECE_BYTES, last - start)
        read_whole(writer, mine[:size], destination)
        if not is_changed:
            read_whole(reader, theirs[:size], origin)
            if not same(mine[:size], theirs[:size]):
                raise _damaged(destination, start)
        hasher.update(mine[:size])


def _steps(changes: Sequence[RegionEdit], num_bytes: int) -> Iterator[tuple[Span, bool]]:
    """Split a file into small steps in order, and say whether each is changed."""
    position = 0
    # A tensor may be in two of the selected units (`gate` and `mlp`); its values are the same in both.
    spans = sorted(span for change in changes for span in change.spans)
    for first, last in (*spans, (num_bytes, num_bytes)):
        for stop, is_changed in ((first, False), (last, True)):
            while position < stop:
                end = min(position + STEP_BYTES, stop)
                yield (position, end), is_changed
                position = end


def _damaged(destination: Path, position: int) -> CheckpointError:
    return CheckpointError(
        f"{destination} does not hold what was written to it, from byte {position} on; "
        f"the disk or the memory is damaged"
    )


@dataclass(frozen=True)
class RegionEdit:
    """A change to a part of a target's tensor.

    Attributes:
        tensor: The target's tensor, whole.
        box: The changed part.
        spans: The part's byte ranges in the file, in order.
        origin: Text that identifies its new bytes: the part's place and dtype in the other models, and the edit.
        pieces: Yields its new bytes in order, as the target stores them; raises `CheckpointError` if they do not fit
            or are not finite.
    """

    tensor: Tensor
    box: Box
    spans: tuple[Span, ...]
    origin: str
    pieces: Callable[[], Iterator[bytes]]

    @property
    def is_whole(self) -> bool:
        return self.box == whole_box(self.tensor.shape)


def find_changes(
    plan: Plan, selection: Sequence[Unit], rounding: Rounding | None = None
) -> dict[str, list[RegionEdit]]:
    """The changes of each weight file of the target, in file order.

    Raises:
        CheckpointError: If a tensor lacks rows of a block.
    """
    found: dict[str, list[RegionEdit]] = {name: [] for name in plan.target.shards}
    rounding = rounding or Rounding(plan.max_overflow)
    for regions in plan.regions(selection):
        found[regions["target"].tensor.file].append(_change(plan, regions, rounding))
    for changes in found.values():
        changes.sort(key=lambda change: change.spans)
    return found


def _change(plan: Plan, regions: Mapping[str, Region], rounding: Rounding) -> RegionEdit:
    ours = regions["target"]
    tensors = [(regions[name].tensor, regions[name].box) for name in plan.others]
    places = [f"{tensor.file} {tensor.dtype} {tensor.start}:{tensor.stop} {box}" for tensor, box in tensors]
    origin = " ".join([*places, *map(str, plan.edit.to_json().values()), str(plan.max_overflow)])
    spans = tuple((start, start + num_bytes) for start, num_bytes in ours.runs())
    pieces = partial(plan.edit.checked_tiles, plan.models, regions, rounding)
    return RegionEdit(ours.tensor, ours.box, spans, origin, pieces)


def edits_digest(changes: Sequence[RegionEdit]) -> str:
    """A SHA-256 over the places and origins of a file's changes, which identifies them."""
    lines = (f"{change.tensor.name}\0{change.tensor.dtype}\0{change.spans}\0{change.origin}\n" for change in changes)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# The request to share a file's blocks with another, of btrfs, XFS, bcachefs and others (linux/fs.h).
FICLONE = 0x40049409
# Errors of the kernel where this file system, or this pair of them, does not support kernel copies.
NO_KERNEL_COPY = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ENOTTY, errno.ETXTBSY,
}  # fmt: skip
# Errors where a file cannot be hard-linked: on another disk, owned by another user, or with too many links already.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS}


def clone(origin: int, destination: int) -> bool:
    """Let a new file share another's blocks until one of them changes; returns whether the file system supports it."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(destination, FICLONE, origin)
    except OSError as error:
        if error.errno not in NO_KERNEL_COPY:
            raise
        return False
    return True


def copy_piece(reader: IO[bytes], writer: IO[bytes], num_bytes: int) -> int:
    """Copy up to `num_bytes` from both files' current positions: in the kernel if possible, else through memory."""
    for name in ("copy_file_range", "sendfile"):
        kernel_copy = getattr(os, name, None)
        if kernel_copy is None or (name == "sendfile" and sys.platform != "linux"):
            continue
        try:
            if name == "sendfile":
                return int(kernel_copy(writer.fileno(), reader.fileno(), None, num_bytes))
            return int(kernel_copy(reader.fileno(), writer.fileno(), num_bytes))
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
    piece = reader.read(min(num_bytes, PIECE_BYTES))
    write_all(writer, memoryview(piece))
    return len(piece)


def link_file(origin: Path, destination: Path) -> None:
    """Hard-link a file; for a symbolic link, as in a Hub cache, the file that it leads to.

    Raises:
        UsageError: If the file system does not support that, or not for this file.
    """
    try:
        os.link(origin.resolve(), destination)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        raise UsageError(
            f"{origin} cannot be hard-linked to {destination.parent}: {error.strerror}; leave out --link to copy it"
        ) from error
