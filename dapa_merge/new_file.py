"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

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
