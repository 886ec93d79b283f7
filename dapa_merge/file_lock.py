"""The kernel's lock on an open file: it keeps others out until the file is closed or the process ends."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

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
