"""Whether a folder is what its manifest says, and the manifest of one that has none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dapa_merge import __version__
from dapa_merge.checkpoint.digest import Digests, Span, hash_file
from dapa_merge.checkpoint.header import read_header
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Box, remainder, whole_box
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.plan import Plan
from dapa_merge.transplant.manifest import (
    MANIFEST_NAME,
    PRIVATE,
    ChangedTensor,
    File,
    Manifest,
    is_listed,
    may_be_added,
    origins,
    read_manifest,
)
from dapa_merge.verify.tensors import Verification


def check(folder: Path, manifest: Manifest | None = None, known: Mapping[str, Digests] | None = None) -> list[str]:
    """Read every file of a result and compare it, and its changed tensors, with the manifest.

    Args:
        folder: The result.
        manifest: What it must be; by default its own `dapa.json`.
        known: Digests of files that were just read, with those of all tensors in them that may have been changed.

    Returns:
        A sentence for each fault: a file that is missing, of another size or other bytes, or not in the manifest; a
        changed tensor that is missing or has other bytes.

    Raises:
        CheckpointError: If the manifest cannot be read.
    """
    manifest = manifest or read_manifest(folder)
    inside = folder.resolve()

    def faults(name: str) -> list[str]:
        if name in PRIVATE and not (folder / name).exists():
            return []
        changed = {tensor: entry for tensor, entry in manifest.tensors.items() if entry.file == name}
        return _faults(inside, name, manifest.files[name], changed, (known or {}).get(name))

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = [fault for of_file in pool.map(faults, manifest.files) for fault in of_file]
    strays = [name for name in _files(folder) if name not in manifest.files and not may_be_added(name)]
    return found + [f"{name} is not in {MANIFEST_NAME}" for name in strays]


def manifest_of(result: Checkpoint, plan: Plan, verification: Verification) -> Manifest:
    """The manifest of a result that was verified, whoever wrote it.

    Raises:
        CheckpointError: If a changed tensor has another name in it than in the target.
    """
    boxes: dict[str, list[Box]] = {}
    for unit in verification.transplanted:
        for part in unit.parts:
            boxes.setdefault(part.tensor, []).append(part.box)
    tensors = {}
    for name, of_tensor in sorted(boxes.items()):
        if name not in result.tensors:
            raise CheckpointError(
                f"{result.name} has no tensor {name}, but its values in another; it gets no {MANIFEST_NAME}"
            )
        tensor = result.tensors[name]
        is_whole = not remainder(whole_box(tensor.shape), of_tensor)
        parts = None if is_whole else tuple(sorted(of_tensor))
        tensors[name] = ChangedTensor(tensor.file, verification.tensors[name], parts)
    files = {}
    for name in _files(result.folder):
        path = result.folder / name
        files[name] = File(path.stat().st_size, verification.files.get(name) or hash_file(path).sha256)
    return Manifest(
        version=__version__,
        models=origins(plan),
        edit=plan.edit,
        units=tuple(map(str, verification.transplanted)),
        files=files,
        tensors=tensors,
    )


def _faults(
    folder: Path, name: str, expected: File, changed: dict[str, ChangedTensor], known: Digests | None
) -> list[str]:
    path = folder / name
    try:
        # A file may be a link, as in a Hub cache; a folder may not, since it would lead elsewhere.
        if not path.is_file() or not path.parent.resolve().is_relative_to(folder):
            return [f"{name} is missing"]
        size = path.stat().st_size
        if size != expected.num_bytes:
            return [f"{name} has {size} bytes, not {expected.num_bytes}"]
        found = {tensor.name: tensor for tensor in read_header(path)} if changed else {}
        spans: dict[str, Span] = {
            tensor: (found[tensor].start, found[tensor].stop) for tensor in changed if tensor in found
        }
        digests = known if known is not None and known.spans.keys() >= spans.keys() else hash_file(path, spans)
    except (CheckpointError, OSError, RuntimeError) as error:
        return [f"{name} cannot be read: {error}"]
    faults = [f"{name} does not have the bytes that {MANIFEST_NAME} says"] if digests.sha256 != expected.sha256 else []
    for tensor, entry in changed.items():
        if tensor not in found:
            faults.append(f"{tensor} is not in {name}")
        elif digests.spans[tensor] != entry.sha256:
            faults.append(f"{tensor} does not have the bytes that {MANIFEST_NAME} says")
        elif entry.boxes is not None and not all(_fits(box, found[tensor].shape) for box in entry.boxes):
            faults.append(f"{tensor} has no such part as {MANIFEST_NAME} says")
    return faults


def _fits(box: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> bool:
    return len(box) == len(shape) and all(stop <= size for (_, stop), size in zip(box, shape, strict=True))


def _files(folder: Path) -> Iterator[str]:
    """The files of a folder that a manifest lists, by their paths in it; links to folders count as files."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in links)
        for name in sorted([*files, *links]):
            path = (here / name).relative_to(folder).as_posix()
            if not name.startswith(".") and is_listed(path):
                yield path
