"""Writes one file of a result: copies the target's file, overwrites regions, and reads everything back.

Each byte is read back, compared with the target's or with the new value, and hashed. The kernel copies, by sharing
blocks or copying ranges where the file system supports it. A file that is written alone is copied by several threads,
and hashed by another one, in order. `find_changes` is the only place where units become spans of files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
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
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.values import Rounding
from dapa_merge.progress import advance

# Bytes copied before they are read back: enough for a fast kernel copy, and still in the second-level cache. Copying
# whole files before reading them back took a quarter longer.
STEP_BYTES = 1 << 19
# Where several threads copy a file, fewer and larger steps cost less to hand over, and still fit into a shared cache.
LARGE_STEP_BYTES = 1 << 21
# Bytes written between background flushes, which keep the final flush short.
FLUSH_BYTES = 64 << 20


class NotNeeded(Exception):
    """Another file failed, so this one is not needed."""


def write_file(
    origin: Path,
    destination: Path,
    changes: Sequence[RegionEdit],
    stop: threading.Event | None = None,
    algorithm: str | None = ALGORITHM,
    num_threads: int = 1,
) -> Digests:
    """Write a copy of `origin` with changes to a new file, flushed to disk, read back and compared.

    Args:
        origin: The target's file.
        destination: The file to make.
        changes: The changes to `origin`.
        stop: Set it to cancel the write.
        algorithm: That of the digests; None to return them empty.
        num_threads: Number of threads that copy and compare; the calling one hashes.

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
    with ExitStack() as stack:
        writer = stack.enter_context(destination.open("x+b", buffering=0))
        step_bytes = STEP_BYTES if num_threads == 1 else LARGE_STEP_BYTES
        num_lanes = 1 if num_threads == 1 else 2 * num_threads
        lanes = [_Lane(origin, destination, step_bytes, stack) for _ in range(num_lanes)]
        reader = lanes[0].reader
        flusher = stack.enter_context(ThreadPoolExecutor(1))
        before = os.fstat(reader.fileno())
        is_cloned = clone(reader.fileno(), writer.fileno())
        for change in changes:
            _overwrite(writer, change, destination)
        flushed = 0
        flush = flusher.submit(os.fsync, writer.fileno())
        steps = _steps(changes, before.st_size, step_bytes)
        # Closed before the files are, also after a fault.
        for piece in stack.enter_context(closing(_in_order(lanes, steps, num_threads, is_cloned))):
            if stop.is_set():
                raise NotNeeded
            hasher.update(piece)
            advance(len(piece), "bytes")
            if hasher.num_bytes - flushed >= FLUSH_BYTES and flush.done():
                # The kernel reports a failed write to one flush only, so no flush's result may be ignored.
                flush.result()
                flushed, flush = hasher.num_bytes, flusher.submit(os.fsync, writer.fileno())
        flush.result()
        os.fsync(writer.fileno())
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{origin} was changed while it was copied; run the same command again")
        if os.fstat(writer.fileno()).st_size != before.st_size:
            raise CheckpointError(f"{destination} does not have the size of {origin} although it is a copy of it")
    return hasher.digests()


def _in_order(
    lanes: Sequence[_Lane], steps: Iterable[tuple[Span, bool]], num_threads: int, is_cloned: bool
) -> Generator[memoryview, None, None]:
    """Copy and compare a file's steps, and yield the bytes of each in order; they are valid until the next one."""
    if num_threads == 1:
        for span, is_changed in steps:
            yield lanes[0].write(span, is_changed or is_cloned, is_changed)
        return
    waiting: deque[Future[memoryview]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for number, (span, is_changed) in enumerate(steps):
                if len(waiting) == len(lanes):
                    # The lane of the step that is the next to be handed over.
                    yield waiting.popleft().result()
                lane = lanes[number % len(lanes)]
                waiting.append(pool.submit(lane.write, span, is_changed or is_cloned, is_changed))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


class _Lane:
    """Handles of both files, and memory for a step of them; one thread at a time uses a lane."""

    def __init__(self, origin: Path, destination: Path, step_bytes: int, stack: ExitStack) -> None:
        """Open both files until the end of the stack's block."""
        self._origin, self._destination = origin, destination
        self.reader = stack.enter_context(origin.open("rb", buffering=0))
        self._writer = stack.enter_context(destination.open("r+b", buffering=0))
        self._mine = memoryview(bytearray(step_bytes))
        self._theirs = memoryview(bytearray(min(PIECE_BYTES, step_bytes)))

    def write(self, span: Span, is_there: bool, is_changed: bool) -> memoryview:
        """Copy a step unless its bytes are there, read it back, and compare it with the target's if it is unchanged.

        Returns:
            The step's bytes, in memory that the next call overwrites.
        """
        first, last = span
        if not is_there:
            self._copy(first, last)
        self._writer.seek(first)
        mine = self._mine[: last - first]
        read_whole(self._writer, mine, self._destination)
        if not is_changed:
            self.reader.seek(first)
            for start in range(0, len(mine), len(self._theirs)):
                piece = mine[start : start + len(self._theirs)]
                theirs = self._theirs[: len(piece)]
                read_whole(self.reader, theirs, self._origin)
                if not same(piece, theirs):
                    raise _damaged(self._destination, first + start)
        return mine

    def _copy(self, first: int, last: int) -> None:
        self.reader.seek(first)
        self._writer.seek(first)
        while first < last:
            num_copied = copy_piece(self.reader, self._writer, min(STEP_BYTES, last - first))
            if not num_copied:
                raise CheckpointError(f"{self._origin} became shorter while it was copied")
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


def _steps(changes: Sequence[RegionEdit], num_bytes: int, step_bytes: int) -> Iterator[tuple[Span, bool]]:
    """Split a file into small steps in order, and say whether each is changed."""
    position = 0
    # A tensor may be in two of the selected units (`gate` and `mlp`); its values are the same in both.
    spans = sorted(span for change in changes for span in change.spans)
    for first, last in (*spans, (num_bytes, num_bytes)):
        for stop, is_changed in ((first, False), (last, True)):
            while position < stop:
                end = min(position + step_bytes, stop)
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
