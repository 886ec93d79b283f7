"""Writing the repaired model: the target's files with the selected tensors of the source, all or nothing.

Everything is written into a hidden folder beside the final one, which appears under its name only when it is complete,
proved and on disk. The target's files are opened for reading only: a Hub cache is made of links to shared blobs.
Headers, the order of tensors and the names of shards stay the target's, so that a content-addressed store has little to
take up.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.changes import Change, digest_of, find_changes
from dapa_merge.checkpoint.copying import Progress, Stopped, write_file
from dapa_merge.checkpoint.destination import check_destination
from dapa_merge.checkpoint.files import INDEX_NAME, TEMPLATES, Checkpoint
from dapa_merge.checkpoint.kernel import link_file
from dapa_merge.checkpoint.manifest import FILE_NAME as MANIFEST_NAME
from dapa_merge.checkpoint.manifest import make_manifest, write_manifest
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.staging import Staging, flush_to_disk, staging
from dapa_merge.checkpoint.streams import Digests, examine
from dapa_merge.errors import CheckpointError, UsageError

# Of the record of what is finished, and of how files are made: another version's are not gone on from.
FORMAT = 1
# Other forms of the target's weights would no longer agree with the result, and its card describes another model.
NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt", ".index.json",
    "README.md", "mergekit_config.yml", "dapa_report.json", "dapa_responses.jsonl", MANIFEST_NAME, ".gitattributes",
)  # fmt: skip
MAX_THREADS = 8


def transplant(
    plan: Plan,
    selection: Sequence[Unit],
    out: Path,
    *,
    texts: Mapping[str, str] | None = None,
    link: bool = False,
    check: Callable[[Path], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> None:
    """Write the target with the selected units replaced by the source's into `out`.

    Every byte is read back as soon as it is written, and compared with the target's or the source's. What an earlier
    run of the same job finished is kept.

    Args:
        plan: Target and source.
        selection: The units to replace.
        out: The folder to make; it must not exist, or be empty.
        texts: Further text files to write into it, by name.
        link: Let weight files that do not change be the target's own, under a second name. Small files are copied all
            the same: people edit them.
        check: Called with the finished folder before it gets its name; what it raises keeps `out` from appearing.
        progress: Called with numbers of bytes as they are done with.

    Raises:
        UsageError: If `out` exists, cannot be made, does not fit on its disk, or is being made by another run; if files
            are to be linked where that is impossible.
        CheckpointError: If a source value does not fit the target's dtype, or a file changes while it is read.
    """
    changes = _changes_by_file(plan, selection)
    linked = frozenset(name for name in plan.target.shards if link and not changes[name])
    sizes = {name: (plan.target.folder / name).stat().st_size for name in changes}
    check_destination(out, plan.target, sum(size for name, size in sizes.items() if name not in linked))
    _check_sizes(plan.target, sizes)
    out = Path(os.path.abspath(out))
    with staging(out, _job(plan, selection, changes, linked)) as made:
        _write_files(plan.target, changes, linked, made, progress)
        files = dict(made.record.files)
        for name, text in (texts or {}).items():
            files[name] = _write_text(made.folder / name, text)
        units = tuple(map(str, selection))
        write_manifest(made.folder, make_manifest(plan.target, plan.source, units, changes, files))
        check(made.folder)
        _publish(made, (*(texts or ()), MANIFEST_NAME), out)


def _changes_by_file(plan: Plan, selection: Sequence[Unit]) -> dict[str, list[Change]]:
    """The files of a result, by their paths in it, each with what is not the target's."""
    target = plan.target
    found = find_changes(plan, selection)
    for path in sorted([*target.folder.iterdir(), *target.folder.glob(f"{TEMPLATES}/*.jinja")]):
        if path.is_file() and (path.name == INDEX_NAME or not path.name.endswith(NOT_COPIED)):
            found[path.relative_to(target.folder).as_posix()] = []
    return found


def _check_sizes(target: Checkpoint, sizes: Mapping[str, int]) -> None:
    for shard in target.shards:
        described = max((tensor.stop for tensor in target.tensors.values() if tensor.file == shard), default=None)
        if described is not None and described != sizes[shard]:
            raise CheckpointError(
                f"{target.folder / shard} had {described} bytes when its header was read and has {sizes[shard]} now; "
                f"wait until nothing writes to it, and run the same command again"
            )


def _job(
    plan: Plan, selection: Sequence[Unit], changes: Mapping[str, Sequence[Change]], linked: Collection[str]
) -> dict[str, Any]:
    """Everything that decides the bytes of a result's files, as JSON has it."""
    sources = sorted({change.source_file for of_file in changes.values() for change in of_file})
    return {
        "format": FORMAT,
        "target": _identity(plan.target, sorted(changes)),
        "source": _identity(plan.source, sources),
        "selection": list(map(str, selection)),
        "changes": {name: digest_of(of_file) for name, of_file in changes.items() if of_file},
        "linked": sorted(linked),
    }


def _identity(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
    """Which files these are. A snapshot of the Hub is known by its commit; its files may have been fetched anew."""
    if checkpoint.commit is not None:
        return {"commit": checkpoint.commit, "files": list(names)}
    states = {name: (checkpoint.folder / name).stat() for name in names}
    files = {name: [state.st_size, state.st_mtime_ns, state.st_ino] for name, state in states.items()}
    return {"folder": str(checkpoint.folder.absolute()), "files": files}


def _write_files(
    target: Checkpoint,
    changes: Mapping[str, Sequence[Change]],
    linked: Collection[str],
    made: Staging,
    progress: Progress,
) -> None:
    """Write a result's files, in parallel, the largest first; Ctrl-C stops between two pieces."""
    stop = threading.Event()
    num_large = sum(name not in linked and name not in made.record.files for name in target.shards)
    hash_apart = num_large < (os.cpu_count() or 1)

    def write(name: str) -> None:
        if stop.is_set():
            return
        digests = made.record.files.get(name)
        if digests is not None:
            progress(digests.num_bytes)
            return
        path = made.folder / name
        if name in linked:
            link_file(target.folder / name, path)
            digests, _ = examine(path, progress=progress)
        else:
            digests = write_file(target.folder / name, path, changes[name], progress, stop, hash_apart=hash_apart)
        made.record.finish(name, path, digests)

    for name in changes:
        (made.folder / name).parent.mkdir(exist_ok=True)
    by_size = sorted(changes, key=lambda name: (target.folder / name).stat().st_size, reverse=True)
    with ThreadPoolExecutor(num_threads()) as pool:
        writes = [pool.submit(write, name) for name in by_size]
        try:
            wait(writes, return_when=FIRST_EXCEPTION)
        finally:
            # After a fault, and after Ctrl-C; otherwise there is nothing left to stop.
            stop.set()
    faults = [fault for written in writes if (fault := written.exception()) is not None]
    for fault in faults:
        if not isinstance(fault, Stopped):
            raise fault


def num_threads() -> int:
    """How many files are written at once: more than there are processors, since each also waits for the disk."""
    return min(MAX_THREADS, (os.cpu_count() or 1) + 2)


def _write_text(path: Path, text: str) -> Digests:
    content = text.encode()
    path.write_bytes(content)
    return Digests(len(content), hashlib.sha256(content).hexdigest(), {})


def _publish(made: Staging, written: Sequence[str], out: Path) -> None:
    """Let the result appear, complete and on disk; `written` are the files that are not on disk yet."""
    for name in written:
        with (made.folder / name).open("rb") as file:
            os.fsync(file.fileno())
    for folder in (*(path for path in made.folder.rglob("*") if path.is_dir()), made.folder):
        flush_to_disk(folder, files=False)
    try:
        made.folder.rename(out)
    except OSError as error:
        raise UsageError(f"{out} came into being while its content was written; nothing was changed") from error
    flush_to_disk(out.parent, files=False)
