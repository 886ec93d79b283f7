"""Files that appear under their names only when they are complete.

Whether a file is still what it was, told without reading it.

The kernel's lock on an open file: it keeps others out until the file is closed or the process ends.

Folders that a command fills step by step, and goes on with: whose they are, and which pictures in them.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dapa_merge.errors import DapaError, UsageError


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[str], None]]:
    """Make sure of a file before the work that would be lost if its answer could not be written.

    Yields:
        What writes the whole text; the file is there once it returns. It raises `DapaError` if that cannot be.

    Raises:
        UsageError: If the file exists, or its folder does not, or cannot be written to.
    """
    # Beside it, since only a file of the same disk can be given its name in one step.
    beside = path.with_name(f".dapa-merge-{secrets.token_hex(8)}")
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)
            raise UsageError(f"{path} exists already; name another file or remove it")
        file = beside.open("x", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another file") from error

    def write(text: str) -> None:
        try:
            with file:
                file.write(text)
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
    """Write a file in the place of another, complete or not at all.

    Raises:
        DapaError: If it cannot be written.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files in the place of others, which belong together: where the disk has no room for all, none is replaced.

    Raises:
        DapaError: If one cannot be written.
    """
    beside = {path: path.with_name(f".dapa-merge-{secrets.token_hex(8)}") for path in contents}
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
        raise DapaError(f"{path} cannot be written: {error.strerror}; what was there before is kept") from error
    finally:
        for new in beside.values():
            with suppress(OSError):
                new.unlink(missing_ok=True)


def file_state(path: Path, *, counts_links: bool = True) -> list[int]:
    """What changes when a file does: its size, the times of its last changes, and its inode; of a link, its target's.

    Args:
        path: The file.
        counts_links: Take the time at which anything of it changed, its number of names too. Programs can set the other
            time back, as `tar` and `rsync` do, but not this one.

    Raises:
        OSError: If there is none.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino, *([found.st_ctime_ns] if counts_links else [])]


def write_all(file: IO[bytes], piece: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


# What some cluster file systems answer, which have no locks unless they are mounted so.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# Windows locks bytes, and lets nobody read them: one far behind the content of any file that is locked there.
LOCKED_BYTE = 1 << 30


def take_lock(descriptor: int, *, shared: bool = False, waits: bool = False) -> bool:
    """Lock an open file or folder.

    Where the file system has no locks it counts as locked: two at once are not noticed there. Windows has neither
    shared locks nor locks on folders.

    Args:
        descriptor: The open file.
        shared: Let others have it too, if they share it.
        waits: Wait until whoever has it lets go.

    Returns:
        False if another has it.

    Raises:
        OSError: If it cannot be locked for another reason.
    """
    if sys.platform == "win32":
        return shared or _take_byte(descriptor, waits)
    import fcntl

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name: who had the lock before may have given it another."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _take_byte(descriptor: int, waits: bool) -> bool:
    if sys.platform != "win32":
        raise NotImplementedError
    import msvcrt

    os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if waits else msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return True


PICTURES = (".png", ".svg")
# What the names of the charts of a run begin with, which lie among a model's own files.
CHART_PREFIX = "dapa_"
JOURNAL_BEGINS = b'{"journal":'


def check_folder(out: Path, is_own: Callable[[Path], bool], kind: str) -> None:
    """Make sure that a folder is new, empty, or one of the command's own, and can be written.

    Args:
        out: The folder.
        is_own: Whether an existing one is such a folder.
        kind: What it is a folder of, for messages.

    Raises:
        UsageError: If it is not.
    """
    try:
        if out.exists() and not is_own(out) and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} exists and is no folder of a {kind}; name another or remove it")
        place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not place.is_dir():
            raise UsageError(f"{out} cannot be made: {place} is no folder; name another folder")
        if not os.access(place, os.W_OK):
            raise UsageError(f"{out} cannot be written: {os.strerror(errno.EACCES)}; name another folder")
    except OSError as error:
        raise UsageError(f"{out} cannot be read: {error.strerror}; name another folder") from error


def make_folder(path: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        UsageError: If that cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}; name another folder") from error


def begins_journal(path: Path) -> bool:
    """Whether something is a file that begins as a journal does.

    Raises:
        OSError: If it cannot be read.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(JOURNAL_BEGINS)) == JOURNAL_BEGINS


def forget_pictures(folder: Path, beginnings: tuple[str, ...]) -> None:
    """Remove the pictures of an earlier run, whose names begin so; others in the folder are somebody else's."""
    for path in folder.iterdir():
        if path.suffix in PICTURES and path.name.startswith(beginnings) and path.is_file():
            path.unlink(missing_ok=True)


def remove_pictures(folder: Path, names: Iterable[str]) -> None:
    """Remove the pictures of these names, without their endings.

    Raises:
        OSError: If one cannot be removed.
    """
    for name in names:
        for kind in PICTURES:
            (folder / f"{name}{kind}").unlink(missing_ok=True)
