"""Whether a file is still what it was, told without reading it."""

from __future__ import annotations

from pathlib import Path


def file_state(path: Path, *, counts_links: bool = True) -> list[int]:
    """What changes when a file does: its size, the times of its last changes, and its inode; of a link, its target's.

    Args:
        path: The file.
        counts_links: Take the time at which anything of it changed, its number of names too. Programs can set the other
            time back, as `tar` and `rsync` do, but not this one.

    Raises:
        OSError: If there is none.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino, *([found.st_ctime_ns] if counts_links else [])]
