"""Opening files of a folder that a stranger made: regular files only, no more of them than is sane, no stray links.

A model folder may come out of an archive or a clone, which can hold links to anything and, unpacked carelessly, pipes.
A pipe would make its reader wait for ever, a device may act on being opened, and a link could carry a private file of
the user's into a result that is then published.

Which links are followed: the folder itself and what is above it may be links, as the user named them. Weight files may
be links to any regular file, since weights are kept on other disks and nothing but a sound safetensors file passes for
one. Small files, which are copied as they are, may only lead to where the folder's own content is: into the folder, or,
from a snapshot in the Hub's cache, to the blobs of its repository.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from dapa_merge.errors import CheckpointError

_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device"}


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without ever waiting for a writer.

    Raises:
        OSError: If it cannot be opened, or is no regular file; its `strerror` says so.
    """
    return open(path, "rb", opener=_open_if_regular)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a small file.

    Raises:
        OSError: If it cannot be read, is no regular file, or is larger than `max_bytes`; its `strerror` says so.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"It is larger than {max_bytes / 1e6:.0f} MB, which no such file needs")
    return content


def refuse_stray_link(path: Path, folder: Path) -> None:
    """Raise unless a small file of a model folder is its own content, or a link to where such content may be.

    Raises:
        CheckpointError: If it leads elsewhere, or nowhere.
    """
    # Not Path.resolve, which before Python 3.13 raises a RuntimeError for links in a circle.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    places = [home]
    if home.parent.name == "snapshots":
        places.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in places):
        raise CheckpointError(
            f"{path} is a link that leads out of its folder, to {real}; put a copy of that file in its place"
        )


def _open_if_regular(path: str, flags: int) -> int:
    _refuse_irregular(os.stat(path))
    # Another file may have taken its place since: so this does not wait either, and the file itself is asked again.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _refuse_irregular(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_irregular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
        raise OSError(errno.EINVAL, f"It is a {kind}, not a file")
