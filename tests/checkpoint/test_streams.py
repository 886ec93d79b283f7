"""Hashes and comparisons of a file that is read once, against hashlib and slices."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapa_merge.checkpoint import streams
from dapa_merge.checkpoint.streams import Claim, Hasher, examine, file_pieces
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


@settings(max_examples=200)
@given(data=st.data(), content=st.binary(min_size=1, max_size=200), piece_bytes=st.integers(1, 40))
def test_a_claim_is_wrong_exactly_if_its_bytes_are_not_the_files(tmp_path_factory, data, content, piece_bytes):
    path = tmp_path_factory.mktemp("file") / "file"
    path.write_bytes(content)
    claims, wrong = [], set()
    for number in range(data.draw(st.integers(0, 4))):
        spans = data.draw(spans_of(len(content) + 10))
        claimed = bytearray(b"".join(content[start:stop] for start, stop in spans))
        if claimed and data.draw(st.booleans()):
            claimed[data.draw(st.integers(0, len(claimed) - 1))] ^= 1
            wrong.add(str(number))
        if any(start < stop and stop > len(content) for start, stop in spans):
            wrong.add(str(number))
        cut = data.draw(st.integers(1, 60))
        pieces = [bytes(claimed[start : start + cut]) for start in range(0, len(claimed), cut)]
        claims.append(Claim(str(number), spans, lambda pieces=pieces: iter(pieces)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "PIECE_BYTES", piece_bytes)
        digests, found = examine(path, claims=claims)
    assert digests.sha256 == hashlib.sha256(content).hexdigest()
    assert found == wrong


def test_pieces_of_a_file_are_its_spans_in_order(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 4000
    path.write_bytes(content)
    spans = ((3, 700_000), (700_000, 700_001), (0, 5))
    found = b"".join(map(bytes, file_pieces(path, spans)))
    assert found == b"".join(content[start:stop] for start, stop in spans)
    with pytest.raises(CheckpointError, match="file became shorter while it was read"):
        list(file_pieces(path, ((0, len(content) + 1),)))


def test_a_claim_is_let_go_of_at_its_first_difference(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * streams.PIECE_BYTES))
    asked = []

    def pieces():
        try:
            while True:
                asked.append(1)
                yield b"\1" * streams.PIECE_BYTES
        finally:
            asked.append("closed")

    _, wrong = examine(path, claims=[Claim("all", ((0, 10 * streams.PIECE_BYTES),), pieces)])
    assert wrong == {"all"}
    assert asked == [1, "closed"]
