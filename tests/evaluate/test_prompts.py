from __future__ import annotations

import json

import pytest

from dapa_merge.errors import UsageError
from dapa_merge.evaluate.prompts import Question, load_prompts, load_questions


@pytest.mark.parametrize("name", ["builtin", "miniature"])
def test_packaged_sets_have_at_least_a_hundred_twins(name):
    prompts = load_prompts(name)
    assert len(prompts.harmful) == len(prompts.harmless) >= 100
    assert len({*prompts.harmful, *prompts.harmless}) == 2 * len(prompts.harmful)
    assert prompts.passages


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
    rows = [{"prompt": "a", "label": "harmful"}, {"prompt": "b", "label": "Harmless"}, {"prompt": "c"}]
    prompts = load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert (prompts.harmful, prompts.harmless) == (("a", "c"), ("b",))


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
    "safe.csv": ("prompt,label\na,safe\n", "safe.csv has no harmful prompts"),
    "broken.jsonl": ('{"prompt": "a"}\n{oops\n', "broken.jsonl, line 2 is no JSON"),
    "list.jsonl": ('["a"]\n', "list.jsonl, line 1 is no JSON object"),
    "short.csv": ("prompt,label\na\n", "short.csv, line 2 has no label"),
    "huge.csv": ("prompt\n" + "x" * 200_000 + "\n", "huge.csv, line 2 is no CSV: field larger than field limit"),
    "deep.jsonl": ("[" * 100_000 + "\n", "deep.jsonl, line 1 is no JSON: RecursionError"),
    "number.jsonl": ('{"prompt": 3}\n', "number.jsonl, line 1 has no prompt"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, name):
    text, message = BAD_FILES[name]
    with pytest.raises(UsageError) as caught:
        load_prompts(write(tmp_path / name, text))
    assert message in str(caught.value)


def test_a_binary_file_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match=r"cannot read .*p\.txt"):
        load_prompts(str(tmp_path / "p.txt"))


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'advbench': no such file or folder, and no packaged set \(builtin, mini"):
        load_prompts("advbench")


def test_a_folder_without_harmful_prompts_is_named(tmp_path):
    write(tmp_path / "harmless.txt", "a\n")
    with pytest.raises(UsageError, match=r"has no harmful\.jsonl"):
        load_prompts(str(tmp_path))


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
