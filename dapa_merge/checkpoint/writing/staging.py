"""The hidden folder beside a result's final place, in which it is made and in which a killed run's work is found again.

Its name follows from the result's. Inside are `result`, which becomes the result by one rename; `record`, of the files
that are finished; and `holder`, which says who is at work here and carries the kernel's lock. The lock ends with its
process, however that ends.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.writing.holder import Holder, is_locked
from dapa_merge.checkpoint.writing.record import Record
from dapa_merge.errors import HubError, UsageError

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
            stop.kept = _kept(place, record)  # type: ignore[attr-defined]
            raise
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
    """Remove what was being removed when its run was killed, and what earlier versions left."""
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
