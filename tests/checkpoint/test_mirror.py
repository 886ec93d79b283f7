from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.checkpoint.fetch import RangeSet, SparseFile, record_of
from dapa_merge.errors import CheckpointError, UsageError

SIZE = 40
some_range = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))
CONTENT = bytes(range(1, SIZE + 1))


def numbers(ranges) -> set[int]:
    return {number for start, stop in ranges for number in range(start, stop)}


@given(st.lists(some_range), some_range)
def test_a_range_set_is_the_set_of_its_numbers(ranges, asked):
    known = RangeSet(ranges)
    assert numbers(known) == numbers(ranges)
    # As few as can be, in order.
    kept = list(known)
    assert all(before[1] < after[0] for before, after in pairwise(kept))
    missing = known.missing(*asked)
    assert numbers(missing) == numbers([asked]) - numbers(ranges)
    assert all(start < stop for start, stop in missing)


@given(st.lists(some_range, max_size=8), st.integers(0, 400), st.binary(max_size=30))
def test_a_record_that_is_cut_or_scribbled_on_never_claims_what_is_not_there(tmp_path_factory, ranges, cut, noise):
    path = tmp_path_factory.mktemp("mirror") / "model.safetensors"
    file = SparseFile(path, SIZE)
    for start, stop in ranges:
        assert sum(file.write(start, [CONTENT[start:stop]])) == stop - start
    record = record_of(path)
    if record.exists():
        record.write_bytes(record.read_bytes()[:cut] + noise)
    again = SparseFile(path, SIZE)
    content = path.read_bytes()
    present = numbers([(0, SIZE)]) - numbers(again.missing(0, SIZE))
    assert all(content[number] == CONTENT[number] for number in present)
    # What is written after it counts.
    sum(again.write(0, [CONTENT]))
    assert SparseFile(path, SIZE).missing(0, SIZE) == []


def test_what_came_before_a_fault_is_kept(tmp_path):
    file = SparseFile(tmp_path / "a", SIZE)

    def pieces():
        yield CONTENT[:10]
        raise RuntimeError("the network is gone")

    with pytest.raises(RuntimeError, match="the network is gone"):
        sum(file.write(0, pieces()))
    assert SparseFile(tmp_path / "a", SIZE).missing(0, SIZE) == [(10, SIZE)]


@pytest.mark.parametrize("what", ["removed", "cut"])
def test_nothing_is_present_of_a_file_that_is_not_the_recorded_one(tmp_path, what):
    path = tmp_path / "a"
    sum(SparseFile(path, SIZE).write(0, [CONTENT]))
    if what == "removed":
        path.unlink()
    else:
        path.write_bytes(CONTENT[:5])
    assert SparseFile(path, SIZE).missing(0, SIZE) == [(0, SIZE)]


def test_a_sparse_file_takes_no_space_for_what_is_not_present(tmp_path):
    file = SparseFile(tmp_path / "a", 1 << 40)
    sum(file.write(1 << 39, [CONTENT]))
    assert (tmp_path / "a").stat().st_blocks * 512 < 1 << 20


def test_a_size_that_no_file_has_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot create .*a with 1180591620717411303424 bytes"):
        SparseFile(tmp_path / "a", 1 << 70)


def test_a_full_disk_is_one_sentence(tmp_path):
    file = SparseFile(tmp_path / "a", SIZE)
    file.path = Path("/dev/full")
    with pytest.raises(UsageError, match="cannot write the download to /dev/full: No space left"):
        sum(file.write(0, [CONTENT]))
