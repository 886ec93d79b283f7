"""Which rows of two tensors differ, as few ranges of rows. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# What one more range costs in a patch: its place in the header, its name and two digests.
RANGE_BYTES = 512


class Range(NamedTuple):
    """Rows `first` to before `stop`, of which `num_changed` differ: the first, the last, and most or all between."""

    first: int
    stop: int
    num_changed: int


def changed_ranges(pieces: Iterable[tuple[bytes, bytes]], num_row_bytes: int, max_ranges: int) -> list[Range]:
    """The rows that differ between two tensors of the same size, which are given piece by piece.

    Unchanged rows between two ranges are taken in where a range of its own costs more than they do, and where there
    would be more than `max_ranges` ranges: the narrowest gaps first.

    Args:
        pieces: Pairs of pieces of equal length, in order; they may end within a row.
        num_row_bytes: Bytes of one row.
        max_ranges: How many ranges there may be.
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
            # Not only at the end, so that a tensor of many tiny rows needs no more memory than another.
            if len(ranges) > 4 * max_ranges:
                ranges = close_gaps(ranges, max_ranges)
        position += len(ours)
    return close_gaps(ranges, max_ranges)


def close_gaps(ranges: Sequence[Range], max_ranges: int) -> list[Range]:
    """At most `max_ranges` ranges that hold the given ones, with as few further rows as can be."""
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
    # The row in which a piece ends may differ on both sides of that end.
    twice = 1 if other.first < one.stop else 0
    return Range(one.first, other.stop, one.num_changed + other.num_changed - twice)


def _in_piece(ours: bytes, theirs: bytes, position: int, num_row_bytes: int, max_gap: int) -> Iterable[Range]:
    """The ranges within one piece, which begins at byte `position` of its tensor."""
    import numpy

    first_row = position // num_row_bytes
    differs: Any = numpy.frombuffer(ours, numpy.uint8) != numpy.frombuffer(theirs, numpy.uint8)
    row_starts = numpy.arange(first_row * num_row_bytes - position, len(ours), num_row_bytes).clip(0)
    rows = first_row + numpy.flatnonzero(numpy.logical_or.reduceat(differs, row_starts))
    ends = numpy.flatnonzero(numpy.diff(rows) > max_gap + 1)
    for begin, end in zip((0, *(ends + 1)), (*ends, len(rows) - 1), strict=True):
        yield Range(int(rows[begin]), int(rows[end]) + 1, int(end - begin) + 1)
