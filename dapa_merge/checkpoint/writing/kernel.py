"""What the kernel does for a copy: sharing blocks, copying ranges, giving a file a second name; else what to do."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import IO

from dapa_merge.checkpoint.streams import PIECE_BYTES
from dapa_merge.errors import UsageError

# The request to share a file's blocks with another, of btrfs, XFS, bcachefs and others (linux/fs.h).
FICLONE = 0x40049409
# What the kernel answers where this file system, or this pair of them, has no copy of its own.
NO_KERNEL_COPY = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ENOTTY, errno.ETXTBSY,
}  # fmt: skip
# What it answers if a file can have no second name: on another disk, another user's, one with too many already.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS}


def clone(origin: int, destination: int) -> bool:
    """Have a new file share the blocks of another until one of them changes; says whether the file system can."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(destination, FICLONE, origin)
    except OSError as error:
        if error.errno not in NO_KERNEL_COPY:
            raise
        return False
    return True


def copy_piece(reader: IO[bytes], writer: IO[bytes], num_bytes: int) -> int:
    """Copy up to `num_bytes` from where both files stand: in the kernel where it can, else through memory."""
    for name in ("copy_file_range", "sendfile"):
        kernel_copy = getattr(os, name, None)
        if kernel_copy is None or (name == "sendfile" and sys.platform != "linux"):
            continue
        try:
            if name == "sendfile":
                return int(kernel_copy(writer.fileno(), reader.fileno(), None, num_bytes))
            return int(kernel_copy(reader.fileno(), writer.fileno(), num_bytes))
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
    piece = reader.read(min(num_bytes, PIECE_BYTES))
    write_all(writer, memoryview(piece))
    return len(piece)


def write_all(file: IO[bytes], piece: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def link_file(origin: Path, destination: Path) -> None:
    """Give a file a second name; of a link, as in a Hub cache, the file that it leads to.

    Raises:
        UsageError: If the file system cannot do that, or not for this file.
    """
    try:
        os.link(origin.resolve(), destination)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        raise UsageError(
            f"{origin} cannot be hard-linked to {destination.parent}: {error.strerror}; leave out --link, so that it "
            f"is copied"
        ) from error
