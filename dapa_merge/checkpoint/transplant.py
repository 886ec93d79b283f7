"""Writing the repaired model: the target's files copied, the selected tensors overwritten, all or nothing.

Everything is written into a hidden folder beside the final one, which appears under its name only when it is complete,
proved and on disk. The target's files are opened for reading only: a Hub cache is made of links to shared blobs.
Headers, the order of tensors and the names of shards stay the target's, so that a content-addressed store has little to
take up.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.files import CHUNK_BYTES, INDEX_NAME, TEMPLATES
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.region import Region
from dapa_merge.checkpoint.staging import check_destination, flush_to_disk, staging
from dapa_merge.checkpoint.values import Rounding, new_tiles
from dapa_merge.errors import CheckpointError, UsageError

Progress = Callable[[int], None]

# Other forms of the target's weights would no longer agree with the result, and its card describes another model.
NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt", ".index.json",
    "README.md", "mergekit_config.yml", "dapa_report.json", ".gitattributes",
)  # fmt: skip
COPY_THREADS = 4
# What the kernel answers where this file system, or this pair of them, has no copy of its own.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def transplant(
    plan: Plan,
    selection: Sequence[Unit],
    out: Path,
    *,
    texts: Mapping[str, str] | None = None,
    check: Callable[[Path], object] = lambda _: None,
    progress: Progress = lambda _: None,
) -> None:
    """Write the target with the selected units replaced by the source's into `out`.

    Args:
        plan: Target and source.
        selection: The units to replace.
        out: The folder to make; it must not exist, or be empty.
        texts: Further text files to write into it, by name.
        check: Called with the finished folder before it gets its name; what it raises keeps `out` from appearing.
        progress: Called with numbers of bytes as they are written.

    Raises:
        UsageError: If `out` exists, cannot be made, or does not fit on its disk.
        CheckpointError: If a source value does not fit the target's dtype, or a file changes while it is read.
    """
    check_destination(out, plan.target)
    out = Path(os.path.abspath(out))
    with staging(out) as folder:
        _write_files(plan, selection, folder, progress)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        check(folder)
        flush_to_disk(folder)
        try:
            folder.rename(out)
        except OSError as error:
            raise UsageError(f"{out} came into being while its content was written; nothing was changed") from error
        flush_to_disk(out.parent, files=False)


def _write_files(plan: Plan, selection: Sequence[Unit], folder: Path, progress: Progress) -> None:
    """Write the result's shards and the target's small files, in parallel; Ctrl-C stops between two pieces."""
    target = plan.target
    replaced: dict[str, list[tuple[Region, Region]]] = {name: [] for name in target.shards}
    for ours, theirs in plan.regions(selection):
        replaced[ours.tensor.file].append((ours, theirs))
    for path in [*target.folder.iterdir(), *target.folder.glob(f"{TEMPLATES}/*.jinja")]:
        if path.is_file() and (path.name == INDEX_NAME or not path.name.endswith(NOT_COPIED)):
            replaced[str(path.relative_to(target.folder))] = []
    if any(name.startswith(TEMPLATES) for name in replaced):
        (folder / TEMPLATES).mkdir()
    stop = threading.Event()
    rounding = Rounding()

    def write(name: str) -> None:
        _copy(target.folder / name, folder / name, progress, stop)
        _overwrite(folder / name, plan, replaced[name], rounding, stop)

    with ThreadPoolExecutor(COPY_THREADS) as pool:
        try:
            # Each is waited for in turn; the first fault stops the others.
            for written in [pool.submit(write, name) for name in replaced]:
                written.result()
        except BaseException:
            stop.set()
            raise


def _overwrite(
    path: Path, plan: Plan, replaced: Sequence[tuple[Region, Region]], rounding: Rounding, stop: threading.Event
) -> None:
    """Put the source's values into a copied shard, and the shard on disk."""
    with path.open("r+b", buffering=0) as file:
        for ours, theirs in replaced:
            write_region(file, ours, new_tiles(plan, ours, theirs, rounding), stop)
        # Here, where other shards are still being copied, rather than one after the other at the end.
        os.fsync(file.fileno())


def write_region(file: IO[bytes], region: Region, tiles: Iterable[bytes], stop: threading.Event) -> None:
    """Write a region's bytes, given in order in pieces, into its stretches of an unbuffered file."""
    rest = memoryview(b"")
    pieces = iter(tiles)
    for start, num_bytes in region.runs():
        file.seek(start)
        while num_bytes:
            if stop.is_set():
                return
            rest = rest or memoryview(next(pieces))
            _write_all(file, rest[:num_bytes])
            num_bytes, rest = max(num_bytes - len(rest), 0), rest[num_bytes:]


def _copy(origin: Path, destination: Path, progress: Progress, stop: threading.Event) -> None:
    with origin.open("rb", buffering=0) as reader, destination.open("xb", buffering=0) as writer:
        remaining = os.fstat(reader.fileno()).st_size
        while remaining and not stop.is_set():
            num_copied = _copy_piece(reader, writer, min(remaining, CHUNK_BYTES))
            if not num_copied:
                raise CheckpointError(f"{origin} became shorter while it was copied")
            remaining -= num_copied
            progress(num_copied)


def _copy_piece(reader: IO[bytes], writer: IO[bytes], num_bytes: int) -> int:
    """Copy up to `num_bytes` from where both files stand: in the kernel where it can, else through memory."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(reader.fileno(), writer.fileno(), num_bytes)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    piece = reader.read(num_bytes)
    _write_all(writer, piece)
    return len(piece)


def _write_all(file: IO[bytes], piece: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]
