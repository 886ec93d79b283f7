"""Files on disk: complete or absent, locked against other processes, appended to line by line, in resumable folders.

This module knows nothing of models. A kill, a full disk or a power cut at any moment leaves the old content, the new
content, or a record without its last line.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import platformdirs
from filelock import FileLock, Timeout

from dapa_merge.errors import DapaError, UsageError, nearest_of

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors of some cluster file systems, which have locks only if mounted with them.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# Errors of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
CHECK_DIGITS = 12
# The journal of a thousand tests of five hundred prompts takes a fifth of it.
MAX_RECORD_BYTES = 256 << 20
PICTURES = (".png", ".svg")
# Prefix of a run's charts, which lie among a model's own files.
CHART_PREFIX = "dapa_"
JOURNAL_BEGINS = b'{"journal":'
# Files that a system makes up when they are read: /proc/self/environ holds the tokens of this process.
_SYSTEM_FOLDERS = ("/proc", "/sys", "/dev")
# Memory that is used like a disk.
_SHARED_MEMORY = "/dev/shm"
KEY_BYTES = 32


def cache_folder(kind: str) -> Path:
    """The folder of one kind of content in the user's cache; it may be absent."""
    return Path(platformdirs.user_cache_dir("dapa-merge")) / kind


@functools.cache
def own_key() -> bytes:
    """A secret of this user, which tells what this user's processes wrote; made if absent.

    It is not in the cache, because caches are copied from machine to machine. Where it cannot be kept, or others could
    read it, it ends with this process.
    """
    path = Path(platformdirs.user_state_dir("dapa-merge")) / "key"
    with suppress(OSError, UsageError):
        if not path.exists():
            _make_key(path)
        state = path.lstat()
        is_private = os.name == "nt" or (state.st_uid == os.geteuid() and not state.st_mode & 0o077)
        if stat.S_ISREG(state.st_mode) and is_private and len(key := path.read_bytes()) == KEY_BYTES:
            return key
    return secrets.token_bytes(KEY_BYTES)


def _make_key(path: Path) -> None:
    """Write a new key, unless another process does so first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with suppress(UsageError):
            _name(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def nearest_here(path: str, known: Iterable[str] = (), *, is_folder: bool = False) -> str:
    """Suggest the nearest name beside a path that does not exist, or of other names; empty if none is near.

    Args:
        path: The path.
        known: The other names, such as Hub ids, by whose last part they are compared.
        is_folder: Whether it should be a folder.
    """
    head, name = os.path.split(path.rstrip("/"))
    meant = {one.rpartition("/")[2]: one for one in known}
    # A path may be none that the system can have.
    with suppress(OSError, ValueError), os.scandir(head or ".") as beside:
        meant |= {one.name: os.path.join(head, one.name) for one in beside if one.is_dir() or not is_folder}
    return nearest_of(name, meant, meant.__getitem__)


def refuse_special(path: Path, max_bytes: int | None = None) -> None:
    """Refuse to read what is not a regular file of a user, wherever links lead; an absent file and a folder may pass.

    Raises:
        UsageError: If it is a pipe or a device, the system makes it up, or it is larger than `max_bytes`.
    """
    if os.path.isdir(path) or not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise UsageError(f"{path} is a pipe or a device; write its content to a file, and name the file")
    real = Path(os.path.realpath(path))
    if any(map(real.is_relative_to, _SYSTEM_FOLDERS)) and not real.is_relative_to(_SHARED_MEMORY):
        raise UsageError(f"{path} is a file of the system, not of a user; name another file")
    if max_bytes is not None and (size := real.stat().st_size) > max_bytes:
        raise UsageError(f"{path} has {size / 1e6:.0f} MB; at most {max_bytes / 1e6:.0f} MB are read")


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[str | bytes], None]]:
    """Reserve a new file before the work that produces its content.

    Yields:
        A function that writes all of it, text as UTF-8, after which the file exists; it raises `DapaError` on failure.

    Raises:
        UsageError: If the file exists, or its folder is absent or cannot be written.
    """
    beside = _beside(path)
    try:
        _refuse_existing(path)
        file = beside.open("xb")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another file") from error

    def write(content: str | bytes) -> None:
        try:
            with file:
                file.write(content.encode() if isinstance(content, str) else content)
            beside.replace(path)
        except OSError as error:
            raise DapaError(f"{path} cannot be written: {error.strerror}") from error

    try:
        yield write
    finally:
        with suppress(OSError):
            file.close()
        beside.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file, completely or not at all.

    Raises:
        DapaError: If it cannot be written.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Replace files that belong together; if the disk has no room for all, none is replaced.

    Raises:
        DapaError: If one cannot be written.
    """
    beside = {path: _beside(path) for path in contents}
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            with beside[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(beside[path], path)
    except OSError as error:
        raise DapaError(f"{path} cannot be written: {error.strerror}; the previous content is kept") from error
    finally:
        for new in beside.values():
            with suppress(OSError):
                new.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A temporary name in the same folder, since only a file on the same disk can be renamed atomically."""
    return path.with_name(f".dapa-merge-{secrets.token_hex(8)}")


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """Write a new binary file, unbuffered; it is flushed to disk and gets its name at the end of the block.

    Until then it is hidden next to `path`. A killed process's leftover there is overwritten.

    Raises:
        UsageError: If `path` exists, another process is writing it, or it cannot be written or does not fit.
    """
    path = Path(os.path.abspath(path))
    hidden = hidden_path(path, ".partial")
    # O_NOFOLLOW: never write through a link that somebody put under the hidden name.
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with ExitStack() as stack:
        try:
            _refuse_existing(path)
            busy = f"{path} is being written by another process; wait for it"
            stack.enter_context(held(hidden_path(path, ".lock"), busy))
            file = stack.enter_context(os.fdopen(os.open(hidden, flags, 0o666), "r+b", buffering=0))
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}; name another file") from error
        try:
            yield file
            os.fsync(file.fileno())
            _name(hidden, path)
            flush_folder(path.parent)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise UsageError(f"no space left on the disk of {path}; nothing was kept") from error
            raise
        finally:
            with suppress(OSError):
                hidden.unlink()


def clear_leftover(path: Path) -> None:
    """Remove a killed process's leftover of a staged file; do nothing if the process is alive."""
    path = Path(os.path.abspath(path))
    with suppress(OSError, UsageError), held(hidden_path(path, ".lock"), "in use"):
        hidden_path(path, ".partial").unlink()


def hidden_path(path: Path, suffix: str) -> Path:
    """A hidden path next to `path`, derived from its name but always short."""
    return path.with_name(f".dapa-merge-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}{suffix}")


def _refuse_existing(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.lstat(path)
        raise UsageError(f"{path} exists already; name another file or remove it")


def _name(hidden: Path, path: Path) -> None:
    """Give a complete file its name, unless another file got it meanwhile."""
    try:
        # A rename would replace what is there; a link cannot.
        os.link(hidden, path)
    except FileExistsError:
        _refuse_existing(path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _refuse_existing(path)
        hidden.rename(path)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    if os.name == "nt":  # Folders cannot be opened on Windows, and renames are durable without this.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_state(path: Path, *, counts_links: bool = True) -> list[int]:
    """Size, times of change and inode of a file, or of a link's target: they change when the file does.

    Args:
        path: The file.
        counts_links: Include the time of the last change of any property, such as the number of links. Programs like
            `tar` and `rsync` can set the modification time back, but not this one.

    Raises:
        OSError: If the file is absent.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino, *([found.st_ctime_ns] if counts_links else [])]


def write_all(file: IO[bytes], piece: bytes | memoryview) -> None:
    """Write everything to an unbuffered file, whose writes may be partial."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


@contextmanager
def held(lock: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock file; the lock is released when the process ends in any way, the file is removed after the block.

    On a file system without locks it counts as held: two simultaneous processes are not noticed there.

    Args:
        lock: The file.
        busy: Error message if another process holds it; None to wait for that process.

    Raises:
        UsageError: If another process holds it.
        OSError: If the file cannot be created.
    """
    # The soft lock of file systems without locks would outlive a killed process on another machine.
    holding = FileLock(lock, fallback_to_soft=False)
    lock.parent.stat()  # filelock would create a missing folder.
    try:
        holding.acquire(timeout=-1 if busy is None else 0)
    except Timeout:
        raise UsageError(busy or f"{lock} is held") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        # Before the release: filelock does not take a lock on a file that lost its name.
        with suppress(OSError):
            lock.unlink()
        holding.release()


class Record:
    """An append-only file of JSON objects, one per line, each on disk before `append` returns.

    Each line ends with `check`, a prefix of the SHA-256 over the previous line's check and the rest of its own line, so
    torn, altered, missing and foreign lines are detected. Processes that append to the same record hold a lock
    meanwhile, and call `read` first.

    Attributes:
        path: The file; absent until the first `append`.
        fault: Number of the first invalid complete line, from 1, and what is wrong with it; None if all are valid.
        tail: The bytes after the last valid line: nothing, a line torn by a kill, or everything from the fault on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: tuple[int, str] | None = None
        self.tail = b""
        self._check = ""
        self._num_lines = 0
        self._num_bytes = 0

    def read(self) -> list[dict[str, Any]]:
        """Read the objects that follow those already read, up to the first line that is torn or altered.

        Raises:
            OSError: If the file cannot be read.
        """
        content, start = b"", self._num_bytes
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_RECORD_BYTES:
                raise OSError(errno.EFBIG, f"It is larger than {MAX_RECORD_BYTES >> 20} MiB, which no record needs")
            file.seek(start)
            content = file.read()
        self.fault = None
        entries = []
        for line in content.split(b"\n")[:-1]:
            entry = self._parse(line)
            if self.fault is not None:
                break
            entries.append(entry)
        self.tail = content[self._num_bytes - start :]
        return entries

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an object in place of any invalid tail, and flush it to disk.

        Raises:
            OSError: If it cannot be written; earlier lines are kept.
        """
        line, check = record_line(entry, self._check)
        # A record that was removed meanwhile must not be created again from the middle.
        flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0) | (0 if self._num_bytes else os.O_CREAT)
        with os.fdopen(os.open(self.path, flags, 0o666), "ab", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > self._num_bytes:
                file.truncate(self._num_bytes)
            write_all(file, line)
            os.fsync(file.fileno())
        self.tail = b""
        self._pass(line, check)

    def cut(self) -> None:
        """Cut off everything after the last valid line."""
        if self.tail:
            os.truncate(self.path, self._num_bytes)
            self.tail = b""

    def forget(self) -> None:
        """Start over: the next `append` replaces everything."""
        self._check, self._num_lines, self._num_bytes = "", 0, 0

    def _parse(self, line: bytes) -> dict[str, Any]:
        """Read the next line; sets `fault` if it is invalid."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        check: Any = entry.pop("check", None) if isinstance(entry, dict) else None
        number = self._num_lines + 1
        if entry is None:
            self.fault = number, "it is not JSON"
        elif not isinstance(entry, dict):
            self.fault = number, "it is not a JSON object"
        elif (line + b"\n", check) != record_line(entry, self._check):
            self.fault = number, "its check does not match"
        else:
            self._pass(line + b"\n", check)
            return entry
        return {}

    def _pass(self, line: bytes, check: str) -> None:
        self._check, self._num_lines = check, self._num_lines + 1
        self._num_bytes += len(line)


def record_line(entry: Mapping[str, Any], last_check: str = "") -> tuple[bytes, str]:
    """A line of a record, and its check."""
    check = hashlib.sha256(last_check.encode() + plain_json(entry)).hexdigest()[:CHECK_DIGITS]
    return plain_json({**entry, "check": check}) + b"\n", check


def plain_json(content: object) -> bytes:
    """JSON in the canonical form for digests."""
    return json.dumps(content, separators=(",", ":")).encode()


def check_folder(out: Path, is_own: Callable[[Path], bool], kind: str) -> None:
    """Raise `UsageError` unless a folder is new, empty or the command's own, and can be written."""
    try:
        if out.exists() and not is_own(out) and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} exists and is not the folder of a {kind}; name another or remove it")
        place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not place.is_dir():
            raise UsageError(f"{out} cannot be made: {place} is not a folder; name another folder")
        if not os.access(place, os.W_OK):
            raise UsageError(f"{out} cannot be written: {os.strerror(errno.EACCES)}; name another folder")
    except OSError as error:
        raise UsageError(f"{out} cannot be read: {error.strerror}; name another folder") from error


def make_folder(path: Path) -> None:
    """Make a folder, if absent.

    Raises:
        UsageError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}; name another folder") from error


def begins_journal(path: Path) -> bool:
    """Whether a path is a file that starts like a journal.

    Raises:
        OSError: If it cannot be read.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(JOURNAL_BEGINS)) == JOURNAL_BEGINS


def forget_pictures(folder: Path, beginnings: tuple[str, ...]) -> None:
    """Remove an earlier run's pictures, those whose names begin so; others in the folder are not ours."""
    for path in folder.iterdir():
        if path.suffix in PICTURES and path.name.startswith(beginnings) and path.is_file():
            path.unlink(missing_ok=True)


def remove_pictures(folder: Path, names: Iterable[str]) -> None:
    """Remove the pictures of these names, given without suffix.

    Raises:
        OSError: If one cannot be removed.
    """
    for name in names:
        for kind in PICTURES:
            (folder / f"{name}{kind}").unlink(missing_ok=True)
