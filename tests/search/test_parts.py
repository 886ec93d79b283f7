"""Parts of a transplant, where all of it violates a limit: which are tried, taken, picked and shown."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import answer, call
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.delta.fill import fill
from dapa_merge.report.report import read_report
from dapa_merge.search import journal as journals

# The perplexity of the packaged target is 1.054 with these gates, and the limit is what it is without them.
SETTINGS = {"prompts": "miniature", "max_new_tokens": 12, "batch_size": 128, "max_perplexity": 1.0}


@given(st.integers(1, 9), st.randoms(use_true_random=False), st.data())
def test_what_fills_a_limit_fits_and_nothing_can_be_added(number, random, data):
    order = list(range(number))
    random.shuffle(order)
    # Whatever holds one of these sets does not fit: every family of sets closed under parts is of this kind.
    too_much = data.draw(st.lists(st.frozensets(st.integers(0, number - 1), min_size=1), max_size=6))
    asked: list[frozenset[int]] = []

    def fits(units: frozenset[int]) -> bool:
        asked.append(units)
        return not any(group <= units for group in too_much)

    found = fill(order, fits)
    assert len(asked) == len(set(asked))
    assert [unit for unit in order if unit in found] == list(found)
    # By brute force.
    assert not any(group <= set(found) for group in too_much)
    left = set(order) - set(found)
    assert all(any(group <= {*found, unit} for group in too_much) for unit in left)


@given(st.integers(1, 40), st.integers(0, 40))
def test_one_unit_too_much_costs_few_questions_and_no_more_than_allowed(number, culprit):
    asked = []

    def fits(units: frozenset[int]) -> bool:
        asked.append(units)
        return culprit not in units

    found = fill(range(number), fits)
    assert set(found) == set(range(number)) - {culprit}
    assert len(asked) <= 2 * number.bit_length() + 2
    for most in (1, 3):
        asked.clear()
        assert culprit not in fill(range(number), fits, max_tests=most)
        assert len(asked) <= most


def test_what_is_wanted_most_is_kept():
    weights = {0: 5, 1: 4, 2: 3, 3: 2, 4: 1}
    for most in range(16):
        found = fill(range(5), lambda units, most=most: sum(weights[unit] for unit in units) <= most)
        best = max((n for n in range(6) if sum(weights[unit] for unit in range(n)) <= most), default=0)
        assert found[:best] == tuple(range(best))
        assert all(sum(weights[unit] for unit in (*found, other)) > most for other in set(weights) - set(found))
    assert list(itertools.accumulate(weights.values()))[-1] == 15


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "recipe.yml"
    models = f"base_model: {miniature.path('target')}\nmodels: [{{model: {miniature.path('source')}}}]"
    path.write_text(f"merge_method: dapa\n{models}\nparameters: {json.dumps(SETTINGS)}\n")
    return path


@pytest.fixture(scope="module")
def ran(recipe, tmp_path_factory) -> tuple[Path, str, Path]:
    folder = tmp_path_factory.mktemp("ran")
    result = call("run", recipe, folder / "out", "--no-lock", "--journal", folder / "journal.jsonl")
    assert result.exit_code == 0, result.stderr
    return folder / "out", result.stdout + result.stderr, folder / "journal.jsonl"


def test_a_part_repairs_where_all_units_violate_a_limit(ran):
    out, said, _ = ran
    report = read_report(out)
    limit = report.requirement["max_perplexity"]
    whole, *others = report.points
    assert whole.figures["perplexity"] > limit
    assert whole.units == tuple(f"{layer}.gate" for layer in range(10))
    assert "with all 10 units its perplexity is" in said
    result = others[-1]
    assert set(report.units) == set(result.units)
    assert result.complaint is None
    assert result.figures["perplexity"] <= limit
    # By the figures of the points themselves: none of them within the limit scores higher than the one that was taken.
    taken = report.points[report.picked - 1]
    fitting = [point.figures["score"] for point in report.points if point.figures["perplexity"] <= limit]
    assert taken.figures["score"] == max(fitting)
    assert report.requirement["min_score"] == pytest.approx(0.95 * taken.figures["score"])
    # How much is left within the limit depends on the processor's rounding; 0.39 was seen.
    assert report.after.dsr > report.before.dsr + 0.3
    assert {"score", "over_refusal", "divergence", "perplexity"} <= result.figures.keys()


def test_its_points_are_on_the_card_the_screen_and_the_chart(ran):
    out, said, _ = ran
    report, card = read_report(out), (out / "README.md").read_text()
    assert "All units together violate a limit" in card
    allowed = int(0.05 * report.searched.num_harmless)
    assert f"over-refusal at most 0.050 ({allowed} of {report.searched.num_harmless} harmless prompts)" in card
    for text in (said, card):
        assert "point 1" in text
        assert "gate of layers 0-9; its perplexity is" in text
        assert f"point {report.picked}, which scores highest within the limits" in text
    assert (out / "dapa_front.png").is_file()


def test_any_of_them_can_be_picked(recipe, ran, tmp_path):
    _, _, journal = ran
    found = answer("search", recipe, "--journal", journal, "--pick", 1, "--json")
    assert found["units"] == [f"{layer}.gate" for layer in range(10)]
    assert (found["picked"], found["tests"]) == (1, 0)
    beyond = call("search", recipe, "--journal", journal, "--pick", 20)
    assert beyond.exit_code == 2
    assert "--pick (DAPA_PICK) is 20, but there are the points 1 to" in beyond.stderr


def test_nothing_is_picked_where_all_units_keep_to_the_limits(write_recipe, few, tmp_path):
    path = write_recipe(miniature.path("target"), miniature.path("source"), prompts=few, max_new_tokens=12)
    result = call("search", path, "--pick", 1, "--journal", tmp_path / "journal.jsonl")
    assert result.exit_code == 2
    assert "--pick (DAPA_PICK) is 1, but there is nothing to pick from" in result.stderr


def test_a_resumed_search_measures_no_part_again(recipe, ran, monkeypatch):
    _, _, journal = ran
    before = journal.read_bytes()
    own = answer("search", recipe, "--journal", journal, "--json")
    # As if another process had written it.
    monkeypatch.setattr(journals, "_written_here", set())
    others = answer("search", recipe, "--journal", journal, "--json")
    assert own["units"] == others["units"]
    assert journal.read_bytes() == before
