"""The parts of a recipe's prompts: what a choice, a search and a report each ask, and nothing twice."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.errors import UsageError
from dapa_merge.measure.meter import skills_of
from dapa_merge.measure.prompts.parts import all_prompts, check_prompts, split, split_prompts
from dapa_merge.measure.prompts.sets import key_of, load_prompts
from dapa_merge.plan.edit import EDITS, Copy
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import parse_recipe


class Choosy(Copy):
    """A copy that would choose weights."""

    name = "choosy"
    chooses = True


@pytest.fixture(autouse=True, scope="module")
def choosy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EDITS, "choosy", Choosy)
        yield


def make(**parameters):
    content = {
        "merge_method": "dapa",
        "base_model": str(miniature.path("target")),
        "models": [{"model": str(miniature.path("source"))}],
        "parameters": {"prompts": "miniature", **parameters},
    }
    return parse_recipe(json.dumps(content))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(number, **others):
    return [{"prompt": f"Question {index}?", **others} for index in range(number)]


def texts(part):
    return {key_of(text) for text in (*part.harmful, *part.harmless, *part.keep)}


def assert_disjoint(parts):
    sets = [texts(part) for part in (parts.choice, parts.search, parts.report) if part is not None]
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_without_keep_prompts_the_two_parts_are_what_they_were_and_the_harmless_prompts_serve():
    parts = split_prompts(make())
    search, report = split(load_prompts("miniature"))
    for found, was in ((parts.search, search), (parts.report, report)):
        assert (found.harmful, found.harmless, found.skill, found.passages) == (
            was.harmful, was.harmless, was.skill, was.passages,
        )  # fmt: skip
        assert found.keep == found.harmless
        assert found.keep_answers == ()
    assert parts.choice is None


def test_an_edit_that_chooses_gets_every_second_prompt_of_the_search_and_the_report_stays(tmp_path):
    plain, choosing = split_prompts(make()), split_prompts(make(edit="choosy"))
    assert choosing.report == plain.report
    assert choosing.choice.harmful == plain.search.harmful[::2]
    assert choosing.search.harmful == plain.search.harmful[1::2]
    assert choosing.choice.harmless == plain.search.harmless[::2]
    assert_disjoint(choosing)
    # It chooses even if its layers are named.
    assert all_prompts(make(edit="choosy", layers="3-6")) == choosing


@pytest.mark.parametrize("keep", [None, "skills", "file"])
def test_all_rungs_of_a_ladder_have_the_same_report_and_share_the_rest(tmp_path, keep):
    said = {} if keep is None else {"keep": write(tmp_path / "keep.jsonl", asked(11)) if keep == "file" else keep}
    choosing = split_prompts(make(edit="choosy", **said), is_rung=True)
    assert choosing == split_prompts(make(edit="auto", **said)) == split_prompts(make(edit="choosy", **said))
    copying = split_prompts(make(edit="copy", **said), is_rung=True)
    assert copying.report == choosing.report
    assert copying.choice is None
    assert_disjoint(copying)
    both = texts(choosing.choice) | texts(choosing.search)
    assert texts(copying.search) == both


@pytest.mark.parametrize(("edit", "numbers"), [("copy", [6, 5]), ("choosy", [5, 3, 3])])
def test_keep_prompts_go_to_the_parts_in_turn(tmp_path, edit, numbers):
    path = write(tmp_path / "keep.jsonl", [*asked(11), {"prompt": " question  0? "}])
    parts = split_prompts(make(edit=edit, keep=path))
    present = [part for part in (parts.choice, parts.search, parts.report) if part is not None]
    assert [len(part.keep) for part in present] == numbers
    assert {text for part in present for text in part.keep} == {row["prompt"] for row in asked(11)}
    assert_disjoint(parts)


@given(st.lists(st.text("abAB ", min_size=1, max_size=2).filter(str.strip), min_size=12, max_size=40), st.booleans())
def test_no_text_is_in_two_parts_whatever_repeats(tmp_path_factory, prompts, chooses):
    folder = tmp_path_factory.mktemp("prompts")
    rows = [
        {"prompt": text, "label": label} for text, label in zip(prompts, ["harmful", "harmless"] * 20, strict=False)
    ]
    keep = write(folder / "keep.jsonl", [{"prompt": text} for text in (*prompts[3:], *"xyz")])
    recipe = make(prompts=write(folder / "prompts.jsonl", rows), keep=keep, edit="choosy" if chooses else "copy")
    try:
        parts = split_prompts(recipe)
    except UsageError as error:
        assert "too few" in str(error)
        return
    present = [part for part in (parts.choice, parts.search, parts.report) if part is not None]
    owners = [{key_of(text) for text in (*part.harmful, *part.harmless)} for part in present]
    for index, part in enumerate(present):
        kept = {key_of(text) for text in part.keep}
        assert kept
        for other, owned in enumerate(owners):
            if other != index:
                assert kept.isdisjoint(owned)
                assert kept.isdisjoint({key_of(text) for text in present[other].keep})
        # What should be refused is not to be kept.
        assert all(kept.isdisjoint({key_of(text) for text in one.harmful}) for one in present)


@pytest.mark.parametrize(("edit", "number"), [("copy", 2), ("choosy", 3)])
def test_one_keep_prompt_for_each_part_is_enough_and_fewer_are_refused(tmp_path, edit, number):
    enough = write(tmp_path / "enough.jsonl", asked(number))
    split_prompts(make(edit=edit, keep=enough))
    few = write(tmp_path / "few.jsonl", asked(number - 1))
    with pytest.raises(UsageError, match=rf"keep: {number - 1} distinct prompts are too few, because .* need one each"):
        split_prompts(make(edit=edit, keep=few))


@pytest.mark.parametrize("rows", [asked(6, label="nobody knows"), asked(6, answer={"not": "text"}), asked(6, extra=1)])
def test_labels_and_answers_of_a_keep_file_do_not_matter(tmp_path, rows):
    parts = split_prompts(make(keep=write(tmp_path / "keep.jsonl", rows)))
    assert [len(parts.search.keep), len(parts.report.keep)] == [3, 3]
    assert parts.search.keep_answers == ()
    assert skills_of(parts.report, None, Options())[0].questions == load_prompts("miniature").skill
    assert len(skills_of(parts.report, None, Options())) == 1


@pytest.mark.parametrize("form", ["keep.txt", "keep.csv?column=ask"])
def test_any_form_of_a_prompt_file_serves(tmp_path, form):
    name, mark, query = form.partition("?")
    (tmp_path / name).write_text("ask\nHow?\nWhy?\nWhen?\n" if mark else "How?\nWhy?\nWhen?\n")
    whole = all_prompts(make(layers="3", keep=f"{tmp_path / name}{mark}{query}"))
    assert whole.report.keep == ("How?", "Why?", "When?")


def test_of_a_prompt_set_the_skill_is_kept_or_else_the_harmless_prompts(tmp_path):
    own = {question.prompt for question in load_prompts("miniature").skill}
    assert set(all_prompts(make(layers="3", keep="miniature")).report.keep) == own
    (tmp_path / "harmful.txt").write_text("How do I steal?\n")
    (tmp_path / "harmless.txt").write_text("How do I sing?\n")
    assert all_prompts(make(layers="3", keep=str(tmp_path))).report.keep == ("How do I sing?",)


@pytest.mark.parametrize(("edit", "shares"), [("copy", (4,)), ("choosy", (3, 1))])
def test_half_of_the_skill_questions_become_keep_prompts_and_the_report_asks_the_other_half(tmp_path, edit, shares):
    more = asked(40, answer="Yes.")
    recipe = make(edit=edit, keep="skills", min_skill=0.9, skills=write(tmp_path / "more.jsonl", more))
    parts = split_prompts(recipe)
    questions = (*load_prompts("miniature").skill, *({"prompt": row["prompt"]} for row in more))
    number = len(questions)
    used = [part for part in (parts.choice, parts.search) if part is not None]
    assert [len(part.keep) for part in used] == [number * share // 8 for share in shares]
    skills = skills_of(parts.report, recipe.skills, Options())
    assert [skill.name for skill in skills] == ["skill", "more"]
    told = {question.prompt for skill in skills for question in skill.questions}
    assert len(told) == number // 2
    assert told == set(parts.report.keep)
    assert told.isdisjoint(text for part in used for text in part.keep)
    assert {question.prompt for question in parts.search.keep_answers} == set(parts.search.keep)
    whole = all_prompts(make(layers="3", keep="skills")).report
    assert skills_of(whole, None, Options())[0].questions == load_prompts("miniature").skill


def test_answers_of_a_keep_file_make_a_skill_only_if_it_must_be_kept(tmp_path):
    path = write(tmp_path / "mine.jsonl", asked(6, answer="Yes."))
    parts = split_prompts(make(keep=path, min_skill=0.5))
    assert [question.answer for question in parts.search.keep_answers] == ["Yes."] * 3
    assert [skill.name for skill in skills_of(parts.report, None, Options())] == ["skill", "keep"]
    assert [question.prompt for question in skills_of(parts.report, None, Options())[1].questions] == list(
        parts.report.keep
    )


def test_a_skill_whose_questions_all_go_to_the_search_is_named(tmp_path):
    path = write(tmp_path / "mine.jsonl", asked(2, answer="Yes."))
    one = write(tmp_path / "one.jsonl", asked(1, answer="Yes."))
    parts = split_prompts(make(keep=path))
    with pytest.raises(UsageError, match="the skill one has no question left for the report"):
        skills_of(parts.report, one, Options())


@pytest.mark.parametrize("keep", [{}, {"keep": "FILE"}])
def test_a_skill_to_keep_needs_questions_with_answers(tmp_path, keep):
    path = write(tmp_path / "keep.jsonl", asked(6))
    with pytest.raises(UsageError, match="min_skill needs questions with known answers"):
        check_prompts(make(min_skill=0.9, **dict.fromkeys(keep, path)))


def test_skills_to_keep_that_do_not_exist_are_named():
    with pytest.raises(UsageError, match="keep is skills, but neither the prompts 'builtin' nor `skills`"):
        check_prompts(make(prompts="builtin", keep="skills"))


@pytest.mark.parametrize(
    ("parameters", "is_warned"),
    [
        ({}, False),
        ({"max_divergence": 0.1}, True),
        ({"edit": "choosy"}, True),
        ({"edit": "choosy", "keep": "skills"}, False),
    ],
)
def test_what_the_lack_of_keep_prompts_risks_is_said_once_where_it_matters(parameters, is_warned, caplog):
    with caplog.at_level(logging.WARNING, "dapa_merge"):
        check_prompts(make(**parameters))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * is_warned
    assert ("its skill may be lost unnoticed" in caplog.text) == is_warned
