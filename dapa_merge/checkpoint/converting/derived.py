"""Model folders in the user's cache that are made from other files, once, and then opened like any other."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from dapa_merge.checkpoint.file_state import file_state
from dapa_merge.checkpoint.files import TEMPLATES
from dapa_merge.checkpoint.untrusted import refuse_stray_link
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
    """Let a derived folder have these files of its origin, as they are now: weights as links, and others as copies.

    Links of an earlier time that dangle go.

    Raises:
        CheckpointError: If a file to be copied is a link that leads out of the origin.
    """
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            path.unlink(missing_ok=True)
    for name in names:
        if (origin / name).is_dir():
            if name == TEMPLATES:
                (folder / name).mkdir(exist_ok=True)
                link_files(origin / name, folder / name, [path.name for path in (origin / name).glob("*.jinja")])
            continue
        is_weight = name.endswith(".safetensors")
        if not is_weight:
            refuse_stray_link(origin / name, origin)
        elif _link(origin / name, folder / name):
            continue
        # Under a name of its own first: another process may be reading the one that is there.
        copy = folder / f".{name}.{secrets.token_hex(4)}"
        shutil.copy(origin / name, copy)
        copy.replace(folder / name)


def _link(origin: Path, path: Path) -> bool:
    try:
        os.symlink(origin.absolute(), path)
    except FileExistsError:
        return True
    except OSError:  # Windows gives links to administrators only.
        return False
    return True


def stamps(paths: Iterable[Path]) -> list[tuple[str, list[int]]]:
    """Paths and states of files: what decides whether something was made from what they are now."""
    return [(str(path.absolute()), file_state(path)) for path in paths]


def _flush(path: Path) -> None:
    """Put a file on disk, so that a folder that has its name is complete after a power cut, too."""
    if path.is_file() and not path.is_symlink():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
