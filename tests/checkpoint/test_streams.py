"""Hashes and comparisons of a file that is read once, against hashlib and slices."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapa_merge.checkpoint.digest import Hasher, hash_file
from dapa_merge.errors import CheckpointError


@st.composite
def spans_of(draw, size):
    """Spans that do not overlap, some of them empty."""
    ends = sorted(draw(st.lists(st.integers(0, size), max_size=8)))
    return tuple(zip(ends[::2], ends[1::2], strict=False))


@settings(max_examples=200)
@given(data=st.data(), content=st.binary(max_size=200))
def test_spans_are_hashed_as_slices_are_however_the_file_is_cut(data, content):
    spans = {str(number): span for number, span in enumerate(data.draw(spans_of(len(content))))}
    hasher = Hasher(spans)
    position = 0
    while position < len(content):
        size = data.draw(st.integers(1, 50))
        hasher.update(memoryview(content)[position : position + size])
        position += size
    digests = hasher.digests()
    assert digests.num_bytes == len(content)
    assert digests.sha256 == hashlib.sha256(content).hexdigest()
    assert digests.spans == {
        name: hashlib.sha256(content[start:stop]).hexdigest() for name, (start, stop) in spans.items()
    }


def test_a_file_is_hashed_as_a_whole_and_in_parts(tmp_path, monkeypatch):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    counted: list[int] = []
    monkeypatch.setattr("dapa_merge.checkpoint.digest.advance", lambda num_bytes, _: counted.append(num_bytes))
    digests = hash_file(tmp_path / "file", {"part": (70, 600_001)})
    assert digests.sha256 == hashlib.sha256(content).hexdigest()
    assert digests.spans == {"part": hashlib.sha256(content[70:600_001]).hexdigest()}
    assert sum(counted) == digests.num_bytes == len(content)


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="cannot read"):
            hash_file(path)
