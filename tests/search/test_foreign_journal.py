"""A journal that others wrote decides nothing by itself: baselines and the selection are measured again.

Of what this user's own processes wrote only the selection is.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import answer, call

from dapa_merge import miniature
from dapa_merge.files import record_line
from dapa_merge.report.report import read_report
from dapa_merge.search import journal as journals

GATES = [f"{layer}.gate" for layer in range(10)]


@pytest.fixture(scope="module")
def done(tmp_path_factory, few) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("done")
    models = f"base_model: {miniature.path('target')}\nmodels: [{{model: {miniature.path('source')}}}]"
    parameters = {"prompts": str(few), "max_new_tokens": 12, "batch_size": 128}
    recipe = folder / "recipe.yml"
    recipe.write_text(f"merge_method: dapa\n{models}\nparameters: {json.dumps(parameters)}\n")
    found = answer("search", recipe, "--journal", folder / "journal.jsonl", "--json")
    return recipe, folder / "journal.jsonl", found


def forge(journal: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a journal whose lines were changed and whose checks match, as anyone can."""
    check, lines = "", []
    for line in journal.read_bytes().splitlines():
        entry = json.loads(line)
        del entry["check"]
        change(entry)
        text, check = record_line(entry, check)
        lines.append(text)
    out.write_bytes(b"".join(lines))
    return out


def test_what_an_earlier_process_wrote_is_told_from_what_this_one_did(done, monkeypatch):
    _, path, _ = done
    parts = json.loads(path.read_bytes().splitlines()[0])["parts"]
    own = journals.Journal(path, parts)
    own.close()
    monkeypatch.setattr(journals, "_written_here", set())
    others = journals.Journal(path, parts)
    others.close()
    assert own.earlier == own.foreign == set()
    assert others.earlier == {*others.notes, *others.tests, *others.pieces}
    assert others.foreign == set()


def test_what_this_users_other_processes_wrote_is_told_from_what_others_did(done, of_a_stranger):
    _, path, _ = done
    parts = json.loads(path.read_bytes().splitlines()[0])["parts"]
    journal = journals.Journal(path, parts)
    journal.close()
    assert journal.foreign == journal.earlier == {*journal.notes, *journal.tests}
    # What is not whole yet has been checked by nobody.
    assert journal.pieces == {}


@pytest.fixture
def of_a_stranger(monkeypatch) -> None:
    """Whatever was written before, somebody else wrote."""
    monkeypatch.setattr(journals, "own_key", lambda: b"another")


def test_a_true_journal_of_another_process_is_believed_and_counted(done, of_a_stranger):
    recipe, journal, found = done
    again = answer("search", recipe, "--journal", journal, "--json")
    assert (again["units"], again["certificate"]) == (found["units"], found["certificate"])
    # The full selection is not a test: it is a baseline.
    assert again["tests_recorded"] == found["tests"] - 1


def test_what_was_measured_again_is_not_measured_a_third_time(done, of_a_stranger):
    recipe, path, _ = done
    parts = json.loads(path.read_bytes().splitlines()[0])["parts"]
    answer("search", recipe, "--journal", path, "--json")
    journal = journals.Journal(path, parts)
    journal.close()
    assert {"target", "full transplant"} & journal.earlier == set()
    # The tests and the prior are still the other process's.
    assert journal.earlier == journal.foreign == {*journal.tests, "prior"}


def test_a_run_that_goes_on_from_it_says_so(done, tmp_path, monkeypatch):
    recipe, journal, found = done
    fresh = call("run", recipe, tmp_path / "fresh", "--no-lock", "--journal", tmp_path / "own.jsonl")
    monkeypatch.setattr(journals, "_written_here", set())
    resumed = call("run", recipe, tmp_path / "resumed", "--no-lock", "--journal", journal)
    assert (fresh.exit_code, resumed.exit_code) == (0, 0)
    sentence = f"{found['tests'] - 1} tests came from the journal of an earlier run"
    for folder, result, says in (("fresh", fresh, False), ("resumed", resumed, True)):
        assert read_report(tmp_path / folder).resumed is says
        assert (sentence in (tmp_path / folder / "README.md").read_text()) is says
        assert (sentence in result.stdout) is says


@pytest.mark.parametrize(
    ("note", "figure", "value", "said"),
    [
        ("target", "score", 0.5, "the DSR of the target is 0.500, but measured now it is 0.000"),
        (
            "full transplant",
            "score",
            0.02,
            "the DSR of the target with all 10 units copied is 0.020, but measured now it is",
        ),
        ("target", "perplexity", 50.0, "the perplexity of the target is 50.000, but measured now it is 1.0"),
        ("full transplant", "over_refusal", None, "over-refusal of the target with all 10 units copied is nan, but"),
    ],
)
def test_a_forged_baseline_moves_no_limit(done, tmp_path, note, figure, value, said):
    recipe, journal, _ = done

    def change(entry):
        if entry.get("note") == note:
            entry["value"][figure] = float("nan") if value is None else value

    forged = forge(journal, tmp_path / "forged.jsonl", change)
    before = forged.read_bytes()
    result = call("run", recipe, tmp_path / "out", "--no-lock", "--journal", forged)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert f"the journal {forged} is not true of these models on this machine" in last
    assert said in last
    assert not (tmp_path / "out").exists()
    # The source was measured before, and nothing rests on the forged line.
    added = forged.read_bytes().removeprefix(before).splitlines()
    assert forged.read_bytes().startswith(before)
    assert all(b'"note":"source ' in line for line in added)


def change_note(name, change):
    return lambda entry: change(entry) if entry.get("note") == name else None


BROKEN = {
    "no mapping": change_note("target", lambda entry: entry.update(value=5)),
    "no responses": change_note("target", lambda entry: entry["value"].pop("responses")),
    "odd responses": change_note("target", lambda entry: entry["value"].update(responses=[{"a": 1}])),
    "no number": change_note("full transplant", lambda entry: entry["value"].update(score="x")),
    "no pieces": lambda entry: entry.pop("pieces", None),
    "odd pieces": lambda entry: entry.update(pieces=[{"x": 1}]) if "pieces" in entry else None,
    "a count below zero": lambda entry: entry.update(num_prompts=-1) if "pieces" in entry else None,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_journal_of_other_data_is_one_sentence(done, tmp_path, case):
    recipe, journal, _ = done
    result = call("search", recipe, "--journal", forge(journal, tmp_path / "forged.jsonl", BROKEN[case]))
    assert result.exit_code == 2
    assert re.search(
        "has no figures where they should be|has tests that no search makes", result.stderr.splitlines()[-1]
    )


@pytest.mark.parametrize("score", ["x", float("nan"), None])
def test_a_forged_prior_is_computed_anew(done, tmp_path, score):
    recipe, journal, found = done
    change = change_note("prior", lambda entry: entry.update(value=dict.fromkeys(entry["value"], score)))
    again = answer("search", recipe, "--journal", forge(journal, tmp_path / "forged.jsonl", change), "--json")
    assert (again["units"], again["tests"]) == (found["units"], found["tests"])


def test_forged_tests_do_not_decide_what_is_transplanted(done, tmp_path):
    recipe, journal, found = done
    kept = frozenset(found["units"])

    def change(entry):
        if "selection" in entry:
            # Of whatever was found, nothing is needed; and everything else is.
            entry["holds"] = not entry["holds"]
            entry["complaint"] = None if entry["holds"] else "made up"

    forged = forge(journal, tmp_path / "forged.jsonl", change)
    result = call("search", recipe, "--journal", forged, "--json")
    if result.exit_code == 0:
        # All that the forger reached is a selection that holds, which needs no belief.
        assert kept < set(json.loads(result.stdout)["units"])
    else:
        assert result.exit_code == 2
        assert "its tests lead to" in result.stderr.splitlines()[-1]


def test_a_selection_that_a_journal_makes_up_is_measured_before_it_is_written(done, tmp_path):
    recipe, journal, _ = done
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    kept = [one for one in lines if "selection" not in one and "piece" not in one]
    check, lines = "", []
    # Whatever the search asks, it is said to be enough, so that it ends with a single gate.
    made_up = [
        {"selection": list(some), "holds": True, "complaint": None, "pieces": [], "num_prompts": 32, "seconds": 0.1}
        for number in range(1, len(GATES))
        for some in itertools.combinations(GATES, number)
    ]
    for entry in (*kept, *made_up):
        entry.pop("check", None)
        text, check = record_line(entry, check)
        lines.append(text)
    forged = tmp_path / "forged.jsonl"
    forged.write_bytes(b"".join(lines))
    result = call("run", recipe, tmp_path / "out", "--no-lock", "--journal", forged)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert f"the journal {forged} is not true of these models on this machine: its tests lead to gate of layer" in last
    assert "but measured now its DSR is" in last
    assert not (tmp_path / "out").exists()
