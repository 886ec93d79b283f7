"""The weights of a repository on the Hub, of which only those bytes are fetched that somebody asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dapa_merge.checkpoint.header import MAX_HEADER_BYTES
from dapa_merge.checkpoint.remote.mirror import RangeSet, SparseFile, known_size
from dapa_merge.checkpoint.remote.ranges import RemoteFile
from dapa_merge.errors import HubError

# A weight file, a first byte in it, and the byte after the last.
FileRange = tuple[str, int, int]

THREADS = 8
# What one request asks for at most, so that there is work for every thread.
REQUEST_BYTES = 64 << 20


class PartialWeights:
    """Weight files of a repository at one commit, mirrored in the user's cache as far as they were read.

    The mirror is as good as its transport: a range cannot be checked against the checksum of its file.

    Attributes:
        repository: The id of the repository.
        commit: The full hash of the commit.
        folder: Where the mirrored files are. Their bytes must not be read before `ensure` said that they are there.
    """

    def __init__(self, repository: str, commit: str, folder: Path) -> None:
        self.repository = repository
        self.commit = commit
        self.folder = folder
        self._files: dict[str, tuple[RemoteFile, SparseFile]] = {}
        # One download at a time, which uses several connections.
        self._lock = threading.Lock()

    def open_headers(self, shards: Sequence[str]) -> None:
        """Make the header of each weight file present: the first that is known of it.

        Raises:
            RangesIgnored: If the server does not answer with ranges.
            HubError: If it gives no file of this name.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            for shard, opened in zip(shards, pool.map(self._open_header, shards), strict=True):
                self._files[shard] = opened

    def _open_header(self, shard: str) -> tuple[RemoteFile, SparseFile]:
        path = self.folder / shard
        size = known_size(path)
        remote = RemoteFile(self.repository, shard, self.commit, size)
        if size is None:
            prefix = b"".join(remote.read(0, 8))
            assert remote.num_bytes is not None
            local = SparseFile(path, remote.num_bytes)
            sum(local.write(0, [prefix]))
        else:
            local = SparseFile(path, size)
            _fetch(remote, local, 0, min(8, size), lambda _: None)
        with path.open("rb") as file:
            header_stop = 8 + int.from_bytes(file.read(8), "little")
        # A longer header is refused by whoever reads it, from these eight bytes.
        if header_stop <= min(8 + MAX_HEADER_BYTES, local.num_bytes):
            _fetch(remote, local, 8, header_stop, lambda _: None)
        return remote, local

    def missing(self, ranges: Iterable[FileRange]) -> list[FileRange]:
        """What of the given ranges is not present here, without overlaps, in pieces of at most 64 MiB."""
        pieces = []
        for file, start, stop in _merged(ranges):
            for gap_start, gap_stop in self._files[file][1].missing(start, stop):
                for first in range(gap_start, gap_stop, REQUEST_BYTES):
                    pieces.append((file, first, min(first + REQUEST_BYTES, gap_stop)))
        return pieces

    def ensure(self, ranges: Iterable[FileRange], progress: Callable[[int], None] = lambda _: None) -> None:
        """Fetch what of the given ranges is not present, over several connections at once.

        Args:
            ranges: Of the weight files; they may overlap.
            progress: Called with numbers of bytes as they come.

        Raises:
            HubError: If the Hub refuses or is not reached; what came is kept.
            UsageError: If the disk is full.
        """
        wanted = list(ranges)
        if not self.missing(wanted):
            return
        with self._lock:
            pieces = self.missing(wanted)
            stop = threading.Event()

            def fetch(piece: FileRange) -> None:
                file, start, end = piece
                _fetch(*self._files[file], start, end, count)

            def count(num_bytes: int) -> None:
                progress(num_bytes)
                if stop.is_set():
                    raise HubError("the download was given up")

            with ThreadPoolExecutor(THREADS) as pool:
                try:
                    # Each is waited for in turn; the first fault stops the others.
                    for fetched in [pool.submit(fetch, piece) for piece in pieces]:
                        fetched.result()
                except BaseException:
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise


def _fetch(remote: RemoteFile, local: SparseFile, start: int, stop: int, progress: Callable[[int], None]) -> None:
    for gap_start, gap_stop in local.missing(start, stop):
        for num_bytes in local.write(gap_start, remote.read(gap_start, gap_stop)):
            progress(num_bytes)


def _merged(ranges: Iterable[FileRange]) -> list[FileRange]:
    """The same bytes in as few ranges as can be, by file."""
    by_file: dict[str, RangeSet] = {}
    for file, start, stop in ranges:
        by_file.setdefault(file, RangeSet()).add(start, stop)
    return [(file, start, stop) for file, joined in by_file.items() for start, stop in joined]
