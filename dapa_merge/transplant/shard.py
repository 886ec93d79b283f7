"""Writing one file of a result: the target's bytes, with the source's in their place, read back and hashed at once.

What was written is read back while it is still in the processor's cache, compared with what it must be, and hashed, so
that a file of which the machine's memory holds only a part is read no second time.

Which bytes of a result's files are the source's: the one place where units become spans of files.

What the kernel does for a copy: sharing blocks, copying ranges, giving a file a second name; else what to do.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from dapa_merge.checkpoint.digest import PIECE_BYTES, Digests, Hasher, Span, read_whole, same
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.region import Box, Region, whole_box
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.files import write_all
from dapa_merge.plan.edit import Rounding
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import advance

# What is copied before it is read back: the kernel's copy is fast from here on, and it is in the second-level cache
# still (a megabyte took some 5 % longer). Copying through memory instead took half as long again in the kernel.
STEP_BYTES = 1 << 19
# How many such steps may wait to be hashed.
NUM_BUFFERS = 3
# What is written before the disk is asked, in the background, to take it up: the last wait for it is short then. That
# took a tenth off the whole when it was measured.
FLUSH_BYTES = 256 << 20


class Stopped(Exception):
    """Another file failed, so that this one is not needed."""


def write_file(
    origin: Path,
    destination: Path,
    changes: Sequence[RegionEdit],
    stop: threading.Event | None = None,
    *,
    hash_apart: bool = False,
    hashes: bool = True,
) -> Digests:
    """Make a new file: `origin` with changes. It is on disk when this returns, and was read back and compared.

    Args:
        origin: The target's file.
        destination: The file to make.
        changes: What is not the target's, in order.
        stop: Set by whoever has no use for the file any more.
        hash_apart: Hash in a second thread; worth it if fewer files are written at once than there are processors.
        hashes: Make digests; without, those that are returned are empty.

    Returns:
        Its digest, and that of each changed tensor, whole.

    Raises:
        CheckpointError: If `origin` changes meanwhile, or a change does not fit, or the disk gives back other bytes.
        OSError: If the disk cannot take it.
        Stopped: If `stop` was set.
    """
    tensors = {change.tensor.name: (change.tensor.start, change.tensor.stop) for change in changes}
    with (
        _Hashing(Hasher(tensors, counts_only=not hashes), apart=hash_apart and hashes) as hashing,
        origin.open("rb", buffering=0) as reader,
        destination.open("x+b", buffering=0) as writer,
        # Waited for before the file is closed.
        ThreadPoolExecutor(1) as flusher,
    ):
        before = os.fstat(reader.fileno())
        writing = _Writing(reader, writer, origin, destination, hashing)
        writing.shares_blocks = clone(reader.fileno(), writer.fileno())
        flushed, flush = 0, None
        for num_bytes in writing.steps(_in_order(changes, before.st_size)):
            if stop is not None and stop.is_set():
                raise Stopped
            advance(num_bytes, "bytes")
            if writing.position - flushed >= FLUSH_BYTES and (flush is None or flush.done()):
                if flush is not None:
                    # A disk that could not take it says so once, and not to the next one who asks.
                    flush.result()
                flushed, flush = writing.position, flusher.submit(os.fsync, writer.fileno())
        if flush is not None:
            # What the disk could not take is told once, to whoever asks first.
            flush.result()
        os.fsync(writer.fileno())
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{origin} was changed while it was copied; run the same command again")
        if os.fstat(writer.fileno()).st_size != before.st_size:
            raise CheckpointError(f"{destination} has not the size of {origin} although it is a copy of it")
        return hashing.digests()


# A part of the file, and where its bytes come from; from the target if that is None.
_Piece = tuple[Span, "Iterator[memoryview] | None"]


def _in_order(changes: Sequence[RegionEdit], num_bytes: int) -> Iterator[_Piece]:
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


class _Hashing:
    """Hashes what was read back: at once, while it is in the cache, or in a thread of its own.

    The thread keeps a second processor busy that has no file of its own, and costs a little where it has one.
    """

    def __init__(self, hasher: Hasher, *, apart: bool) -> None:
        self._hasher = hasher
        self._pool = ThreadPoolExecutor(1) if apart else None
        self.buffer_bytes = STEP_BYTES if apart else PIECE_BYTES
        self._buffers: deque[tuple[memoryview, Future[None] | None]] = deque(
            (memoryview(bytearray(self.buffer_bytes)), None) for _ in range(NUM_BUFFERS if apart else 1)
        )

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def buffer(self) -> memoryview:
        """Memory for the next bytes; what was in it before is hashed."""
        buffer, hashed = self._buffers.popleft()
        if hashed is not None:
            hashed.result()
        return buffer

    def hash(self, buffer: memoryview, size: int) -> None:
        """Take the first bytes of a buffer, which is given back with that."""
        hashed = None
        if self._pool is None:
            self._hasher.update(buffer[:size])
        else:
            hashed = self._pool.submit(self._hasher.update, buffer[:size])
        self._buffers.append((buffer, hashed))

    def digests(self) -> Digests:
        """What the file was, now that it has ended."""
        for _, hashed in self._buffers:
            if hashed is not None:
                hashed.result()
        return self._hasher.digests()


class _Writing:
    """One file as it is written, from the front."""

    def __init__(
        self, reader: IO[bytes], writer: IO[bytes], origin: Path, destination: Path, hashing: _Hashing
    ) -> None:
        self.reader, self.writer, self.origin, self.destination = reader, writer, origin, destination
        self.hashing = hashing
        self.shares_blocks = False
        self.position = 0
        self._theirs = memoryview(bytearray(PIECE_BYTES))

    def steps(self, parts: Iterator[_Piece]) -> Iterator[int]:
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
        """Compare what was written from `start` to `stop` with the expected bytes, or the target's, and hash it."""
        for first in range(start, stop, self.hashing.buffer_bytes):
            last = min(first + self.hashing.buffer_bytes, stop)
            buffer = self.hashing.buffer()
            for position in range(first, last, PIECE_BYTES):
                end = min(position + PIECE_BYTES, last)
                self._compare(
                    buffer[position - first : end - first],
                    position,
                    None if expected is None else expected[position - start : end - start],
                )
            self.hashing.hash(buffer, last - first)
        self.position = stop

    def _compare(self, mine: memoryview, position: int, theirs: memoryview | None) -> None:
        self.writer.seek(position)
        read_whole(self.writer, mine, self.destination)
        if theirs is None:
            theirs = self._theirs[: len(mine)]
            self.reader.seek(position)
            read_whole(self.reader, theirs, self.origin)
        if not same(mine, theirs):
            raise CheckpointError(
                f"{self.destination} does not hold what was written to it, from byte {position} on; "
                f"the disk or the memory is damaged"
            )


@dataclass(frozen=True)
class RegionEdit:
    """A part of a target's tensor that a result has otherwise.

    Attributes:
        tensor: The target's tensor, whole.
        box: The part of it, by its dimensions.
        spans: Where the part lies in the file, in order.
        origin: What decides its bytes, in words: where the part lies in the other models, its dtype there, the edit.
        pieces: Yields its bytes, as the target stores them, in order; raises `CheckpointError` if they do not fit or
            are not finite.
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
    """The changes of each weight file of the target, by their place in it.

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
    """What tells changes of a file from others: a SHA-256 over where they are and where they come from."""
    lines = (f"{change.tensor.name}\0{change.tensor.dtype}\0{change.spans}\0{change.origin}\n" for change in changes)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# The request to share a file's blocks with another, of btrfs, XFS, bcachefs and others (linux/fs.h).
FICLONE = 0x40049409
# What the kernel answers where this file system, or this pair of them, has no copy of its own.
NO_KERNEL_COPY = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ENOTTY, errno.ETXTBSY,
}  # fmt: skip
# What it answers if a file can have no second name: on another disk, another user's, one with too many already.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS}


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
