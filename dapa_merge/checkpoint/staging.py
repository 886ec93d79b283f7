"""The hidden folder beside a result's final place, in which it is made."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.errors import UsageError


def check_destination(out: Path, target: Checkpoint) -> None:
    """Raise `UsageError` unless `out` is absent or an empty folder, in a place to write to, with space left."""
    try:
        occupied = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
        is_here = out.exists() and out.samefile(Path.cwd())
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error.strerror}") from error
    if occupied:
        raise UsageError(f"{out} exists already; name another folder or remove it")
    if is_here:
        raise UsageError(f"{out} is the folder you are in, which cannot be replaced; name one inside it")
    parent = Path(os.path.abspath(out)).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{out} cannot be made: {parent} is no folder that you may write to")
    needed = sum((target.folder / shard).stat().st_size for shard in target.shards)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"the result needs {needed / 1e9:.2f} GB on the disk of {parent}, which has {free / 1e9:.2f} GB left"
        )


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, gone at the end unless it was renamed; clears what killed runs left."""
    parent = out.parent
    # A name that nobody else would give, and that is short whatever the length of the result's own.
    prefix = f".dapa-merge-{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:12]}-"
    new_parents = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(f"{prefix}*.partial"):
            with _locked(leftover) as is_ours:
                if is_ours:
                    shutil.rmtree(leftover, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=prefix, suffix=".new", dir=parent))
        # mkdtemp makes it private; a model folder is as readable as the user's other files.
        umask = os.umask(0)
        os.umask(umask)
        made.chmod(0o777 & ~umask)
    except OSError as error:
        raise UsageError(f"cannot write beside {out}: {error.strerror}") from error
    with _locked(made):
        # Only now that it is locked does it get the name by which another run would look for leftovers.
        folder = made.rename(made.with_suffix(".partial"))
        try:
            yield folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UsageError(f"no space left on the disk of {out}; nothing was kept") from error
            raise
        finally:
            # After a success it has its final name, and there is nothing here to remove.
            shutil.rmtree(folder, ignore_errors=True)
            for empty in new_parents:
                with suppress(OSError):
                    empty.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the kernel's lock on a folder, which ends with the process however it ends; says whether it was free."""
    try:
        import fcntl
    except ImportError:  # Windows: leftovers stay until the user removes them.
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


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
