"""A local file as large as a remote one, of which only some ranges of bytes are present, and the record of which.

The file is sparse: what is not present takes no space, and would read as zeros, so that nobody may read a range before
it is in the record. Bytes are on disk before the record says so; a record that a killed process left half written
loses its last line and no more.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dapa_merge.checkpoint.writing.kernel import write_all
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.file_lock import take_lock

# First byte, and the byte after the last.
Range = tuple[int, int]

RECORD_SUFFIX = ".ranges"
# So much of each connection may have to be fetched again after a killed process: whatever is less.
NOTE_BYTES = 8 << 20
NOTE_SECONDS = 1.0


class RangeSet:
    """Disjoint ranges of whole numbers, in order; those that touch are one."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._ranges: list[Range] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Range]:
        return iter(self._ranges)

    def add(self, start: int, stop: int) -> None:
        """Add the numbers from `start` to before `stop`."""
        if start >= stop:
            return
        first = bisect.bisect_left(self._ranges, start, key=lambda known: known[1])
        last = bisect.bisect_right(self._ranges, stop, key=lambda known: known[0])
        if first < last:
            start, stop = min(start, self._ranges[first][0]), max(stop, self._ranges[last - 1][1])
        self._ranges[first:last] = [(start, stop)]

    def missing(self, start: int, stop: int) -> list[Range]:
        """What of the numbers from `start` to before `stop` is not in the set."""
        gaps = []
        for known_start, known_stop in self._ranges[bisect.bisect_right(self._ranges, start, key=lambda r: r[1]) :]:
            if known_start >= stop:
                break
            if start < known_start:
                gaps.append((start, known_start))
            start = max(start, known_stop)
        if start < stop:
            gaps.append((start, stop))
        return gaps


class SparseFile:
    """A file of which some ranges are present.

    Attributes:
        path: Where it is; its record lies beside it.
        num_bytes: Its size, with everything that is not present.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Open it, or make it with nothing present.

        Raises:
            CheckpointError: If the folder cannot be written, or holds no file of this size.
        """
        self.path = path
        self.num_bytes = num_bytes
        self._record = record_of(path)
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path.parent):
                if not path.is_file() or path.stat().st_size != num_bytes:
                    # Nothing that was recorded is true of the file that is made now.
                    self._record.unlink(missing_ok=True)
                    with path.open("wb") as file:
                        file.truncate(num_bytes)
                self._present = RangeSet(_read_record(self._record, num_bytes))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(f"cannot keep a file of {num_bytes} bytes as {path}: {reason}") from error

    def missing(self, start: int, stop: int) -> list[Range]:
        """The ranges between `start` and `stop` that are not present."""
        with self._lock:
            return self._present.missing(start, stop)

    def write(self, start: int, pieces: Iterable[bytes]) -> Iterator[int]:
        """Write bytes from `start` on, and record them; yields the number of bytes of each piece.

        However it ends, also when `pieces` raises, what was written is recorded.

        Raises:
            UsageError: If the disk is full.
        """
        noted = position = start
        due = time.monotonic() + NOTE_SECONDS
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(start)
                try:
                    for piece in pieces:
                        write_all(file, piece)
                        position += len(piece)
                        if position - noted >= NOTE_BYTES or time.monotonic() >= due:
                            self._note(file.fileno(), noted, position)
                            noted, due = position, time.monotonic() + NOTE_SECONDS
                        yield len(piece)
                finally:
                    if position > noted:
                        self._note(file.fileno(), noted, position)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}, which keeps what is downloaded: {error.strerror}") from error

    def _note(self, descriptor: int, start: int, stop: int) -> None:
        os.fsync(descriptor)
        with self._lock:
            # In one call, and after a line break, so that what a killed process left of a line spoils no other.
            with self._record.open("ab", buffering=0) as file:
                file.write(b"\n" + _line(start, stop) + b"\n")
            self._present.add(start, stop)


def record_of(path: Path) -> Path:
    """The record of a sparse file."""
    return path.with_name(path.name + RECORD_SUFFIX)


def known_size(path: Path) -> int | None:
    """The size of the remote file that a sparse file stands for, or None if there is none here."""
    return path.stat().st_size if path.is_file() and record_of(path).is_file() else None


def _line(start: int, stop: int) -> bytes:
    text = b"%d %d" % (start, stop)
    return b"%s %08x" % (text, zlib.crc32(text))


def _read_record(path: Path, num_bytes: int) -> Iterator[Range]:
    """The ranges of a record; a line that is not whole does not count."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            start, stop = (int(number) for number in line.split()[:2])
        except ValueError:
            continue
        if line == _line(start, stop) and 0 <= start < stop <= num_bytes:
            yield start, stop


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on a folder, which ends with the process however it ends."""
    if os.name == "nt":  # A folder cannot be opened there: two first downloads at once may fetch a range twice.
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor, waits=True)
        yield
    finally:
        os.close(descriptor)
