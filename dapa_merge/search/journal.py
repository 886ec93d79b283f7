"""The journal of a search: every test is on disk before its answer is used, so a killed search loses nothing.

A text file of JSON objects, one per line, append-only, each flushed to disk. The first line identifies the search by
digests of everything that affects a verdict. The others are tests (`selection`) and notes (`note`: other measurements).
Each line ends with `check`, the beginning of the SHA-256 of the previous line's check and the rest of its own line,
which reveals damage, missing lines and lines of another journal. A kill may leave an incomplete last line; it is
removed, and its test repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dapa_merge.errors import DapaError, Stopped, UsageError
from dapa_merge.files import Record, held, plain_json, record_line

FORMAT = 1
T = TypeVar("T")
# Digests of all entries that this process has written, whatever the journal.
_written_here: set[str] = set()


class JournalUnavailable(UsageError):
    """The journal cannot be written: its folder is read-only, its disk is full, or another search holds it."""


class Missing(Exception):
    """A note is wanted that others are to make: see `Journal.perform`."""


def gathered(calls: Iterable[Callable[[], T]]) -> list[T]:
    """The results of all calls; if notes are missing, raises `Missing` only when all that are have been asked for."""
    found: list[T] = []
    missing: Missing | None = None
    for call in calls:
        try:
            found.append(call())
        except Missing as error:
            missing = error
    if missing is not None:
        raise missing
    return found


class Perform(Protocol):
    """What does the work that ends in notes."""

    def __call__(self, name: str, work: Callable[[], object], *, alone: bool = False) -> None:
        """Do it, or see to it that it is done and raise `Missing`.

        Args:
            name: Of the note, or of one of them.
            work: Makes and records all of them.
            alone: Whether it loads models of its own, so that none should be in memory.
        """


def at_once(name: str, work: Callable[[], object], *, alone: bool = False) -> None:
    """Do it here and now: how notes are made where no work is shared out."""
    work()


class Journal:
    """The tests of one search, in memory and on disk.

    Attributes:
        tests: The outcome of each test, in order, by the names of the selection's units.
        notes: Other measurements, by name.
        path: The file; None for a journal that ends with the process.
        parts: What identifies it; empty for such a journal.
        earlier: The names of notes that another process wrote, and the selections of its tests. Whoever can write the
            file can have made them up, so that nothing may rest on them alone.
        perform: Does the work that ends in notes, at once; whoever shares work out puts something else here.
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
            parts: A digest or value of everything that affects a verdict, by name.
            kind: The kind of work that it records, for messages.
            place: What a user names or removes, for messages: `file` or `folder`.

        Raises:
            UsageError: If the file belongs to another search, or is damaged.
            JournalUnavailable: If it cannot be written.
        """
        self.path = path
        self.parts = dict(parts or {})
        self._kind = kind
        self._place = place
        self.tests: dict[frozenset[str], Mapping[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self.earlier: set[str | frozenset[str]] = set()
        self.perform: Perform = at_once
        self._record: Record | None = None
        self._lock = ExitStack()
        if path is None:
            return
        check_writable(path)
        busy = f"another {kind} is writing the journal {path}; wait for it, or name another {place}"
        try:
            try:
                self._lock.enter_context(held(path.with_name(f"{path.name}.lock"), busy))
            except UsageError as error:
                raise JournalUnavailable(str(error)) from None
            self._record = Record(path)
            self._read(self._record, self.parts)
        except OSError as error:
            self.close()
            raise JournalUnavailable(f"cannot write the journal {path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def record(self, selection: frozenset[str], test: Mapping[str, Any]) -> None:
        """Append a test, and flush it to disk."""
        self._append({"selection": sorted(selection), **test})
        self.tests[selection] = dict(test)

    def note(self, name: str, value: Any) -> None:
        """Append another measurement, and flush it to disk."""
        self._append({"note": name, "value": value})
        self.notes[name] = value

    def once(self, name: str, make: Callable[[], Any], *, alone: bool = False) -> Any:
        """The value of a note; if it is not there, it is made and recorded first. `alone` as for `Perform`."""
        if name not in self.notes:
            self.perform(name, lambda: self.note(name, make()), alone=alone)
        return self.notes[name]

    @property
    def is_shared(self) -> bool:
        """Whether the work of making notes is given away."""
        return self.perform is not at_once

    def confirm(self, name: str) -> None:
        """Count a note of another process as this one's, which has found the same."""
        _written_here.add(self._digest({"note": name, "value": self.notes[name]}))
        self.earlier.discard(name)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Say what is kept if Ctrl-C ends the block."""
        try:
            yield
        except KeyboardInterrupt as stop:
            said = [str(stop)] if isinstance(stop, Stopped) else []
            if self.path is None:
                said.append("nothing is kept, because there is no journal")
            elif not self.tests and not self.notes:
                said.append("nothing was measured yet, and the same command starts again")
            else:
                done = f"{len(self.tests)} tests and {len(self.notes)} other measurements"
                said.append(f"{done} are in the journal {self.path}, and the same command goes on from there")
            raise Stopped("; ".join(said)) from stop

    def close(self) -> None:
        """Unlock the file."""
        self._record = None
        self._lock.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        if self._record is None:
            return
        _written_here.add(self._digest(content))
        try:
            self._record.append(content)
        except OSError as error:
            raise JournalUnavailable(
                f"cannot write the journal {self.path}: {error.strerror}; earlier tests are kept"
            ) from error

    def _read(self, record: Record, parts: dict[str, str]) -> None:
        header = {"journal": FORMAT, "parts": parts}
        entries = record.read()
        if record.fault is not None:
            raise self._damaged(*record.fault)
        if not entries and not record_line(header)[0].startswith(record.tail):
            raise self._damaged(1, "it is not a journal")
        if entries:
            self._check_owner(entries[0], parts)
        for number, entry in enumerate(entries[1:], 2):
            is_earlier = self._digest(entry) not in _written_here
            if isinstance(note := entry.get("note"), str):
                self.notes[note] = entry.get("value")
                self.earlier |= {note} if is_earlier else set()
            elif isinstance(entry.get("selection"), list) and isinstance(entry.get("holds"), bool):
                selection = frozenset(map(str, entry.pop("selection")))
                self.tests[selection] = entry
                self.earlier |= {selection} if is_earlier else set()
            else:
                raise self._damaged(number, "it is neither a test nor a note")
        # The file is changed only now that it is known to be ours.
        record.cut()
        if not entries:
            self._append(header)

    def _check_owner(self, header: Mapping[str, Any], parts: Mapping[str, str]) -> None:
        found = header.get("parts")
        if header.get("journal") != FORMAT or not isinstance(found, dict):
            raise self._damaged(1, f"it does not begin a journal of format {FORMAT}")
        differing = [name for name in sorted({*found, *parts}) if found.get(name) != parts.get(name)]
        if differing:
            raise UsageError(
                f"the journal {self.path} belongs to another {self._kind}: {', '.join(differing)} "
                f"{'differs' if len(differing) == 1 else 'differ'}; name another {self._place}, or remove it"
            )

    def _digest(self, entry: Mapping[str, Any]) -> str:
        return hashlib.sha256(plain_json([self.parts, dict(entry)])).hexdigest()

    def _damaged(self, number: int, why: str) -> DapaError:
        return UsageError(
            f"the journal {self.path} is damaged at line {number}: {why}; remove the {self._place} to start again"
        )


class MarkedJournal:
    """A part of a journal: tests and notes that hold only for one choice that an edit made.

    Attributes:
        tests: As a `Journal`'s, only those of this choice.
        notes: Likewise.
        path: The journal's.
    """

    def __init__(self, journal: Journal, mark: str) -> None:
        self._journal, self._mark = journal, mark
        self.path = journal.path
        # Whatever rests on it is measured again at the end of a search.
        self.earlier: frozenset[str] = frozenset()
        self.tests = {names - {mark}: test for names, test in journal.tests.items() if mark in names}
        beginning = f"{mark} "
        self.notes = {
            name.removeprefix(beginning): value for name, value in journal.notes.items() if name.startswith(beginning)
        }

    def record(self, selection: frozenset[str], test: Mapping[str, Any]) -> None:
        """Append a test, and flush it to disk."""
        self._journal.record(selection | {self._mark}, test)
        self.tests[selection] = dict(test)

    def note(self, name: str, value: Any) -> None:
        """Append another measurement, and flush it to disk."""
        self._journal.note(f"{self._mark} {name}", value)
        self.notes[name] = value


def check_writable(path: Path) -> None:
    """Raise `JournalUnavailable` unless a file can be written to; it is made if absent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise JournalUnavailable(f"cannot write the journal {path}: it is not a regular file")
        path.open("ab").close()
    except OSError as error:
        raise JournalUnavailable(f"cannot write the journal {path}: {error.strerror or error}") from error


def name_of(parts: Mapping[str, str]) -> str:
    """A file name that is unique to these parts."""
    return hashlib.sha256(plain_json(dict(sorted(parts.items())))).hexdigest()[:32] + ".jsonl"
