"""Ctrl-C and SIGTERM at any moment of a run: what is kept is said, and the same command goes on and ends alike."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
import warm
from conftest import without_time, write_few

from dapa_merge import miniature
from dapa_merge.errors import Stopped
from dapa_merge.search import journal as journals
from dapa_merge.search.journal import Journal

pytestmark = [
    pytest.mark.usefixtures("warm_processes"),
    pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once"),
]
# A shell that runs tests in the background has them ignore Ctrl-C.
CODE = (
    "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from dapa_merge.cli import main\nmain(sys.argv[1:])"
)


def started(*arguments) -> warm.Process:
    return warm.Process([sys.executable, "-c", CODE, *map(str, arguments)], env=dict(os.environ))


def notes_in(journal) -> int:
    return len(journal.read_text().splitlines()) - 1 if journal.exists() else -1


@pytest.mark.parametrize("edit", ["copy", "directions"])
def test_a_run_that_is_stopped_says_what_is_kept_and_the_same_command_ends_alike(edit, write_recipe, tmp_path):
    pair = ("", "") if edit == "copy" else ("shadow-", "shadow-")
    models = [miniature.path(f"{prefix}{role}") for prefix, role in zip(pair, ("target", "source"), strict=True)]
    settings = {"prompts": "miniature", "edit": edit, "max_tests": 4, "max_new_tokens": 12, "batch_size": 64}
    settings |= {"keep": "skills"} if edit == "directions" else {"prompts": write_few(tmp_path / "few", 32)}
    recipe, journal = write_recipe(*models, layers="auto", **settings), tmp_path / "journal.jsonl"
    command = ["run", recipe, tmp_path / "out", "--journal", journal, "--no-lock", "--json"]
    for stop, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = max(notes_in(journal), 0)
        run = started(*command)
        while notes_in(journal) < before + 2 and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(stop)
        assert run.wait() == code, run.stderr
        last = run.stderr.splitlines()[-1]
        assert last.startswith(f"Stopped by {'Ctrl-C' if stop == signal.SIGINT else 'SIGTERM'}; ")
        assert f"other measurements are in the journal {journal}, and the same command goes on from there" in last
        assert not (tmp_path / "out").exists()
    # In the report, after the search.
    run = started(*command)
    while '"target sha256' not in journal.read_text() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130, run.stderr
    resumed = started(*command)
    assert resumed.wait() == 0, resumed.stderr
    # The source was measured before the search, the target and perhaps the result after it.
    for role in ("source", "target"):
        assert f"the {role} was measured on these held-out prompts before: DSR" in resumed.stderr
    assert "loading the source" not in resumed.stderr
    assert "measured the target on" not in resumed.stderr
    assert f" of this search in the journal {journal}: it goes on from there" in resumed.stderr
    whole = started("run", recipe, tmp_path / "whole", "--journal", tmp_path / "other.jsonl", "--no-lock", "--json")
    assert whole.wait() == 0, whole.stderr
    found, wanted = (without_time(json.loads(run.stdout)) for run in (resumed, whole))
    for key in ("units", "before", "after", "source_alone"):
        assert found[key] == wanted[key]


def test_a_stop_before_anything_was_measured_or_without_a_journal_says_so(tmp_path, monkeypatch):
    for written, journal, words in (
        ((), Journal(), "nothing is kept, because there is no journal"),
        ((), Journal(tmp_path / "journal.jsonl"), "nothing was measured yet, and the same command starts again"),
        # As after the trial of an edit, before that of another.
        (("seal",), Journal(tmp_path / "other.jsonl"), "what was measured before is in other journals, and the same"),
    ):
        monkeypatch.setattr(journals, "_written_here", {*written})
        with pytest.raises(Stopped, match=words), journal.telling():
            raise KeyboardInterrupt
        with pytest.raises(Stopped, match=f"the best so far; {words}"), journal.telling():
            raise Stopped("the best so far")
        journal.close()
