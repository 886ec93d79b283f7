"""What a run is said to take, against what it takes."""

from __future__ import annotations

import random
import re
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import answer, call, write_few

from dapa_merge import miniature
from dapa_merge.delta.minimize import minimize
from dapa_merge.measure import expected
from dapa_merge.measure.expected import Expected
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.progress import collected, duration
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.search import forecast as forecasts
from dapa_merge.search.forecast import expected_tests, forecast

PAIR = miniature.path("target"), miniature.path("source")


def forecast_of(text: str, **settings):
    return forecast(make_ladder(parse_recipe(text)), Options("cpu"), **settings)


@pytest.mark.parametrize(("number", "needed"), [(32, 6), (64, 6), (128, 10)])
@pytest.mark.parametrize(
    ("algorithm", "has_prior"), [("guided", True), ("guided", False), ("probdd", False), ("ddmin", False)]
)
def test_as_many_tests_are_expected_as_searches_need(algorithm, has_prior, number, needed):
    found = []
    for seed in range(12):
        chance = random.Random(seed)
        units, wanted = list(range(number)), set(chance.sample(range(number), needed))
        prior = {unit: (unit in wanted) + chance.random() / 2 for unit in units} if has_prior else None
        found.append(minimize(units, lambda one, need=wanted: need <= one, algorithm=algorithm, prior=prior).tests)
    mean = statistics.mean(found)
    assert mean / 2 <= expected_tests(number, algorithm, has_prior=has_prior) <= 2 * mean
    assert expected_tests(number, algorithm, has_prior=has_prior, max_tests=3) == 3


def test_the_prompts_and_tests_of_a_run_are_about_those_that_it_asks(write_recipe, tmp_path, monkeypatch):
    few = write_few(tmp_path / "few", 24)
    recipe = write_recipe(*PAIR, prompts=few, max_new_tokens=12, batch_size=24)
    expected = forecast(make_ladder(load_recipe(recipe)), Options("cpu"))
    asked = [0]

    def count(number: int, _unit: str) -> None:
        asked[0] += number

    monkeypatch.setattr("dapa_merge.measure.generate.advance", count)
    report = answer("run", recipe, tmp_path / "out", "--json")
    assert report["tests"] / 3 <= expected.tests <= 3 * report["tests"]
    total = expected.prompts + sum(work.prompts for work in expected.works)
    assert asked[0] / 2 <= total <= 2 * asked[0]


def test_a_recipe_that_names_its_layers_only_takes_its_report():
    names = (
        "merge_method: dapa\nbase_model: {}\nmodels: [{{model: {}}}]\nparameters: {{prompts: miniature, layers: {}}}\n"
    )
    named, searched = (forecast_of(names.format(*PAIR, layers)) for layers in ("'3-6'", "auto"))
    assert (named.works, named.tests) == ((), 0)
    assert named.prompts > searched.prompts > 0
    assert named.total_seconds > 0
    assert forecast_of(names.format(*PAIR, "auto"), reports=False).prompts == 0


def test_the_forecast_counts_the_questions_of_skills_and_the_requests_of_attacks(write_recipe, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"prompt": "{n} + 0 =", "answer": "{n}"}}\n' for n in range(7)))
    few = write_few(tmp_path / "few", 8)
    plain, more = (
        forecast(make_ladder(load_recipe(write_recipe(*PAIR, prompts=few, **besides))), Options("cpu")).prompts
        for besides in ({}, {"skills": tmp_path / "mine.jsonl", "attacks": "prefill"})
    )
    # Each of three models answers 7 questions, and the 4 held-out harmful prompts once more.
    assert more - plain == 3 * (7 + 4)


UNAVAILABLE = {
    "skills": ("nope.jsonl", "skills 'nope.jsonl': no such file"),
    "text": ("nope.txt", "text 'nope.txt': no such file"),
    "attacks": ("nope.txt", "cannot read nope.txt"),
    "evaluator": ("nope", "unknown evaluator 'nope'"),
}


@pytest.mark.parametrize("key", UNAVAILABLE)
def test_what_a_report_cannot_be_measured_with_is_told_by_plan_too(key, write_recipe):
    value, told = UNAVAILABLE[key]
    planned = call("plan", write_recipe(*PAIR, prompts="miniature", **{key: value}))
    assert planned.exit_code == 2
    assert told in planned.stderr
    assert planned.stdout == ""


def test_plan_takes_the_options_of_an_evaluator(write_recipe, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dapa_merge\n@dapa_merge.evaluator('half')\ndef score(candidate):\n    return 0.5\n"
    )
    recipe = write_recipe(*PAIR, prompts="miniature", evaluator="half")
    planned = call("plan", recipe, "--evaluator-file", tmp_path / "mine.py")
    assert planned.exit_code == 0, planned.stderr


def test_plan_says_what_a_run_takes(write_recipe):
    recipe = write_recipe(*PAIR, prompts="miniature", edit="auto", keep="skills")
    found = answer("plan", recipe, "--json")["forecast"]
    assert [work["edit"] for work in found["works"]] == ["copy", "directions"]
    assert found["works"][0]["steps"] == 0 < found["works"][1]["steps"]
    copied, chosen = found["works"]
    assert 0 < copied["in_vain"] < copied["prompts"]
    # Of an edit that does not repair, only the scores are measured.
    a_prompt = copied["seconds"] / copied["prompts"]
    least = chosen["seconds"] + a_prompt * copied["in_vain"]
    assert least < found["seconds"] < least + a_prompt * 1.1 * found["report_prompts"]
    assert found["fetch_bytes"] == 0
    shown = call("plan", recipe).stdout
    assert "a run takes             about " in shown
    assert re.search(r" on cpu( without 16-bit arithmetic)?, about \d+ tests, ", shown)


def test_a_long_run_says_beforehand_how_long(monkeypatch, write_recipe):
    ladder = make_ladder(load_recipe(write_recipe(*PAIR, prompts="miniature")))
    expected = forecast(ladder, Options("cpu"))
    for seconds, told in ((59.0, 0), (61.0, 1)):
        monkeypatch.setattr(Expected, "total_seconds", seconds)
        with collected() as lines, expected.told():
            pass
        assert len(lines) == told
    assert re.match(r"this takes about 61 s on cpu( without 16-bit arithmetic)?, about \d+ tests, ", lines[0])


@pytest.mark.parametrize(
    ("slow", "options", "is_told"),
    [
        (True, Options("cpu"), True),
        (False, Options("cpu"), False),
        (True, Options("cpu", dtype="bfloat16"), False),
        (True, Options("cpu", quantize="8bit"), False),
    ],
)
def test_a_processor_without_the_arithmetic_of_the_model_is_told_how_long_float32_takes(
    slow, options, is_told, write_recipe, monkeypatch
):
    seconds = {torch.bfloat16: 2.0, torch.float32: 1.0}
    monkeypatch.setattr(expected, "_of_product", lambda _rows, _columns, dtype, *_: seconds[dtype])
    monkeypatch.setattr(forecasts, "is_slow", lambda dtype: slow and dtype == torch.bfloat16)
    ladder = make_ladder(load_recipe(write_recipe(*PAIR, prompts="miniature", max_new_tokens=12)))
    found = forecast(ladder, options)
    assert (found.float32_seconds is not None) == is_told
    assert (" on cpu without 16-bit arithmetic, about " in str(found)) == is_told
    if is_told:
        assert found.float32_seconds == pytest.approx(found.total_seconds / 2, rel=0.01)
        assert str(found).endswith(f"; about {duration(found.float32_seconds)} with --dtype float32")
        assert found.to_json()["float32_seconds"] == round(found.float32_seconds, 1)
    assert forecast(ladder, replace(options, dtype="float32", quantize=None)).float32_seconds is None
