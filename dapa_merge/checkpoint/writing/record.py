"""The record of a result in the making: which job it is, and which of its files are finished and on disk.

A text file of JSON objects, one a line behind the beginning of its SHA-256; only ever appended to, each line flushed to
the disk. The first line is the job: everything that decides the result's bytes. The others are files, each written down
only after it is on disk itself. A last line without its end is what a kill leaves behind, and is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.file_state import file_state
from dapa_merge.checkpoint.streams import Digests

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
