"""What of a folder goes to a repository, and what that changes there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.streams import hash_file
from dapa_merge.checkpoint.untrusted import read_regular, refuse_stray_link
from dapa_merge.checkpoint.weights import ADAPTER_NAMES, NO_WEIGHTS, WEIGHTS
from dapa_merge.checkpoint.writing.manifest import PRIVATE, may_be_added
from dapa_merge.errors import CheckpointError

Progress = Callable[[int], None]
# What is sent from memory; larger files are never kept in git itself.
MAX_SMALL_BYTES = 10 << 20
LOADED = (".safetensors", ".bin", ".h5", ".msgpack", ".index.json")
# How the files of a model end that nothing else lists.
PARTS = (*WEIGHTS, ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".yml")


@dataclass(frozen=True)
class LocalFile:
    """A file to publish.

    Attributes:
        path: Where it is.
        num_bytes: Its size.
        sha256: What the Hub knows a large file by.
        git_hash: What the Hub knows a small file by: SHA-1 of git's header for a blob, and the content.
        content: All of it, if it is small, so that what was looked at is what is sent.
    """

    path: Path
    num_bytes: int
    sha256: str
    git_hash: str = ""
    content: bytes | None = field(default=None, repr=False)

    def is_same_as(self, remote: Any) -> bool:
        """Whether a file on the Hub (huggingface_hub's `RepoFile`) has this content."""
        if remote is None:
            return False
        return bool(remote.lfs.sha256 == self.sha256 if remote.lfs is not None else remote.blob_id == self.git_hash)


@dataclass(frozen=True)
class Difference:
    """What publishing a folder changes in a repository.

    Attributes:
        written: Files that are new there, or have another content.
        deleted: Files there of the model that is replaced, and other weights that programs would load.
        kept: Other files there, which stay.
    """

    written: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.written or self.deleted)


def files_of(out: Path, known: Mapping[str, str], progress: Progress = lambda _: None) -> dict[str, LocalFile]:
    """The files of a result that are published, by their paths in it: all but hidden ones and what the models said.

    Args:
        out: The result.
        known: The SHA-256 of files that were hashed already.
        progress: Called with numbers of bytes as they are read.

    Raises:
        CheckpointError: If one cannot be read, leads out of the folder, or is no part of a model.
    """
    names = []
    for parent, folders, files in os.walk(out):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent).relative_to(out)
        names += [(here / name).as_posix() for name in sorted(files) if not name.startswith(".")]
    names = [name for name in names if name.rpartition("/")[2] not in PRIVATE]
    for name in names:
        # A manifest lists what belongs to a result; without one, a key or a log may lie there.
        if name not in known and not (name.endswith(PARTS) or may_be_added(name)):
            raise CheckpointError(f"{out / name} is no part of a model that is known; move it out of {out}")

    def read(name: str) -> LocalFile:
        path = out / name
        refuse_stray_link(path, out)
        try:
            return _local_file(path, known.get(name), progress)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _local_file(path: Path, sha256: str | None, progress: Progress) -> LocalFile:
    size = path.stat().st_size
    if size > MAX_SMALL_BYTES:
        return LocalFile(path, size, sha256 or hash_file(path, progress=progress).sha256)
    content = read_regular(path, MAX_SMALL_BYTES)
    progress(size)
    return of_content(path, content)


def of_content(path: Path, content: bytes) -> LocalFile:
    """A file whose content is at hand, which is sent as it is now."""
    git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return LocalFile(path, len(content), hashlib.sha256(content).hexdigest(), git_hash, content)


def difference(files: Mapping[str, LocalFile], there: Mapping[str, Any], listed: Collection[str] = ()) -> Difference:
    """What has to change in a repository for it to be these files.

    Args:
        files: What is published.
        there: huggingface_hub's `RepoFile`s of the repository, by path.
        listed: Files there that belong to the model that is replaced.
    """
    others = sorted(name for name in there if name not in files and name != ".gitattributes")
    stale = [name for name in others if name in listed or is_loaded(name)]
    return Difference(
        written=tuple(name for name, file in files.items() if not file.is_same_as(there.get(name))),
        deleted=tuple(stale),
        kept=tuple(name for name in others if name not in stale),
    )


def is_loaded(name: str) -> bool:
    """Whether transformers would load a file of this name as a model's weights, instead of or beside its own."""
    if "/" in name or (name in NO_WEIGHTS and name not in ADAPTER_NAMES):
        return False
    return name.endswith(LOADED) or name.startswith("adapter_")


def copies(files: Mapping[str, LocalFile], names: Sequence[str], there: Mapping[str, Any]) -> dict[str, str]:
    """Which of these files the Hub can copy from another repository of its, and their paths there.

    Only large ones: what is small is sent faster than it is copied.
    """
    places = {file.lfs.sha256: path for path, file in sorted(there.items()) if file.lfs and file.xet_hash}
    return {name: places[files[name].sha256] for name in names if files[name].sha256 in places}
