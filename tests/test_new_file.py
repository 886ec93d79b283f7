"""Files that commands write beside their answer: whole or not at all, and never at the price of the answer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import call, write_few

from dapa_merge import miniature
from dapa_merge.errors import DapaError, UsageError
from dapa_merge.files import new_file


def test_a_file_appears_when_it_is_complete_with_the_usual_rights(tmp_path):
    path, usual = tmp_path / "new.txt", tmp_path / "usual.txt"
    with new_file(path) as write:
        assert not path.exists()
        write("naïve\n")
        assert path.read_text(encoding="utf-8") == "naïve\n"
    usual.touch()
    assert path.stat().st_mode == usual.stat().st_mode
    assert {entry.name for entry in tmp_path.iterdir()} == {"new.txt", "usual.txt"}


def test_work_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "new.txt"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path, sentence in (
        (tmp_path / "there", "there exists already; name another file or remove it"),
        (tmp_path / "link", "link exists already"),
        (tmp_path / "none" / "new.txt", r"none/new\.txt cannot be written: No such file or directory; name another"),
        (tmp_path / "there" / "new.txt", "cannot be written: Not a directory"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (Path("/proc/new.txt"), r"/proc/new\.txt cannot be written: "),
    ):
        with pytest.raises(UsageError, match=sentence), new_file(path):
            raise AssertionError("the work was begun")


@pytest.fixture
def small_disk():
    """No file may grow beyond 16 bytes: the system's own limit stands for a full disk."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Otherwise the system ends the process; Python then hears of an error.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_no_half_a_file(tmp_path, small_disk):
    small_disk()
    with new_file(tmp_path / "new.txt") as write, pytest.raises(DapaError, match=r"new\.txt cannot be written: File"):
        write("x" * 100)
    assert os.listdir(tmp_path) == []


def test_figures_are_printed_although_the_responses_cannot_be_written(tmp_path, small_disk):
    few = write_few(tmp_path / "few", 1)
    path = tmp_path / "responses.jsonl"
    small_disk()
    settings = ("--prompts", few, "--max-new-tokens", 2, "--batch-size", 2, "--json")
    result = call("--quiet", "evaluate", miniature.path("target"), *settings, "--responses", path)
    assert (result.exit_code, result.stderr) == (1, f"Error: {path} cannot be written: File too large\n")
    assert json.loads(result.stdout)["num_harmful"] == 1
    assert not path.exists()
