"""Fetches only the needed files and byte ranges of models on the Hub.

huggingface_hub caches small files and whole weight files. Ranges are fetched by HTTP (RFC 9110, section 14), resumed
after broken connections, into a sparse local file of the remote file's size. Missing parts would read as zeros, so a
range is read only once it is in the file's record, which is written after its bytes are on disk. URLs, headers,
back-off and the client are huggingface_hub's, so tokens, mirrors and proxies work as they do there.

A whole file is compared with the Hub's SHA-256 of it when it arrives. No checksum is known of a range: before anything
is written or proved by it, it is fetched once more and compared (`PartialWeights.confirm`).
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub

from dapa_merge import __version__
from dapa_merge.checkpoint.contents import LICENCES, SETTINGS
from dapa_merge.checkpoint.folder import (
    ADAPTER_CONFIG_NAME,
    INDEX_NAME,
    cached_sha256,
    refuse_other_bytes,
    sha256_of,
)
from dapa_merge.checkpoint.header import MAX_HEADER_BYTES
from dapa_merge.errors import CheckpointError, HubError, UsageError
from dapa_merge.files import Record, cache_folder, held, write_all
from dapa_merge.hub_client import Absent, api, asking, fault, hub_errors, hub_utils, is_id, no_folder
from dapa_merge.progress import advance, task

# Weight file, first byte, end (exclusive).
FileRange = tuple[str, int, int]

THREADS = 8
# Largest request, small enough to give every thread work.
REQUEST_BYTES = 64 << 20


class PartialWeights:
    """Weight files of a repository at one commit, mirrored in the user's cache as far as they were read.

    Attributes:
        repository: Hub id.
        commit: Full hash.
        folder: The mirrored files. Call `ensure` before reading their bytes, and `confirm` before relying on them.
        known: What the Hub says of its files, by name; empty offline.
    """

    def __init__(
        self, repository: str, commit: str, folder: Path, known: Mapping[str, huggingface_hub.RepoFile]
    ) -> None:
        self.repository = repository
        self.commit = commit
        self.folder = folder
        self.known = known
        self._files: dict[str, tuple[RemoteFile, SparseFile]] = {}
        # One download at a time, which uses several connections.
        self._lock = threading.Lock()

    def open_headers(self, shards: Sequence[str]) -> None:
        """Fetch the header of each weight file; this must come before `missing` and `ensure`.

        Raises:
            RangesIgnored: If the server does not support range requests.
            HubError: If a file cannot be fetched.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            for shard, opened in zip(shards, pool.map(self._open_header, shards), strict=True):
                self._files[shard] = opened

    def _open_header(self, shard: str) -> tuple[RemoteFile, SparseFile]:
        path = self.folder / shard
        size = known_size(path)
        if size is not None and shard in self.known and size != self.known[shard].size:
            # The first answer lied about the size.
            drop(path)
            size = None
        remote = RemoteFile(self.repository, shard, self.commit, size)
        if size is None:
            prefix = b"".join(remote.read(0, 8))
            assert remote.num_bytes is not None
            local = SparseFile(path, remote.num_bytes)
            sum(local.write(0, [prefix]))
        else:
            local = SparseFile(path, size)
            _fetch(remote, local, 0, min(8, size))
        header_stop = _header_stop(path)
        # `read_header` refuses a longer header by these eight bytes.
        if header_stop <= min(8 + MAX_HEADER_BYTES, local.num_bytes):
            _fetch(remote, local, 8, header_stop)
        return remote, local

    def missing(self, ranges: Iterable[FileRange]) -> list[FileRange]:
        """The parts of the given ranges that are not present, without overlaps, in pieces of at most 64 MiB."""
        pieces = []
        for file, start, stop in _merged(ranges):
            for gap_start, gap_stop in self._files[file][1].missing(start, stop):
                for first in range(gap_start, gap_stop, REQUEST_BYTES):
                    pieces.append((file, first, min(first + REQUEST_BYTES, gap_stop)))
        return pieces

    def ensure(self, ranges: Iterable[FileRange]) -> None:
        """Fetch the parts of the given ranges that are not present, over several connections at once.

        Raises:
            HubError: If the Hub refuses or cannot be reached; bytes that arrived are kept.
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
                _fetch(*self._files[file], start, end, check)

            def check() -> None:
                if stop.is_set():
                    raise HubError("the download was cancelled")

            with ThreadPoolExecutor(THREADS) as pool:
                try:
                    # Each is waited for in turn; the first fault stops the others.
                    for fetched in [pool.submit(fetch, piece) for piece in pieces]:
                        fetched.result()
                except BaseException:
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def confirm(self, ranges: Iterable[FileRange]) -> None:
        """Make sure that ranges, and the headers of their files, hold what the Hub has.

        Whole files are compared with the Hub's SHA-256. Other ranges are fetched a second time, and compared; what was
        confirmed before is compared with the digest that it had then, and needs no connection.

        Raises:
            HubError: If the Hub gave other bytes the second time, or cannot be reached; different bytes are removed.
        """
        wanted = _merged(ranges)
        self.ensure(wanted)
        files = dict.fromkeys(file for file, _, _ in wanted)
        whole = {file for file in files if self._is_whole(file)}
        wanted = _merged([*wanted, *((file, 0, _header_stop(self.folder / file)) for file in files)])
        gaps = [
            (file, first, min(first + REQUEST_BYTES, gap_stop))
            for file, start, stop in wanted
            if file not in whole
            for gap_start, gap_stop in self._files[file][1].unconfirmed(start, stop)
            for first in range(gap_start, gap_stop, REQUEST_BYTES)
        ]
        total = sum(stop - start for _, start, stop in gaps)
        with task("fetching a second time", total, "bytes"), ThreadPoolExecutor(THREADS) as pool:
            wrong = [gap for gap, is_same in zip(gaps, pool.map(self._confirm, gaps), strict=True) if not is_same]
        faults = [
            self._differs(file, f"had other bytes, of {start} to {stop - 1}, when these were fetched again")
            for file, start, stop in wrong
        ]
        if faults:
            raise faults[0]

    def _is_whole(self, file: str) -> bool:
        """Whether all of a file is here and has the Hub's SHA-256."""
        local, known = self._files[file][1], self.known.get(file)
        if known is None or known.lfs is None or local.missing(0, local.num_bytes):
            return False
        if sha256_of(local.path, 0, local.num_bytes) != known.lfs.sha256:
            raise self._differs(file, "has not the SHA-256 that the Hub states")
        return True

    def _confirm(self, gap: FileRange) -> bool:
        file, start, stop = gap
        remote, local = self._files[file]
        return local.confirm(start, stop, remote.read(start, stop, is_again=True))

    def _differs(self, file: str, how: str) -> HubError:
        drop(self.folder / file)
        return HubError(
            f"{file} of {self.repository}@{self.commit[:12]} {how}; what was fetched of it was removed: run the "
            f"command again, and if that does not help, download the model with `hf download` first"
        )

    def drop(self) -> None:
        """Remove all that was fetched."""
        for file in self._files:
            drop(self.folder / file)
        self._files.clear()


def _header_stop(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _fetch(
    remote: RemoteFile, local: SparseFile, start: int, stop: int, check: Callable[[], None] = lambda: None
) -> None:
    for gap_start, gap_stop in local.missing(start, stop):
        for num_bytes in local.write(gap_start, remote.read(gap_start, gap_stop)):
            advance(num_bytes, "bytes")
            check()


def _merged(ranges: Iterable[FileRange]) -> list[FileRange]:
    """Merge the overlapping and adjacent ranges of each file."""
    by_file: dict[str, RangeSet] = {}
    for file, start, stop in ranges:
        by_file.setdefault(file, RangeSet()).add(start, stop)
    return [(file, start, stop) for file, joined in by_file.items() for start, stop in joined]


# Small files, never pickles. Code is copied into a result as part of the target, but never run.
SMALL_PATTERNS = [*SETTINGS, *LICENCES, "*.py", "*.index.json", ADAPTER_CONFIG_NAME]
# A tokenizer of a quarter of a million tokens takes half of it; weights are larger.
MAX_SMALL_BYTES = 64 << 20
# Subfolders hold training state or other programs' files, except for chat templates (additional_...).
SUBFOLDERS = ["[!a]*/*", "a[!d]*/*"]


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository whose small files are cached.

    Attributes:
        repository: Hub id.
        commit: Full hash.
        folder: Its files in huggingface_hub's cache.
        files: Names of all files in the repository's top folder; offline, of the cached ones.
        known: What the Hub says of these files; empty offline.
    """

    repository: str
    commit: str
    folder: Path
    files: frozenset[str]
    known: Mapping[str, huggingface_hub.RepoFile] = field(default_factory=dict, repr=False)

    def fetch(self, names: Sequence[str]) -> Path:
        """Download whole files, and return the folder that holds them.

        Raises:
            HubError: If they cannot be fetched, or arrive with other bytes than the Hub's; the next call resumes the
                download.
        """
        if not (lacking := self.lacks(names)):
            return self.folder
        patterns = [glob.escape(name) for name in names]
        with asking(f"fetch {self.repository}"):
            fetched = huggingface_hub.snapshot_download(self.repository, revision=self.commit, allow_patterns=patterns)
            folder = Path(fetched)
        self.check(lacking)
        return folder

    def check(self, names: Iterable[str]) -> None:
        """Compare cached files with the Hub's SHA-256s, as far as these are known.

        Raises:
            HubError: If one differs; it is removed from the cache.
        """
        expected = {}
        for name in names:
            lfs = self.known[name].lfs if name in self.known else None
            if sha256 := lfs.sha256 if lfs is not None else cached_sha256(self.folder / name):
                expected[name] = sha256
        refuse_other_bytes(self.folder, expected, f"{self.repository}@{self.commit[:12]}")

    def lacks(self, names: Sequence[str]) -> list[str]:
        """The named files that are not cached."""
        return [name for name in names if not (self.folder / name).is_file()]


def open_snapshot(repository: str, revision: str | None) -> Snapshot:
    """Fetch the small files of a repository, or use the cached ones if the Hub cannot be reached.

    Args:
        repository: Hub id.
        revision: Branch, tag or commit; None for `main`.

    Raises:
        CheckpointError: If `repository` is not a Hub id.
        HubError: If it cannot be fetched.
    """
    if not is_id(repository):
        raise CheckpointError(f"{no_folder(repository)}, and it is not the id of a Hub repository")
    what = Absent(repository)
    with asking(what):
        patterns = {"allow_patterns": SMALL_PATTERNS, "ignore_patterns": SUBFOLDERS}
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, **patterns))
    known: dict[str, huggingface_hub.RepoFile] = {}
    here = {path.name for place in (folder, mirror_folder(repository, folder.name)) for path in place.glob("*.*")}
    try:
        with asking(what):
            tree = api().list_repo_tree(repository, revision=folder.name)
            known = {item.path: item for item in tree if isinstance(item, huggingface_hub.RepoFile)}
        here |= known.keys()
    except HubError:
        # Cached weights can be used offline.
        if not any(name.endswith((".safetensors", INDEX_NAME)) for name in here):
            raise
    snapshot = Snapshot(repository, folder.name, folder, frozenset(here), known)
    snapshot.check(
        path.name for path in folder.glob("*.*") if path.is_file() and path.stat().st_size <= MAX_SMALL_BYTES
    )
    return snapshot


def mirror_folder(repository: str, commit: str) -> Path:
    """Folder of a commit's partial weights in the user's cache."""
    return cache_folder("mirrors") / repository.replace("/", "--") / commit


# First byte, end (exclusive).
Range = tuple[int, int]

RECORD_SUFFIX = ".ranges"
# Each connection records its progress after this many bytes or seconds; a kill loses what came since.
NOTE_BYTES = 8 << 20
NOTE_SECONDS = 1.0


class RangeSet:
    """Disjoint integer ranges, in order; adjacent ones are merged."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._ranges: list[Range] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Range]:
        return iter(self._ranges)

    def add(self, start: int, stop: int) -> None:
        """Add the numbers in `[start, stop)`."""
        if start >= stop:
            return
        first = bisect.bisect_left(self._ranges, start, key=lambda known: known[1])
        last = bisect.bisect_right(self._ranges, stop, key=lambda known: known[0])
        if first < last:
            start, stop = min(start, self._ranges[first][0]), max(stop, self._ranges[last - 1][1])
        self._ranges[first:last] = [(start, stop)]

    def missing(self, start: int, stop: int) -> list[Range]:
        """The ranges within `[start, stop)` that are not in the set."""
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
    """A partly downloaded file; its record of present ranges lies next to it.

    Attributes:
        path: The file.
        num_bytes: Full size, including missing ranges.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Open the file, or create it with nothing present.

        Raises:
            CheckpointError: If the folder cannot be written, or cannot hold a file of this size.
        """
        self.path = path
        self.num_bytes = num_bytes
        self._record = Record(record_of(path))
        self._present = RangeSet()
        # By range, the SHA-256 of what was fetched twice.
        self._confirmed: dict[Range, str] = {}
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._held():
                if not path.is_file() or path.stat().st_size != num_bytes:
                    # An old record does not apply to the new file.
                    record_of(path).unlink(missing_ok=True)
                    with path.open("wb") as file:
                        file.truncate(num_bytes)
                self._read()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(f"cannot create {path} with {num_bytes} bytes: {reason}") from error

    def missing(self, start: int, stop: int) -> list[Range]:
        """The ranges between `start` and `stop` that are not present."""
        with self._lock:
            return self._present.missing(start, stop)

    def write(self, start: int, pieces: Iterable[bytes]) -> Iterator[int]:
        """Write bytes from `start` on, and record them; yields the number of bytes of each piece.

        Written bytes are recorded even if `pieces` raises.

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
            raise UsageError(f"cannot write the download to {self.path}: {error.strerror}") from error

    def unconfirmed(self, start: int, stop: int) -> list[Range]:
        """The ranges within `[start, stop)` that were not fetched twice, or changed here since."""
        sound = RangeSet()
        with self._lock:
            confirmed = list(self._confirmed.items())
        for (first, last), sha256 in confirmed:
            if first < stop and start < last and sha256 == sha256_of(self.path, first, last):
                sound.add(first, last)
        return sound.missing(start, stop)

    def confirm(self, start: int, stop: int, pieces: Iterable[bytes]) -> bool:
        """Compare bytes from `start` on with others of the same range; equal ones are recorded as confirmed."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(start)
            for piece in pieces:
                if file.read(len(piece)) != piece:
                    return False
                digest.update(piece)
                advance(len(piece), "bytes")
        self._append({"start": start, "stop": stop, "sha256": digest.hexdigest()})
        return True

    def _note(self, descriptor: int, start: int, stop: int) -> None:
        os.fsync(descriptor)
        self._append({"start": start, "stop": stop})

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock, self._held():
            # Another process may download the same file.
            self._read()
            self._record.append(entry)
            self._take(entry)

    def _read(self) -> None:
        for entry in self._record.read():
            self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        start, stop = entry["start"], entry["stop"]
        if 0 <= start < stop <= self.num_bytes:
            self._present.add(start, stop)
            if "sha256" in entry:
                self._confirmed[start, stop] = entry["sha256"]

    def _held(self) -> AbstractContextManager[None]:
        return held(record_of(self.path).with_suffix(".lock"))


def record_of(path: Path) -> Path:
    """Path of a sparse file's record."""
    return path.with_name(path.name + RECORD_SUFFIX)


def drop(path: Path) -> None:
    """Remove a sparse file and its record, the record first."""
    record_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def known_size(path: Path) -> int | None:
    """Size of the remote file that a sparse file mirrors; None if the sparse file is absent."""
    return path.stat().st_size if path.is_file() and record_of(path).is_file() else None


# Consecutive requests without progress before a download fails.
MAX_FAILURES = 6
MAX_WAIT_SECONDS = 8.0
TIMEOUT_SECONDS = 60.0
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RangesIgnored(HubError):
    """The server answers a range request with the whole file."""


class RemoteFile:
    """One file of a repository, at one commit."""

    def __init__(self, repository: str, name: str, commit: str, num_bytes: int | None = None) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self._url = huggingface_hub.hf_hub_url(repository, name, revision=commit)
        headers = hub_utils().build_hf_headers(library_name="dapa-merge", library_version=__version__)
        # Ranges of a compressed response would be other bytes.
        self._headers = headers | {"Accept-Encoding": "identity"}

    def read(self, start: int, stop: int, *, is_again: bool = False) -> Iterator[bytes]:
        """Yields the bytes in `[start, stop)`, in pieces as they arrive.

        Args:
            start: The first byte.
            stop: The end, exclusive.
            is_again: Ask servers between here and the Hub not to answer from their memory.

        Raises:
            RangesIgnored: If the server does not support range requests.
            HubError: If it refuses, or fails several times in a row.
        """
        position, num_failures = start, 0
        while position < stop:
            before = position
            try:
                for piece in self._answer(position, stop, is_again):
                    position += len(piece)
                    yield piece
                if position == before:
                    raise HubError("the answer was empty")
            except RangesIgnored:
                raise
            except (hub_errors().OfflineModeIsEnabled, hub_errors().HfHubHTTPError) as error:
                # Transient statuses were retried already.
                raise fault(f"read {self._url}", error) from error
            except Exception as error:
                # The HTTP library's errors have no common class; after any of them the rest is requested again.
                num_failures = 0 if position > before else num_failures + 1
                if num_failures > MAX_FAILURES:
                    raise fault(f"read {self._url}", error) from error
                if num_failures:
                    time.sleep(min(0.25 * 2**num_failures, MAX_WAIT_SECONDS))

    def _answer(self, start: int, stop: int, is_again: bool) -> Iterator[bytes]:
        """Yields the bytes that one request returns of a range, possibly not all of them."""
        headers = self._headers | ({"Cache-Control": "no-cache"} if is_again else {})
        with hub_utils().http_stream_backoff(
            "GET",
            self._url,
            headers=headers | {"Range": f"bytes={start}-{stop - 1}"},
            timeout=TIMEOUT_SECONDS,
            base_wait_time=0.5,
            # The caller resumes a broken connection, since it knows the position.
            retry_on_exceptions=(),
            retry_on_status_codes=RETRIED_STATUSES,
        ) as response:
            hub_utils().hf_raise_for_status(response)
            self._check(response, start, stop)
            left = stop - start
            # Not gathered into larger pieces, which would be lost if the connection broke.
            for piece in response.iter_raw():
                if len(piece) > left:
                    raise HubError("the answer was longer than the requested range")
                left -= len(piece)
                yield piece

    def _check(self, response: Any, start: int, stop: int) -> None:
        """Raise unless the response starts where the range does, is not longer, and the file has the known size."""
        if response.status_code == 200:
            raise RangesIgnored(
                f"{self._url} returned the whole file instead of the requested byte range; "
                f"download the model first, with `hf download`"
            )
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or match is None:
            raise HubError(f"a range request was answered with status {response.status_code} and no Content-Range")
        first, last, size = map(int, match.groups())
        if self.num_bytes is None:
            self.num_bytes = size
        if first != start or last >= stop or size != self.num_bytes:
            raise HubError(f"requested bytes {start} to {stop - 1} of {self.num_bytes}, but received {match.string!r}")
