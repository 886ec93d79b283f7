"""Writing one file of a result: the target's file is copied, regions are overwritten, everything is read back.

Nothing is believed that was not read again: each byte is compared with the target's or with the new value, and hashed.
The kernel copies: it shares blocks or copies ranges where the file system can. `find_changes` is the one place where
units become spans of files.
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
# still. To copy whole files first, and then to read them back, took a quarter longer.
STEP_BYTES = 1 << 19
# What is written before the disk is asked, in the background, to take it up: the last wait for it is short then.
FLUSH_BYTES = 256 << 20


class Stopped(Exception):
    """Another file failed, so that this one is not needed."""


def write_file(
    origin: Path,
    destination: Path,
    changes: Sequence[RegionEdit],
    stop: threading.Event | None = None,
    *,
    hashes: bool = True,
) -> Digests:
    """Make a new file: `origin` with changes. When this returns, it is on disk, and was read back and compared.

    Args:
        origin: The target's file.
        destination: The file to make.
        changes: What is not the target's.
        stop: Set by whoever does not need the file any more.
        hashes: Make digests; without, those that are returned are empty.

    Returns:
        The digest of the file, and of each changed tensor, whole.

    Raises:
        CheckpointError: If `origin` changes meanwhile, a change does not fit, or other bytes are read back.
        OSError: If the disk cannot take it.
        Stopped: If `stop` was set.
    """
    stop = stop or threading.Event()
    tensors = {change.tensor.name: (change.tensor.start, change.tensor.stop) for change in changes}
    hasher = Hasher(tensors, counts_only=not hashes)
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
                raise Stopped
            if not is_changed and not is_cloned:
                _copy(reader, writer, first, last, origin)
            _read_back(reader, writer, first, last, is_changed, hasher, buffers, origin, destination)
            advance(last - first, "bytes")
            if last - flushed >= FLUSH_BYTES and flush.done():
                # A disk that could not take it says so once, and not to the next one who asks.
                flush.result()
                flushed, flush = last, flusher.submit(os.fsync, writer.fileno())
        flush.result()
        os.fsync(writer.fileno())
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{origin} was changed while it was copied; run the same command again")
        if os.fstat(writer.fileno()).st_size != before.st_size:
            raise CheckpointError(f"{destination} has not the size of {origin} although it is a copy of it")
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
    """Write a change to its places, and compare what is read back there."""
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
    # What follows the last byte is a check of whoever makes the pieces.
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
    """Hash a step of the file, and compare it with the target's if it is not changed."""
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
    """A file from its first byte to its last in small steps, and whether each is changed."""
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
