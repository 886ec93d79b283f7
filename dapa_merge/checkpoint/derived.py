"""Model folders in the user's cache that are made from other files, once, and then opened like any other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from dapa_merge.errors import UsageError


def derived_folder(kind: str, origin: object, make: Callable[[Path], None]) -> Path:
    """The folder made from `origin`; it is complete, whatever became of a process that was making it.

    Args:
        kind: What sort of folder it is, a name in the cache.
        origin: All that decides the content, as JSON can say it.
        make: Fills an empty folder.

    Raises:
        UsageError: If the cache cannot be written, or its disk is full.
    """
    import platformdirs
    from filelock import FileLock

    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(platformdirs.user_cache_dir("dapa-merge")) / kind / key
    unfinished = folder.with_name(f"{key}.unfinished")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The kernel's lock, which ends with its process: what is unfinished now is nobody's.
        with FileLock(folder.with_name(f"{key}.lock")):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                try:
                    make(unfinished)
                    for path in unfinished.rglob("*"):
                        _flush(path)
                except BaseException:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
                unfinished.rename(folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder}, in the cache folder: {error.strerror}") from error
    return folder


def link_files(origin: Path, folder: Path, names: Iterable[str]) -> None:
    """Let a derived folder have these files of its origin, as they are now; links of an earlier time that dangle go."""
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            path.unlink(missing_ok=True)
    for name in names:
        try:
            os.symlink((origin / name).absolute(), folder / name)
        except FileExistsError:
            continue
        except OSError:  # Windows gives links to administrators only.
            shutil.copy(origin / name, folder / name)


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of files: what decides whether something was made from what they are now."""
    return [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _flush(path: Path) -> None:
    """Put a file on disk, so that a folder that has its name is complete after a power cut, too."""
    if path.is_file() and not path.is_symlink():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
