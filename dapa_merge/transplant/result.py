"""Writes the repaired model: the target's files with some bytes replaced, all or nothing.

Everything is written into a hidden folder next to the final one, and renamed only when it is complete, verified and on
disk. The target's files are opened only for reading: a Hub cache consists of links to shared blobs. Headers, the order
of tensors and the names of shards stay the target's, so a content-addressed store has little to add.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.contents import left_behind, parts_of
from dapa_merge.checkpoint.digest import ALGORITHM, Digests, hash_bytes, hash_file
from dapa_merge.checkpoint.folder import refuse_pointer, refuse_stray_link
from dapa_merge.checkpoint.open import Checkpoint, find_model
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError, UsageError, some_of
from dapa_merge.files import CHART_PREFIX, PICTURES, file_state, flush_folder
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.values import Rounding
from dapa_merge.progress import LOG, advance
from dapa_merge.transplant.manifest import MANIFEST_NAME, WRITTEN, make_manifest, manifest_text
from dapa_merge.transplant.shard import (
    NotNeeded,
    RegionEdit,
    clone,
    edits_digest,
    find_changes,
    link_file,
    write_file,
)
from dapa_merge.transplant.staging import Staging, staging, staging_folder

# Version of the record of finished files and of how they are made; another version's work is not resumed.
FORMAT = 3
# Number of files that a message names.
MAX_NAMED = 4
MAX_THREADS = 8
# A tokenizer has about 20 MB; a much larger file does not hold settings.
MAX_SMALL_BYTES = 1 << 30


def write_result(
    target: Checkpoint,
    changes: Mapping[str, Sequence[RegionEdit]],
    out: Path,
    job: Mapping[str, Any],
    *,
    extras: Mapping[str, str | bytes] | None = None,
    describe: Callable[[Mapping[str, Digests]], str] | None = None,
    link: bool = False,
    finish: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write a model with some changes into `out`.

    Every byte is read back as soon as it is written, and compared with the expected one. Files that an earlier run of
    the same job finished are kept.

    Args:
        target: The model.
        changes: The changes of each of its weight files.
        out: The folder to make; it must be absent or empty.
        job: Everything else that decides the bytes besides the model and the places of the changes, as JSON data.
        extras: Further small files to write into it, by name.
        describe: Makes the manifest's text from the digests of the files; without it nothing is hashed.
        link: Hard-link unchanged weight files to the target's instead of copying them.
        finish: Called with the complete folder before it gets its name. It may add flushed files; an exception keeps
            `out` from appearing.

    Raises:
        UsageError: If `out` exists, cannot be made, does not fit on its disk, or is being made by another run; or if
            files cannot be linked.
        CheckpointError: If a change does not fit, a small file is a stray link or not a file, or one changes meanwhile.
    """
    linked = frozenset(name for name in target.shards if link and not changes[name])
    changes = {**changes, **{name: [] for name in _small_files(target)}}
    _tell_left_behind(target, changes)
    sizes = {name: target.path(name).stat().st_size for name in changes}
    check_destination(out, target, sum(size for name, size in sizes.items() if name not in linked))
    _check_sizes(target, sizes)
    out = Path(os.path.abspath(out))
    algorithm = None if describe is None else ALGORITHM
    with staging(out, _whole_job(target, changes, linked, {**job, "digests": algorithm})) as made:
        files = _write_files(target, changes, linked, made, algorithm)
        written = dict(extras or {})
        for name, content in written.items():
            files[name] = _write_small(made.folder / name, content)
        if describe is not None:
            written[MANIFEST_NAME] = describe(files)
            _write_small(made.folder / MANIFEST_NAME, written[MANIFEST_NAME])
        _check_loading(made.folder, target, out)
        finish(made.folder)
        _publish(made, tuple(written), out)


def _small_files(target: Checkpoint) -> list[str]:
    """The files of a model besides its weights, by their paths in its folder.

    Raises:
        CheckpointError: If one is a link out of the folder, not a file, or a pointer of Git LFS.
    """
    names = parts_of(target.folder)
    for path in (target.folder / name for name in names):
        refuse_stray_link(path, target.folder)
        if not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a link to one; remove it or repair it")
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"cannot read {path}: {os.strerror(errno.EACCES)}")
        refuse_pointer(path)
        if path.stat().st_size > MAX_SMALL_BYTES:
            size, most = path.stat().st_size / 1e9, MAX_SMALL_BYTES / 1e9
            raise CheckpointError(
                f"{path} has {size:.1f} GB; files other than weights may have {most:.1f} GB; move it elsewhere"
            )
    return names


def _tell_left_behind(target: Checkpoint, kept: Collection[str]) -> None:
    """Name the files next to the target's own that are not copied; cards, reports and charts are made anew."""
    others = [
        name
        for name in left_behind(target.folder, kept)
        if name not in WRITTEN and not (name.startswith(CHART_PREFIX) and name.endswith(PICTURES))
    ]
    if others:
        LOG.info(f"not copied, since they are not parts of the repaired model: {some_of(others, MAX_NAMED)}")


def _check_loading(folder: Path, target: Checkpoint, out: Path) -> None:
    """Raise `CheckpointError` unless programs would load exactly the written weights from a finished result."""
    try:
        found = find_model(str(folder)).shards()
    except CheckpointError as error:
        raise CheckpointError(f"{out} would not be loaded as it was written, and was not kept: {error}") from error
    if found != target.shards:
        names, written = (", ".join(shards[:MAX_NAMED]) for shards in (found, target.shards))
        raise CheckpointError(f"programs would load {names} from {out}, but {written} were written; nothing was kept")


def _check_sizes(target: Checkpoint, sizes: Mapping[str, int]) -> None:
    for shard in target.shards:
        described = max((tensor.stop for tensor in target.tensors.values() if tensor.file == shard), default=None)
        if described is not None and described != sizes[shard]:
            raise CheckpointError(
                f"{target.folder / shard} had {described} bytes when its header was read and has {sizes[shard]} now; "
                f"wait until nothing writes to it, and run the same command again"
            )


def _whole_job(
    target: Checkpoint, changes: Mapping[str, Sequence[RegionEdit]], linked: Collection[str], job: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides the bytes of a result's files, as JSON data."""
    return {
        "format": FORMAT,
        "target": model_state(target, sorted(changes), linked),
        **job,
        "changes": {name: edits_digest(of_file) for name, of_file in changes.items() if of_file},
        "linked": sorted(linked),
    }


def model_state(checkpoint: Checkpoint, names: Sequence[str], linked: Collection[str] = ()) -> dict[str, Any]:
    """The identity of a model's files, as JSON data; it changes when they do.

    A Hub snapshot is identified by its commit, since its files may have been downloaded again. The time of the last
    change of any property is left out for linked files, since linking changes it.
    """
    if checkpoint.commit is not None:
        return {"commit": checkpoint.commit, "files": list(names)}
    files = {name: file_state(checkpoint.path(name), counts_links=name not in linked) for name in names}
    return {"folder": str(checkpoint.folder.absolute()), "files": files}


def _write_files(
    target: Checkpoint,
    changes: Mapping[str, Sequence[RegionEdit]],
    linked: Collection[str],
    made: Staging,
    algorithm: str | None,
) -> dict[str, Digests]:
    """Write a result's files in parallel, the largest first, and return their digests; Ctrl-C stops between pieces."""
    stop = threading.Event()
    files = dict(made.finished.files)
    shards = [name for name in target.shards if name not in files and name not in linked]
    # Of one shard each processor copies a part, of many its own.
    of_shard = max(1, min(MAX_THREADS, os.cpu_count() or 1) // max(len(shards), 1))

    def write(name: str) -> None:
        if stop.is_set():
            return
        path = made.folder / name
        if name in files:
            advance(files[name].num_bytes, "bytes")
        elif name in linked:
            # Not recorded but hashed by each run: writing to the target changes this file too.
            link_file(target.path(name), path)
            files[name] = hash_file(path, algorithm) if algorithm else Digests(path.stat().st_size, "", {})
        else:
            threads = of_shard if name in shards else 1
            files[name] = write_file(target.path(name), path, changes[name], stop, algorithm, threads)
            made.finished.add(name, path, files[name])

    for name in changes:
        (made.folder / name).parent.mkdir(exist_ok=True)
    by_size = sorted(changes, key=lambda name: target.path(name).stat().st_size, reverse=True)
    with ThreadPoolExecutor(num_threads()) as pool:
        writes = [pool.submit(write, name) for name in by_size]
        try:
            wait(writes, return_when=FIRST_EXCEPTION)
        finally:
            # Stops the others after a fault or Ctrl-C; otherwise all are done.
            stop.set()
    faults = [fault for written in writes if (fault := written.exception()) is not None]
    for fault in faults:
        if not isinstance(fault, NotNeeded):
            raise fault
    return files


def num_threads() -> int:
    """Number of files written at once: more than there are processors, since each also waits for the disk."""
    return min(MAX_THREADS, (os.cpu_count() or 1) + 2)


def _write_small(path: Path, content: str | bytes) -> Digests:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(content)
    return Digests(len(content), hash_bytes(content, ALGORITHM), {})


def _publish(made: Staging, written: Sequence[str], out: Path) -> None:
    """Flush the result to disk and give it its name; `written` are the files that were not flushed yet."""
    for name in written:
        with (made.folder / name).open("rb") as file:
            os.fsync(file.fileno())
    for folder in (*(path for path in made.folder.rglob("*") if path.is_dir()), made.folder):
        flush_folder(folder)
    try:
        made.folder.rename(out)
    except OSError as error:
        raise UsageError(f"{out} was created by another program in the meantime; nothing was changed") from error
    flush_folder(out.parent)


def transplant(
    plan: Plan,
    selection: Sequence[Unit],
    out: Path,
    *,
    extras: Mapping[str, str | bytes] | None = None,
    link: bool = False,
    manifest: bool = True,
    finish: Callable[[Path], object] = lambda _: None,
) -> Rounding:
    """Write the target with the plan's edit of the selected units into `out`.

    Every byte is read back as soon as it is written, and compared with the expected one. Files that an earlier run of
    the same job finished are kept.

    Args:
        plan: The models and the edit.
        selection: The units to change.
        out: The folder to make; it must be absent or empty.
        extras: Further small files to write into it, by name.
        link: Hard-link unchanged weight files to the target's instead of copying them. Small files are always copied,
            since people edit them.
        manifest: Write `dapa.json`, with a digest of everything.
        finish: Called with the complete folder before it gets its name. It may add flushed files; an exception keeps
            `out` from appearing.

    Returns:
        The rounding errors from storing values in a narrower dtype, in the files that this call wrote.

    Raises:
        UsageError: If `out` exists, cannot be made, does not fit on its disk, or is being made by another run; or if
            files cannot be linked.
        CheckpointError: If a source value does not fit the target's dtype, or a file changes while it is read.
    """
    rounding = Rounding(plan.max_overflow)
    changes = find_changes(plan, selection, rounding)
    units = tuple(map(str, selection))

    def describe(files: Mapping[str, Digests]) -> str:
        return manifest_text(make_manifest(plan, units, changes, files))

    regions = list(plan.regions(selection))
    job: dict[str, Any] = {
        name: model_state(checkpoint, sorted({found[name].tensor.file for found in regions}))
        for name, checkpoint in plan.others.items()
    }
    job["selection"] = list(units)
    write_result(
        plan.target, changes, out, job, extras=extras, describe=describe if manifest else None, link=link, finish=finish
    )
    return rounding


def check_absent(out: Path) -> None:
    """Raise `UsageError` unless `out` is absent or an empty folder."""
    # Also resolves a name that ends in `..`.
    place = Path(os.path.abspath(out))
    try:
        occupied = place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir())))
        is_here = place.exists() and place.samefile(Path.cwd())
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error.strerror}") from error
    if occupied:
        raise UsageError(f"{out} exists already; name another folder or remove it")
    if is_here:
        raise UsageError(f"{out} is the folder you are in, which cannot be replaced; name one inside it")


def check_destination(out: Path, target: Checkpoint, num_bytes: int | None = None) -> None:
    """Raise `UsageError` unless `out` is absent or an empty folder, in a writable place with enough space.

    Args:
        out: The folder to make.
        target: The model to copy.
        num_bytes: Bytes to write; None for all of the target's weights.
    """
    check_absent(out)
    place = Path(os.path.abspath(out))
    parent = place.parent
    if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(target.folder)):
        raise UsageError(f"{out} is inside the target's own folder; name a place next to it")
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{out} cannot be made: {parent} is not a folder that you may write to")
    needed = num_bytes
    if needed is None:
        needed = sum((target.folder / shard).stat().st_size for shard in target.shards)
    # An earlier run's files are either reused or removed.
    free = shutil.disk_usage(parent).free + _allocated(staging_folder(place))
    if free < needed and not _shares_blocks(target, parent):
        raise UsageError(
            f"the result needs {needed / 1e9:.2f} GB on the disk of {parent}, which has {free / 1e9:.2f} GB left"
        )


def _allocated(folder: Path) -> int:
    """Disk space that removing a folder would free."""
    if not folder.is_dir():
        return 0
    states = [path.lstat() for path in folder.rglob("*")]
    # Links to the target's own files (from a run with --link) free nothing.
    return sum(getattr(state, "st_blocks", state.st_size // 512) * 512 for state in states if state.st_nlink == 1)


def _shares_blocks(target: Checkpoint, parent: Path) -> bool:
    """Whether the file system can share the target's blocks with a copy, which then takes no space until changed."""
    try:
        with (target.folder / target.shards[0]).open("rb") as reader, tempfile.TemporaryFile(dir=parent) as writer:
            return clone(reader.fileno(), writer.fileno())
    except OSError:
        return False
