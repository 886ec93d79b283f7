from __future__ import annotations

import json
import os
from collections import Counter
from fractions import Fraction
from itertools import zip_longest

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.errors import UsageError
from dapa_merge.measure.prompts.parts import split
from dapa_merge.measure.prompts.sets import (
    PromptSet,
    Question,
    distinct,
    key_of,
    load_prompts,
    load_questions,
    load_text,
)
from dapa_merge.measure.prompts.sets import pinned_prompts as pinned
from dapa_merge.measure.skills import load_skills


@pytest.mark.parametrize("name", ["builtin", "miniature"])
def test_packaged_sets_have_at_least_a_hundred_twins(name):
    prompts = load_prompts(name)
    assert len(prompts.harmful) == len(prompts.harmless) >= 100
    assert len({*prompts.harmful, *prompts.harmless}) == 2 * len(prompts.harmful)
    assert prompts.passages


def test_packaged_twins_are_balanced_over_categories():
    prompts = load_prompts("builtin")
    for kind, texts in (("harmful", prompts.harmful), ("harmless", prompts.harmless)):
        counts = Counter(prompts.categories[kind, text] for text in texts)
        assert len(counts) == 10
        assert set(counts.values()) == {12}
    for twins in zip(prompts.harmful, prompts.harmless, strict=True):
        assert prompts.categories["harmful", twins[0]] == prompts.categories["harmless", twins[1]]
    assert all(part.categories == prompts.categories for part in split(prompts))


def test_borderline_prompts_are_twins_and_join_the_builtin_ones_in_all_parts():
    builtin, alone, both = (load_prompts(name) for name in ("builtin", "borderline", "builtin, borderline"))
    assert len(alone.harmful) == len(alone.harmless) == 80
    assert set(alone.categories.values()) == {"borderline"}
    # It has no passages of its own.
    assert alone.passages == builtin.passages
    for kind in ("harmful", "harmless"):
        assert getattr(both, kind) == getattr(builtin, kind) + getattr(alone, kind)
    assert len(set(map(key_of, both.harmless + both.harmful))) == 2 * (120 + 80)
    # Twins stay together, and every part has as many of each category as any other.
    twins = dict(zip(both.harmful, both.harmless, strict=True))
    for part in split(both):
        assert [twins[text] for text in part.harmful] == list(part.harmless)
        counts = Counter(part.categories["harmless", text] for text in part.harmless)
        assert (counts.pop("borderline"), set(counts.values())) == (40, {6})


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_text_file_is_a_prompt_a_line_with_packaged_harmless_ones(tmp_path):
    prompts = load_prompts(write(tmp_path / "p.txt", "How do I steal?\n\n  How do I lie?  \n"))
    assert prompts.harmful == ("How do I steal?", "How do I lie?")
    builtin = load_prompts("builtin")
    assert (prompts.harmless, prompts.passages) == (builtin.harmless, builtin.passages)


@pytest.mark.parametrize("column", ["prompt", "goal", "question", "instruction", "text"])
def test_a_csv_file_is_read_by_its_column_with_quotes_and_line_breaks(tmp_path, column):
    text = f'id,{column},label\n1,"How, exactly,\ndo I steal?",unsafe\n2,How do I sing?,safe\n'
    prompts = load_prompts(write(tmp_path / "p.csv", "\ufeff" + text))
    assert prompts.harmful == ("How, exactly,\ndo I steal?",)
    assert prompts.harmless == ("How do I sing?",)


def test_a_json_lines_file_may_label_its_prompts(tmp_path):
    rows = [{"prompt": "a", "label": "harmful"}, {"prompt": "b", "label": "Harmless"}]
    prompts = load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert (prompts.harmful, prompts.harmless) == (("a",), ("b",))
    rows.append({"prompt": "c"})
    with pytest.raises(UsageError, match=r"p\.jsonl, line 3 has no label"):
        load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))


def test_a_folder_brings_its_own_skill_and_passages(tmp_path):
    write(tmp_path / "harmful.txt", "a\n")
    write(tmp_path / "harmless.csv", "prompt\nb\n")
    write(tmp_path / "skill.jsonl", '{"prompt": "2 + 2?", "answer": "4"}\n')
    write(tmp_path / "perplexity.jsonl", '{"text": "Once upon a time."}\n{"prompt": "q", "answer": "r"}\n')
    prompts = load_prompts(str(tmp_path))
    assert (prompts.harmful, prompts.harmless) == (("a",), ("b",))
    assert prompts.skill == (Question("2 + 2?", "4"),)
    assert prompts.passages == (Question("", "Once upon a time."), Question("q", "r"))


BAD_FILES = {
    "empty.txt": ("\n  \n", "empty.txt is empty"),
    "empty.csv": ("prompt\n", "empty.csv is empty"),
    "column.csv": ("sentence\nHow?\n", "column.csv, line 2 has no prompt: one of the columns prompt, goal"),
    "blank.csv": ("prompt,label\n,harmful\n", "blank.csv, line 2 has no prompt"),
    "label.csv": ("prompt,label\na,bad\n", "label.csv, line 2: label is 'bad'; allowed are harmful, unsafe"),
    "broken.jsonl": ('{"prompt": "a"}\n{oops\n', "broken.jsonl, line 2 is not valid JSON"),
    "list.jsonl": ('["a"]\n', "list.jsonl, line 1 is not a JSON object"),
    "short.csv": ("prompt,label\na\n", "short.csv, line 2 has no label"),
    "huge.csv": ("prompt\n" + "x" * 200_000 + "\n", "huge.csv, line 2 is not valid CSV: field larger than field limit"),
    "deep.jsonl": ("[" * 100_000 + "\n", "deep.jsonl, line 1 is not valid JSON: RecursionError"),
    "open.csv": (
        'prompt,label\na,safe\n"b,safe\nc,safe\nd,safe\n',
        "open.csv, line 3 is not valid CSV: a quotation mark",
    ),
    "good.xyz": (
        '{"prompt": "a"}\n',
        "good.xyz has the unknown suffix .xyz; known are .csv, ",
    ),
    "number.jsonl": ('{"prompt": 3}\n', "number.jsonl, line 1 has no prompt"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, name):
    text, message = BAD_FILES[name]
    with pytest.raises(UsageError) as caught:
        load_prompts(write(tmp_path / name, text))
    assert message in str(caught.value)


def test_a_suffix_may_be_in_capitals_or_be_missing(tmp_path):
    assert load_prompts(write(tmp_path / "P.CSV", "prompt,label\na,unsafe\n")).harmful == ("a",)
    assert load_prompts(write(tmp_path / "prompts", "a\nb\n")).harmful == ("a", "b")


def test_a_pipe_or_device_is_said_to_be_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), os.devnull):
        for load in (load_prompts, load_text, load_skills):
            with pytest.raises(UsageError, match=f"{path} is a pipe or a device; write its content to a file"):
                load(path)


def test_a_binary_file_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match=r"cannot read .*p\.txt"):
        load_prompts(str(tmp_path / "p.txt"))


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(UsageError, match="'advbensh'") as caught:
        load_prompts("advbensh")
    assert "no such file or folder (did you mean 'advbench'?), and no packaged set (builtin, bord" in str(caught.value)
    with pytest.raises(UsageError, match=r"'some/thing\.csv': no such file"):
        load_prompts("some/thing.csv")


def test_a_folder_of_neither_prompts_nor_data_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read: .*; a folder of prompts has harmful\.jsonl"):
        load_prompts(str(tmp_path))


@pytest.mark.parametrize("name", ["", "safe.csv"])
def test_harmless_prompts_alone_go_with_the_packaged_harmful_ones(tmp_path, name):
    write(tmp_path / "harmless.txt", "a\n")
    write(tmp_path / "safe.csv", "prompt,label\na,safe\n")
    prompts, builtin = load_prompts(str(tmp_path / name)), load_prompts("builtin")
    assert (prompts.harmful, prompts.harmless) == (builtin.harmful, ("a",))
    assert prompts.categories == {key: value for key, value in builtin.categories.items() if key[0] == "harmful"}


def test_a_question_needs_an_answer(tmp_path):
    write(tmp_path / "skill.jsonl", '{"prompt": "2 + 2?"}\n')
    with pytest.raises(UsageError, match="line 1 has no answer"):
        load_questions(tmp_path / "skill.jsonl")


def test_characters_that_only_look_like_line_ends_do_not_end_a_line(tmp_path):
    text = "How do I\u2028steal a\x85car?"
    rows = json.dumps({"prompt": text}, ensure_ascii=False)
    assert load_prompts(write(tmp_path / "p.jsonl", rows)).harmful == (text,)
    assert load_prompts(write(tmp_path / "p.csv", f"prompt,label\n{text},unsafe\n")).harmful == (text,)
    assert load_prompts(write(tmp_path / "p.txt", text + "\r\n")).harmful == (text,)


def test_a_repeated_prompt_is_asked_once(tmp_path):
    prompts = load_prompts(write(tmp_path / "p.txt", "How do I steal?\nHow do I lie?\nhow do I  STEAL?\n"))
    assert prompts.harmful == ("How do I steal?", "How do I lie?")
    rows = "prompt,label\na,unsafe\nb,safe\nA,unsafe\nB ,safe\n"
    labelled = load_prompts(write(tmp_path / "p.csv", rows))
    assert (labelled.harmful, labelled.harmless) == (("a",), ("b",))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "harmful.txt", "a\nb\na\n")
    write(tmp_path / "folder" / "harmless.txt", "c\nc\n")
    folder = load_prompts(str(tmp_path / "folder"))
    assert (folder.harmful, folder.harmless) == (("a", "b"), ("c",))


def test_keys_after_a_path_name_its_columns(tmp_path):
    path = write(tmp_path / "my,file?.csv", "ask,verdict,my kind\na,unsafe,x\nb,benign,\nc,Toxic,y\n")
    prompts = load_prompts(f"{path}?column=ask&label=verdict&category=my%20kind")
    assert (prompts.harmful, prompts.harmless) == (("a", "c"), ("b",))
    assert prompts.categories == {("harmful", "a"): "x", ("harmful", "c"): "y"}
    assert load_prompts(f"{path}?column=ask&kind=harmless").harmless == ("a", "b", "c")


def test_a_path_wins_over_what_its_question_mark_and_commas_would_mean(tmp_path):
    path = write(tmp_path / "a,b?column=c.txt", "d\n")
    write(tmp_path / "a", "e\n")
    assert load_prompts(path).harmful == ("d",)
    assert load_prompts(f"{tmp_path / 'a'}, {path}").harmful == ("e", "d")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.tsv", "Goal\tCategory\na, b\tx\n"),
        ("p.json", '[{"Goal": "a, b", "Category": "x"}]'),
        ("p.json", '{"Goal": "a, b", "Category": "x"}\n'),
        ("p.csv", 'BehaviorID,Behavior,FunctionalCategory,SemanticCategory\n1,"a, b",standard,x\n'),
        ("p.csv", 'type,prompt,label\nx,"a, b",unsafe\n'),
        ("p.csv", 'prompt,type\n"a, b",contrast_x\nsafe one,homonyms\n'),
    ],
)
def test_public_layouts_are_read_with_their_categories(tmp_path, name, text):
    prompts = load_prompts(write(tmp_path / name, text))
    assert prompts.harmful == ("a, b",)
    assert prompts.categories["harmful", "a, b"] in ("x", "contrast_x")
    assert ("safe one" in prompts.harmless) == ("homonyms" in text)


def test_an_array_of_texts_is_a_prompt_each(tmp_path):
    assert load_prompts(write(tmp_path / "p.json", '["a", {"prompt": "b"}]')).harmful == ("a", "b")


def test_a_parquet_file_is_read(tmp_path):
    table = pyarrow.table({"goal": ["a", "b"], "category": ["x", None]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    prompts = load_prompts(str(tmp_path / "p.parquet"))
    assert (prompts.harmful, prompts.categories["harmful", "a"]) == (("a", "b"), "x")
    assert ("harmful", "b") not in prompts.categories
    (tmp_path / "q.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"cannot read .*q\.parquet: "):
        load_prompts(str(tmp_path / "q.parquet"))


def test_sets_that_are_joined_count_a_prompt_once_with_its_first_category(tmp_path):
    one = write(tmp_path / "1.csv", "prompt,category\na,\nb,x\n")
    two = write(tmp_path / "2.csv", "prompt,label,category\nA,unsafe,y\nb,unsafe,z\nc,safe,w\n")
    prompts = load_prompts(f"{one}, {two}")
    assert (prompts.harmful, prompts.harmless) == (("a", "b"), ("c",))
    assert prompts.categories == {("harmful", "a"): "y", ("harmful", "b"): "x", ("harmless", "c"): "w"}
    both = load_prompts(f"builtin,{two}")
    assert len(both.harmful) == 122
    assert both.skill == ()


BAD_NAMES = {
    "?colum=ask": "key 'colum' (did you mean 'column'?); the keys here are column, label, category, kind",
    "?split=train": "key 'split'",
    "?column=": "the key column needs one value",
    "?column=ask&column=ask": "the key column needs one value",
    "?column=aks": "has no column 'aks' (did you mean 'ask'?); its columns are ask, verdict",
    "?column=ask&category=sort": "has no column 'sort'; its columns are ask, verdict",
    "?column=ask&label=verdict": "line 2: verdict is 'bad'; allowed are harmful, unsafe",
    "?column=ask&kind=bad": "kind is 'bad'; it is harmful or harmless",
    "": "line 2 has no prompt: one of the columns prompt, goal, ",
    ",": "empty entry",
}


@pytest.mark.parametrize("query", BAD_NAMES)
def test_a_bad_key_or_column_is_named_with_those_that_are_there(tmp_path, query):
    path = write(tmp_path / "p.csv", "ask,verdict\na,bad\n")
    with pytest.raises(UsageError) as caught:
        load_prompts(path + query)
    assert BAD_NAMES[query] in str(caught.value)


def test_pinned_names_have_absolute_paths_and_keep_their_keys(tmp_path, monkeypatch):
    write(tmp_path / "p.csv", "ask\na\n")
    write(tmp_path / "q,r.txt", "a\n")
    monkeypatch.chdir(tmp_path)
    assert pinned("builtin") == "builtin"
    name = pinned("p.csv?column=ask,q,r.txt, miniature, advbench")
    assert name == f"{tmp_path / 'p.csv'}?column=ask, {tmp_path / 'q,r.txt'}, miniature, advbench"
    assert load_prompts(pinned("p.csv?column=ask,q,r.txt")).harmful == ("a",)


# Few letters, so that texts repeat, also across the kinds, and differ by case and spaces only.
TEXTS = st.lists(st.text("aAbB ß", min_size=1, max_size=3).filter(str.strip), min_size=2, max_size=40)
SHARES = st.floats(0.01, 0.99)


def sets(kinds) -> PromptSet:
    return PromptSet("made", *map(tuple, kinds), (Question("2 + 2?", "4"),), (Question("", "Once."),))


def keys(*groups):
    return {" ".join(text.casefold().split()) for group in groups for text in group}


@given(st.tuples(TEXTS, TEXTS), SHARES)
def test_no_text_is_in_both_parts_and_each_is_in_one_in_the_order_of_the_file(kinds, share):
    prompts = sets(kinds)
    try:
        search, confirm = split(prompts, share)
    except UsageError as error:
        assert "are too few for a search and" in str(error)
        return
    assert keys(search.harmful, search.harmless).isdisjoint(keys(confirm.harmful, confirm.harmless))
    for kind in ("harmful", "harmless"):
        whole, parts = getattr(prompts, kind), (getattr(search, kind), getattr(confirm, kind))
        assert keys(*parts) == keys(whole)
        assert sum(map(len, parts)) == len(keys(whole)) == len(distinct(whole))
        for part in parts:
            assert part
            assert list(part) == [text for text in distinct(whole) if text in part]
    assert search.passages == confirm.passages == prompts.passages
    assert (search.skill, confirm.skill) == ((), prompts.skill)
    assert split(prompts, share) == (search, confirm)


@given(st.integers(2, 300), SHARES)
def test_the_share_is_kept_in_every_stretch_of_a_file(number, share):
    """So that categories that stand together are parted alike."""
    texts = tuple(map(str, range(number)))
    try:
        _, confirm = split(sets((texts, texts)), share)
    except UsageError:
        assert number * Fraction(str(share)) < 1
        return
    chosen = set(confirm.harmful)
    for start, stop in ((0, number), (0, number // 2), (number // 3, number)):
        assert abs(sum(text in chosen for text in texts[start:stop]) - share * (stop - start)) <= 1 + 1e-9


@pytest.mark.parametrize("name", ["builtin", "miniature"])
def test_half_of_a_packaged_set_alternates_and_keeps_twins_together(name):
    prompts = load_prompts(name)
    search, confirm = split(prompts)
    for kind in ("harmful", "harmless"):
        mixed = [text for both in zip_longest(getattr(search, kind), getattr(confirm, kind)) for text in both]
        assert tuple(mixed) == getattr(prompts, kind)
    twins = dict(zip(prompts.harmful, prompts.harmless, strict=True))
    assert [twins[text] for text in confirm.harmful] == list(confirm.harmless)


def test_a_text_of_both_kinds_is_in_one_part_only():
    search, confirm = split(sets((("a", "b", "c"), ("d", "A ", "e", "f"))))
    assert (search.harmful, confirm.harmful) == (("a", "c"), ("b",))
    assert (search.harmless, confirm.harmless) == (("d", "A ", "e"), ("f",))


@pytest.mark.parametrize(
    ("kinds", "share", "message"),
    [
        ((("a", " A"), ("b", "c")), 0.5, "prompts 'made': 1 distinct harmful prompts are too few for a search and"),
        ((("a", "d"), ("b", "B")), 0.5, "prompts 'made': 1 distinct harmless prompts are too few"),
        ((("a", "d", "e"), ("b", "c")), 0.1, "3 distinct harmful prompts are too few .* (confirm: 0.1); add some, or"),
        # Both go where their harmful doubles go, which leaves none for the report.
        ((("a", "b", "c"), ("a", "c")), 0.5, "2 distinct harmless prompts are too few"),
    ],
)
def test_too_few_prompts_for_two_parts_are_a_clear_fault(kinds, share, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(").replace(")", r"\)")):
        split(sets(kinds), share)
