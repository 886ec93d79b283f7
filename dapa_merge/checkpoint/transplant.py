"""Writing the repaired model: the target's files copied, the selected tensors overwritten, all or nothing.

Everything is written into a hidden folder beside the final one, which appears under its name only when it is complete,
proved and on disk. The target's files are opened for reading only: a Hub cache is made of links to shared blobs.
Headers, the order of tensors and the names of shards stay the target's, so that a content-addressed store has little to
take up.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.files import (
    CHUNK_BYTES,
    INDEX_NAME,
    TEMPLATES,
    TORCH_NAMES,
    Checkpoint,
    Tensor,
    iterate_bytes,
)
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.errors import CheckpointError, UsageError, ValueDoesNotFit

Progress = Callable[[int], None]

# Other forms of the target's weights would no longer agree with the result, and its card describes another model.
NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt", ".index.json",
    "README.md", "mergekit_config.yml", "dapa_report.json", ".gitattributes",
)  # fmt: skip
COPY_THREADS = 4
# For each float dtype, the unsigned integer of its width and the bits of its exponent (IEEE 754, and bfloat16).
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
# What the kernel answers where this file system, or this pair of them, has no copy of its own.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def transplant(
    plan: Plan,
    selection: Sequence[Unit],
    out: Path,
    *,
    texts: Mapping[str, str] | None = None,
    check: Callable[[Path], None] = lambda _: None,
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
    with _staging(out) as folder:
        _write_files(plan, selection, folder, progress)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        check(folder)
        _flush_to_disk(folder)
        try:
            folder.rename(out)
        except OSError as error:
            raise UsageError(f"{out} came into being while its content was written; nothing was changed") from error
        _flush_to_disk(out.parent, files=False)


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


def source_bytes(source: Checkpoint, tensor: Tensor, dtype: str) -> Iterator[bytes]:
    """A source tensor's bytes as the target stores it, in pieces; the same bytes where the dtypes agree.

    A conversion rounds to nearest, once, as torch does.

    Raises:
        ValueDoesNotFit: If a finite value becomes infinite in the target's dtype.
    """
    if tensor.dtype == dtype:
        yield from iterate_bytes(source, tensor)
        return
    import torch

    from_dtype, to_dtype = (getattr(torch, TORCH_NAMES[name]) for name in (tensor.dtype, dtype))
    for piece in iterate_bytes(source, tensor):
        values = torch.frombuffer(bytearray(piece), dtype=from_dtype)
        converted = values.to(to_dtype)
        if num_lost := int((converted.isinf() & values.isfinite()).sum()):
            raise ValueDoesNotFit(
                f"{tensor.name} of the source {source.name} has at least {num_lost} values that {tensor.dtype} holds "
                f"but {dtype}, the target's dtype, does not"
            )
        yield converted.view(torch.uint8).numpy().tobytes()


def _refuse_not_finite(piece: bytes, source: Checkpoint, theirs: Tensor, dtype: str) -> None:
    """Raise if a value in a piece of a source tensor is infinite or not a number: all bits of its exponent are set."""
    import numpy

    width, exponent = EXPONENTS[dtype]
    values = numpy.frombuffer(piece, dtype=width)
    if ((values & exponent) == exponent).any():
        raise CheckpointError(
            f"{theirs.name} of the source {source.name} holds values that are infinite or not a number; it is damaged"
        )


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
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


def _write_files(plan: Plan, selection: Sequence[Unit], folder: Path, progress: Progress) -> None:
    """Write the result's shards and the target's small files, in parallel; Ctrl-C stops between two pieces."""
    target = plan.target
    replaced: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in target.shards}
    for ours, theirs in plan.tensors(selection):
        replaced[ours.file].append((ours, theirs))
    for path in [*target.folder.iterdir(), *target.folder.glob(f"{TEMPLATES}/*.jinja")]:
        if path.is_file() and (path.name == INDEX_NAME or not path.name.endswith(NOT_COPIED)):
            replaced[str(path.relative_to(target.folder))] = []
    if any(name.startswith(TEMPLATES) for name in replaced):
        (folder / TEMPLATES).mkdir()
    stop = threading.Event()

    def write(name: str) -> None:
        _copy(target.folder / name, folder / name, progress, stop)
        _overwrite(folder / name, plan.source, replaced[name], stop)

    with ThreadPoolExecutor(COPY_THREADS) as pool:
        try:
            # Each is waited for in turn; the first fault stops the others.
            for written in [pool.submit(write, name) for name in replaced]:
                written.result()
        except BaseException:
            stop.set()
            raise


def _overwrite(
    path: Path, source: Checkpoint, replaced: Sequence[tuple[Tensor, Tensor]], stop: threading.Event
) -> None:
    """Put the source's tensors into a copied shard, and the shard on disk."""
    with path.open("r+b", buffering=0) as file:
        for ours, theirs in replaced:
            file.seek(ours.start)
            for piece in source_bytes(source, theirs, ours.dtype):
                if stop.is_set():
                    return
                _refuse_not_finite(piece, source, theirs, ours.dtype)
                _write_all(file, piece)
        # Here, where other shards are still being copied, rather than one after the other at the end.
        os.fsync(file.fileno())


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


def _write_all(file: IO[bytes], piece: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def _flush_to_disk(folder: Path, *, files: bool = True) -> None:
    """Fsync a folder's entries and, with `files`, the content of its files."""
    if os.name == "nt":  # A folder cannot be opened there, and a rename is durable by itself.
        return
    for path in [*(folder.rglob("*") if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
