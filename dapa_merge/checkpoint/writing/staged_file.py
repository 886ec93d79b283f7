"""A binary file that appears under its name complete and on disk, or not at all; and the kernel's lock on a file."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dapa_merge.checkpoint.writing.staging import flush_to_disk
from dapa_merge.errors import UsageError
from dapa_merge.file_lock import is_at, take_lock

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
