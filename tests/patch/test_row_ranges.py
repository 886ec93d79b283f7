from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.patch import extract as row_ranges
from dapa_merge.patch.extract import Range, changed_ranges, close_gaps


def cut(content: bytes, sizes: list[int]) -> list[bytes]:
    pieces, position = [], 0
    for size in sizes:
        pieces.append(content[position : position + size])
        position += size
    return [piece for piece in [*pieces, content[position:]] if piece]


def runs_of(rows: list[int]) -> list[tuple[int, int]]:
    """By brute force: the runs of consecutive numbers."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    return [tuple(run) for run in runs]


@st.composite
def pairs(draw):
    """Two contents of the same size, the bytes of a row, and where both are cut into pieces."""
    num_row_bytes = draw(st.sampled_from([1, 2, 3, 8, 520]))
    num_rows = draw(st.integers(1, 60))
    changed = draw(st.sets(st.integers(0, num_rows - 1)))
    theirs = bytearray(num_row_bytes * num_rows)
    for row in changed:
        theirs[row * num_row_bytes + draw(st.integers(0, num_row_bytes - 1))] = 1
    sizes = draw(st.lists(st.integers(1, 2 * num_row_bytes + 3), max_size=30))
    return bytes(len(theirs)), bytes(theirs), num_row_bytes, sizes, sorted(changed)


@given(pairs())
def test_with_no_price_on_a_range_they_are_exactly_the_runs_of_changed_rows(pair):
    ours, theirs, num_row_bytes, sizes, changed = pair
    price, row_ranges.RANGE_BYTES = row_ranges.RANGE_BYTES, 0
    try:
        found = changed_ranges(zip(cut(ours, sizes), cut(theirs, sizes), strict=True), num_row_bytes, 1000)
    finally:
        row_ranges.RANGE_BYTES = price
    assert [(first, stop) for first, stop, _ in found] == runs_of(changed)
    assert all(num_changed == stop - first for first, stop, num_changed in found)


@given(pairs(), st.integers(1, 6))
def test_they_hold_every_changed_row_and_say_how_many_are_changed(pair, max_ranges):
    ours, theirs, num_row_bytes, sizes, changed = pair
    found = changed_ranges(zip(cut(ours, sizes), cut(theirs, sizes), strict=True), num_row_bytes, max_ranges)
    assert len(found) <= max_ranges
    for (_, stop, _), (first, _, _) in itertools.pairwise(found):
        assert (first - stop) * num_row_bytes > row_ranges.RANGE_BYTES
    inside = [[row for row in changed if first <= row < stop] for first, stop, _ in found]
    assert [row for rows in inside for row in rows] == changed
    assert [(rows[0], rows[-1] + 1, len(rows)) for rows in inside] == found


def test_rows_that_cost_more_than_a_range_are_never_taken_in():
    ours, theirs = bytes(5 * 520), bytes(520).join([b"\1" * 520] * 3)
    assert changed_ranges([(ours, theirs)], 520, 1000) == [(0, 1, 1), (2, 3, 1), (4, 5, 1)]


def test_the_narrowest_gaps_are_closed_first():
    ranges = [Range(0, 2, 2), Range(5, 6, 1), Range(7, 9, 2), Range(20, 21, 1)]
    assert close_gaps(ranges, 3) == [(0, 2, 2), (5, 9, 3), (20, 21, 1)]
    assert close_gaps(ranges, 2) == [(0, 9, 5), (20, 21, 1)]
    assert close_gaps(ranges, 1) == [(0, 21, 6)]
