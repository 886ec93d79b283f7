"""Reading a file once to know what it is: its SHA-256, those of parts of it, and whether it holds what it should.

Everything is done to a piece while it is in the processor's cache, and a file of any size takes a few hundred
kilobytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from dapa_merge.errors import CheckpointError

# Two of these fit into the processor's second-level cache.
PIECE_BYTES = 1 << 18
# The first byte of a part of a file, and the byte after its last.
Span = tuple[int, int]


@dataclass(frozen=True)
class Digests:
    """What a file is.

    Attributes:
        num_bytes: Its size.
        sha256: Its SHA-256, in hexadecimal.
        spans: The SHA-256 of each span that was asked for, by name.
    """

    num_bytes: int
    sha256: str
    spans: Mapping[str, str]


class Hasher:
    """The SHA-256 of a file that is given in order, and of spans of it that do not overlap."""

    def __init__(self, spans: Mapping[str, Span] | None = None) -> None:
        """Begin a file.

        Args:
            spans: Parts to be hashed for themselves, by name.
        """
        self._whole = hashlib.sha256()
        self._parts = {name: hashlib.sha256() for name in spans or {}}
        self._waiting = sorted(((start, stop, name) for name, (start, stop) in (spans or {}).items()), reverse=True)
        self.num_bytes = 0

    def update(self, piece: memoryview) -> None:
        """Take the next bytes."""
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
        """What the file was, now that it has ended."""
        parts = {name: part.hexdigest() for name, part in self._parts.items()}
        return Digests(self.num_bytes, self._whole.hexdigest(), parts)


@dataclass(frozen=True)
class Claim:
    """That parts of a file hold certain bytes.

    Attributes:
        name: What to call it in the answer.
        spans: The parts, in order.
        pieces: Yields the bytes of all of them together, in order, in pieces of any size. It is called when the first
            of the parts is reached, and closed at the first difference.
    """

    name: str
    spans: tuple[Span, ...]
    pieces: Callable[[], Iterator[bytes | bytearray | memoryview]]


@dataclass
class _Cursor:
    """How far a claim has been compared."""

    claim: Claim
    waiting: list[Span] = field(default_factory=list)
    pieces: Iterator[bytes | bytearray | memoryview] | None = None
    rest: memoryview = field(default_factory=lambda: memoryview(b""))

    def agrees(self, piece: memoryview, begin: int) -> bool:
        """Compare as much of the claim as lies in the next piece of the file, which starts at `begin`."""
        end = begin + len(piece)
        while self.waiting and self.waiting[-1][0] < end:
            start, stop = self.waiting.pop()
            if stop > end:
                self.waiting.append((end, stop))
            if not self._equal(piece[max(start - begin, 0) : min(stop, end) - begin]):
                return False
            if stop > end:
                break
        return True

    def _equal(self, part: memoryview) -> bool:
        if self.pieces is None:
            self.pieces = iter(self.claim.pieces())
        while part:
            if not self.rest:
                found = next(self.pieces, None)
                if found is None:
                    return False
                self.rest = memoryview(found).cast("B")
                continue
            size = min(len(part), len(self.rest))
            if not same(part[:size], self.rest[:size]):
                return False
            part, self.rest = part[size:], self.rest[size:]
        return True

    def close(self) -> None:
        close = getattr(self.pieces, "close", None)
        if close is not None:
            close()


def examine(
    path: Path,
    *,
    spans: Mapping[str, Span] | None = None,
    claims: Sequence[Claim] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Digests, frozenset[str]]:
    """Read a file once; hash it and spans of it, and compare it with claims, which may overlap.

    Args:
        path: The file.
        spans: Parts to be hashed for themselves, by name; they do not overlap.
        claims: What it may hold, by distinct names.
        progress: Called with numbers of bytes as they are read.

    Returns:
        Its digests, and the names of the claims that are wrong.

    Raises:
        CheckpointError: If it cannot be read.
    """
    hasher = Hasher(spans)
    cursors = [
        _Cursor(claim, sorted((span for span in claim.spans if span[0] < span[1]), reverse=True)) for claim in claims
    ]
    coming = sorted((cursor for cursor in cursors if cursor.waiting), key=lambda cursor: -cursor.waiting[-1][0])
    current: list[_Cursor] = []
    wrong: set[str] = set()
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                piece, begin = buffer[:size], hasher.num_bytes
                hasher.update(piece)
                while coming and coming[-1].waiting[-1][0] < hasher.num_bytes:
                    current.append(coming.pop())
                for cursor in current:
                    if not cursor.agrees(piece, begin):
                        wrong.add(cursor.claim.name)
                        cursor.waiting.clear()
                    if not cursor.waiting:
                        cursor.close()
                current = [cursor for cursor in current if cursor.waiting]
                progress(size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    finally:
        for cursor in current:
            cursor.close()
    # The file ended before them.
    wrong |= {cursor.claim.name for cursor in (*current, *coming)}
    return hasher.digests(), frozenset(wrong)


def file_pieces(path: Path, spans: Sequence[Span]) -> Iterator[memoryview]:
    """The bytes of parts of a file, each piece in the same memory as the one before.

    Raises:
        CheckpointError: If the file cannot be read, or ends before them.
    """
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            for start, stop in spans:
                file.seek(start)
                while start < stop:
                    piece = buffer[: min(PIECE_BYTES, stop - start)]
                    read_whole(file, piece, path)
                    start += len(piece)
                    yield piece
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def read_whole(file: IO[bytes], piece: memoryview, path: Path) -> None:
    """Fill memory from an unbuffered file, which may give less than it is asked for.

    Raises:
        CheckpointError: If the file ends before that.
    """
    while piece:
        size = file.readinto(piece)  # type: ignore[attr-defined]
        if not size:
            raise CheckpointError(f"{path} became shorter while it was read")
        piece = piece[size:]


def same(one: memoryview, other: memoryview) -> bool:
    """Whether two pieces of bytes are the same."""
    # Two memoryviews are compared item by item, a hundred times slower; a bytearray with anything by memcmp.
    whole = other.obj
    return (whole if isinstance(whole, bytearray) and len(whole) == len(other) else bytearray(other)) == one
