"""Locks and records: what other processes, kills and file systems without locks make of them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import files
from dapa_merge.errors import UsageError
from dapa_merge.files import KEY_BYTES, Record, held, own_key

HOLD = "import sys, time\nfrom pathlib import Path\nfrom dapa_merge.files import held\n"
HOLD += "with held(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


def test_a_lock_refuses_others_ends_with_its_process_and_leaves_no_file(tmp_path):
    lock = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match="somebody is here"), held(lock, "somebody is here"):
        raise AssertionError("two hold it")
    process.kill()
    process.communicate()
    with held(lock, "somebody is here"):
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def key_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files.platformdirs, "user_state_dir", lambda name: str(tmp_path / "state" / name))
    return tmp_path / "state" / "dapa-merge" / "key"


def test_a_users_key_is_made_once_and_is_read_by_nobody_else(key_file):
    made = [own_key.__wrapped__() for _ in range(2)]
    assert made[0] == made[1] == key_file.read_bytes()
    assert len(made[0]) == KEY_BYTES
    assert os.name == "nt" or key_file.stat().st_mode & 0o777 == 0o600
    assert list(key_file.parent.iterdir()) == [key_file]


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
def test_a_key_that_others_can_read_or_that_cannot_be_kept_ends_with_the_process(key_file):
    known = own_key.__wrapped__()
    key_file.chmod(0o644)
    assert own_key.__wrapped__() not in (known, own_key.__wrapped__())
    key_file.unlink()
    key_file.symlink_to("/dev/zero")
    assert len({own_key.__wrapped__() for _ in range(2)}) == 2
    key_file.unlink()
    key_file.write_bytes(b"short")
    key_file.chmod(0o600)
    assert len({own_key.__wrapped__() for _ in range(2)}) == 2
    key_file.unlink()
    key_file.parent.rmdir()
    key_file.parent.write_bytes(b"")
    assert len({own_key.__wrapped__() for _ in range(2)}) == 2


def test_processes_that_begin_at_once_have_the_same_key(key_file):
    found = []
    threads = [threading.Thread(target=lambda: found.append(own_key.__wrapped__())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {key_file.read_bytes()}


def test_a_lock_waits_where_no_refusal_is_given(tmp_path):
    order = []

    def second():
        with held(tmp_path / "lock"):
            order.append("second")

    with held(tmp_path / "lock"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("fault", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_counts_as_held(tmp_path, monkeypatch, fault):
    def refuse(*_):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr("fcntl.flock", refuse)
    with held(tmp_path / "lock", "somebody is here"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError), held(tmp_path / "none" / "lock"):
        raise AssertionError("it is held")
    assert list(tmp_path.iterdir()) == []


@given(cut=st.integers(0, 400), noise=st.binary(max_size=20))
def test_a_record_that_is_cut_or_scribbled_on_gives_its_first_lines_and_goes_on(tmp_path_factory, cut, noise):
    path = tmp_path_factory.mktemp("record") / "record"
    entries = [{"number": number, "text": "ä\u2028\n"} for number in range(5)]
    record = Record(path)
    for entry in entries:
        record.append(entry)
    path.write_bytes(path.read_bytes()[:cut] + noise)
    again = Record(path)
    found = again.read()
    assert found == entries[: len(found)]
    again.append({"number": 7})
    assert Record(path).read() == [*found, {"number": 7}]


def test_two_processes_append_in_turn_if_they_read_first(tmp_path):
    one, other = Record(tmp_path / "record"), Record(tmp_path / "record")
    one.append({"by": 1})
    assert other.read() == [{"by": 1}]
    other.append({"by": 2})
    assert one.read() == [{"by": 2}]
    one.append({"by": 3})
    assert [entry["by"] for entry in Record(tmp_path / "record").read()] == [1, 2, 3]


def test_a_record_that_was_removed_is_not_begun_again_in_the_middle(tmp_path):
    record = Record(tmp_path / "record")
    record.append({"by": 1})
    record.path.unlink()
    with pytest.raises(FileNotFoundError):
        record.append({"by": 2})
    assert list(tmp_path.iterdir()) == []
