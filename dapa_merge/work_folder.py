"""Folders that a command fills step by step, and goes on with: whose they are, and which pictures in them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from dapa_merge.errors import UsageError

PICTURES = (".png", ".svg")
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
