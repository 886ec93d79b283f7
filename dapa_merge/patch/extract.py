"""Extracts a patch: a result's changes to its base, in one small file. Both models are streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy

from dapa_merge import __version__
from dapa_merge.checkpoint.digest import settings_files
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.files import staged_file, write_all
from dapa_merge.patch.computed import can_be_held, computed_pieces, edit_text
from dapa_merge.patch.file import (
    FORMAT_VERSION,
    FORMAT_WITH_EDIT,
    Entry,
    Patch,
    check_space,
    entries_text,
    iterate_range,
    lay_out,
    layout_digest,
    read_patch,
    rest_digest,
    row_bytes,
    unique_key,
)
from dapa_merge.plan.edit import Edit
from dapa_merge.progress import advance

# Most ranges that the header can hold, per tensor and in all; beyond them, ranges are joined across unchanged rows.
MAX_TENSOR_RANGES = 1024
MAX_RANGES = 50_000
THREADS = 2
_UNKNOWN = "0" * 64


def extract(
    result: Checkpoint, base: Checkpoint, path: Path, *, recipe: str | None = None, edit: Edit | None = None
) -> Patch:
    """Write the changes from `base` to `result` to a new file, as whole tensors or ranges of rows.

    Args:
        result: A model with some other values than its base.
        base: The model that it was made of.
        path: The file to make.
        recipe: The text of its recipe, if known.
        edit: The edit that it was made by, if known. If the file can hold it, it takes the place of all rows that it
            computes from the base's exactly.

    Returns:
        The patch as read back from disk.

    Raises:
        CheckpointError: If the two differ in tensors, dtypes or shapes.
        UsageError: If nothing was changed, or the file exists or cannot be written.
    """
    check_layouts(result, base)
    with staged_file(path) as file:
        found = _compare(result, base)
        if not found:
            raise UsageError(f"{result.name} has the weights of {base.name}; there is nothing to extract")
        metadata = {
            "dapa_patch": FORMAT_VERSION,
            "tool": f"dapa-merge {__version__}",
            "base": base.name,
            "base_layout": layout_digest(base.tensors),
        }
        if base.commit is not None:
            metadata["base_commit"] = base.commit
        if recipe is not None:
            metadata["recipe"] = recipe
        computed: dict[str, list[Range]] = {}
        if edit is not None and can_be_held(edit, base):
            computed = _computed(edit, result, base, found)
        entries = _entries(base, {**found, **computed})
        files: dict[str, bytes] = {}
        if computed and edit is not None:
            edit = edit.reduced(region for name in computed for region in edit.regions_in(base.tensors[name]))
            files = edit.files()
            metadata |= {"dapa_patch": FORMAT_WITH_EDIT, "edit": edit_text(edit)}
        metadata["base_rest"] = rest_digest(base, entries)
        _write(file, path, result, base, entries, metadata, computed, files)
    return read_patch(path)


def differing_settings(result: Checkpoint, base: Checkpoint) -> list[str]:
    """Names of the config, tokenizer and template files that differ; a patch does not hold them."""
    ours, theirs = settings_files(result), settings_files(base)
    return sorted(
        name
        for name in {*ours, *theirs}
        if name not in ours or name not in theirs or ours[name].read_bytes() != theirs[name].read_bytes()
    )


def check_layouts(result: Checkpoint, base: Checkpoint) -> None:
    """Raise `CheckpointError` unless two models have the same tensors, dtypes and shapes."""
    advice = "a patch holds changed values only: name another base, or publish the result whole"
    for one, other in ((result, base), (base, result)):
        if lacking := [name for name in other.tensors if name not in one.tensors]:
            raise CheckpointError(f"{one.name} has no tensor {lacking[0]}, which {other.name} has; {advice}")
    for name, tensor in base.tensors.items():
        found = result.tensors[name]
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            raise CheckpointError(
                f"{name} is {found.dtype} {list(found.shape)} in {result.name}, but {tensor.dtype} "
                f"{list(tensor.shape)} in {base.name}; {advice}"
            )


def _compare(result: Checkpoint, base: Checkpoint) -> dict[str, list[Range]]:
    """The ranges of differing rows, by tensor."""

    def ranges(tensor: Tensor) -> list[Range]:
        found = result.tensors[tensor.name]
        if not tensor.num_bytes:
            return []
        pieces = _pairs(result, found, base, tensor)
        return changed_ranges(pieces, row_bytes(tensor.dtype, tensor.shape), MAX_TENSOR_RANGES)

    # Comparing and reading both let another thread run.
    with ThreadPoolExecutor(THREADS) as pool:
        compared = dict(zip(base.tensors, pool.map(ranges, base.tensors.values()), strict=True))
    changed = {name: found for name, found in compared.items() if found}
    limit = max(1, MAX_RANGES // max(1, len(changed)))
    return {name: close_gaps(found, limit) for name, found in changed.items()}


def _pairs(result: Checkpoint, found: Tensor, base: Checkpoint, tensor: Tensor) -> Iterator[tuple[bytes, bytes]]:
    ours = iterate_range(result, found.file, found.start, found.stop)
    theirs = iterate_range(base, tensor.file, tensor.start, tensor.stop)
    for pair in zip(ours, theirs, strict=True):
        yield pair
        advance(len(pair[0]), "bytes")


def _computed(
    edit: Edit, result: Checkpoint, base: Checkpoint, found: Mapping[str, Sequence[Range]]
) -> dict[str, list[Range]]:
    """Of the tensors with differing rows, those whose rows the edit computes from the base's: one range each."""
    computed = {}
    for name, ranges in found.items():
        tensor, other = base.tensors[name], result.tensors[name]
        if any(edit.regions_in(tensor)):
            (joined,) = close_gaps(ranges, 1)
            start, stop = (row * row_bytes(tensor.dtype, tensor.shape) for row in joined[:2])
            old = iterate_range(base, tensor.file, tensor.start + start, tensor.start + stop)
            new = iterate_range(result, other.file, other.start + start, other.start + stop)
            if all(mine == theirs for mine, theirs in zip(computed_pieces(edit, tensor, start, old), new, strict=True)):
                computed[name] = [joined]
    return computed


def _entries(base: Checkpoint, found: Mapping[str, Sequence[Range]]) -> list[Entry]:
    """The entries of a patch, with placeholders for the digests."""
    entries: dict[str, Entry] = {}
    whole = {
        name for name, ranges in found.items() for tensor in (base.tensors[name],)
        if (ranges[0].stop - ranges[0].first) * row_bytes(tensor.dtype, tensor.shape) == tensor.num_bytes
    }  # fmt: skip
    # Whole tensors first: they keep their own names.
    for name, ranges in sorted(found.items(), key=lambda item: item[0] not in whole):
        tensor = base.tensors[name]
        for first, stop, num_changed in ranges:
            key = unique_key(name if name in whole else f"{name}[{first}:{stop}]", entries)
            entries[key] = Entry(key, name, tensor.dtype, tensor.shape, (first, stop), num_changed, _UNKNOWN, _UNKNOWN)
    return list(entries.values())


def _write(
    file: BinaryIO,
    path: Path,
    result: Checkpoint,
    base: Checkpoint,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    computed: Container[str],
    files: Mapping[str, bytes],
) -> None:
    """Write the rows first, and then the header with their digests into the space reserved for it.

    Rows of the tensors that are `computed` are only hashed; `files` are what they are computed from.
    """
    stored = [entry for entry in entries if entry.tensor not in computed]
    contents = [(entry.key, entry.dtype, entry.stored_shape) for entry in stored]
    contents += [(name, "U8", (len(content),)) for name, content in files.items()]
    header, offsets = lay_out(contents, {**metadata, "entries": entries_text(entries)})
    needed = len(header) + sum(entry.num_bytes for entry in stored) + sum(map(len, files.values()))
    check_space(path, needed, "the patch")
    for name, content in files.items():
        file.seek(offsets[name])
        write_all(file, content)
    complete = []
    for entry in sorted(entries, key=lambda entry: offsets.get(entry.key, 0)):
        before, after = hashlib.sha256(), hashlib.sha256()
        ours, theirs = (
            iterate_range(model, model.tensors[entry.tensor].file, *entry.place(model.tensors[entry.tensor]))
            for model in (result, base)
        )
        if is_stored := entry.key in offsets:
            file.seek(offsets[entry.key])
        for new, old in zip(ours, theirs, strict=True):
            if is_stored:
                write_all(file, new)
            before.update(old)
            after.update(new)
        complete.append(replace(entry, base_sha256=before.hexdigest(), new_sha256=after.hexdigest()))
    final, _ = lay_out(contents, {**metadata, "entries": entries_text(complete)})
    assert len(final) == len(header)
    file.seek(0)
    write_all(file, final)


# Cost of one more range in a patch: its place in the header, its name and two digests.
RANGE_BYTES = 512


class Range(NamedTuple):
    """Rows `[first, stop)`, of which `num_changed` differ, among them the first and the last."""

    first: int
    stop: int
    num_changed: int


def changed_ranges(pieces: Iterable[tuple[bytes, bytes]], num_row_bytes: int, max_ranges: int) -> list[Range]:
    """The rows that differ between two tensors of the same size, given piece by piece.

    Ranges are joined across unchanged rows where these cost less than another range would, and, narrowest gaps first,
    where there would be more than `max_ranges` ranges.

    Args:
        pieces: Pairs of pieces of equal length, in order; they may end within a row.
        num_row_bytes: Bytes of one row.
        max_ranges: Largest number of ranges.
    """
    ranges: list[Range] = []
    max_gap = RANGE_BYTES // num_row_bytes
    position = 0
    for ours, theirs in pieces:
        if ours != theirs:
            for found in _in_piece(ours, theirs, position, num_row_bytes, max_gap):
                if ranges and found.first - ranges[-1].stop <= max_gap:
                    ranges[-1] = _joined(ranges[-1], found)
                else:
                    ranges.append(found)
            # Not only at the end, to bound the memory for a tensor of many tiny rows.
            if len(ranges) > 4 * max_ranges:
                ranges = close_gaps(ranges, max_ranges)
        position += len(ours)
    return close_gaps(ranges, max_ranges)


def close_gaps(ranges: Sequence[Range], max_ranges: int) -> list[Range]:
    """At most `max_ranges` ranges that cover the given ones with as few additional rows as possible."""
    num_closed = len(ranges) - max_ranges
    if num_closed <= 0:
        return list(ranges)
    by_gap = sorted(range(1, len(ranges)), key=lambda index: ranges[index].first - ranges[index - 1].stop)
    closed = set(by_gap[:num_closed])
    joined: list[Range] = []
    for index, found in enumerate(ranges):
        if index in closed:
            joined[-1] = _joined(joined[-1], found)
        else:
            joined.append(found)
    return joined


def _joined(one: Range, other: Range) -> Range:
    # A row that spans two pieces may differ in both.
    twice = 1 if other.first < one.stop else 0
    return Range(one.first, other.stop, one.num_changed + other.num_changed - twice)


def _in_piece(ours: bytes, theirs: bytes, position: int, num_row_bytes: int, max_gap: int) -> Iterable[Range]:
    """The ranges within one piece, which begins at byte `position` of its tensor."""
    first_row = position // num_row_bytes
    differs: Any = numpy.frombuffer(ours, numpy.uint8) != numpy.frombuffer(theirs, numpy.uint8)
    row_starts = numpy.arange(first_row * num_row_bytes - position, len(ours), num_row_bytes).clip(0)
    rows = first_row + numpy.flatnonzero(numpy.logical_or.reduceat(differs, row_starts))
    ends = numpy.flatnonzero(numpy.diff(rows) > max_gap + 1)
    for begin, end in zip((0, *(ends + 1)), (*ends, len(rows) - 1), strict=True):
        yield Range(int(rows[begin]), int(rows[end]) + 1, int(end - begin) + 1)
