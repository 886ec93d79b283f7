"""Digests of a file that is read once, against the one-shot functions of blake3 and hashlib over slices."""

from __future__ import annotations

import hashlib

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dapa_merge.checkpoint.digest import HASHES, Hasher, hash_bytes, hash_file, read_into
from dapa_merge.errors import CheckpointError

ONE_SHOT = {
    "blake3": lambda content: blake3(content).hexdigest(),
    "sha256": lambda content: hashlib.sha256(content).hexdigest(),
}
each_algorithm = pytest.mark.parametrize("algorithm", ONE_SHOT)


def test_every_algorithm_has_its_authority():
    assert HASHES.keys() == ONE_SHOT.keys()
    # The first test vector of the BLAKE3 team.
    assert hash_bytes(b"", "blake3") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


@st.composite
def spans_of(draw, size):
    """Spans that do not overlap, some of them empty."""
    ends = sorted(draw(st.lists(st.integers(0, size), max_size=8)))
    return tuple(zip(ends[::2], ends[1::2], strict=False))


@each_algorithm
@settings(max_examples=200)
@given(data=st.data(), content=st.binary(max_size=200))
def test_spans_are_hashed_as_slices_are_however_the_file_is_cut(algorithm, data, content):
    spans = {str(number): span for number, span in enumerate(data.draw(spans_of(len(content))))}
    hasher = Hasher(algorithm, spans)
    position = 0
    while position < len(content):
        size = data.draw(st.integers(1, 50))
        hasher.update(memoryview(content)[position : position + size])
        position += size
    digests = hasher.digests()
    assert digests.num_bytes == len(content)
    assert digests.digest == ONE_SHOT[algorithm](content)
    assert digests.spans == {name: ONE_SHOT[algorithm](content[start:stop]) for name, (start, stop) in spans.items()}


@each_algorithm
def test_a_file_is_hashed_as_a_whole_and_in_parts(tmp_path, monkeypatch, algorithm):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    counted: list[int] = []
    monkeypatch.setattr("dapa_merge.checkpoint.digest.advance", lambda num_bytes, _: counted.append(num_bytes))
    digests = hash_file(tmp_path / "file", algorithm, {"part": (70, 600_001)})
    assert digests.digest == ONE_SHOT[algorithm](content)
    assert digests.spans == {"part": ONE_SHOT[algorithm](content[70:600_001])}
    assert sum(counted) == digests.num_bytes == len(content)


def test_two_algorithms_share_a_read(tmp_path, monkeypatch):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    counted: list[int] = []
    monkeypatch.setattr("dapa_merge.checkpoint.digest.advance", lambda num_bytes, _: counted.append(num_bytes))
    hashers = {algorithm: Hasher(algorithm) for algorithm in ONE_SHOT}
    read_into(tmp_path / "file", *hashers.values())
    assert {name: hasher.digests().digest for name, hasher in hashers.items()} == {
        name: digest(content) for name, digest in ONE_SHOT.items()
    }
    assert sum(counted) == len(content)


def test_a_file_that_is_only_counted_has_no_digest(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    hasher = Hasher(None, {"part": (1, 2)})
    read_into(tmp_path / "file", hasher)
    digests = hasher.digests()
    assert (digests.num_bytes, digests.digest, digests.spans) == (5, "", {})


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="cannot read"):
            hash_file(path, "blake3")
