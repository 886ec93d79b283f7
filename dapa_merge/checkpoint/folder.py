"""Opens files of untrusted model folders safely, and finds those that hold the weights.

A folder from an archive or a clone can hold pipes and links to anything. Reading a pipe could block for ever, opening a
device can have effects, and a link could carry a private file of the user's into a published result.

The folder itself and its parents may be links, since the user named them. Weight files may be links to any regular
file: weights are often kept on other disks, and only valid safetensors files are accepted. Small files are copied as
they are, so their links must stay inside the folder, or lead from a Hub snapshot to its repository's blobs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from dapa_merge.errors import CheckpointError, HubError
from dapa_merge.progress import advance, task

# How the pointers of Git LFS begin: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_POINTER_BEGINS = b"version https://git-lfs.github.com/spec/"
# Bytes to hash at once.
PIECE_BYTES = 8 << 20
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device"}


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without ever waiting for a writer.

    Raises:
        OSError: If it cannot be opened or is not a regular file; its `strerror` says which.
    """
    return open(path, "rb", opener=_open_if_regular)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a small file.

    Raises:
        OSError: If it cannot be read, is not a regular file, or is larger than `max_bytes`; its `strerror` says which.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"It is larger than {max_bytes / 1e6:.0f} MB, which no such file needs")
    return content


def refuse_pointer(path: Path) -> None:
    """Raise if a file is only Git LFS's pointer to its content, as in a clone that was made without it.

    Raises:
        CheckpointError: If it is.
        OSError: If it cannot be read or is not a regular file.
    """
    with open_regular(path) as file:
        is_pointer = file.read(len(_POINTER_BEGINS)) == _POINTER_BEGINS
    if is_pointer:
        raise CheckpointError(
            f"{path} is only Git LFS's pointer to the file; run `git lfs pull` in the clone that it came from"
        )


def refuse_stray_link(path: Path, folder: Path) -> None:
    """Raise if a small file of a model folder is a link out of the folder and, in the Hub's cache, its repository.

    Raises:
        CheckpointError: If it is.
    """
    # Not Path.resolve, which before Python 3.13 raises a RuntimeError for circular links.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    places = [home]
    if home.parent.name == "snapshots":
        places.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in places):
        raise CheckpointError(
            f"{path} is a link that leads out of its folder, to {real}; put a copy of that file in its place"
        )


def sha256_of(path: Path, start: int, stop: int) -> str:
    """SHA-256 of the bytes in `[start, stop)` of a file, as far as it has them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(PIECE_BYTES, stop - start))):
            digest.update(piece)
            advance(len(piece), "bytes")
            start += len(piece)
    return digest.hexdigest()


def cached_sha256(path: Path) -> str | None:
    """The SHA-256 by which huggingface_hub's cache names a large file; None where it does not."""
    real = Path(os.path.realpath(path))
    return real.name if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name) else None


def refuse_other_bytes(folder: Path, expected: Mapping[str, str], model: str) -> None:
    """Hash files that came from the Hub.

    Args:
        folder: Their folder in huggingface_hub's cache.
        expected: The SHA-256 of each, by name.
        model: Their model, for messages.

    Raises:
        HubError: If one has another SHA-256; it is removed.
    """
    sizes = {name: (folder / name).stat().st_size for name in expected}
    with task("checking what was fetched", sum(sizes.values()), "bytes"), ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda name: sha256_of(folder / name, 0, sizes[name]), expected)
        wrong = [name for name, sha256 in zip(expected, found, strict=True) if sha256 != expected[name]]
    for name in wrong:
        Path(os.path.realpath(folder / name)).unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)
    if wrong:
        raise HubError(
            f"{wrong[0]} of {model} has not the SHA-256 that the Hub states; what was fetched of it was removed: run "
            f"the command again"
        )


def _open_if_regular(path: str, flags: int) -> int:
    _refuse_irregular(os.stat(path))
    # The file may have been replaced since: open it without blocking, and check it again once open.
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


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"
ADAPTER_CONFIG_NAME = "adapter_config.json"
# Mistral AI's own format of the weights, often published next to the common one.
CONSOLIDATED_NAME = "consolidated.safetensors"
# Suffixes of weight files for other programs, which load them only by name: a download often has them, too.
OTHER_PROGRAMS = (".gguf", ".onnx", ".onnx_data", ".mlmodel", ".tflite")
# Suffixes of weight files, of any program.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx")
# peft's change to a model, not a model.
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# Pickles that trainers leave next to a model.
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "random_states.bin", *ADAPTER_NAMES)
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Parts of a distributed checkpoint of transformers, which loads them rather than any other weights.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Hidden files, and what desktops and editors leave in any folder.
_CLUTTER = re.compile(
    r"\..*|.*~|#.*#|~\$.*|desktop\.ini|(eh)?thumbs\.db|icon\r|__macosx|__pycache__|\$recycle\.bin", re.IGNORECASE
)


def is_clutter(name: str) -> bool:
    """Whether a path is hidden, or was left by a desktop or an editor: such files are never parts of a model.

    Among them `._model.safetensors`, which macOS writes next to each file on a disk of another system.
    """
    return any(_CLUTTER.fullmatch(part) for part in name.split("/"))


@dataclass(frozen=True)
class Layout:
    """The files that hold the weights.

    Attributes:
        index: The index file, if any.
        shards: The weight files, if there is no index.
        pickled: Whether they are pickles.
    """

    index: str | None = None
    shards: tuple[str, ...] = ()
    pickled: bool = False


def find_weights(files: Collection[str], name: str) -> Layout:
    """Choose the weight files among a model's files.

    The order of preference: an index, `model.safetensors`, a complete set of numbered shards,
    `consolidated.safetensors`, the only other safetensors file that is not an adapter, pickles.

    Args:
        files: Names of the files in the model's top folder.
        name: The model's name in messages.

    Raises:
        CheckpointError: If there are no weights, a shard is missing, the choice is ambiguous, or transformers would
            load other weights instead or on top.
    """
    files = {file for file in files if not is_clutter(file)}
    layout = _choose(files, name)
    ours = layout.index or layout.shards[0]
    if beside := [file for file in (ADAPTER_CONFIG_NAME, *ADAPTER_NAMES) if file in files]:
        raise CheckpointError(
            f"{name} has {' and '.join(beside)} beside its own weights, {ours}, and programs load an adapter on top of "
            f"them; remove it, or move it into a folder of its own and name both, as BASE+ADAPTER"
        )
    if parts := sorted(filter(_DISTRIBUTED.fullmatch, files)):
        raise CheckpointError(
            f"{name} has a distributed checkpoint, {parts[0]}, which transformers loads instead of any other weights; "
            f"remove it, or save the model from it"
        )
    pickles = [file for file in (PICKLE_NAME, PICKLE_INDEX_NAME) if file in files]
    if pickles and not layout.pickled and ours not in (INDEX_NAME, SINGLE_NAME):
        raise CheckpointError(
            f"{name} has {pickles[0]}, which transformers loads instead of {ours}; keep only one of them"
        )
    return layout


def _choose(files: Collection[str], name: str) -> Layout:
    if INDEX_NAME in files and SINGLE_NAME in files:
        raise CheckpointError(
            f"{name} has both {SINGLE_NAME} and {INDEX_NAME}, and programs differ in which they read; remove one"
        )
    if INDEX_NAME in files:
        return Layout(index=INDEX_NAME)
    if SINGLE_NAME in files:
        return Layout(shards=(SINGLE_NAME,))
    others = sorted(file for file in files if file.endswith(".safetensors") and file not in ADAPTER_NAMES)
    if numbered := [match for match in map(_NUMBERED.fullmatch, others) if match]:
        return Layout(shards=_complete_set(numbered, name))
    if CONSOLIDATED_NAME in others:
        return Layout(shards=(CONSOLIDATED_NAME,))
    if len(others) == 1:
        return Layout(shards=(others[0],))
    if others:
        raise CheckpointError(
            f"{name} has neither {SINGLE_NAME} nor {INDEX_NAME}, but {len(others)} other safetensors files "
            f"({others[0]}, {others[1]}, ...); keep only those that are its weights"
        )
    return _pickles(files, name)


def _complete_set(numbered: list[re.Match[str]], name: str) -> tuple[str, ...]:
    """The shards `stem-00001-of-0000N` to N; several stems or counts are ambiguous."""
    sets = {(match["stem"], match["count"]) for match in numbered}
    if len(sets) > 1:
        first, second = (f"{stem}-*-of-{count}.safetensors" for stem, count in sorted(sets)[:2])
        raise CheckpointError(
            f"{name} has no {INDEX_NAME} and several sets of shards, {first} and {second}; remove one"
        )
    ((stem, count),) = sets
    # One more name than there are files is enough to find a gap.
    expected = [
        f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, min(int(count), len(numbered) + 1) + 1)
    ]
    found = {match.string for match in numbered}
    if missing := [file for file in expected if file not in found]:
        raise CheckpointError(
            f"{name} lacks {missing[0]}: it has no {INDEX_NAME}, and {len(numbered)} of {int(count)} shards; "
            f"download it again"
        )
    if extra := sorted(found - set(expected)):
        raise CheckpointError(f"{name} has {extra[0]}, which is not a shard of {int(count)}; download the model again")
    return tuple(expected)


def _pickles(files: Collection[str], name: str) -> Layout:
    if PICKLE_INDEX_NAME in files:
        return Layout(index=PICKLE_INDEX_NAME, pickled=True)
    if PICKLE_NAME in files:
        return Layout(shards=(PICKLE_NAME,), pickled=True)
    if any(adapter in files for adapter in ADAPTER_NAMES):
        raise CheckpointError(f"{name} is a LoRA adapter, not a model; pass it after its base, as BASE+{name}")
    if any(file.endswith((".bin", ".pth", ".pt")) and file not in NO_WEIGHTS for file in files):
        raise CheckpointError(
            f"{name} has pickled weights only, which can run code when loaded, and none are named {PICKLE_NAME}; "
            f"save it again as safetensors"
        )
    if gguf := sorted(file for file in files if file.endswith(".gguf")):
        raise CheckpointError(
            f"{name} has GGUF weights only, {gguf[0]}, which cannot be edited; name the model that they were made "
            f"from, or save them as safetensors"
        )
    raise CheckpointError(f"{name} has neither {SINGLE_NAME} nor {INDEX_NAME}")
