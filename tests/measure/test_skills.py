from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.errors import UsageError
from dapa_merge.measure import confined
from dapa_merge.measure.prompts.sets import Question
from dapa_merge.measure.skills import absolute, is_right, load_skills, skill_figure


@pytest.mark.parametrize(
    ("match", "response", "answer", "right"),
    [
        ("exact", " Banco  NEGRO. \n", "banco negro.", True),
        ("exact", "banco negro", "banco negro.", False),
        ("exact", "caf\u0065\u0301", "caf\u00e9", True),
        ("contains", "It is Paris, of course.", "paris", True),
        ("contains", "Comparison", "paris", False),
        ("contains", "In New   York City", "new york", True),
        ("contains", "C++ is it", "c++", True),
        ("number", "3 + 4 = 7, so 7 apples", "7", True),
        ("number", "7 apples and 8 pears", "7", False),
        ("number", "That makes 1,234.50 dollars.", "1234.5", True),
        ("number", "minus -3", "-3", True),
        ("number", "none", "0", False),
        ("regex", "The answer is (B).", r"\(?B\)?\.?$", True),
        ("regex", "The answer is (C).", r"\(?B\)?\.?$", False),
    ],
)
def test_each_match_compares_in_its_way(match, response, answer, right):
    assert is_right(response, Question("?", answer, match)) is right


@given(st.text(), st.sampled_from(["exact"]))
def test_an_answer_matches_itself_whatever_it_is(answer, match):
    assert is_right(answer, Question("?", answer, match))


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc ,.!\n"))
def test_a_number_is_found_behind_any_words(number, words):
    assert is_right(f"{words} {number:,}", Question("?", str(number), "number"))


def test_skills_are_files_and_tasks_in_the_order_of_the_list(tmp_path):
    pytest.importorskip("lm_eval")
    task = tmp_path / "task.yaml"
    task.write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'sums.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: prompt\ndoc_to_target: answer\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    one, other = tmp_path / "sums.jsonl", tmp_path / "capitals.csv"
    one.write_text('{"prompt": "2 + 2?", "answer": "4", "match": "number"}\n')
    other.write_text("prompt,answer\nCapital of France?,Paris\nCapital of Chad?,N'Djamena\n")
    skills = load_skills(f"{one}, lm-eval:{task}:exact_match,none ,{other}", task_files=[task])
    assert [skill.name for skill in skills] == ["sums", f"lm-eval:{task}:exact_match,none", "capitals"]
    assert skills[0].questions == (Question("2 + 2?", "4", "number"),)
    figure = skill_figure(skills[2], lambda prompts: ["paris"] * len(prompts), lambda _: 0.0)
    assert (figure.score, figure.num_questions) == (0.5, 2)
    assert figure.interval[0] < 0.5 < figure.interval[1]
    assert skill_figure(skills[1], lambda _: [], lambda _: 0.25).score == 0.25


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            '{"prompt": "p", "answer": "4", "match": "fuzzy"}',
            "match is 'fuzzy'; known are exact, contains, num",
        ),
        ('{"prompt": "p", "answer": "(", "match": "regex"}', "question 1: the answer is not a regex"),
        ('{"prompt": "p", "answer": "a{99999999999}", "match": "regex"}', r"not a regex: .* the repetition number is"),
        (
            '{"prompt": "p", "answer": "%s", "match": "regex"}' % ("(?:" * 5000 + ")" * 5000),
            r"not a regex: .* maximum recursion",
        ),
        ('{"prompt": "p", "answer": "four", "match": "number"}', "question 1: the answer is not a number"),
        ('{"prompt": "p"}', "has no answer"),
        ('{"prompt": "p", "answer": "", "match": "contains"}', 'line 1: the answer is ""; .* text'),
        ('{"prompt": "p", "answer": [5]}', r"line 1: the answer is \[5\]; .* text"),
        ("", "is empty"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, line, sentence):
    path = tmp_path / "skill.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=sentence):
        load_skills(str(path))


def test_a_pattern_that_takes_for_ever_to_read_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(confined, "SECONDS", 1)
    path = tmp_path / "skill.jsonl"
    answer = "(?i)" + "[\\x01-\\U0010fffe]" * 10_000
    path.write_text(json.dumps({"prompt": "p", "answer": answer, "match": "regex"}))
    with pytest.raises(UsageError, match=r"question 1: the answer is not a regex: .* does not end within 1 seconds"):
        load_skills(str(path))


def test_an_answer_may_be_a_number_in_the_file(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "2 + 3?", "answer": 5}\n{"prompt": "1 / 2?", "answer": 0.5}\n')
    (skill,) = load_skills(str(path))
    assert [question.answer for question in skill.questions] == ["5", "0.5"]


def test_a_skill_is_measured_once_and_no_two_have_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for path in ("sums.csv", "other/sums.csv", "a, b.csv"):
        Path(path).write_text("prompt,answer\n2 + 3?,5\n")
    names = f"sums.csv, ./sums.csv,a, b.csv ,other/sums.csv,{tmp_path}/sums.csv"
    assert [skill.name for skill in load_skills(names)] == ["sums.csv", "a, b", "other/sums.csv"]
    assert [skill.name for skill in load_skills("sums.csv")] == ["sums"]
    assert [skill.name for skill in load_skills("sums.csv", ["sums"])] == ["sums.csv"]
    assert absolute("sums.csv,sums.csv") == str(tmp_path / "sums.csv")


@pytest.mark.parametrize("names", ["sums.csv,", ",sums.csv", "lm-eval:gsm8k:exact_match,,sums.csv"])
def test_a_list_with_a_comma_too_many_is_said(names):
    with pytest.raises(UsageError, match=f"{names!r} has an empty entry.* comma"):
        load_skills(names)
