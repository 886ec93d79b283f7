"""The undo file of a patch that is applied in place: the old bytes, and how to recognize a half-written range.

It is a patch itself, from the patched model back to its base. Its metadata say `undo_of`, the identity of the patch
that it takes back; `blocks`, the key of one further tensor: the CRC-32 of what the patch makes of each block of 4 KiB
of the model's files, in the order of `entries`; and `alignments`: for each entry, at which byte of a block it begins.

It is not a record that grows: it is complete and on disk before the first byte of the model is changed, and then only
read. Its sums are those of the model's blocks, not of its own lines. A killed process stops between two such blocks,
since the kernel changes whole pages, and each call writes up to the end of one. So a block is the old one, which is
here, or the new one, whose sum is here, or somebody else's. Should a block be torn all the same, as by a disk that
loses power, `revert` refuses it, but to apply the patch again mends it: then the new bytes are known too.
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
    """An undo file that was read and found sound; `alignments` is one number for each entry of the way back."""

    patch: Patch
    alignments: tuple[int, ...]

    def takes_back(self, patch: Patch) -> bool:
        """Whether it leads back from this patch; what it says of itself does not count."""
        return identity(self.patch.metadata["base_layout"], _turned(self.patch.entries)) == patch.identity

    def is_half_written(self, entry: Entry, base: Checkpoint, patch: Patch | None = None) -> bool:
        """Whether every block of an entry's rows in the model is either the old one or the new one.

        With the patch that is taken back at hand, whether every single byte is.
        """
        tensor = base.tensors[entry.tensor]
        start, stop = entry.place(tensor)
        found = _blocks(iterate_range(base, tensor.file, start, stop), start)
        old = _blocks(self.patch.pieces(entry), start)
        if patch is not None:
            (forth,) = (other for other in patch.entries if (other.tensor, other.rows) == (entry.tensor, entry.rows))
            new = _blocks(patch.pieces(forth), start)
            # Strict would be of no use: `all` ends before the iterators do.
            return all(_is_mixed(*blocks) for blocks in zip(found, old, new))  # noqa: B905
        index = self.patch.entries.index(entry)
        if start % BLOCK_BYTES != self.alignments[index]:
            return False
        sums = self._sums(index)
        return all(mine == before or zlib.crc32(mine) == after for mine, before, after in zip(found, old, sums))  # noqa: B905

    def _sums(self, index: int) -> Iterator[int]:
        """The sums of the new blocks of one entry."""
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
            raise ValueError("it takes back nothing")
        if not all(type(number) is int and 0 <= number < BLOCK_BYTES for number in alignments):
            raise ValueError("its alignments are none")
        if (sums.dtype, sums.shape) != ("U32", (sum(map(_num_blocks, patch.entries, alignments)),)):
            raise ValueError("its blocks are not those of its entries")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an undo file, or is damaged ({str(error)[:200]})") from error
    return Undo(patch, tuple(alignments))


def write_undo(patch: Patch, base: Checkpoint, path: Path) -> Undo:
    """Write what the patch would overwrite to a new file, complete and on disk, and check all of the patch's bytes.

    Raises:
        CheckpointError: If the base or the patch does not hold what the patch records.
        UsageError: If the file exists, or cannot be written.
    """
    # In the order of the file that is written, as it will be read again.
    ways_forth = sorted(patch.entries, key=lambda entry: -DTYPE_BITS[entry.dtype])
    entries = _turned(ways_forth)
    starts = [entry.place(base.tensors[entry.tensor])[0] for entry in entries]
    alignments = [start % BLOCK_BYTES for start in starts]
    blocks = unique_key("crc32 of the new blocks", patch.contents)
    metadata = {
        **{key: patch.metadata[key] for key in ("dapa_patch", "base_layout")},
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
        for entry, forth, start in zip(entries, ways_forth, starts, strict=True):
            old = hashlib.sha256()
            file.seek(offsets[entry.key])
            tensor = base.tensors[entry.tensor]
            for piece in iterate_range(base, tensor.file, *entry.place(tensor)):
                old.update(piece)
                write_all(file, piece)
                advance(len(piece), "bytes")
            if old.hexdigest() != entry.new_sha256:
                raise CheckpointError(f"{entry.tensor} of {base.name} was changed by another program while it was read")
            for block in _blocks(checked_pieces(patch, forth), start):
                sums += zlib.crc32(block).to_bytes(4, "little")
        file.seek(offsets[blocks])
        write_all(file, bytes(sums))
    return read_undo(path)


def _turned(entries: Iterable[Entry]) -> list[Entry]:
    return [replace(entry, base_sha256=entry.new_sha256, new_sha256=entry.base_sha256) for entry in entries]


def _num_blocks(entry: Entry, alignment: int) -> int:
    return -(-(alignment + entry.num_bytes) // BLOCK_BYTES)


def _is_mixed(found: bytes, old: bytes, new: bytes) -> bool:
    return all(mine in pair for mine, *pair in zip(found, old, new, strict=True))


def ending_on_blocks(pieces: Iterable[bytes], start: int) -> Iterator[bytes]:
    """Bytes that belong at `start` of a file, in pieces that end where a block of it does, but for the last."""
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
    """Bytes that belong at `start` of a file, in the parts of them that lie in one block of it."""
    for content in ending_on_blocks(pieces, start):
        # The first one may begin within a block.
        for position in range(-(start % BLOCK_BYTES), len(content), BLOCK_BYTES):
            yield content[max(0, position) : position + BLOCK_BYTES]
        start += len(content)
