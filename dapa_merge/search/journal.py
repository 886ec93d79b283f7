"""The journal of a search: every test is on disk before its answer is used, so that a killed search loses nothing.

A text file of JSON objects, one a line, append-only, each flushed to disk. The first line identifies the search by
digests of everything that decides a verdict. The others are tests (`selection`) and notes (`note`: other measurements).
Each line ends with `check`, the beginning of the SHA-256 of the check of the line before and the rest of its own line.
So damage is seen, and so is a line that is missing or another journal's. A kill leaves a last line without its end; it
is cut off, and its test asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dapa_merge.errors import DapaError, UsageError
from dapa_merge.files import take_lock

FORMAT = 1
CHECK_DIGITS = 12


class JournalUnavailable(UsageError):
    """The journal cannot be written: its folder is read-only, its disk is full, or another search holds it."""


class Journal:
    """The tests of one search, in memory and on disk.

    Attributes:
        tests: The outcome of each test, in order, by the names of the selection's units.
        notes: Other measurements, by name.
        path: The file; None for a journal that ends with the process.
    """

    def __init__(
        self,
        path: Path | None = None,
        parts: Mapping[str, str] | None = None,
        *,
        kind: str = "search",
        place: str = "file",
    ) -> None:
        """Open a journal, or begin one.

        Args:
            path: The file; its folder is made if absent.
            parts: A digest or value of everything that decides a verdict, by name.
            kind: What it is the journal of, for messages.
            place: What a user names and removes, for messages: the file, or its folder.

        Raises:
            UsageError: If the file is of another search, or damaged.
            JournalUnavailable: If it cannot be written.
        """
        self.path = path
        self._kind = kind
        self._place = place
        self.tests: dict[frozenset[str], Mapping[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self._last_check = ""
        if path is None:
            return
        self._file = _open(path)
        try:
            if not take_lock(self._file.fileno()):
                raise JournalUnavailable(
                    f"another {kind} is writing the journal {path}; wait for it, or name another {place}"
                )
            self._read(dict(parts or {}))
        except OSError as error:
            self.close()
            raise JournalUnavailable(f"cannot write the journal {path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def record(self, selection: frozenset[str], test: Mapping[str, Any]) -> None:
        """Write down a test, and be sure that it is on disk."""
        self._append({"selection": sorted(selection), **test})
        self.tests[selection] = dict(test)

    def note(self, name: str, value: Any) -> None:
        """Write down another measurement."""
        self._append({"note": name, "value": value})
        self.notes[name] = value

    def close(self) -> None:
        """Close the file, which unlocks it."""
        file, self._file = self._file, None
        if file is not None:
            # Closing tries once more to write what did not fit on the disk, which was told before.
            with suppress(OSError):
                file.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            line, check = _line(content, self._last_check)
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._last_check = check
        except OSError as error:
            raise JournalUnavailable(
                f"cannot write the journal {self.path}: {error.strerror}; what was tested before is kept"
            ) from error

    def _read(self, parts: dict[str, str]) -> None:
        assert self._file is not None
        header = {"journal": FORMAT, "parts": parts}
        self._file.seek(0)
        content = self._file.read()
        *lines, torn = content.split(b"\n")
        if not lines and not _line(header, "")[0].startswith(torn):
            raise self._damaged(1, "it is not a journal")
        entries = [self._parse(line, number) for number, line in enumerate(lines, 1)]
        if entries:
            self._check_owner(entries[0], parts)
        for number, entry in enumerate(entries[1:], 2):
            if isinstance(entry.get("note"), str):
                self.notes[entry["note"]] = entry.get("value")
            elif isinstance(entry.get("selection"), list) and isinstance(entry.get("holds"), bool):
                selection = frozenset(map(str, entry.pop("selection")))
                self.tests[selection] = entry
            else:
                raise self._damaged(number, "it is neither a test nor a note")
        # Only now that it is known to be ours is anything changed.
        if torn:
            self._file.truncate(len(content) - len(torn))
        if not entries:
            self._append(header)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise self._damaged(number, "it is not JSON") from None
        if not isinstance(entry, dict):
            raise self._damaged(number, "it is not a JSON object")
        check = entry.pop("check", None)
        if (line + b"\n", check) != _line(entry, self._last_check):
            raise self._damaged(number, "its check does not match")
        self._last_check = check
        return entry

    def _check_owner(self, header: Mapping[str, Any], parts: Mapping[str, str]) -> None:
        found = header.get("parts")
        if header.get("journal") != FORMAT or not isinstance(found, dict):
            raise self._damaged(1, f"it does not begin a journal of format {FORMAT}")
        differing = [name for name in sorted({*found, *parts}) if found.get(name) != parts.get(name)]
        if differing:
            raise UsageError(
                f"the journal {self.path} is of another {self._kind}: {', '.join(differing)} "
                f"{'differs' if len(differing) == 1 else 'differ'}; name another {self._place}, or remove it"
            )

    def _damaged(self, number: int, why: str) -> DapaError:
        return UsageError(
            f"the journal {self.path} is damaged at line {number}: {why}; remove the {self._place} to start again"
        )


def check_writable(path: Path) -> None:
    """Raise `JournalUnavailable` unless a file can be written to; it is made if absent."""
    _open(path).close()


def name_of(parts: Mapping[str, str]) -> str:
    """A file name that only searches with the same parts share."""
    return hashlib.sha256(_plain(dict(sorted(parts.items())))).hexdigest()[:32] + ".jsonl"


def _open(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise JournalUnavailable(f"cannot write the journal {path}: it is not a regular file")
        return path.open("a+b")
    except OSError as error:
        raise JournalUnavailable(f"cannot write the journal {path}: {error.strerror or error}") from error


def _line(content: Mapping[str, Any], last_check: str) -> tuple[bytes, str]:
    """A line of the file, and its check."""
    check = hashlib.sha256(last_check.encode() + _plain(content)).hexdigest()[:CHECK_DIGITS]
    return _plain({**content, "check": check}) + b"\n", check


def _plain(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
