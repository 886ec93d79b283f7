"""Writing one file of a result: the target's bytes, with the source's in their place, read back and hashed at once.

The kernel copies where it can: a clone of the whole file where the file system shares blocks, else a range at a time.
What was written is read back while it is still in the processor's cache, compared with what it must be, and hashed, so
that a file of which the machine's memory holds only a part is read no second time.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from dapa_merge.checkpoint.changes import Change
from dapa_merge.checkpoint.streams import PIECE_BYTES, Digests, Hasher, Span, read_whole, same
from dapa_merge.errors import CheckpointError, UsageError

Progress = Callable[[int], None]

# What is copied before it is read back: the kernel's copy is fast from here on, and it is in the cache still. Copying
# through memory instead took half as long again in the kernel.
STEP_BYTES = 1 << 20
# The request to share a file's blocks with another, of btrfs, XFS, bcachefs and others (linux/fs.h).
FICLONE = 0x40049409
# What the kernel answers where this file system, or this pair of them, has no copy of its own.
NO_KERNEL_COPY = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ENOTTY, errno.ETXTBSY,
}  # fmt: skip
# What it answers if a file can have no second name: on another disk, another user's, one with too many already.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS}


class Stopped(Exception):
    """Another file failed, so that this one is not needed."""


def write_file(
    origin: Path,
    destination: Path,
    changes: Sequence[Change],
    progress: Progress = lambda _: None,
    stop: threading.Event | None = None,
) -> Digests:
    """Make a new file: `origin` with changes. It is on disk when this returns, and was read back and compared.

    Args:
        origin: The target's file.
        destination: The file to make.
        changes: What is not the target's, in order.
        progress: Called with numbers of bytes as they are done with.
        stop: Set by whoever has no use for the file any more.

    Returns:
        Its digest, and that of each changed tensor, whole.

    Raises:
        CheckpointError: If `origin` changes meanwhile, or a change does not fit, or the disk gives back other bytes.
        OSError: If the disk cannot take it.
        Stopped: If `stop` was set.
    """
    tensors = {change.tensor.name: (change.tensor.start, change.tensor.stop) for change in changes}
    with origin.open("rb", buffering=0) as reader, destination.open("x+b", buffering=0) as writer:
        before = os.fstat(reader.fileno())
        writing = _Writing(reader, writer, origin, destination, Hasher(tensors))
        writing.shares_blocks = clone(reader.fileno(), writer.fileno())
        for num_bytes in writing.steps(_in_order(changes, before.st_size)):
            if stop is not None and stop.is_set():
                raise Stopped
            progress(num_bytes)
        # Here, where other files are still being written, rather than one after the other at the end. (Asking for it
        # earlier, every 256 MB, made nothing faster when it was measured.)
        os.fsync(writer.fileno())
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{origin} was changed while it was copied; run the same command again")
        if os.fstat(writer.fileno()).st_size != before.st_size:
            raise CheckpointError(f"{destination} has not the size of {origin} although it is a copy of it")
    return writing.hasher.digests()


def link_file(origin: Path, destination: Path) -> None:
    """Give a file a second name; of a link, as in a Hub cache, the file that it leads to.

    Raises:
        UsageError: If the file system cannot do that, or not for this file.
    """
    try:
        os.link(origin.resolve(), destination)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        raise UsageError(
            f"{origin} cannot be hard-linked to {destination.parent}: {error.strerror}; leave out --link, so that it "
            f"is copied"
        ) from error


# A part of the file, and where its bytes come from; from the target if that is None.
_Part = tuple[Span, "Iterator[memoryview] | None"]


def _in_order(changes: Sequence[Change], num_bytes: int) -> Iterator[_Part]:
    """A file's parts from its first byte to its last."""
    streams = [_Stream(change.pieces()) for change in changes]
    spans = sorted((span, number) for number, change in enumerate(changes) for span in change.spans)
    position = 0
    for (first, last), number in spans:
        if first < position:
            # A tensor may be in two of the selected units (`gate` and `mlp`); its values are the same in both.
            skipped = min(position, last)
            for _ in streams[number].take(skipped - first):
                pass
            first = skipped
        if position < first:
            yield (position, first), None
        if first < last:
            yield (first, last), streams[number].take(last - first)
        position = max(position, last)
    if position < num_bytes:
        yield (position, num_bytes), None


class _Stream:
    """Pieces of bytes of which the next so many are wanted at a time."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def take(self, num_bytes: int) -> Iterator[memoryview]:
        while num_bytes:
            if not self._rest:
                self._rest = memoryview(next(self._pieces))
            piece = self._rest[: min(num_bytes, STEP_BYTES)]
            self._rest = self._rest[len(piece) :]
            num_bytes -= len(piece)
            yield piece


class _Writing:
    """One file as it is written, from the front."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes], origin: Path, destination: Path, hasher: Hasher) -> None:
        self.reader, self.writer, self.origin, self.destination = reader, writer, origin, destination
        self.hasher = hasher
        self.shares_blocks = False
        self.position = 0
        self._mine, self._theirs = (memoryview(bytearray(PIECE_BYTES)) for _ in range(2))

    def steps(self, parts: Iterator[_Part]) -> Iterator[int]:
        """Write part after part; yields the number of bytes of each step when it was compared."""
        for (first, last), pieces in parts:
            if pieces is None:
                for start in range(first, last, STEP_BYTES):
                    stop = min(start + STEP_BYTES, last)
                    if not self.shares_blocks:
                        self._copy(start, stop)
                    self._read_back(start, stop, None)
                    yield stop - start
            else:
                for piece in pieces:
                    start = self.position
                    self.writer.seek(start)
                    write_all(self.writer, piece)
                    self._read_back(start, start + len(piece), piece)
                    yield len(piece)

    def _copy(self, start: int, stop: int) -> None:
        self.reader.seek(start)
        self.writer.seek(start)
        while start < stop:
            num_copied = copy_piece(self.reader, self.writer, stop - start)
            if not num_copied:
                raise CheckpointError(f"{self.origin} became shorter while it was copied")
            start += num_copied

    def _read_back(self, start: int, stop: int, expected: memoryview | None) -> None:
        for position in range(start, stop, PIECE_BYTES):
            size = min(PIECE_BYTES, stop - position)
            mine = self._mine[:size]
            self.writer.seek(position)
            read_whole(self.writer, mine, self.destination)
            if expected is None:
                theirs = self._theirs[:size]
                self.reader.seek(position)
                read_whole(self.reader, theirs, self.origin)
            else:
                theirs = expected[position - start : position - start + size]
            if not same(mine, theirs):
                raise CheckpointError(
                    f"{self.destination} does not hold what was written to it, from byte {position} on; "
                    f"the disk or the memory is damaged"
                )
            self.hasher.update(mine)
        self.position = stop


def clone(origin: int, destination: int) -> bool:
    """Have a new file share the blocks of another until one of them changes; says whether the file system can."""
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
    """Copy up to `num_bytes` from where both files stand: in the kernel where it can, else through memory."""
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


def write_all(file: IO[bytes], piece: memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    while piece:
        piece = piece[file.write(piece) :]
