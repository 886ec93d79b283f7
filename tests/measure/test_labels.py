"""Which prompts are harmful: the labels of public sets, and whatever else a table may hold."""

from __future__ import annotations

import json
import logging
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import answer, call
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.errors import RecipeError, UsageError
from dapa_merge.measure.prompts.labels import PUBLIC_SETS, Columns, read_requests
from dapa_merge.measure.prompts.parts import check_prompts
from dapa_merge.measure.prompts.rows import PromptRow
from dapa_merge.measure.prompts.sets import load_prompts, load_questions, tell_prompts
from dapa_merge.recipe.parse import parse_recipe


def kinds(rows, **columns):
    """The kind of each row, by its prompt."""
    made = [PromptRow(f"row {number}", row) for number, row in enumerate(rows, 1)]
    return {one.prompt: one.kind for one in read_requests(made, "set.jsonl", Columns(**columns)).requests}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def split_of(name):
    found = load_prompts(name)
    return found.harmful, found.harmless


@pytest.mark.parametrize(
    ("header", "bad", "good"),
    [
        ("prompt, label", "harmful", "harmless"),
        ("\ufeffPrompt ,LABEL\xa0", "Unsafe ", " safe"),
        ("prompt,labels", "toxic", "non-toxic"),
        ("prompt,is_harmful", "1", "0"),
        ("prompt,isHarmful", "True", "False"),
        ("prompt,is_safe", "0", "1"),
        ("prompt,toxicity", "1.0", "0.0"),
        ("prompt,harmfulness", "harmful", "not_harmful"),
        ("prompt,safety_label", "unsafe", "safe"),
        ("prompt,prompt_harm_label", "harmful", "unharmful"),
        ("prompt,Harmless", "no", "yes"),
        ("prompt,type", "jailbreak", "benign"),
    ],
)
def test_labels_are_found_by_the_names_and_words_that_people_use(tmp_path, header, bad, good):
    path = write(tmp_path / "p.csv", f"{header}\nbad one,{bad}\ngood one,{good}\n")
    assert split_of(path) == (("bad one",), ("good one",))


# Rows as the sets have them, shortened: the prompts that are harmful begin with "bad".
OF_SETS = {
    "WildGuardMix": [
        {"prompt": "bad", "adversarial": False, "response": None, "prompt_harm_label": "harmful", "subcategory": "x"},
        {"prompt": "good", "response": "a", "prompt_harm_label": "unharmful", "response_harm_label": "harmful"},
        {"prompt": "unclear", "response": "a", "prompt_harm_label": None, "response_harm_label": "harmful"},
    ],
    "WildJailbreak": [
        {"vanilla": "bad", "adversarial": "", "completion": "a", "data_type": "vanilla_harmful"},
        {"vanilla": "x", "adversarial": "good", "completion": "a", "data_type": "adversarial_benign"},
    ],
    "ToxicChat": [
        {"user_input": "bad", "model_output": "a", "toxicity": 1, "jailbreaking": 0, "openai_moderation": "[]"},
        {"user_input": "good", "model_output": "a", "toxicity": 0, "jailbreaking": 1, "openai_moderation": "[]"},
    ],
    "Aegis 2.0": [
        {
            "prompt": "bad",
            "response": "a",
            "prompt_label": "unsafe",
            "response_label": "safe",
            "violated_categories": "",
        },
        {
            "prompt": "good",
            "response": "a",
            "prompt_label": "safe",
            "response_label": "safe",
            "violated_categories": "",
        },
    ],
    "XSTest-Response": [
        {"prompt": "bad", "response": "a", "label": "unharmful", "prompt_type": "prompt_harmful"},
        {"prompt": "good", "response": "a", "label": "harmful", "prompt_type": "prompt_safe"},
    ],
    "XSTest's completions": [
        {"prompt": "bad", "type": "contrast_homonyms", "completion": "a", "final_label": "1_full_compliance"},
        {"prompt": "good", "type": "homonyms", "completion": "a", "final_label": "2_full_refusal"},
    ],
    "SORRY-Bench": [{"question_id": 1, "category": "7", "turns": ["bad"], "prompt_style": "base"}],
    "Do-Not-Answer": [
        {"risk_area": "x", "types_of_harm": "y", "specific_harms": "z", "question": "bad", "GPT4_harmful": 0},
    ],
}
UNLABELLED = {
    "AdvBench": {"goal": "bad", "target": "Sure, here is"},
    "HarmBench": {"Behavior": "bad", "FunctionalCategory": "standard", "SemanticCategory": "illegal", "Tags": ""},
    "StrongREJECT": {"category": "x", "source": "DAN", "forbidden_prompt": "bad"},
    "JailbreakBench": {"Index": 0, "Goal": "bad", "Target": "Sure", "Behavior": "Defamation", "Category": "x"},
    "SimpleSafetyTests": {"id": "SST001", "harm_area": "Self-harm", "category": "Information", "prompt": "bad"},
    "AILuminate": {"release_prompt_id": "1", "prompt_text": "bad", "hazard": "cse", "persona": "typical"},
}


def test_the_prompts_of_public_sets_are_of_their_kind():
    assert set(OF_SETS) == {one.name for one in PUBLIC_SETS if not one.fault}
    for name, rows in {**OF_SETS, **{name: [row] for name, row in UNLABELLED.items()}}.items():
        wanted = {"bad": "harmful", "good": "harmless"}
        assert kinds(rows) == {prompt: wanted[prompt] for prompt in list(wanted)[: min(len(rows), 2)]}, name


def test_rows_without_a_label_are_left_out_of_a_public_set_and_counted():
    rows = [PromptRow("", row) for row in OF_SETS["WildGuardMix"]]
    found = read_requests(rows, "wild.parquet", Columns())
    assert found.left_out == 1
    assert str(found) == (
        "read 1 harmful and 1 harmless prompts from wild.parquet (by its column prompt_harm_label; 1 rows without a "
        "label were left out)"
    )


REFUSED = {
    "a score": ([{"prompt": "a", "harmfulness": 5}, {"prompt": "b", "harmfulness": 1}], "harmfulness is '5'"),
    "a share": ([{"prompt": "a", "toxicity": 0.7}], "toxicity is '0.7'"),
    "bare numbers": ([{"prompt": "a", "label": 1}], "label is '1'"),
    "words": ([{"prompt": "a", "refusal": "full"}], "refusal is 'full'"),
    "some unknown": ([{"prompt": "a", "type": "benign"}, {"prompt": "b", "type": "odd"}], "type is 'odd'"),
    "a flag": ([{"prompt": "a", "is_attack": True}, {"prompt": "b", "is_attack": False}], "is_attack is 'true'"),
    "a gap": ([{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": float("nan")}], "row 2 has no label"),
    "a denial": ([{"prompt": "a", "is_not_safe": 1}, {"prompt": "b", "is_not_safe": 0}], "is_not_safe is '1'"),
    "another denial": ([{"prompt": "a", "unSafe": True}, {"prompt": "b", "unSafe": False}], "unSafe is 'true'"),
    "free of harm": ([{"prompt": "a", "harm-free": "yes"}], "harm-free is 'yes'"),
    "an answer too": ([{"prompt": "a", "answer": "b", "is_safe": "yes"}], "is_safe may label the answer rather than"),
    "whose response": ([{"prompt": "a", "llm_response": "b", "label": "safe"}], "label may label the llm_response"),
    "of an answer": ([{"prompt": "a", "isAnswerHarmful": 1}], "label the response"),
    "BeaverTails": ([{"prompt": "a", "response": "b", "is_safe": True, "category": {}}], "label the response"),
    "PKU-SafeRLHF": ([{"prompt": "a", "response_0": "b", "is_response_0_safe": True}], "label the response"),
    "responses only": ([{"prompt": "a", "response_harm_label": "harmful"}], "label the response"),
    "a response too": ([{"prompt": "a", "completion": "b", "label": "safe"}], "label may label the completion"),
    "moderation": ([{"prompt": "a", "S": 0, "H": 1, "V": 0, "HR": 0, "SH": 0}], "a column for each kind"),
    "contradiction": ([{"prompt": "a", "unsafe": 1, "label": "safe"}], "row 1: unsafe and label look like labels and"),
    "two of a name": ([{"prompt": "a", "Prompt": "b"}], "two columns prompt: prompt, Prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_looks_like_a_label_and_is_not_understood_is_refused_with_what_to_do(case):
    rows, message = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        kinds(rows)
    assert message in str(caught.value)
    assert "?kind=" in str(caught.value) or case in ("a gap", "two of a name")
    assert set(kinds([{**row, "prompt": str(n)} for n, row in enumerate(rows)], kind="harmless", column="prompt")) == {
        str(number) for number in range(len(rows))
    }


def test_the_advice_works():
    rows = [{"prompt": "a", "label": 1}, {"prompt": "b", "label": 0}]
    assert kinds(rows, label="label", harmful_if="1") == {"a": "harmful", "b": "harmless"}
    assert kinds(rows, label="label", harmful_if="0") == {"a": "harmless", "b": "harmful"}
    assert kinds(rows, label="none") == {"a": "harmful", "b": "harmful"}
    assert kinds([{"prompt": "a", "completion": "b", "label": "safe"}], label="label") == {"a": "harmless"}
    with pytest.raises(UsageError, match="no label is '2'; there are 0, 1"):
        kinds(rows, label="label", harmful_if="2")
    with pytest.raises(UsageError, match="harmful_if=1 needs the labels' column"):
        kinds(rows, harmful_if="1")


NAMES = st.sampled_from(["label", " Label", "is_unsafe", "isHarmful", "prompt_harm_label", "Safety Label", "toxic"])
WORDS = st.sampled_from(
    [("harmful", "harmless"), ("Unsafe", " SAFE "), ("toxic", "Non-Toxic"), ("malicious", "benign")]
)
OTHERS = st.lists(st.sampled_from(["id", "category", "source", "target", "note", "harm_area"]), unique=True)


@given(NAMES, WORDS, OTHERS, st.lists(st.booleans(), min_size=1, max_size=8), st.randoms())
def test_no_order_of_columns_or_spelling_of_a_label_changes_a_kind(name, words, others, harmful, shuffled):
    columns = ["prompt", name, *others]
    shuffled.shuffle(columns)
    rows = []
    for number, is_harmful in enumerate(harmful):
        cells = {"prompt": f"p{number}", name: words[not is_harmful]}
        rows.append({column: cells.get(column, f"x{number}") for column in columns})
    assert list(kinds(rows).values()) == ["harmful" if one else "harmless" for one in harmful]


@pytest.mark.parametrize(("name", "kind"), [("harmless", 1), ("or-bench-80k", 1), ("or-bench-toxic", 0), ("mine", 0)])
def test_a_file_without_labels_may_tell_its_kind_by_its_name(tmp_path, name, kind):
    path = write(tmp_path / f"{name}.csv", "prompt,category\na,x\n")
    assert split_of(path)[kind] == ("a",)


@pytest.mark.parametrize("name", ["not_harmful_prompts.txt", "nonharmful.txt", "benign2.txt", "non-toxic-set.txt"])
def test_a_name_that_denies_harm_is_not_taken_for_harmful(tmp_path, name):
    with pytest.raises(UsageError, match="has no labels, and its name does not say whether all are harmless"):
        load_prompts(write(tmp_path / name, "a\n"))
    assert split_of(write(tmp_path / "unsafe_set.txt", "a\n"))[0] == ("a",)


def test_a_name_that_says_half_is_refused(tmp_path):
    path = write(tmp_path / "advbench_391_harmless.csv", "text\na\n")
    with pytest.raises(UsageError, match=r"391_harmless\.csv has no labels, and its name .*\?kind=harmless"):
        load_prompts(path)
    assert split_of(f"{path}?kind=harmless")[1] == ("a",)


def test_what_was_read_from_where_is_logged_and_in_the_json(tmp_path, caplog):
    path = write(tmp_path / "p.csv", "prompt,label\na,unsafe\nb,safe\nc,safe\n")
    with caplog.at_level(logging.INFO, "dapa_merge"):
        other = write(tmp_path / "q.csv", "goal\nB\n")
        tell_prompts(load_prompts(f"{path}, {other}"))
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == f"read 1 harmful and 2 harmless prompts from {path} (by its column label)"
    assert texts[1] == f"read 1 harmful and 0 harmless prompts from {other} (it has no labels)"
    assert "1 prompts are both harmful and harmless" in texts[2]
    few = write(tmp_path / "few.csv", "prompt\nHow do I burgle a house?\n")
    found = call("evaluate", miniature.path("target"), "--prompts", few, "--max-new-tokens", 2, "--json")
    assert [(one["source"], one["harmful"], one["harmless"]) for one in json.loads(found.stdout)["read"]] == [
        (few, 1, 0), ("the packaged set builtin", 0, 120),
    ]  # fmt: skip
    assert f"read 1 harmful and 0 harmless prompts from {few} (it has no labels)" in found.stderr


TABLES = {
    "semicolons.csv": ("prompt;label\nbad, one;unsafe\ngood;safe\n", (("bad, one",), ("good",))),
    "quoted.csv": ('"prompt", "label"\n"bad, one", "unsafe"\n"good", "safe"\n', (("bad, one",), ("good",))),
    "tail.csv": ("prompt,label,\nbad,unsafe,\ngood,safe,\n", (("bad",), ("good",))),
    "wrapped.json": ('{"v": 1, "data": [{"prompt": "bad", "label": "unsafe"}, {"prompt": "good", "label": "safe"}]}',
        (("bad",), ("good",))),
    "pretty.json": ('[\n {\n  "prompt": "bad",\n  "label": "unsafe"\n },\n {"prompt": "good", "label": "safe"}\n]',
        (("bad",), ("good",))),
    "chat.jsonl": (
        '{"messages": [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "x"}], "label": "unsafe"}\n'
        '{"conversations": [{"from": "human", "value": "good"}], "label": "safe"}\n', (("bad",), ("good",)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_many_forms_are_read_right(tmp_path, name):
    text, wanted = TABLES[name]
    assert split_of(write(tmp_path / name, text)) == wanted


BAD_TABLES = {
    "comma.csv": ("prompt\nHow do I steal, then hide?\n", "comma.csv, line 2 has more fields than the header's 1"),
    "twice.csv": ("prompt,label,label\na,safe,unsafe\n", "two columns 'label'"),
    "bare.csv": ("How do I steal?\nHow do I hide?\n", "bare.csv, line 2 has no prompt: .* the columns are How do I"),
    "blank.jsonl": ('{"prompt": " ", "text": "other"}\n', "blank.jsonl, line 1 has no prompt"),
    "table.txt": ("prompt,label\na,safe\n", "table.txt is not one prompt per line: .* name it .csv"),
    "header.txt": ("prompt\na\n", "header.txt is not one prompt per line: .* name it .csv"),
    "rows.txt": ('{"prompt": "a"}\n', "rows.txt is not one prompt per line: .* name it .jsonl"),
    "two.json": ('{"harmful": ["a"], "harmless": ["b"]}', "two.json is an object with the keys harmful, harmless"),
    "again.jsonl": ('{"prompt": "a", "label": "safe", "label": "unsafe"}\n', "line 1 is not valid JSON: .* repeated"),
    "turns.jsonl": ('{"turns": ["a", " "]}\n', "turns.jsonl, line 1: a message of the user is empty"),
    "nested.jsonl": ('{"prompt": {"text": "a"}}\n', "nested.jsonl, line 1 has no prompt"),
    "escape.jsonl": ('{"prompt": "a"}\n{"prompt": "a\\u001b[31m"}\n', r"escape.jsonl, line 2: .* U\+001B"),
    "null.txt": ("a\nb\x00c\n", r"null.txt, line 2: .* U\+0000"),
    "half.jsonl": ('{"prompt": "a\\ud800"}\n', r"half.jsonl, line 1: .* U\+D800"),
    "c1.csv": ("prompt\na\x9b31m\n", r"c1.csv, line 2: .* U\+009B"),
    "kind.csv": ("prompt,category\na,b\x07\n", r"kind.csv, line 2: the category .* U\+0007"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_what_could_be_misread_is_one_sentence_with_its_line(tmp_path, name):
    text, message = BAD_TABLES[name]
    with pytest.raises(UsageError, match=message):
        load_prompts(write(tmp_path / name, text))


def test_utf_16_is_not_read_as_something_else(tmp_path):
    (tmp_path / "p.csv").write_bytes("prompt\na\n".encode("utf-16"))
    with pytest.raises(UsageError, match=r"p\.csv: it is not UTF-8"):
        load_prompts(str(tmp_path / "p.csv"))
    (tmp_path / "q.txt").write_bytes("steal".encode("utf-16-le"))
    with pytest.raises(UsageError, match=r"q\.txt, line 1: .* U\+0000"):
        load_prompts(str(tmp_path / "q.txt"))


def test_a_question_is_read_whatever_the_case_of_its_columns_and_without_control_characters(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("Prompt, Answer, Match\n2 + 2?, 4, number\n")
    (question,) = load_questions(path)
    assert (question.prompt, question.answer, question.match) == ("2 + 2?", "4", "number")
    path.write_text("prompt,answer\n2?,4\x1b\n")
    with pytest.raises(UsageError, match=r"q\.csv, line 2: the answer has the control character U\+001B"):
        load_questions(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs Linux")
def test_files_of_the_system_are_never_read_wherever_links_lead(tmp_path):
    secret = "/proc/self/environ"
    (tmp_path / "p.txt").symlink_to(secret)
    (tmp_path / "harmful.txt").symlink_to(secret)
    for name in (secret, f"miniature, {secret}", str(tmp_path / "p.txt"), str(tmp_path)):
        with pytest.raises(UsageError, match=r"is a file of the system|is a link to"):
            load_prompts(name)


def test_a_link_to_a_private_file_is_no_way_around_its_name(tmp_path):
    (tmp_path / "id_rsa").write_text("secret\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "harmful.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UsageError, match=r"harmful\.txt is a link to .*id_rsa"):
        load_prompts(str(tmp_path / "set"))


def test_a_dataset_cannot_name_files_outside_its_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret\n")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "own.txt").write_text("a\n")
    files = "- {split: train, path: own.txt}\n  - {split: x, path: %s}"
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  {files}\n---\n"
    for path in (tmp_path / "secret.txt", "../secret.txt"):
        (folder / "README.md").write_text(card % path)
        with pytest.raises(UsageError, match=r"names .*secret\.txt, which is not a file of its own"):
            load_prompts(f"{folder}?split=train")


def test_a_saved_dataset_cannot_name_files_outside_its_folder(tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "set"
    datasets.Dataset.from_dict({"prompt": ["secret"]}).save_to_disk(str(secret))
    (data,) = secret.glob("*.arrow")
    state = json.loads((secret / "state.json").read_text())
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "link.arrow").symlink_to(data)
    for file in (data, f"../secret/{data.name}", "link.arrow"):
        (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": str(file)}]}))
        with pytest.raises(UsageError, match=r"names .*\.arrow, which is not a file of its own"):
            load_prompts(str(folder))
    (folder / "state.json").unlink()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../secret"]}))
    with pytest.raises(UsageError, match=r"names .*\.arrow, which is not a file of its own"):
        load_prompts(str(folder))
    assert load_prompts(str(secret)).harmful == ("secret",)


def recipe(**parameters):
    content = {
        "merge_method": "dapa",
        "base_model": str(miniature.path("target")),
        "models": [{"model": str(miniature.path("source"))}],
        "parameters": parameters,
    }
    return parse_recipe(json.dumps(content))


def test_a_word_for_attacks_means_no_file_of_that_name_and_a_path_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("none", "prefill", "id_rsa"):
        write(tmp_path / name, "secret\n")
    for word in ("none", "prefill"):
        check_prompts(recipe(prompts="miniature", attacks=word))
    with pytest.raises(RecipeError, match=r"attacks names \./id_rsa; a recipe may only name files that end"):
        check_prompts(recipe(prompts="miniature", attacks="./id_rsa"))


@pytest.mark.parametrize("key", ["prompts", "keep", "text", "skills"])
def test_a_recipe_names_only_files_whose_name_says_that_they_hold_prompts(tmp_path, key):
    private = write(tmp_path / "id_rsa", "secret\n")
    with pytest.raises(RecipeError, match=rf"parameters\.{key} names .*id_rsa; a recipe may only name files that end"):
        check_prompts(recipe(**{"prompts": "miniature", key: private}))
    # Whoever names it on the command line means it.
    assert split_of(private)[0] == ("secret",)


def test_a_parquet_file_with_nested_columns_is_read_by_its_prompt(tmp_path):
    rows = [{"prompt": "a", "is_safe": False, "meta": {"x": [1]}}, {"prompt": "b", "is_safe": True, "meta": {"x": []}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert split_of(str(tmp_path / "p.parquet")) == (("a",), ("b",))


def test_a_parquet_file_that_cannot_be_held_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, *map(pyarrow.py_buffer, (b"\0" * 4 + b"\1\0\0\0", b"\xff"))]
    )
    odd = {"UnicodeDecodeError": text, "OverflowError": pyarrow.array([10**15], pyarrow.timestamp("ms"))}
    for name, column in odd.items():
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "other": column}), path)
        with pytest.raises(UsageError, match=rf"cannot read .*p\.parquet: {name}"):
            load_prompts(str(path))
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["safe"], ["unsafe"]], ["prompt", "label", "label"]), path)
    with pytest.raises(UsageError, match="has two columns 'label'"):
        load_prompts(str(path))
    monkeypatch.setattr("dapa_merge.measure.prompts.rows.MAX_UNPACKED_BYTES", 1 << 20)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a" * 1000] * 2000}), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(UsageError, match="unpacks to more than 1 MiB"):
        load_prompts(str(path))


def test_a_plan_says_what_is_asked(tmp_path, write_recipe):
    path = write(tmp_path / "p.csv", "prompt,is_harmful\n" + "".join(f"p{n},{n % 2}\n" for n in range(12)))
    result = call("plan", write_recipe(*map(miniature.path, ("target", "source")), prompts=path))
    assert result.exit_code == 0, result.stderr
    assert f"read 6 harmful and 6 harmless prompts from {path} (by its column is_harmful)" in result.stderr
    assert answer("plan", write_recipe(*map(miniature.path, ("target", "source")), prompts=path), "--json")
