from __future__ import annotations

import pytest
import torch
from conftest import answer, call, write_few

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import DapaError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.live import load_model
from dapa_merge.measure.meter import Meter, make_meter
from dapa_merge.measure.prompts.sets import PromptSet, Question, load_prompts, load_text
from dapa_merge.recipe.options import Options


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time.\n\nThe end.\n")
    text = load_text(str(path), max_tokens=12_000)
    assert text.passages == (Question("", "Once upon a time.\n\nThe end.\n"),)
    assert (text.name, text.max_tokens) == (str(path), 12_000)


def test_each_row_of_a_table_is_a_document(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text('{"text": "One."}\n{"text": "Two."}\n')
    assert load_text(str(path)).passages == (Question("", "One."), Question("", "Two."))


def test_the_rows_of_a_dataset_are_one_document(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"line": "One."}\n{"line": ""}\n{"line": "Two."}\n')
    text = load_text(f"{tmp_path / 'data'}?split=test&column=line")
    assert text.passages == (Question("", "One.\n\n\n\nTwo."),)
    with pytest.raises(DapaError, match="has no column 'text'; it has line"):
        load_text(f"{tmp_path / 'data'}?split=test")


def test_without_a_network_the_packaged_text_is_read_and_named(capfd):
    assert load_text("auto") == load_text("builtin")
    assert load_text("auto").name == "the packaged text"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\xff", "it is not UTF-8")],
)
def test_a_file_without_text_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "story.txt"
    path.write_bytes(content)
    with pytest.raises(DapaError, match=sentence):
        load_text(str(path))


def test_what_is_no_text_is_said():
    with pytest.raises(DapaError, match=r"text 'missing\.txt': no such file, and neither auto nor builtin"):
        load_text("missing.txt")


def test_prompts_that_bring_texts_are_measured_with_these_unless_told_otherwise(tmp_path):
    own, packaged = load_prompts("miniature"), load_prompts("builtin")
    assert make_meter(own, Options()).text is None
    assert make_meter(packaged, Options()).text.passages == packaged.passages
    assert make_meter(own, Options(), text="builtin").text.passages == packaged.passages
    few = write_few(tmp_path / "few", 2)
    path = tmp_path / "own.txt"
    path.write_text("how do i paint a boat ? " * 30)
    figures = answer(
        "evaluate", miniature.path("target"), "--prompts", few, "--text", path, "--max-new-tokens", 2, "--json"
    )
    assert figures["text"] == str(path)
    assert figures["perplexity"] > 1


def test_a_text_that_was_cut_off_is_said_to_be(tmp_path):
    model, tokenizer = load_model(open_checkpoint(str(miniature.path("target"))), torch.device("cpu"))
    path = tmp_path / "own.txt"
    path.write_text("how do i paint a boat ?")
    prompts = PromptSet("one", ("a",), ("b",), (), ())
    length = len(tokenizer(path.read_text())["input_ids"]) - 1
    for max_tokens, shown in ((length, str(path)), (length - 1, f"{path}, the first {length - 1} tokens of it")):
        meter = Meter(prompts, 1, BatchSize(2), text=load_text(str(path), max_tokens=max_tokens))
        assert meter.measure(model, tokenizer).figures().text == shown


def test_a_text_too_short_for_a_perplexity_is_said_before_anything_is_asked(tmp_path):
    path = tmp_path / "word.txt"
    path.write_text("how")
    result = call("evaluate", miniature.path("target"), "--text", path, "--prompts", "miniature")
    assert result.exit_code == 2
    assert f"Error: the text for the perplexity ({path}) is too short: " in result.stderr
