"""The journal of a search: every test is on disk before its answer is used, so a killed search loses nothing.

A text file of JSON objects, one per line, append-only, each flushed to disk. The first line identifies the search by
digests of everything that affects a verdict. The others are tests (`selection`), notes (`note`: other measurements)
and pieces of notes (`piece`). Each line ends with `check`, the beginning of the SHA-256 of the previous line's check
and the rest of its own line, which reveals damage, missing lines and lines of another journal. A kill may leave an
incomplete last line; it is removed, and its test repeated.

Anyone can write lines whose checks match. So each also has a `seal`, a keyed digest (HMAC, RFC 2104) of the line and
of what identifies the search: only this user's processes can make it, and a baseline that they recorded needs no second
measurement.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dapa_merge.errors import DapaError, Stopped, UsageError
from dapa_merge.files import Record, held, own_key, plain_json, record_line

FORMAT = 1
T = TypeVar("T")
# Seals of all entries that this process has written, whatever the journal.
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
        pieces: Parts of measurements that are to be notes, by name: only those that this user's processes recorded.
        path: The file; None for a journal that ends with the process.
        parts: What identifies it; empty for such a journal.
        earlier: The names of notes and pieces that another process wrote, and the selections of its tests.
        foreign: Those of them without this user's seal. Whoever can write the file can have made them up, so that
            nothing may rest on them alone.
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
        self.pieces: dict[str, Any] = {}
        self.earlier: set[str | frozenset[str]] = set()
        self.foreign: set[str | frozenset[str]] = set()
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

    def note(self, name: str, value: Any, seconds: float | None = None) -> None:
        """Append another measurement and, if it is known, how long it took, and flush it to disk."""
        spent = {} if seconds is None else {"seconds": round(seconds, 3)}
        self._append({"note": name, "value": value, **spent})
        self.notes[name] = value

    def take_over(self, path: Path) -> tuple[int, float]:
        """Record what is not here, and this user's processes recorded in another journal of the same work.

        Nothing is taken of a file that is absent, damaged at its beginning, or of other work.

        Returns:
            How many tests, notes and pieces were taken, and the seconds that they took.
        """
        entries: list[dict[str, Any]] = []
        with suppress(OSError):
            entries = Record(path).read()
        if self._record is None or not entries or entries[0].get("parts") != self.parts:
            return 0, 0.0
        number, seconds = 0, 0.0
        for entry in entries[1:]:
            seal = entry.pop("seal", None)
            if seal == self._seal(entry) and not self._has(entry):
                number, seconds = number + 1, seconds + float(entry.get("seconds", 0.0))
                self._write({**entry, "seal": seal})
                self._take({**entry, "seal": seal})
        return number, seconds

    def _has(self, entry: Mapping[str, Any]) -> bool:
        if "selection" in entry:
            return frozenset(entry["selection"]) in self.tests
        return entry.get("note") in self.notes or entry.get("piece") in self.pieces

    def piece(self, name: str, value: Any, seconds: float) -> None:
        """Append a piece of a measurement and how long it took, and flush it to disk."""
        self._append({"piece": name, "value": value, "seconds": round(seconds, 3)})
        self.pieces[name] = value

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
        """Record a note of another process as this one's, which has found the same."""
        self.note(name, self.notes[name])
        self.earlier.discard(name)
        self.foreign.discard(name)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Say what is kept if Ctrl-C ends the block."""
        try:
            yield
        except KeyboardInterrupt as stop:
            said = [str(stop)] if isinstance(stop, Stopped) else []
            if self.path is None:
                said.append("nothing is kept, because there is no journal")
            elif not self.tests and not self.notes and not self.pieces:
                # Such as what all units of another edit can do.
                said.append(
                    "what was measured before is in other journals, and the same command goes on from there"
                    if _written_here
                    else "nothing was measured yet, and the same command starts again"
                )
            else:
                done = f"{len(self.tests)} tests and {len(self.notes) + len(self._open)} other measurements"
                said.append(f"{done} are in the journal {self.path}, and the same command goes on from there")
            raise Stopped("; ".join(said)) from stop

    @property
    def _open(self) -> list[str]:
        """The pieces of measurements that did not end."""
        return [name for name in self.pieces if name.rpartition(": ")[0] not in self.notes]

    def close(self) -> None:
        """Unlock the file."""
        self._record = None
        self._lock.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        if self._record is None:
            return
        seal = self._seal(content)
        _written_here.add(seal)
        self._write({**content, "seal": seal})

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._record is not None
        try:
            self._record.append(entry)
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
            if not self._take(entry):
                raise self._damaged(number, "it is neither a test nor a note")
        # The file is changed only now that it is known to be ours.
        record.cut()
        if not entries:
            self._write(header)

    def _take(self, entry: dict[str, Any]) -> bool:
        """Know what an entry says; returns whether it is one of a journal."""
        found, seal = entry.pop("seal", None), self._seal(entry)
        is_own, is_here = found == seal, seal in _written_here
        name: str | frozenset[str]
        if isinstance(piece := entry.get("piece"), str):
            if is_own:
                self.pieces[piece] = entry.get("value")
                self.earlier |= set() if is_here else {piece}
            return True
        if isinstance(note := entry.get("note"), str):
            self.notes[name := note] = entry.get("value")
        elif isinstance(entry.get("selection"), list) and isinstance(entry.get("holds"), bool):
            self.tests[name := frozenset(map(str, entry.pop("selection")))] = entry
        else:
            return False
        for names, belongs in ((self.earlier, not is_here), (self.foreign, not is_here and not is_own)):
            # A later line with the same name replaces an earlier one.
            (names.add if belongs else names.discard)(name)
        return True

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

    def _seal(self, entry: Mapping[str, Any]) -> str:
        parts = dict(sorted(self.parts.items()))
        return hmac.digest(own_key(), plain_json([parts, dict(entry)]), "sha256").hex()

    def _damaged(self, number: int, why: str) -> DapaError:
        return UsageError(
            f"the journal {self.path} is damaged at line {number}: {why}; remove the {self._place} to start again"
        )


class MarkedJournal:
    """A part of a journal: tests and notes that hold only for one choice that an edit made.

    Attributes:
        tests: As a `Journal`'s, only those of this choice.
        notes: Likewise.
        pieces: Likewise.
        path: The journal's.
    """

    def __init__(self, journal: Journal, mark: str) -> None:
        self._journal, self._mark = journal, mark
        self.path = journal.path
        # Whatever rests on it is measured again at the end of a search.
        self.earlier: frozenset[str] = frozenset()
        self.tests = {names - {mark}: test for names, test in journal.tests.items() if mark in names}
        self.notes, self.pieces = (
            {name.removeprefix(f"{mark} "): value for name, value in all_of.items() if name.startswith(f"{mark} ")}
            for all_of in (journal.notes, journal.pieces)
        )

    def record(self, selection: frozenset[str], test: Mapping[str, Any]) -> None:
        """Append a test, and flush it to disk."""
        self._journal.record(selection | {self._mark}, test)
        self.tests[selection] = dict(test)

    def note(self, name: str, value: Any, seconds: float | None = None) -> None:
        """Append another measurement and, if it is known, how long it took, and flush it to disk."""
        self._journal.note(f"{self._mark} {name}", value, seconds)
        self.notes[name] = value

    def piece(self, name: str, value: Any, seconds: float) -> None:
        """Append a piece of a measurement and how long it took, and flush it to disk."""
        self._journal.piece(f"{self._mark} {name}", value, seconds)
        self.pieces[name] = value


def check_writable(path: Path) -> None:
    """Raise `JournalUnavailable` unless a file can be written to; it is made if absent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise JournalUnavailable(f"cannot write the journal {path}: it is not a regular file")
        path.open("ab").close()
    except OSError as error:
        raise JournalUnavailable(f"cannot write the journal {path}: {error.strerror or error}") from error


def noted(path: Path) -> frozenset[str]:
    """The names of a journal's notes, for estimates: whose it is is not checked. None of a file that cannot be read."""
    with suppress(OSError):
        return frozenset(str(entry["note"]) for entry in Record(path).read() if "note" in entry)
    return frozenset()


def name_of(parts: Mapping[str, str]) -> str:
    """A file name that is unique to these parts."""
    return hashlib.sha256(plain_json(dict(sorted(parts.items())))).hexdigest()[:32] + ".jsonl"
