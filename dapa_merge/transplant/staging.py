"""The hidden folder next to a result's final place, where the result is made and a killed run is resumed.

Its name is derived from the result's. It holds `result`, which becomes the result by one rename; `record`, the list of
finished files; `holder`, which names the running process; and `lock`, which is released when that process ends.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.digest import Digests
from dapa_merge.errors import HubError, Stopped, UsageError
from dapa_merge.files import DISK_FULL, Record, file_state, held, hidden_path


@dataclass(frozen=True)
class Staging:
    """A result in the making."""

    folder: Path
    finished: FinishedFiles


def staging_folder(out: Path) -> Path:
    """Path of the hidden folder in which the result `out` is made."""
    return hidden_path(out, ".partial")


@contextmanager
def staging(out: Path, job: Mapping[str, Any]) -> Iterator[Staging]:
    """Hold the hidden folder of one result; files that an earlier run of the same job finished are kept.

    After a temporary fault (no space, no network, Ctrl-C) the folder stays, so the same job can be resumed. After a
    success or any other fault it is removed.

    Args:
        out: The result's final place, absolute.
        job: Everything that decides the result's bytes, as JSON data.

    Raises:
        UsageError: If another run holds the folder, it cannot be made, or the disk is full.
        HubError: As raised in the block, with a note of what is kept.
    """
    parent = out.parent
    new_parents = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    place = staging_folder(out)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        hold = _hold(place, out)
    except OSError as error:
        raise UsageError(f"cannot write next to {out}: {error.strerror}") from error
    keep = False
    finished: FinishedFiles | None = None
    try:
        finished = _open(place, job)
        yield Staging(place / "result", finished)
    except (KeyboardInterrupt, HubError, OSError) as fault:
        # Until the record is read, earlier runs' files are unknown, so everything is kept.
        keep = finished is None or bool(finished.files)
        kept = _kept(place, finished)
        if isinstance(fault, KeyboardInterrupt):
            raise Stopped(kept) from fault
        if isinstance(fault, HubError):
            raise type(fault)(f"{fault}; {kept}") from fault
        if fault.errno in DISK_FULL:
            raise UsageError(f"no space left on the disk of {out}; {kept}") from fault
        raise
    finally:
        if not keep:
            _empty(place)
        elif finished is not None:
            _remove_unfinished(place / "result", finished)
        hold.close()
        if not keep:
            for folder in (place, *new_parents):
                with suppress(OSError):
                    folder.rmdir()


def _hold(place: Path, out: Path) -> ExitStack:
    """Make the folder, or reuse one that no process holds; closing the result releases it."""
    with ExitStack() as stack:
        while True:
            place.mkdir(exist_ok=True)
            _refuse_foreign(place)
            busy = f"{out} is being made by another run{_holder(place)}; wait for it, or name another folder"
            # The previous holder may remove the folder at this very moment.
            with suppress(FileNotFoundError):
                stack.enter_context(held(place / "lock", busy))
                break
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        (place / "holder").write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        return stack.pop_all()


def _holder(place: Path) -> str:
    try:
        return f" ({(place / 'holder').read_text()[:200]})"
    except (OSError, ValueError):
        return ""


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that another user planted in a shared folder to redirect our writes."""
    found = folder.lstat()
    if folder.is_symlink() or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise UsageError(f"{folder}, where the result would be made, belongs to another user or is a link; remove it")


def _open(place: Path, job: Mapping[str, Any]) -> FinishedFiles:
    result = place / "result"
    finished = FinishedFiles(place / "record", job, result)
    if finished.files:
        _remove_unfinished(result, finished)
    else:
        shutil.rmtree(result, ignore_errors=True)
    result.mkdir(exist_ok=True)
    return finished


def _remove_unfinished(result: Path, finished: FinishedFiles) -> None:
    """Free the space of files that must be written again."""
    for path in [*result.rglob("*")]:
        if not path.is_dir() and path.relative_to(result).as_posix() not in finished.files:
            path.unlink(missing_ok=True)


def _empty(place: Path) -> None:
    """Remove everything but the lock, which is removed when released."""
    for name in ("record", "holder"):
        (place / name).unlink(missing_ok=True)
    shutil.rmtree(place / "result", ignore_errors=True)


def _kept(place: Path, finished: FinishedFiles | None) -> str:
    if finished is None:
        return f"{place} is kept"
    if not finished.files:
        return "nothing was finished, so nothing was kept"
    size = sum(digests.num_bytes for digests in finished.files.values()) / 1e9
    kept = f"{len(finished.files)} finished files ({size:.2f} GB) are kept in {place}"
    return f"{kept}, and the same command goes on from there"


class FinishedFiles:
    """The record of one job: the first line is the job, each further line a file that is on disk."""

    def __init__(self, path: Path, job: Mapping[str, Any], folder: Path) -> None:
        """Continue this job's record, or replace any other one.

        Raises:
            OSError: If it cannot be written.
        """
        self.files: dict[str, Digests] = {}
        self._lock = threading.Lock()
        self._record = Record(path)
        lines = self._record.read()
        if lines[:1] == [json.loads(json.dumps({"job": job}))]:
            self.files = _unchanged(lines[1:], folder)
        else:
            self._record.forget()
            self._record.append({"job": job})

    def add(self, name: str, path: Path, digests: Digests) -> None:
        """Record a file that is on disk."""
        entry = {"file": name, "bytes": digests.num_bytes, "digest": digests.digest, "spans": dict(digests.spans)}
        with self._lock:
            self._record.append({**entry, "state": _state(path)})
            self.files[name] = digests


def finished_files(place: Path) -> dict[str, Digests]:
    """The files that the next run will reuse, in a staging folder that no process holds."""
    return _unchanged(Record(place / "record").read()[1:], place / "result")


def _unchanged(lines: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Digests]:
    return {
        line["file"]: Digests(line["bytes"], line["digest"], line["spans"])
        for line in lines
        if _state(folder / line["file"]) == line["state"]
    }


def _state(path: Path) -> list[int] | None:
    try:
        return None if path.is_symlink() else file_state(path)
    except OSError:
        return None
