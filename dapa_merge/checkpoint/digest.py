"""Digests of models, files and parts of files. A file of any size takes a few hundred kilobytes of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dapa_merge.checkpoint.contents import TEMPLATES, is_settings
from dapa_merge.checkpoint.folder import open_regular
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint, iterate_bytes
from dapa_merge.errors import CheckpointError
from dapa_merge.progress import advance

DIGEST_THREADS = 4
MAX_SMALL_BYTES = 1 << 28


def tensors_digest(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> str:
    """The commit of a Hub snapshot; for a local folder the SHA-256 over the named tensors (default: all).

    Names, dtypes, shapes and bytes count; the order in the files and the division into shards do not.
    """
    if checkpoint.commit is not None:
        return f"commit {checkpoint.commit}"
    chosen = sorted(checkpoint.tensors if names is None else set(names))

    def digest(tensor: Tensor) -> bytes:
        state = hashlib.sha256(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        for piece in iterate_bytes(checkpoint, tensor):
            state.update(piece)
            advance(len(piece), "bytes")
        return state.digest()

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = list(pool.map(digest, [checkpoint.tensors[name] for name in chosen]))
    return "sha256 " + hashlib.sha256(b"".join(digests)).hexdigest()


def settings_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 over a model's config, tokenizer, chat templates and generation settings."""
    state = hashlib.sha256()
    for name, path in settings_files(checkpoint).items():
        content = path.read_bytes()
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    return "sha256 " + state.hexdigest()


def settings_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Paths of a model's config, tokenizer, chat templates and generation settings, by name within its folder."""
    folder = checkpoint.folder
    paths = {path.relative_to(folder).as_posix(): path for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*"))}
    return {
        name: path
        for name, path in sorted(paths.items())
        if is_settings(name) and path.is_file() and path.stat().st_size <= MAX_SMALL_BYTES
    }


# Two of these fit into the processor's second-level cache.
PIECE_BYTES = 1 << 18
# A byte range of a file; the end is exclusive.
Span = tuple[int, int]


@dataclass(frozen=True)
class Digests:
    """A file's size, its SHA-256 in hexadecimal, and the SHA-256 of each requested span by name."""

    num_bytes: int
    sha256: str
    spans: Mapping[str, str]


class Hasher:
    """Hashes a file that is given in order, and non-overlapping spans of it."""

    def __init__(self, spans: Mapping[str, Span] | None = None, *, counts_only: bool = False) -> None:
        """Begin a file."""
        self._counts_only = counts_only
        self._whole = hashlib.sha256()
        self._parts = {name: hashlib.sha256() for name in spans or {}}
        self._waiting = sorted(((start, stop, name) for name, (start, stop) in (spans or {}).items()), reverse=True)
        self.num_bytes = 0

    def update(self, piece: memoryview) -> None:
        """Hash the next bytes."""
        if self._counts_only:
            self.num_bytes += len(piece)
            return
        self._whole.update(piece)
        begin, end = self.num_bytes, self.num_bytes + len(piece)
        while self._waiting and self._waiting[-1][0] < end:
            start, stop, name = self._waiting[-1]
            self._parts[name].update(piece[max(start - begin, 0) : stop - begin])
            if stop > end:
                break
            self._waiting.pop()
        self.num_bytes = end

    def digests(self) -> Digests:
        """The digests, once all bytes were given."""
        if self._counts_only:
            return Digests(self.num_bytes, "", {})
        parts = {name: part.hexdigest() for name, part in self._parts.items()}
        return Digests(self.num_bytes, self._whole.hexdigest(), parts)


def hash_file(path: Path, spans: Mapping[str, Span] | None = None) -> Digests:
    """Hash a file and spans of it in one read.

    Raises:
        CheckpointError: If it cannot be read.
    """
    hasher = Hasher(spans)
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        with open_regular(path) as file:
            while size := file.readinto(buffer):
                hasher.update(buffer[:size])
                advance(size, "bytes")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return hasher.digests()


def read_whole(file: IO[bytes], piece: memoryview, path: Path) -> None:
    """Fill memory from an unbuffered file, whose reads may return less than requested.

    Raises:
        CheckpointError: If the file ends first.
    """
    while piece:
        size = file.readinto(piece)  # type: ignore[attr-defined]
        if not size:
            raise CheckpointError(f"{path} became shorter while it was read")
        piece = piece[size:]


def same(one: memoryview, other: memoryview) -> bool:
    """Whether two pieces of bytes are the same."""
    # Python compares two memoryviews item by item, a hundred times slower than memcmp, which a bytearray uses.
    whole = other.obj
    return (whole if isinstance(whole, bytearray) and len(whole) == len(other) else bytearray(other)) == one
