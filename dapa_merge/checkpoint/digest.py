"""Digests of models, files and parts of files. A file of any size takes a few hundred kilobytes of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import blake3

from dapa_merge.checkpoint.contents import TEMPLATES, is_settings
from dapa_merge.checkpoint.folder import open_regular
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint, iterate_bytes
from dapa_merge.errors import CheckpointError
from dapa_merge.progress import advance

DIGEST_THREADS = 4


class Hash(Protocol):
    """Computes a digest of bytes that are given in order."""

    def update(self, piece: bytes | bytearray | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


# The algorithms of the digests of files, all of 256 bits. On processors with wide vectors BLAKE3 is several times as
# fast as SHA-256; but the Hub states the SHA-256 of a large file, so what is compared with the Hub needs that one.
HASHES: Mapping[str, Callable[[], Hash]] = {"blake3": blake3.blake3, "sha256": hashlib.sha256}
# That of a manifest.
ALGORITHM = "blake3"
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
    """A file's size, its digest in hexadecimal, and the digest of each requested span by name."""

    num_bytes: int
    digest: str
    spans: Mapping[str, str]


class Hasher:
    """Hashes a file that is given in order, and non-overlapping spans of it."""

    def __init__(self, algorithm: str | None, spans: Mapping[str, Span] | None = None) -> None:
        """Begin a file; without an algorithm, its bytes are only counted."""
        self._counts_only = algorithm is None
        make = HASHES[algorithm or ALGORITHM]
        self._whole = make()
        self._parts = {name: make() for name in spans or {}}
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


def hash_file(path: Path, algorithm: str, spans: Mapping[str, Span] | None = None) -> Digests:
    """Hash a file and spans of it in one read.

    Raises:
        CheckpointError: If it cannot be read.
    """
    hasher = Hasher(algorithm, spans)
    read_into(path, hasher)
    return hasher.digests()


def read_into(path: Path, *hashers: Hasher) -> None:
    """Give a file to each of the hashers, in one read.

    Raises:
        CheckpointError: If it cannot be read.
    """
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        with open_regular(path) as file:
            while size := file.readinto(buffer):
                for hasher in hashers:
                    hasher.update(buffer[:size])
                advance(size, "bytes")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def hash_bytes(content: bytes, algorithm: str) -> str:
    """The digest of bytes in hexadecimal."""
    state = HASHES[algorithm]()
    state.update(content)
    return state.hexdigest()


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
