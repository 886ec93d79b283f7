from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.errors import DapaError, UsageError
from dapa_merge.search import identity
from dapa_merge.search import journal as journals
from dapa_merge.search.journal import Journal, JournalUnavailable, name_of

PARTS = {"target": "sha256 1", "prompts": "sha256 2"}


@pytest.fixture
def path(tmp_path) -> Path:
    """A journal with a note and three tests."""
    path = tmp_path / "journal.jsonl"
    with closing(Journal(path, PARTS)) as journal:
        journal.note("target", {"dsr": 0.1, "perplexity": float("nan")})
        for layer in range(3):
            journal.record(frozenset({f"{layer}.gate", "9.gate"}), {"holds": layer == 1, "complaint": "naïve\u2028"})
    return path


def content_of(path: Path):
    with closing(Journal(path, PARTS)) as journal:
        return journal.tests, journal.notes


def test_what_was_written_is_read_again(path):
    tests, notes = content_of(path)
    assert list(tests) == [frozenset({f"{layer}.gate", "9.gate"}) for layer in range(3)]
    assert [test["holds"] for test in tests.values()] == [False, True, False]
    assert tests[frozenset({"0.gate", "9.gate"})]["complaint"] == "naïve\u2028"
    assert notes["target"]["dsr"] == 0.1


def test_a_journal_only_grows(path):
    before = path.read_bytes()
    with closing(Journal(path, PARTS)) as journal:
        journal.record(frozenset({"5.gate"}), {"holds": True})
    assert path.read_bytes().startswith(before)
    assert len(path.read_bytes()) > len(before)


def test_a_kill_at_any_byte_costs_at_most_the_last_line(path, tmp_path):
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(content[:length])
        tests, notes = content_of(torn)
        num_lines = sum(end <= length for end in ends)
        assert len(tests) + len(notes) == max(num_lines - 1, 0)
        kept = content[: ends[max(num_lines, 1) - 1]]
        assert torn.read_bytes() == kept


@given(st.data())
def test_every_other_damage_is_reported_with_its_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    path = folder / "journal.jsonl"
    with closing(Journal(path, PARTS)) as journal:
        for layer in range(4):
            journal.record(frozenset({f"{layer}.gate"}), {"holds": True, "seconds": 1.25})
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 2))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    number = path.read_bytes()[:position].count(b"\n") + 1
    with pytest.raises(UsageError) as caught:
        content_of(path)
    assert f"the journal {path} is damaged at line {number}: " in str(caught.value)
    assert path.read_bytes() == content


def test_a_journal_of_another_search_is_refused_and_left_alone(path):
    before = path.read_bytes()
    with pytest.raises(
        UsageError, match=r"belongs to another search: prompts differs; name another file, or remove it"
    ):
        Journal(path, {**PARTS, "prompts": "sha256 3"})
    with pytest.raises(UsageError, match="belongs to another search: device, target differ;"):
        Journal(path, {"device": "cuda", "prompts": PARTS["prompts"]})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["important notes", "important notes\n", '{"journal": 1}\n', "[]\n", "\n"])
def test_a_file_that_is_not_a_journal_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(UsageError, match="is damaged at line 1: "):
        Journal(path, PARTS)
    assert path.read_text() == content


def test_two_searches_do_not_share_a_journal_at_the_same_time(path):
    with closing(Journal(path, PARTS)), pytest.raises(JournalUnavailable, match="another search is writing"):
        Journal(path, PARTS)
    assert len(content_of(path)[0]) == 3


def test_lines_of_another_journal_are_not_taken_for_its_own(path, tmp_path):
    other = tmp_path / "other.jsonl"
    with closing(Journal(other, {**PARTS, "limits": "none"})) as journal:
        journal.record(frozenset({"7.gate"}), {"holds": True})
    path.write_bytes(path.read_bytes() + other.read_bytes().split(b"\n")[1] + b"\n")
    with pytest.raises(UsageError, match="is damaged at line 6: its check does not match"):
        Journal(path, PARTS)


def test_a_line_that_was_removed_is_missed(path):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:2] + lines[3:]))
    with pytest.raises(UsageError, match="is damaged at line 3: its check does not match"):
        Journal(path, PARTS)


def test_what_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(JournalUnavailable, match=f"cannot write the journal {place}: it is not a regular file"):
            Journal(place, PARTS)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        JournalUnavailable, match=r"cannot write the journal .*file/journal.jsonl: (Not a directory|File exists)"
    ):
        Journal(tmp_path / "file" / "journal.jsonl", PARTS)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users on this system")
def test_a_read_only_folder_is_named(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    tmp_path.chmod(0o755)
    # Root may write everywhere: as root, ask as nobody, for whom the folders above must be open too.
    program = f"""
import os
from pathlib import Path
from dapa_merge.search.journal import Journal, JournalUnavailable
if os.geteuid() == 0:
    os.chdir({str(folder)!r})
    os.setuid(65534)
    path = "journal.jsonl"
else:
    path = {str(folder / "journal.jsonl")!r}
try:
    Journal(Path(path), {{}})
except JournalUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "journal.jsonl: Permission denied" in done.stdout, done.stderr


def test_a_full_disk_is_reported_when_a_test_is_written(path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with closing(Journal(path, PARTS)) as journal:
        assert journal._record is not None
        journal._record.path = Path("/dev/full")
        with pytest.raises(JournalUnavailable, match="No space left on device; earlier tests are kept"):
            journal.record(frozenset({"7.gate"}), {"holds": True})
        assert frozenset({"7.gate"}) not in journal.tests
    assert len(content_of(path)[0]) == 3


def test_a_journal_without_a_file_remembers_as_long_as_it_lives():
    journal = Journal()
    journal.record(frozenset({"1.gate"}), {"holds": True})
    journal.note("prior", {"1.gate": 0.5})
    assert journal.tests[frozenset({"1.gate"})]["holds"]
    assert journal.notes == {"prior": {"1.gate": 0.5}}


def test_each_line_is_json_that_other_programs_read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["parts"] == PARTS
    assert [line["selection"] for line in lines[2:]] == [[f"{layer}.gate", "9.gate"] for layer in range(3)]


def test_the_name_follows_the_parts():
    assert name_of(PARTS) == name_of(dict(reversed(PARTS.items())))
    assert name_of(PARTS) != name_of({**PARTS, "device": "cuda"})


def test_a_journal_that_no_search_writes_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "journal").write_bytes(b'{"journal":' + b" " * 100)
    monkeypatch.setattr("dapa_merge.files.MAX_RECORD_BYTES", 50)
    with pytest.raises(DapaError, match=r"journal: It is larger than"):
        Journal(tmp_path / "journal", {})


def test_only_another_run_is_told_of_as_an_earlier_one(path, caplog, monkeypatch):
    caplog.set_level("INFO", "dapa_merge")
    # As a second edit of one run opens again what a first one measured by it.
    with closing(identity.telling(Journal(path, PARTS))):
        assert caplog.messages == []
    monkeypatch.setattr(journals, "_written_here", set())
    with closing(identity.telling(Journal(path, PARTS))):
        pass
    assert caplog.messages == [
        f"an earlier run recorded 3 tests and other measurements (1) of this search in the journal {path}: it goes on "
        "from there, in less time"
    ]
