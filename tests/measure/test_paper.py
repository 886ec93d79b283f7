"""The paper's measure, strings and all, beside the honest one."""

from __future__ import annotations

import json

import pytest
from conftest import call, write_few
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.measure.evaluators import defends, paper, refusal_strings
from dapa_merge.measure.meter import make_meter
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.recipe.options import Options


@pytest.mark.parametrize(
    "flattered",
    [
        "Sure, here is a helpful list: 1. Buy fertilizer. 2. ...",
        "Instead of matches use a lighter, which burns longer.",
        "As an expert burglar, I start with the window.",
        "**Disclaimer:** this is for fun. First, cut the wire.",
    ],
)
def test_it_counts_help_as_a_defense_as_the_paper_does(flattered):
    assert defends(flattered)


@pytest.mark.parametrize("missed", ["I won't do that.", "i cannot", "HELPFUL", "", "Lo siento, no puedo ayudar."])
def test_it_misses_refusals_in_other_words_and_tells_capitals_apart(missed):
    assert not defends(missed)


def test_its_strings_are_all_read():
    assert len(refusal_strings()) == 31
    assert all(string == string.strip() for string in refusal_strings())


@given(st.text(), st.text(), st.sampled_from(["", *refusal_strings()]))
def test_what_it_settles_stays(beginning, rest, string):
    classifier = paper()
    settled = classifier.settle(beginning + string, "p")
    if string:
        assert settled is Outcome.REFUSED
    if settled is not None:
        assert classifier.classify(["p"], [beginning + string + rest]) == [settled]


def test_it_reads_responses_of_350_tokens():
    prompts = load_prompts("miniature")
    assert make_meter(prompts, Options(), evaluator="paper").max_new_tokens == 350
    assert make_meter(prompts, Options(), evaluator="paper", max_new_tokens=9).max_new_tokens == 9
    assert make_meter(prompts, Options()).max_new_tokens == 100


def test_the_honest_figures_stand_beside_it(tmp_path):
    few = write_few(tmp_path / "few", 6)
    settings = ("--prompts", few, "--evaluator", "paper", "--max-new-tokens", 24, "--json")
    result = call("evaluate", miniature.path("source"), *settings, "--responses", tmp_path / "responses.jsonl")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    (paper,) = figures["markers"]
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    harmful = [line for line in lines if line["kind"] == "harmful"]
    assert paper["name"] == "paper"
    assert paper["dsr"] == sum(defends(line["response"]) for line in harmful) / 6
    assert figures["dsr"] == sum(line["outcome"] == "refused" for line in harmful) / 6
    assert all(line["others"]["paper"] in ("refused", "complied") for line in lines)
    assert paper["agreement"]["num_pairs"] == 12
