"""The hidden folder beside a result's final place, in which it is made and in which a killed run's work is found again.

Its name follows from the result's. Inside are `result`, which becomes the result by one rename; `record`, of the files
that are finished; and `holder`, which says who is at work here and carries the kernel's lock. The lock ends with its
process, however that ends.

Who is at work in a folder: a file that carries the kernel's lock, and says which process has it.

The record of a result in the making: which job it is, and which of its files are finished and on disk.

A text file of JSON objects, one a line behind the beginning of its SHA-256; only ever appended to, each line flushed to
the disk. The first line is the job: everything that decides the result's bytes. The others are files, each written down
only after it is on disk itself. A last line without its end is what a kill leaves behind, and is cut off.

A binary file that appears under its name complete and on disk, or not at all; and the kernel's lock on a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dapa_merge.checkpoint.digest import Digests
from dapa_merge.errors import HubError, Stopped, UsageError
from dapa_merge.files import file_state, is_at, take_lock

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Staging:
    """A result in the making.

    Attributes:
        folder: What will be the result.
        record: Its files that are finished.
    """

    folder: Path
    record: Record


def staging_folder(out: Path) -> Path:
    """Where the result `out` is made."""
    # A name that nobody else would give, and that is short whatever the length of the result's own.
    return out.parent / f"{_prefix(out)}.partial"


@contextmanager
def staging(out: Path, job: Mapping[str, Any]) -> Iterator[Staging]:
    """The hidden folder of one result, for this process alone; what is finished in it, of the same job, is kept.

    It stays if the fault is one after which the same job can go on: no space, no network, Ctrl-C. It is gone after a
    success and after every other fault. What runs of other jobs left in it is cleared first.

    Args:
        out: The result's final place, absolute.
        job: What decides the result's bytes, as JSON has it.

    Raises:
        UsageError: If another run holds it, it cannot be made, or the disk is full.
        HubError: As raised inside, with what is kept.
    """
    parent = out.parent
    new_parents = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    place = staging_folder(out)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(out)
        holder = Holder.take(place, out)
    except OSError as error:
        raise UsageError(f"cannot write beside {out}: {error.strerror}") from error
    keep = False
    try:
        record: Record | None = None
        try:
            record = _open_record(place, job)
            yield Staging(place / "result", record)
        except KeyboardInterrupt as stop:
            keep = record is None or bool(record.files)
            raise Stopped(_kept(place, record)) from stop
        except HubError as error:
            keep = record is None or bool(record.files)
            raise type(error)(f"{error}; {_kept(place, record)}") from error
        except OSError as error:
            # Without a record it is not known yet what earlier runs finished.
            keep = record is None or bool(record.files)
            if error.errno in DISK_FULL:
                raise UsageError(f"no space left on the disk of {out}; {_kept(place, record)}") from error
            raise
        finally:
            if record is not None:
                record.close()
            if keep and record is not None:
                _remove_unfinished(place / "result", record)
    finally:
        if not keep:
            _discard(place)
        holder.release()
        if not keep:
            for empty in new_parents:
                with suppress(OSError):
                    empty.rmdir()


def _open_record(place: Path, job: Mapping[str, Any]) -> Record:
    result = place / "result"
    record = Record(place / "record", job, result)
    if record.files:
        _remove_unfinished(result, record)
    else:
        shutil.rmtree(result, ignore_errors=True)
    result.mkdir(exist_ok=True)
    return record


def _remove_unfinished(result: Path, record: Record) -> None:
    """Give back the space of what has to be written anew."""
    for path in [*result.rglob("*")]:
        if not path.is_dir() and path.relative_to(result).as_posix() not in record.files:
            path.unlink(missing_ok=True)


def _kept(place: Path, record: Record | None) -> str:
    if record is None:
        return f"what {place} holds is kept"
    if not record.files:
        return "nothing was finished, so that nothing was kept"
    size = sum(digests.num_bytes for digests in record.files.values()) / 1e9
    return (
        f"{len(record.files)} finished files ({size:.2f} GB) are kept in {place}, and the same command goes on from "
        f"there"
    )


def _prefix(out: Path) -> str:
    return f".dapa-merge-{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:12]}"


def _discard(place: Path) -> None:
    """Remove a folder, of which another run may be waiting to make one of the same name."""
    away = place.with_name(f"{place.stem}-{secrets.token_hex(4)}.partial")
    try:
        place.rename(away)
    except OSError:  # Windows, where an open file holds it.
        away = place
    shutil.rmtree(away, ignore_errors=True)


def _clear_leftovers(out: Path) -> None:
    """Remove what was being removed when its run was killed."""
    for leftover in out.parent.glob(f"{_prefix(out)}-*.partial"):
        if not leftover.is_symlink() and not is_locked(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def flush_to_disk(folder: Path, *, files: bool = True) -> None:
    """Fsync a folder's entries and, with `files`, the content of its files."""
    if os.name == "nt":  # A folder cannot be opened there, and a rename is durable by itself.
        return
    for path in [*(folder.rglob("*") if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Holder:
    """This process's hold on a folder; it ends with `release`, or with the process."""

    def __init__(self, descriptor: int) -> None:
        """Take over an open and locked file."""
        self._descriptor = descriptor

    @classmethod
    def take(cls, folder: Path, out: Path) -> Holder:
        """Make a folder, or take up one that nobody holds.

        Args:
            folder: The folder to hold.
            out: What to call it when it is held by another.

        Raises:
            UsageError: If another process holds it.
            OSError: If it cannot be made.
        """
        while True:
            folder.mkdir(exist_ok=True)
            _refuse_strange(folder)
            try:
                descriptor = os.open(folder / "holder", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            except FileNotFoundError:
                continue  # It was removed meanwhile.
            if not take_lock(descriptor):
                who = _holder_name(descriptor)
                os.close(descriptor)
                raise UsageError(f"{out} is being made by {who}; wait for it, or name another folder")
            if is_at(descriptor, folder / "holder"):
                break
            os.close(descriptor)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            os.ftruncate(descriptor, 0)
            os.write(
                descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()
            )
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Let others have it."""
        os.close(self._descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock on a folder itself, as earlier versions did; also if that cannot be told."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        return not take_lock(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _refuse_strange(folder: Path) -> None:
    """In a folder that all may write to, another user could have made it first, to have us write elsewhere."""
    found = folder.lstat()
    if folder.is_symlink() or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise UsageError(f"{folder} is not yours, and stands where the result is to be made; remove it")


def _holder_name(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0) if hasattr(os, "pread") else os.read(descriptor, 1000))
        return f"another run (process {int(holder['pid'])} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


CHECK_DIGITS = 16


class Record:
    """The finished files of one job.

    Attributes:
        files: What each finished file is, by its name in the result.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], folder: Path) -> None:
        """Take up the record of this job, or begin one.

        Args:
            path: The file. Whatever it holds but a sound record of this very job is forgotten.
            job: What decides the result's bytes, as JSON has it.
            folder: Where the result's files are; one that is not as the record has it is not finished.

        Raises:
            OSError: If it cannot be written.
        """
        self.path = path
        self.files: dict[str, Digests] = {}
        self._lock = threading.Lock()
        lines = read_lines(path)
        if lines and lines[0] == json.loads(json.dumps({"job": job})):
            self.files = finished_files(lines[1:], folder)
        else:
            path.unlink(missing_ok=True)
            lines = []
        self._file = path.open("ab", buffering=0)
        if lines:
            # What a kill left of a line would run into the next.
            self._file.truncate(sum(len(_line(line)) for line in lines))
        else:
            self._append({"job": job})

    def finish(self, name: str, path: Path, digests: Digests) -> None:
        """Write down a file that is on disk, and be sure of it."""
        content = {"file": name, "bytes": digests.num_bytes, "sha256": digests.sha256, "spans": dict(digests.spans)}
        with self._lock:
            self._append({**content, "state": _state(path)})
            self.files[name] = digests

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        line = _line(content)
        if self._file.write(line) != len(line):
            # A disk that is full takes a part; the next write tells.
            raise OSError(28, os.strerror(28), str(self.path))
        os.fsync(self._file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; none if there is no record, or any line but the end of the last is damaged."""
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            content = json.loads(line[CHECK_DIGITS + 1 :])
        except (ValueError, RecursionError):
            return []
        if not isinstance(content, dict) or _line(content) != line + b"\n":
            return []
        found.append(content)
    return found


def finished_files(lines: Iterable[Mapping[str, Any]], folder: Path) -> dict[str, Digests]:
    """What each finished file is, by its name: those that are in `folder` as the lines behind a record's first say."""
    return {
        line["file"]: Digests(line["bytes"], line["sha256"], line["spans"])
        for line in lines
        if _state(folder / line["file"]) == line["state"]
    }


def _line(content: Mapping[str, Any]) -> bytes:
    plain = json.dumps(content, separators=(",", ":")).encode()
    return hashlib.sha256(plain).hexdigest()[:CHECK_DIGITS].encode() + b" " + plain + b"\n"


def _state(path: Path) -> list[int] | None:
    try:
        return None if path.is_symlink() else file_state(path)
    except OSError:
        return None


# What is answered where a file system has no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, unbuffered; at the end of the block it is flushed to disk and gets its name.

    Until then it is hidden beside `path`. What a killed process left of it there is written over.

    Raises:
        UsageError: If `path` exists, another process is about to make it, or it cannot be written or does not fit.
    """
    path = Path(os.path.abspath(path))
    hidden = _hidden(path)
    try:
        _refuse_existing(path)
        file = os.fdopen(os.open(hidden, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another file") from error
    with file:
        if not take_lock(file.fileno()) or not is_at(file.fileno(), hidden):
            raise UsageError(f"{path} is being written by another process; wait for it")
        try:
            file.truncate(0)
            yield file
            os.fsync(file.fileno())
            _name(hidden, path)
            flush_to_disk(path.parent, files=False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UsageError(f"no space left on the disk of {path}; nothing was kept") from error
            raise
        finally:
            with suppress(OSError):
                hidden.unlink()


def clear_leftover(path: Path) -> None:
    """Remove what a killed process left of `path` beside it; of one that still runs, nothing."""
    hidden = _hidden(Path(os.path.abspath(path)))
    with suppress(OSError), os.fdopen(os.open(hidden, os.O_RDWR | _FLAGS), "r+b") as file:
        if take_lock(file.fileno()) and is_at(file.fileno(), hidden):
            hidden.unlink()


# O_NOFOLLOW: what waits under the hidden name is ours, or it is no plain file.
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _hidden(path: Path) -> Path:
    # A name that nobody else would give, and that is short whatever the length of the file's own.
    return path.with_name(f".dapa-merge-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}.partial")


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already; name another file or remove it")


def _name(hidden: Path, path: Path) -> None:
    """Give a complete file its name, unless that came to be another's meanwhile."""
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
