"""Who is at work in a folder: a file that carries the kernel's lock, and says which process has it."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from dapa_merge.errors import UsageError
from dapa_merge.file_lock import is_at, take_lock


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
                who = _name(descriptor)
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


def _name(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0) if hasattr(os, "pread") else os.read(descriptor, 1000))
        return f"another run (process {int(holder['pid'])} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
