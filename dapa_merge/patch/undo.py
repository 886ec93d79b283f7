"""The undo file of a patch that is applied in place: the old bytes, and checksums that identify half-written ranges.

It is a patch itself, from the patched model back to its base. Its metadata hold `undo_of`, the identity of the patch
that it reverts; `blocks`, the key of one further tensor: the CRC-32 of each patched 4 KiB block of the model's files,
in the order of `entries`; and `alignments`: the byte of a block at which each entry begins.

It is complete and on disk before the first byte of the model is changed, and then only read. A killed process stops
between two blocks, since the kernel changes whole pages, and each call writes up to the end of one. So a block is the
old one, which is here, or the new one, whose checksum is here, or from another program. If a block is torn all the
same, as by a disk that loses power, `revert` refuses it, but applying the patch again repairs it: then the new bytes
are known too.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dapa_merge import __version__
from dapa_merge.checkpoint.header import DTYPE_BITS
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.errors import CheckpointError
from dapa_merge.files import staged_file, write_all
from dapa_merge.patch.file import (
    FORMAT_VERSION,
    Entry,
    Patch,
    check_space,
    checked_pieces,
    entries_text,
    identity,
    iterate_range,
    lay_out,
    read_patch,
    unique_key,
)
from dapa_merge.progress import advance

UNDO_NAME = ".dapa-undo.safetensors"
BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Undo:
    """An undo file that was read and validated; `alignments` has one number per entry of `patch`."""

    patch: Patch
    alignments: tuple[int, ...]

    def takes_back(self, patch: Patch) -> bool:
        """Whether it reverts this patch, judged by its entries and not by its `undo_of`."""
        return identity(self.patch.metadata["base_layout"], _reversed(self.patch.entries)) == patch.identity

    def old(self, entry: Entry) -> Iterator[bytes]:
        """The saved bytes of an entry of the patch that it reverts."""
        (saved,) = (one for one in self.patch.entries if (one.tensor, one.rows) == (entry.tensor, entry.rows))
        return self.patch.pieces(saved)

    def is_half_written(self, entry: Entry, base: Checkpoint, patch: Patch | None = None) -> bool:
        """Whether every block of an entry's rows in the model is either old or new.

        With the patch that it reverts, whether every single byte is.
        """
        tensor = base.tensors[entry.tensor]
        start, stop = entry.place(tensor)
        found = _blocks(iterate_range(base, tensor.file, start, stop), start)
        old = _blocks(self.patch.pieces(entry), start)
        if patch is not None:
            (original,) = (other for other in patch.entries if (other.tensor, other.rows) == (entry.tensor, entry.rows))
            new = _blocks(patch.pieces(original), start)
            # Not strict: `all` may stop before the iterators end.
            return all(_is_mixed(*blocks) for blocks in zip(found, old, new))  # noqa: B905
        index = self.patch.entries.index(entry)
        if start % BLOCK_BYTES != self.alignments[index]:
            return False
        sums = self._sums(index)
        return all(mine == before or zlib.crc32(mine) == after for mine, before, after in zip(found, old, sums))  # noqa: B905

    def _sums(self, index: int) -> Iterator[int]:
        """The checksums of the new blocks of one entry."""
        sums = self.patch.contents[self.patch.metadata["blocks"]]
        num_blocks = list(map(_num_blocks, self.patch.entries, self.alignments))
        with self.patch.path.open("rb") as file:
            file.seek(sums.start + 4 * sum(num_blocks[:index]))
            content = file.read(4 * num_blocks[index])
        return (number for (number,) in struct.iter_unpack("<I", content))


def read_undo(path: Path) -> Undo:
    """Read an undo file's header.

    Raises:
        CheckpointError: If it is not an undo file, or is damaged.
    """
    patch = read_patch(path, further="blocks")
    try:
        sums = patch.contents[patch.metadata["blocks"]]
        alignments = json.loads(patch.metadata["alignments"])
        if len(alignments) != len(patch.entries) or "undo_of" not in patch.metadata:
            raise ValueError("it lacks undo_of, or one alignment per entry")
        if not all(type(number) is int and 0 <= number < BLOCK_BYTES for number in alignments):
            raise ValueError("its alignments are invalid")
        if (sums.dtype, sums.shape) != ("U32", (sum(map(_num_blocks, patch.entries, alignments)),)):
            raise ValueError("its blocks do not match its entries")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an undo file, or is damaged ({str(error)[:200]})") from error
    return Undo(patch, tuple(alignments))


def write_undo(patch: Patch, base: Checkpoint, path: Path) -> Undo:
    """Save the bytes that the patch would overwrite in a new file on disk, and check all of the patch's bytes.

    Raises:
        CheckpointError: If the bytes of the base or the patch are not those that the patch records.
        UsageError: If the file exists, or cannot be written.
    """
    # In the order of the new file, in which it will be read again.
    originals = sorted(patch.entries, key=lambda entry: -DTYPE_BITS[entry.dtype])
    entries = _reversed(originals)
    starts = [entry.place(base.tensors[entry.tensor])[0] for entry in entries]
    alignments = [start % BLOCK_BYTES for start in starts]
    blocks = unique_key("crc32 of the new blocks", {entry.key: entry for entry in patch.entries})
    metadata = {
        "dapa_patch": FORMAT_VERSION,
        "base_layout": patch.metadata["base_layout"],
        "tool": f"dapa-merge {__version__}",
        "base": f"{base.name} with {patch.path.name}",
        "entries": entries_text(entries),
        "undo_of": patch.identity,
        "blocks": blocks,
        "alignments": json.dumps(alignments),
    }
    contents = [(entry.key, entry.dtype, entry.stored_shape) for entry in entries]
    num_blocks = sum(map(_num_blocks, entries, alignments))
    header, offsets = lay_out([*contents, (blocks, "U32", (num_blocks,))], metadata)
    with staged_file(path) as file:
        check_space(path, len(header) + patch.num_bytes + 4 * num_blocks, "the undo file")
        write_all(file, header)
        sums = bytearray()
        for entry, original, start in zip(entries, originals, starts, strict=True):
            old = hashlib.sha256()
            file.seek(offsets[entry.key])
            tensor = base.tensors[entry.tensor]
            for piece in iterate_range(base, tensor.file, *entry.place(tensor)):
                old.update(piece)
                write_all(file, piece)
                advance(len(piece), "bytes")
            if old.hexdigest() != entry.new_sha256:
                raise CheckpointError(f"{entry.tensor} of {base.name} was changed by another program while it was read")
            for block in _blocks(checked_pieces(patch, original), start):
                sums += zlib.crc32(block).to_bytes(4, "little")
        file.seek(offsets[blocks])
        write_all(file, bytes(sums))
    return read_undo(path)


def _reversed(entries: Iterable[Entry]) -> list[Entry]:
    return [replace(entry, base_sha256=entry.new_sha256, new_sha256=entry.base_sha256) for entry in entries]


def _num_blocks(entry: Entry, alignment: int) -> int:
    return -(-(alignment + entry.num_bytes) // BLOCK_BYTES)


def _is_mixed(found: bytes, old: bytes, new: bytes) -> bool:
    return all(mine in pair for mine, *pair in zip(found, old, new, strict=True))


def ending_on_blocks(pieces: Iterable[bytes], start: int) -> Iterator[bytes]:
    """Regroup the bytes for position `start` of a file into pieces that end at block boundaries, except the last."""
    carried = b""
    for piece in pieces:
        content = carried + piece
        size = max(0, len(content) - (start + len(content)) % BLOCK_BYTES)
        if size:
            yield content[:size]
        start += size
        carried = content[size:]
    if carried:
        yield carried


def _blocks(pieces: Iterable[bytes], start: int) -> Iterator[bytes]:
    """Split the bytes for position `start` of a file at its block boundaries."""
    for content in ending_on_blocks(pieces, start):
        # The first one may begin within a block.
        for position in range(-(start % BLOCK_BYTES), len(content), BLOCK_BYTES):
            yield content[max(0, position) : position + BLOCK_BYTES]
        start += len(content)
